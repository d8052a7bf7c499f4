"""What the scanner counts: names, order and shapes of the packed statistics, merging, and the neuron table.

Everything is a *sum* (float64) or a *count* until `neurons_table`, the one place that divides: sums of
workers add up, averages do not (ERRATA 000, "INCRBYFLOAT gives averages").
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyonn_lib.errors import BenchError

if TYPE_CHECKING:
    import pandas as pd

# Axis 1 of the packed array, in order. Appending is a new layout version; reordering is never done.
STATISTICS: tuple[str, ...] = (
    "abs_h",  # sum over tokens of |h|
    "h",  # sum over tokens of h
    "h_sq",  # sum over tokens of h^2
    "top",  # tokens on which the neuron is among its layer's top rho by |h|
    "saliency",  # sum over tokens of |h * dL/dh|
    "grad_gate",  # sum over samples of the row norm of dL/dW_gate
    "grad_up",  # sum over samples of the row norm of dL/dW_up
    "grad_down",  # sum over samples of the column norm of dL/dW_down
    "grad",  # sum over samples of sqrt(gate^2 + up^2 + down^2)
)
FORWARD = slice(0, 4)  # known after a forward
BACKWARD = slice(4, 9)  # known after a backward
# Columns of the counters, one row per layer.
COUNTERS: tuple[str, ...] = ("tokens", "samples", "grad_tokens", "grad_samples")
COLUMNS: tuple[str, ...] = (
    "layer", "neuron", "tokens", "samples", "act", "act_mean", "act_sq", "freq",
    "grad_gate", "grad_up", "grad_down", "grad", "saliency",
)  # fmt: skip
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Layout:
    """Shape of a scan: which layers, how many neurons in each, and the top share rho.

    Attributes:
        layers: layer numbers, in the order of the packed arrays.
        widths: neurons per layer, same order.
        rho: share of a layer's neurons that count as its top on a token, in (0, 1].
    """

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    rho: float

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.widths) or len(set(self.layers)) != len(self.layers):
            raise BenchError(f"a scan needs one width per layer and each layer once; layers are {self.layers}")
        if not 0.0 < self.rho <= 1.0:
            raise BenchError(f"rho={self.rho} is a share of the layer's neurons: choose it in (0, 1], e.g. 0.05")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, statistics, widest layer): narrower layers are padded with zeros at the end."""
        return len(self.layers), len(STATISTICS), max(self.widths, default=0)

    def top(self, width: int) -> int:
        """How many of `width` neurons are the layer's top: round(rho * width), at least one."""
        return max(1, min(width, round(self.rho * width)))

    def describe(self) -> dict[str, object]:
        """The layout as JSON-able values, for fingerprints and file headers."""
        return {
            "version": LAYOUT_VERSION,
            "statistics": list(STATISTICS),
            "layers": list(self.layers),
            "widths": list(self.widths),
            "rho": self.rho,
        }


@dataclass(frozen=True)
class Totals:
    """Sums of everything scanned so far.

    Attributes:
        layout: what the axes mean.
        sums: float64, (layer, statistic, neuron), statistics in the order of `STATISTICS`. Gradient sums are
            in units of the loss per weight, saliency in units of the loss.
        counts: float64 whole numbers, (layer, counter), counters in the order of `COUNTERS`.
    """

    layout: Layout
    sums: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        expected = self.layout.shape
        if self.sums.shape != expected or self.counts.shape != (expected[0], len(COUNTERS)):
            raise BenchError(
                f"totals of shape {self.sums.shape}, {self.counts.shape} do not fit {expected} of the layout"
            )

    @classmethod
    def zeros(cls, layout: Layout) -> Totals:
        return cls(layout, np.zeros(layout.shape), np.zeros((len(layout.layers), len(COUNTERS))))

    def layer(self, layer: int, statistic: str) -> np.ndarray:
        """One statistic of one layer, float64 (neurons,), without padding."""
        row = self.layout.layers.index(layer)
        return self.sums[row, STATISTICS.index(statistic), : self.layout.widths[row]]


def merge(parts: Iterable[Totals]) -> Totals:
    """Add totals of several workers. Parts are added in the order given (float64 sums depend on it).

    Raises:
        BenchError: no part, or parts of different layouts.
    """
    parts = list(parts)
    if not parts:
        raise BenchError("nothing to merge: no worker has committed anything yet")
    first = parts[0]
    sums, counts = first.sums.copy(), first.counts.copy()
    for part in parts[1:]:
        if part.layout != first.layout:
            raise BenchError(
                f"cannot add totals of different layouts ({part.layout.shape}, rho={part.layout.rho} and "
                f"{first.layout.shape}, rho={first.layout.rho}): scan both with the same model and rho"
            )
        sums += part.sums
        counts += part.counts
    return Totals(first.layout, sums, counts)


def neurons_table(totals: Totals) -> pd.DataFrame:
    """One row per neuron, columns exactly `COLUMNS`.

    Returns:
        `layer, neuron` (int64), `tokens, samples` (int64, of that layer), `act` mean |h|, `act_mean` mean h,
        `act_sq` mean h^2 (each per token), `freq` share of tokens on which the neuron is in the layer's top
        rho, `grad_gate, grad_up, grad_down` mean per sample of the norms of the neuron's gate row, up row and
        down column of the weight gradient, `grad` mean per sample of their joint norm, `saliency` mean per
        token of |h * dL/dh|. Where nothing was counted the mean is NaN, never a silent zero.
    """
    import pandas as pd

    layout = totals.layout
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    denominators = {
        "act": ("abs_h", "tokens"),
        "act_mean": ("h", "tokens"),
        "act_sq": ("h_sq", "tokens"),
        "freq": ("top", "tokens"),
        "grad_gate": ("grad_gate", "grad_samples"),
        "grad_up": ("grad_up", "grad_samples"),
        "grad_down": ("grad_down", "grad_samples"),
        "grad": ("grad", "grad_samples"),
        "saliency": ("saliency", "grad_tokens"),
    }
    for row, (layer, width) in enumerate(zip(layout.layers, layout.widths, strict=True)):
        counts = dict(zip(COUNTERS, totals.counts[row], strict=True))
        columns["layer"].append(np.full(width, layer, dtype=np.int64))
        columns["neuron"].append(np.arange(width, dtype=np.int64))
        columns["tokens"].append(np.full(width, int(counts["tokens"]), dtype=np.int64))
        columns["samples"].append(np.full(width, int(counts["samples"]), dtype=np.int64))
        for column, (statistic, counter) in denominators.items():
            values = totals.sums[row, STATISTICS.index(statistic), :width]
            columns[column].append(values / counts[counter] if counts[counter] else np.full(width, math.nan))
    return pd.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in columns.items()})


def layer_ranks(neurons: pd.DataFrame, one: str, other: str) -> pd.Series:
    """Spearman correlation of two columns within each layer; pooled, differences between layers would hide it."""
    import pandas as pd

    return pd.Series({layer: rows[one].corr(rows[other], "spearman") for layer, rows in neurons.groupby("layer")})
