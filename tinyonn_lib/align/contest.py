"""Every way to align, from the same warm model and judged on the same held-out prompts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from tinyonn_lib.align.answers import answers
from tinyonn_lib.align.imitate import imitate
from tinyonn_lib.align.parts import Part
from tinyonn_lib.align.prefer import pairs, prefer
from tinyonn_lib.align.reinforce import Kind, reinforce
from tinyonn_lib.align.verify import lift, success
from tinyonn_lib.align.verify import rates as rates_of
from tinyonn_lib.align.warm import teach
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.resume import fingerprint
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS: dict[str, str] = {
    "gspo": "rewards, importance of the whole answer",
    "grpo": "rewards, importance of each token",
    "rejection": "taught its own right answers, as many answers generated",
    "dpo": "pairs of its own right and wrong answers, as many answers generated",
    "gold": "taught the true solutions, as many steps: knows more than the others are told",
}
COOLER = "cooler"
"""The control without training: the warm model, sampled at half the temperature."""

Rate = tuple[Part, float]
RATES: dict[str, tuple[Rate, ...]] = {
    "gspo": (("gains", 1e-2), ("gains", 2e-2), ("gains", 5e-3)),
    "grpo": (("gains", 1e-2), ("gains", 2e-2), ("gains", 5e-3)),
    "rejection": (("gains", 1e-2), ("all", 1e-3), ("all", 3e-4)),
    "dpo": (("gains", 3e-3), ("gains", 1e-3), ("gains", 1e-2)),
    "gold": (("gains", 1e-2), ("all", 1e-3), ("all", 3e-3)),
}
"""What of the embedded model each method trains, and at which peak rate; what did best there first."""


@dataclass(frozen=True)
class Budget:
    """What every method may spend.

    Attributes:
        steps: rounds of GSPO and GRPO.
        prompts_per_step, group: prompts in each, and answers to each prompt.
        updates: optimiser steps in each.
        temperature: of all sampling; beta: weight of the KL divergence in GSPO and GRPO.
        samples: answers per prompt when judging.
    """

    steps: int = 20
    prompts_per_step: int = 32
    group: int = 8
    updates: int = 4
    temperature: float = 1.0
    beta: float = 0.0
    samples: int = 4


def contest(
    warm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: pd.DataFrame,
    tune: pd.DataFrame,
    heldout: pd.DataFrame,
    rates: Mapping[str, Sequence[Rate]],
    *,
    budget: Budget | None = None,
    seeds: int = 3,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train by every method with several seeds, and judge.

    Each method takes the best of its own rates, chosen with the first seed by sampled success on `tune`.

    Args:
        warm: the model all begin with; left as it is.
        train: filtered prompts (`filtering.keep`); tune, heldout: other prompts, see `tasks.prompts`.
        rates: method in `METHODS` → pairs of a part and a learning rate to choose from; the order is that of the table.
        budget: None takes the defaults of `Budget`.
        seeds: trainings per method.
        folder: keeps what is finished, for going on after a kill; delete it when the result is safe.
        progress: counts the trainings.

    Returns:
        The runs: method, part, lr, seed, task, greedy, sampled (shares on `heldout`), tokens (generated for training),
        "warm" first and `COOLER` last. And per method the lift over the warm model, and GSPO's over every other method:
        method, against, and the columns of `verify.lift`, all seeds together.

    Raises:
        BenchError: no such method, no rate, fewer than one seed, or what the trainings raise.
    """
    plan = budget or Budget()
    if unknown := set(rates) - set(METHODS):
        raise BenchError(f"Unknown method '{min(unknown)}': choose from {', '.join(METHODS)}.")
    if not rates or not all(rates.values()) or seeds < 1:
        raise BenchError(f"A contest needs methods with a learning rate each and seeds={seeds} of at least 1.")
    total = sum(len(tried) + seeds - 1 for tried in rates.values())
    done = 0

    def one(method: str, rate: Rate, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, int]:
        """Success on heldout and on tune, and tokens: trained now, or read back."""
        nonlocal done

        def train_it() -> pd.DataFrame:
            model = copy.deepcopy(warm)
            tokens = _train(model, tokenizer, train, method, rate, seed, plan)
            both = pd.concat([heldout, tune], keys=["heldout", "tune"], names=["split"])
            found = success(model, tokenizer, both.reset_index(drop=True), plan.samples, plan.temperature)
            return found.assign(split=both.index.get_level_values("split").to_numpy(), tokens=tokens)

        whole = [asdict(plan), method, rate, seed, fingerprint({}, list(warm.parameters()), []), train, tune, heldout]
        table = _kept(folder, whole, train_it)
        done += 1
        if progress is not None:
            progress(done, total, f"{method} {rate[0]} {rate[1]:g}")
        parts = [table[table["split"] == name].reset_index(drop=True) for name in ("heldout", "tune")]
        return parts[0], parts[1], int(table["tokens"].iloc[0])

    start = success(warm, tokenizer, heldout, plan.samples, plan.temperature)
    runs = [_row("warm", ("all", 0.0), 0, start, 0)]
    judged: dict[str, list[pd.DataFrame]] = {}
    for method, tried in rates.items():
        first = {rate: one(method, rate, 0) for rate in tried}
        best = max(tried, key=lambda rate: float(first[rate][1]["sampled"].mean()))
        results = [first[best], *(one(method, best, seed) for seed in range(1, seeds))]
        judged[method] = [held for held, _, _ in results]
        runs += [_row(method, best, seed, held, tokens) for seed, (held, _, tokens) in enumerate(results)]
    judged[COOLER] = [success(warm, tokenizer, heldout, plan.samples, plan.temperature / 2)]
    runs.append(_row(COOLER, ("all", 0.0), 0, judged[COOLER][0], 0))
    gaps = [lift(found, start).assign(method=name, against="warm") for name, found in judged.items()]
    gaps += [
        lift(judged["gspo"], found).assign(method="gspo", against=name)
        for name, found in judged.items()
        if name != "gspo" and "gspo" in judged
    ]
    lifts = pd.concat(gaps, ignore_index=True)
    return pd.concat(runs, ignore_index=True), lifts[["method", "against", *lifts.columns[:-2]]]


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    method: str,
    rate: Rate,
    seed: int,
    plan: Budget,
) -> int:
    """Train in place; returns the tokens generated for it."""
    part, lr = rate
    common: dict[str, Any] = {"part": part, "lr": lr, "seed": seed}
    asked = plan.steps * plan.prompts_per_step  # prompts, each with a group of answers
    updates, batch = plan.steps * plan.updates, max(1, plan.prompts_per_step * plan.group // plan.updates)
    if method in ("gspo", "grpo"):
        history = reinforce(
            model, tokenizer, prompts, kind=cast("Kind", method), steps=plan.steps,
            prompts_per_step=plan.prompts_per_step, group=plan.group, updates=plan.updates,
            temperature=plan.temperature, beta=plan.beta, **common,
        )  # fmt: skip
        return int(history["tokens"].iloc[-1])
    if method == "rejection":
        rounds = min(4, plan.steps)
        history = imitate(
            model, tokenizer, prompts, rounds=rounds, prompts_per_round=asked // rounds, group=plan.group,
            steps=max(1, updates // rounds), batch=batch, temperature=plan.temperature, **common,
        )  # fmt: skip
        return int(history["tokens"].iloc[-1])
    if method == "dpo":
        n = max(2, -(-asked * plan.group // len(prompts)))
        few = prompts.head(asked * plan.group // n)  # as many answers as the others: perhaps not all of the prompts
        drawn = answers(model, tokenizer, few, n, plan.temperature, seed)
        prefer(model, tokenizer, pairs(few, drawn), steps=updates, batch=batch, **common)
        return int(drawn["tokens"].sum())
    teach(model, tokenizer, prompts, steps=updates, batch=batch, **common)
    return 0


def _row(method: str, rate: Rate, seed: int, found: pd.DataFrame, tokens: int) -> pd.DataFrame:
    told = rates_of(found).drop(columns="prompts")
    names = {"method": method, "part": rate[0], "lr": rate[1], "seed": seed}
    for place, (name, value) in enumerate(names.items()):
        told.insert(place, name, value)
    return told.assign(tokens=tokens)


def _kept(folder: Path | None, whole: Sequence[Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table made once: read back if all it depends on is the same."""
    if folder is None:
        return make()
    told = [item.to_csv(index=False) if isinstance(item, pd.DataFrame) else repr(item) for item in whole]
    path = folder / f"{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:24]}.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        make().to_parquet(temporary, index=False)
        temporary.replace(path)
    return pd.read_parquet(path)
