"""Two lessons of document 002, measured: batches of one row (2025-06-14), and rows much longer than texts (2025-04-01).

Each comparison goes through its texts once, and every setting gets the best of a few learning rates, chosen on other
texts than it is judged on: a straw man would prove nothing. The document's own setting, batch 1 at the rate that suits
large batches, is beside them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain.layout import IGNORED, Rows, lay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATES = (0.1, 0.3, 1.0, 3.0)


class Train(Protocol):
    """Trains a model in place, and all that these lessons know of a recipe.

    Given `batch` rows per step, learning rates `lr` times the recipe's, and `tokens` of the rows, counting padding. It
    visits every row once if `tokens` is the size of `rows.ids`, and returns the history of `lm.train.fit`.
    """

    def __call__(
        self, model: PreTrainedModel, rows: Rows, *, batch: int, lr: float, tokens: int, seed: int
    ) -> pd.DataFrame: ...


@dataclass(frozen=True)
class Bench:
    """What all settings of a lesson have in common.

    Attributes:
        build: seed → a fresh model.
        train: see there.
        choose: bits per byte of a model on the texts that choose a learning rate.
        judge: bits per byte on other, held-out texts.
        rates: multiples of the recipe's learning rates to choose from.
        seeds: of weights and order; the first one chooses the rate.
    """

    build: Callable[[int], PreTrainedModel]
    train: Train
    choose: Callable[[PreTrainedModel], float]
    judge: Callable[[PreTrainedModel], float]
    rates: Sequence[float] = RATES
    seeds: Sequence[int] = (0, 1, 2)


@dataclass(frozen=True)
class _Setting:
    name: str
    rows: Rows
    batch: int


def batch_size(bench: Bench, rows: Rows, *, tokens: int, batches: Sequence[int] = (1, 4, 16)) -> pd.DataFrame:
    """The same rows in small and large batches, so equally many tokens in more or fewer steps.

    Args:
        rows: packed; the first of them are taken.
        tokens: budget of each training, rounded down to whole steps of all batches.
        batches: rows per step; the smallest is trained at the rate of the largest, too.

    Returns:
        One row per training: lesson, setting, lr (multiple of the recipe's), seed, steps, tokens_computed,
        tokens_learned (that were asked for), seconds (of the training), choose and bits_per_byte (infinite where the
        loss was), best (whether this is the setting's chosen rate). A setting "batch 1 at the rate of batch 16"
        repeats trainings of "batch 1" where the rate is among those.

    Raises:
        BenchError: too few rows for the budget, or a trainer that goes through them otherwise.
    """
    if not batches or min(batches) < 1:
        raise BenchError(f"batches={list(batches)} must be rows per step, 1 or more.")
    taken = _first(rows, tokens, math.lcm(*batches))
    settings = [_Setting(f"batch {size}", taken, size) for size in sorted(set(batches))]
    found = _settings(bench, "batch size", settings)
    smallest, largest = settings[0], settings[-1]
    if smallest is not largest:
        lr = next(row["lr"] for row in found if row["setting"] == largest.name and row["best"])
        known = {(row["setting"], row["lr"], row["seed"]): row for row in found}
        for seed in bench.seeds:
            row = known.get((smallest.name, lr, seed)) or _row(bench, "batch size", smallest, lr, seed)
            found.append({**row, "setting": f"{smallest.name} at the rate of {largest.name}", "best": True})
    return pd.DataFrame(found)


def long_context(
    bench: Bench,
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    tokens: int,
    batch: int,
    eos: int,
    pad: int,
) -> pd.DataFrame:
    """Rows much longer than the texts: one text a row and padding, against packed rows.

    Three settings: "packed"; "padded, equal computation", as many rows, most of them padding; and "padded, equal text",
    the texts of "packed" one a row, so that the computation is a multiple.

    Args:
        documents: token ids without special tokens, in the order in which they are taken.
        length: tokens in a row.
        tokens: budget of the first two settings, rounded down to whole steps.
        batch: rows per step.
        eos, pad: tokens.

    Returns:
        As `batch_size`. Each setting's last step is whole, so at most batch − 1 of its rows are left out.

    Raises:
        BenchError: too little text for the budget, or a trainer that goes through the rows otherwise.
    """
    wanted = _count(tokens, length, batch) * length
    size, taken = 1, 0
    while taken < len(documents) and size < wanted:
        size += len(documents[taken]) + 1  # and the EOS that `layout.lay` puts between
        taken += 1
    if size < wanted:
        raise BenchError(f"{size} tokens of text are fewer than the budget of {wanted}: give more text or lower it.")
    packed = _first(lay(documents[:taken], length, eos=eos, pad=pad, layout="packed"), tokens, batch)
    padded = lay(documents[:taken], length, eos=eos, pad=pad, layout="padded")
    settings = [
        _Setting("packed", packed, batch),
        _Setting("padded, equal computation", _first(padded, tokens, batch), batch),
        _Setting("padded, equal text", _first(padded, padded.ids.numel(), batch), batch),
    ]
    return pd.DataFrame(_settings(bench, "long context", settings))


def _first(rows: Rows, tokens: int, multiple: int) -> Rows:
    """The first rows of a budget, a multiple of some number of them."""
    length = int(rows.ids.shape[1])
    count = _count(tokens, length, multiple)
    if count > len(rows.ids):
        raise BenchError(f"{len(rows.ids)} rows are fewer than the {count} of the budget: give more text or lower it.")
    return replace(rows, ids=rows.ids[:count], positions=None if rows.positions is None else rows.positions[:count])


def _count(tokens: int, length: int, multiple: int) -> int:
    """Rows that a budget buys, in whole steps."""
    if not (count := tokens // (length * multiple) * multiple):
        raise BenchError(f"A budget of {tokens} tokens is less than a step of {multiple} rows of {length}: raise it.")
    return count


def _settings(bench: Bench, lesson: str, settings: Sequence[_Setting]) -> list[dict[str, Any]]:
    """Every rate with the first seed, the best one with the others."""
    found = []
    for setting in settings:
        tried = [_row(bench, lesson, setting, lr, bench.seeds[0]) for lr in bench.rates]
        lr = min(tried, key=lambda row: row["choose"])["lr"]
        tried += [_row(bench, lesson, setting, lr, seed) for seed in bench.seeds[1:]]
        found += [{**row, "best": row["lr"] == lr} for row in tried]
    return found


def _row(bench: Bench, lesson: str, setting: _Setting, lr: float, seed: int) -> dict[str, Any]:
    """One training."""
    rows, tokens = setting.rows, setting.rows.ids.numel()
    counts = {
        "lesson": lesson,
        "setting": setting.name,
        "lr": lr,
        "seed": seed,
        "steps": len(rows.ids) // setting.batch,
        "tokens_computed": tokens,
        "tokens_learned": int((rows.asked(rows.ids) != IGNORED).sum()),
    }
    model, began = bench.build(seed), time.perf_counter()
    try:
        history = bench.train(model, rows, batch=setting.batch, lr=lr, tokens=tokens, seed=seed)
    except BenchError as error:
        if "not finite" not in str(error):
            raise
        # A result: at this rate it does not converge.
        return {**counts, "seconds": time.perf_counter() - began, "choose": math.inf, "bits_per_byte": math.inf}
    counts["seconds"] = time.perf_counter() - began
    went = (len(history), int(history["tokens"].iloc[-1]))
    if went != (counts["steps"], tokens):
        raise BenchError(
            f"{setting.name}: the trainer went {went[0]} steps over {went[1]} tokens instead of {counts['steps']} over "
            f"{tokens}: use a recipe without a batch ramp."
        )
    return {**counts, "choose": bench.choose(model), "bits_per_byte": bench.judge(model)}
