"""How wide a projector should be: the measured rule next to the document's, and what a table says of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.log import FACTORS

RATIO, DROPOUT = 2.0, 0.0
"""The rule for the document's shared adapters. On the one pair that was measured (benchmarks/results/kv_projector.json)
each doubling of the width lowered the student's loss, and dropout did not."""

DOCUMENT = ((0.0, 0.5, 0.1), (14e9, 1.0, 0.1), (30e9, 2.0, 0.15))
"""From this many parameters of the teacher on (included): mlp_ratio, dropout (003, §Recommended configuration)."""

LARGEST = 70e9
"""The document ends here; beyond, the last line goes on."""


@dataclass(frozen=True)
class Recommendation:
    """Arguments for `KVDimensionProjector`, and why; and what the document would have said.

    Attributes:
        document: its mlp_ratio for a teacher of this size.
    """

    mlp_ratio: float
    dropout: float
    reason: str
    document: float


def recommended(teacher_params: float) -> Recommendation:
    """One rule for every size, because nothing that was measured depends on it; the document's beside it.

    The document's table is read as half-open intervals: a size belongs to the line that begins at or below it. (Its
    ranges overlap from 7 to 14 billion, and its FAQ goes by width, with other bounds. Its summary does neither.)

    Args:
        teacher_params: parameters of the teacher, such as 7e9.

    Raises:
        BenchError: not a finite number, or one that can only be meant in billions.
    """
    if isinstance(teacher_params, bool) or not isinstance(teacher_params, Real) or not math.isfinite(teacher_params):
        raise BenchError(f"teacher_params is {teacher_params!r}: give the teacher's number of parameters, such as 7e9.")
    size = float(teacher_params)
    if size < 1e6:
        hint = f" If you mean {size:g} billion, write {size * 1e9:g}." if size > 0 else ""
        raise BenchError(f"A teacher of {size:g} parameters: give all of them, not billions, such as 7e9.{hint}")
    place = max(number for number, (begin, *_) in enumerate(DOCUMENT) if begin <= size)
    (begin, ratio, dropout), following = DOCUMENT[place], DOCUMENT[place + 1 :]
    reach = f"below {following[0][0] / 1e9:g} billion" if following else f"of {begin / 1e9:g} billion or more"
    if begin and following:
        reach = f"from {begin / 1e9:g} to {reach}"
    beyond = f" It ends at {LARGEST / 1e9:g} billion." if size > LARGEST else ""
    return Recommendation(
        RATIO, DROPOUT,
        f"mlp_ratio {RATIO:g} and dropout {DROPOUT:g} for shared adapters, whatever the teacher's size: on "
        "the one pair that was measured every doubling of the width helped and dropout did not; how that depends on "
        f"the size was not measured. Document 003 gives teachers {reach} parameters mlp_ratio {ratio:g} and dropout "
        f"{dropout:g}; this one has {size / 1e9:.3g} billion.{beyond} Where memory is short take less, and "
        "measure your pair with `sweep`.",
        ratio,
    )  # fmt: skip


def judged(table: pd.DataFrame, ratios: Mapping[str, float]) -> str:
    """Whether a measured table bears out the rule, and what mattered in it.

    Args:
        table: of `sweep`.
        ratios: whose choice, such as "The rule's" → its ratio for the table's teacher.

    Returns:
        One sentence per line. Each ratio is represented by its configuration with the least validation loss.
    """
    linears, mlps = (table[table["kind"] == kind].reset_index(drop=True) for kind in ("linear", "mlp"))
    linear = linears.loc[linears["validation"].idxmin()]
    best = mlps.loc[mlps.groupby("mlp_ratio")["validation"].idxmin()].set_index("mlp_ratio")
    gain = (linear["heldout"] - best["heldout"]) / best["parameters"] * 1e6
    lines = [
        "Held-out loss: linear "
        + ", ".join([f"{linear['heldout']:.4g}", *(f"{r:g}× {v:.4g}" for r, v in best["heldout"].items())])
        + f"; {best['heldout'].idxmin():g}× is best, {gain.idxmax():g}× gains most on linear per parameter.",
        "The student's loss (nats): linear "
        + ", ".join([f"{linear['nll']:.4f}", *(f"{r:g}× {v:.4f}" for r, v in best["nll"].items())])
        + f"; {best['nll'].idxmin():g}× is best.",
    ]
    for whose, ratio in ratios.items():
        wins = best["nll"].idxmin() == ratio
        cost = best.loc[ratio, "nll"] - best["nll"].min()
        lines.append(
            f"{whose} {ratio:g}× is {'borne out' if wins else f'not borne out: it costs {cost:.4f} nats per token'}."
        )
    return "\n".join([*lines, *(_effect(mlps, factor) for factor in FACTORS)])


def _effect(mlps: pd.DataFrame, factor: str) -> str:
    """What one choice does to the held-out loss, in units of the spread over seeds."""
    best = mlps.loc[mlps.groupby(factor)["validation"].idxmin()].set_index(factor)["heldout"].sort_values()
    means = mlps.groupby(factor)["heldout"].mean()
    name = {"mlp_ratio": "Ratio", "layernorm": "LayerNorm", "activation": "Activation", "init": "Init"}[factor]
    said = ", ".join(f"{_word(factor, value)} {loss:.4g}" for value, loss in best.items())
    difference, spread = best.iloc[-1] - best.iloc[0], math.sqrt(float((mlps["heldout_spread"] ** 2).mean()))
    verdict = "and with one seed there is no spread to compare this with"
    if not math.isnan(spread):
        verdict = f"{'more' if difference > 2 * spread else 'no more'} than twice the spread over seeds ({spread:.2g})"
    return (
        f"{name}, all else at its best: {said}; worst − best {difference:.2g}, {verdict}. "
        f"Averaged over all else: {means.max() - means.min():.2g}."
    )


def _word(factor: str, value: Any) -> str:
    if factor == "layernorm":
        return "with" if value else "without"
    return f"{value:g}×" if factor == "mlp_ratio" else str(value)
