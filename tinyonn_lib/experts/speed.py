"""Tokens per second of divided models next to the dense one they came from, in turns, in one process.

A smaller active share saves arithmetic in the FFNs alone. Attention, embedding and head cost what they did; routing,
gathering and many small matrix products come on top. So it is measured, by each implementation of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.running import START, Arm, Task
from tinyonn_lib.progress import Progress

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""What plain transformers holds; its others ("deepgemm", "sonicmoe") fetch kernels from the hub."""

STAGES = ("prefill", "decode")
DENSE = "dense"
FEWEST, MOST = 5, 30
"""Rounds."""

HOPELESS = 10
"""What takes so many times as long as the dense model counts once: more rounds would not change what is said of it."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A model to compare with the dense one.

    Attributes:
        label: its name in the table.
        model: loaded like the dense one: same dtype, device and attention implementation.
        active: experts per token → the share of the FFN parameters that this is. The key 0 runs the model as it is:
            for one without routers, such as a narrower dense model.
    """

    label: str
    model: Any
    active: Mapping[int, float]


@torch.inference_mode()
def throughput(
    dense: Any,
    variants: Sequence[Variant],
    prompts: Tensor,
    *,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    batches: Sequence[int] = (1, 16),
    new_tokens: int = 16,
    seconds: float = 20.0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure prefill and decoding of the dense model and of every variant × k × implementation, round by round.

    Prefill reads whole prompts into a new cache and gives the logits of the last token. Decoding reads `START` tokens,
    untimed, and then takes the likeliest token `new_tokens` times; no token ends it. In each round every model runs
    once, in an order that moves on by one, so that what the machine does meanwhile happens to all of them. A warm-up
    comes first. As many threads as torch is set to.

    Args:
        prompts: Token ids `(at least max(batches), length)`; real text where the routing should be that of real text.
        seconds: about how long to measure; at least a warm-up and `FEWEST` rounds (one of what is `HOPELESS`), however
            long that takes.
        progress: `(done, total, note)`, one for each stage and batch.

    Returns:
        One row per model, implementation, k, stage and batch, whatever the machine can run:

        `model` (label), `implementation` ("" without experts), `active` (share of the FFN parameters; attention,
        embedding and head are not counted), `k` (0 without experts), `stage`, `batch`, `tokens_per_second` (median of
        the rounds), `ratio` (median over rounds of its tokens/s by the dense model's in the same round), `low`, `high`
        (quartiles of these ratios), `rounds` (1 where the ratio is below 1 / `HOPELESS`), `touched` (mean share of a
        layer's experts that one forward of the whole batch uses: their weights must be read), `note` (why there are no
        numbers, then NaN in 0 rounds, or no ratio).

    Raises:
        BenchError: too few or too short prompts, k out of range, or routers that do not follow k.
    """
    if prompts.shape[0] < max(batches) or prompts.shape[1] <= START:
        raise BenchError(
            f"Prompts are {tuple(prompts.shape)}: at least {max(batches)} of more than {START} tokens are needed."
        )
    prompts = prompts.to(next(dense.parameters()).device)
    cells = [(stage, batch) for stage in STAGES for batch in batches]
    arms = [Arm(DENSE, dense, "", 0, 1.0)]
    for one in variants:
        note = _unlike(dense, one.model)
        for k, share in one.active.items():
            arms += [Arm(one.label, one.model, name, k, share, note) for name in (implementations if k else ("",))]
    rows: list[Row] = []
    for done, (stage, batch) in enumerate(cells, 1):
        rows += _in_turns(arms, Task(stage, prompts[:batch], new_tokens), seconds / len(cells))
        if progress is not None:
            progress(done, len(cells), f"{stage}, batch {batch}")
    return pd.DataFrame(rows)


@dataclass
class _Runs:
    """What one arm's turns gave; seconds per round."""

    note: str
    warm: float = 0.0
    touched: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    failed: bool = False


def _in_turns(arms: Sequence[Arm], task: Task, seconds: float) -> list[Row]:
    """All arms at one stage and batch; the first is the dense model."""
    found = [_Runs(arm.unlike) for arm in arms]

    def turn(arm: Arm, runs: _Runs, warm: bool = False) -> None:
        try:
            if warm:
                runs.warm, runs.touched = arm.warm(task)
            else:
                runs.seconds.append(arm.run(task))
        except BenchError:
            raise
        except Exception as error:  # kernels refuse in many ways; each is a finding about this implementation
            runs.note, runs.failed = f"{type(error).__name__}: {shorten(str(error), 200)}", True
            runs.seconds.clear()

    pairs = list(zip(arms, found, strict=True))
    for arm, runs in pairs:
        turn(arm, runs, warm=True)
    left, number, rounds = [pair for pair in pairs if not pair[1].failed], 0, 1
    while left and number < rounds:
        for arm, runs in left[number % len(left) :] + left[: number % len(left)]:
            turn(arm, runs)
        left = [pair for pair in left if not pair[1].failed]
        if not number:  # now it is known what a round takes
            limit = float("inf") if found[0].failed else HOPELESS * found[0].seconds[0]
            left = [(arm, runs) for arm, runs in left if min(runs.warm, *runs.seconds) <= limit]
            whole = sum(runs.seconds[0] for _, runs in left)
            rounds = min(MOST, max(FEWEST, int(seconds / whole))) if left else 1
        number += 1
    return [_row(arm, runs, found[0], task) for arm, runs in pairs]


def _row(arm: Arm, runs: _Runs, dense: _Runs, task: Task) -> Row:
    ratios = [] if arm.unlike else [d / mine for d, mine in zip(dense.seconds, runs.seconds, strict=False)]
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)) if ratios else [np.nan] * 3
    return {
        "model": arm.label, "implementation": arm.implementation, "active": arm.active, "k": arm.k,
        "stage": task.stage, "batch": task.ids.shape[0],
        "tokens_per_second": task.tokens / median(runs.seconds) if runs.seconds else float("nan"),
        "ratio": ratio, "low": low, "high": high, "rounds": len(runs.seconds), "touched": runs.touched,
        "note": runs.note or ("no ratio: the dense model did not run" if dense.failed else ""),
    }  # fmt: skip


def conditions(model: nn.Module) -> str:
    """What two models must share for their speeds to be comparable: dtypes, device, attention implementation."""
    parameters = list(model.parameters())
    dtypes = "+".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))
    config: Any = model.config
    return f"{dtypes} on {parameters[0].device}, {config._attn_implementation} attention"


def _unlike(dense: nn.Module, model: nn.Module) -> str:
    ours, theirs = conditions(model), conditions(dense)
    return "" if ours == theirs else f"no ratio: this model is {ours}, the dense one {theirs}"


def verdict(table: pd.DataFrame) -> str:
    """Where mixtures are slower and where faster than the dense model, with ranges, in plain words.

    A setting is one mixture, k, stage and batch, run by its fastest implementation. Slower: the quartiles of the
    rounds' ratios lie below 1; faster: above; else unclear.

    Args:
        table: of `throughput`.
    """
    moe = table[table["k"] > 0]
    rated = moe.dropna(subset=["ratio"])
    best = rated.loc[rated.groupby(["model", "k", "stage", "batch"], sort=False)["ratio"].idxmax()]
    groups = {
        "**slower**": best[best["high"] < 1],
        "**faster**": best[best["low"] > 1],
        "**unclear**": best[(best["low"] <= 1) & (best["high"] >= 1)],
    }
    lines = [
        f"{word} in {len(rows)}, at {_reach(rows['ratio'])} its tokens/s ({_where(rows)})"
        for word, rows in groups.items()
        if len(rows)
    ]
    if lines:
        worst = rated.nsmallest(1, "ratio")
        how, ratio = worst[["implementation", "ratio"]].iloc[0]
        lines = [
            f"Next to the dense model, {len(best)} settings, each with its fastest implementation: {'; '.join(lines)}.",
            f"Slowest way of all: {how}, {ratio:.2f} × ({_where(worst)}).",
        ]
    else:
        lines = ["No mixture could be compared with the dense model."]
    if lost := len(moe) - len(rated):
        lines.append(f"{lost} of {len(moe)} combinations have no ratio; their notes say why.")
    narrow = table[(table["k"] == 0) & (table["model"] != DENSE)]["ratio"].dropna()
    if len(narrow):
        lines.append(f"Narrower dense models, without routers, run at {_reach(narrow)}.")
    return " ".join([*lines, "Active is meant of the FFNs: attention, embedding and head cost both models the same."])


def _reach(ratios: pd.Series) -> str:
    return " to ".join(sorted({f"{ratios.min():.2f}", f"{ratios.max():.2f}"}, key=float)) + " ×"


def _where(rows: pd.DataFrame) -> str:
    """Settings in words, those that differ in the active share alone together."""
    return "; ".join(
        f"{model}, {stage}, batch {batch}, {' and '.join(f'{share:.0%}' for share in part['active'])} active"
        for (model, stage, batch), part in rows.groupby(["model", "stage", "batch"], sort=False)
    )
