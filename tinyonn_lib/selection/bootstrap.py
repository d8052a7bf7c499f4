"""A bootstrap of ranks: rows are drawn by groups, and a draw weighs ranks anew without sorting again.

Efron & Tibshirani 1993, §6.4; an AUROC is a Mann-Whitney statistic (Hanley & McNeil 1982), ties by half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tinyonn_lib.evaluate import MIN_GROUPS

Array = NDArray[np.float64]

CELLS = 4_000_000
"""Weights that are held at a time: draws times rows."""


class Weights:
    """How often every row is drawn: row 0 once each, the table as it is; then the bootstrap's draws, by groups."""

    def __init__(self, groups: Sequence[Any] | NDArray[Any], draws: int, seed: int) -> None:
        _, self.code = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        self.groups = int(self.code.max()) + 1
        even = np.full(self.groups, 1 / self.groups)
        drawn = np.random.default_rng(seed).multinomial(self.groups, even, size=draws)
        self.counts = np.concatenate([np.ones((1, self.groups), drawn.dtype), drawn])

    def __iter__(self) -> Iterator[Array]:
        """Rows times draws, in parts that fit into memory."""
        step = max(1, CELLS // len(self.code))
        for first in range(0, len(self.counts), step):
            yield self.counts[first : first + step].T.astype(np.float64)[self.code]


def intervals(values: Array, weights: Weights, name: str) -> pd.DataFrame:
    """Columns of `values`, row 0 the estimate and the others its draws, as rows `name, low, high`: 95 %."""
    ends = np.full((2, values.shape[1]), np.nan)
    known = ~np.isnan(values[0])  # a draw may miss a kind, an estimate that exists has draws that do not
    if weights.groups >= MIN_GROUPS:
        ends[:, known] = np.nanquantile(values[1:, known], [0.025, 0.975], axis=0)
    return pd.DataFrame({name: values[0], "low": ends[0], "high": ends[1]})


def below(values: Array, among: Array, weights: Array) -> Array:
    """Weight of `among` below each value, ties by half: `(values, draws)`; `weights` is `(among, draws)`."""
    order = np.argsort(among)
    total = np.zeros((len(among) + 1, weights.shape[1]))
    np.cumsum(weights[order], axis=0, out=total[1:])
    first, last = (np.searchsorted(among[order], values, side) for side in ("left", "right"))
    found: Array = total[first]
    found += total[last]
    found /= 2
    return found


def spearman(one: Array, other: Array, weights: Array) -> Array:
    """Spearman's correlation under each column of `weights`, `(rows, draws)`: `(draws,)`."""
    share = weights / weights.sum(0)
    # The weighted mean of such ranks is half of all weight, whatever the values.
    ranks = [below(values, values, weights) - weights.sum(0) / 2 for values in (one, other)]
    both, first, second = (
        np.einsum("nd,nd,nd->d", share, a, b) for a, b in (ranks, (ranks[0], ranks[0]), (ranks[1], ranks[1]))
    )
    with np.errstate(all="ignore"):
        found: Array = both / np.sqrt(first * second)
    return found
