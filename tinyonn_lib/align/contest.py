"""Every way to align, from the same warm model and judged on the same held-out prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from tinyonn_lib.align.methods import LEADER, METHODS, Budget, Rate
from tinyonn_lib.align.trained import DIVERGED, NOTHING, Bench, Trained
from tinyonn_lib.align.verify import lift
from tinyonn_lib.align.verify import rates as rates_of
from tinyonn_lib.errors import BenchError
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COOLER = "cooler"
"""The control without training: the warm model, sampled at half the temperature."""

_NO_RATE: Rate = ("all", 0.0)


@dataclass(frozen=True)
class Contest:
    """What came out.

    Attributes:
        runs: method, part, lr, seed, task, greedy, sampled (shares on the held-out prompts), tokens (generated for
            training), note (`NOTHING`: it is the warm model still; `DIVERGED`: it answers nothing); "warm" first and
            `COOLER` last.
        lifts: per method the lift over the warm model, and that of `LEADER` over every other method: method, against,
            seeds (trainings of each), note, and the columns of `verify.lift`.
        history: method, and the columns of its training: of every method with rewards, at its best rate, first seed.
        model: that of `LEADER`, at its best rate, first seed: the one that was judged.
    """

    runs: pd.DataFrame
    lifts: pd.DataFrame
    history: pd.DataFrame
    model: PreTrainedModel


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
    seed: int = 0,
    folder: Path | None = None,
    every_seconds: float = 10.0,
    progress: Callable[[str, str], Progress] | None = None,
) -> Contest:
    """Train by every method with several seeds, and judge.

    Each method takes the best of its own rates, chosen with the first seed by sampled success on `tune`. A rate with
    which it diverges is never the best; a later seed that diverges counts as no right answer.

    Args:
        warm: the model all begin with; left as it is.
        train: filtered prompts (`filtering.keep`); tune, heldout: other prompts, see `tasks.prompts`.
        rates: method in `METHODS` → pairs of a part and a learning rate to choose from; the order is that of the table.
        budget: None takes the defaults of `Budget`.
        seeds: trainings per method, with seed, seed + 1, …; all are judged with the first one's sampling.
        folder: keeps what is finished, and checkpoints every `every_seconds`: a contest that was killed goes on there
            and ends the same. Delete it when the result is safe.
        progress: (what, unit) → reporter.

    Raises:
        BenchError: no such method, none of `LEADER`, no rate, fewer than one seed, `LEADER` finds nothing to learn, a
            method diverges at each of its rates, or what the trainings raise.
    """
    if unknown := set(rates) - set(METHODS):
        raise BenchError(f"Unknown method '{min(unknown)}': choose from {', '.join(METHODS)}.")
    if LEADER not in rates or not all(rates.values()) or seeds < 1:
        raise BenchError(
            f"A contest needs {LEADER}, whose controls the others are, a learning rate for each method, and "
            f"seeds={seeds} of at least 1."
        )
    bench = Bench(warm, tokenizer, train, tune, heldout, budget or Budget(), seed, folder, every_seconds, progress)
    start, cool = bench.judged(warm, heldout), bench.judged(warm, heldout, cooler=0.5)
    runs, results = [_row("warm", _NO_RATE, seed, start)], {}
    for method, tried in rates.items():
        first = {rate: bench.trained(method, rate, seed, choose=len(tried) > 1) for rate in tried}
        best = max(tried, key=lambda rate: (first[rate].note != DIVERGED, first[rate].tuned))
        if first[best].note == DIVERGED:
            raise _diverged(method, tried)
        if first[best].note == NOTHING and method == LEADER:
            raise BenchError(
                f"{METHODS[LEADER].name} finds nothing to learn, the answers to each prompt are all right or all "
                "wrong: warm up more or less, or raise `group`."
            )
        results[method] = [first[best], *(bench.trained(method, best, seed + more) for more in range(1, seeds))]
        runs += [_row(method, best, seed + n, own.found, own.tokens, own.note) for n, own in enumerate(results[method])]
    runs.append(_row(COOLER, _NO_RATE, seed, cool))
    history = [own.history.assign(method=name) for name, (own, *_) in results.items() if "reward" in own.history]
    return Contest(
        pd.concat(runs, ignore_index=True), _lifts(results, start, cool), pd.concat(history, ignore_index=True),
        results[LEADER][0].model(warm),
    )  # fmt: skip


def _row(method: str, rate: Rate, seed: int, found: pd.DataFrame, tokens: int = 0, note: str = "") -> pd.DataFrame:
    told = rates_of(found).drop(columns="prompts")
    names = {"method": method, "part": rate[0], "lr": rate[1], "seed": seed}
    for place, (name, value) in enumerate(names.items()):
        told.insert(place, name, value)
    return told.assign(tokens=tokens, note=note)


def _lifts(results: Mapping[str, Sequence[Trained]], start: pd.DataFrame, cool: pd.DataFrame) -> pd.DataFrame:
    judged = {name: [each.found for each in own] for name, own in results.items()} | {COOLER: [cool]}
    notes = {name: _noted(each.note for each in own) for name, own in results.items()} | {COOLER: ""}
    pairs = [(name, "warm", [start]) for name in judged]
    pairs += [(LEADER, name, found) for name, found in judged.items() if name != LEADER]
    gaps = [
        lift(judged[name], found).assign(
            method=name, against=other, seeds=len(judged[name]), note=notes[name] or notes.get(other, "")
        )
        for name, other, found in pairs
    ]
    table = pd.concat(gaps, ignore_index=True)
    first = ["method", "against", "seeds", "note"]
    return table[[*first, *table.columns.difference(first, sort=False)]]


def _noted(notes: Iterable[str]) -> str:
    """The notes of a method's trainings as one: "diverged", or "diverged in 1 of 3" if some did."""
    counts = Counter(notes)
    total = counts.total()
    told = [note if count == total else f"{note} in {count} of {total}" for note, count in counts.items() if note]
    return ", ".join(told)


def _diverged(method: str, tried: Sequence[Rate]) -> BenchError:
    rest = [rate for rate in METHODS[method].rates if rate not in tried]
    advice = f"raise `rates` to {len(tried) + 1} to let it choose" if rest else "name it lower ones in align/methods.py"
    rates = ", ".join(f"{lr:g} ({part})" for part, lr in tried)
    return BenchError(f"{METHODS[method].name} diverges at each of its learning rates, {rates}: {advice}.")
