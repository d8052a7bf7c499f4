"""What the scanner counts: kinds of targets, their statistics in packing order, and merging.

Everything is a *sum* (float64) or a *count* until `tables` divides: sums of workers add up, averages do not
(ERRATA 000, "INCRBYFLOAT gives averages").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyonn_lib.errors import BenchError

# Statistics of a kind of target, in the order of the packed array. Appending or reordering is a new version.
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
KINDS: dict[str, tuple[str, ...]] = {
    # One gated FFN; a row is a neuron.
    "neurons": STATISTICS,
    # One nn.Linear; a row is an output: |y| and top rho as above, norm of the row of dL/dW.
    "linear": ("abs_y", "top", "grad"),
    # One embedding; a row is a token id: how often it was read, norm of its row of dL/dE (the head's part included
    # where the weight is tied).
    "embedding": ("count", "grad"),
    # One module of fused experts; a row is an expert: tokens routed to it, sum of their routing weights, norms of its
    # slices of the two gradients and of both together.
    "experts": ("count", "weight", "grad_gate_up", "grad_down", "grad"),
}
# Of each kind the statistics that mean: how strongly active, how often, how large a gradient.
ACTIVITY = {
    "neurons": ("abs_h", "top", "grad"),
    "linear": ("abs_y", "top", "grad"),
    "embedding": ("count", "count", "grad"),
    "experts": ("weight", "count", "grad"),
}
# Columns of the counters and of the tensor norms, one row per target.
COUNTERS: tuple[str, ...] = ("tokens", "samples", "grad_tokens", "grad_samples")
NORMS: tuple[str, ...] = ("act_norm", "grad_norm")  # sums over samples of |X| (Frobenius) and of |dL/dW|
# How a target's norms of a step were taken, as recorded per step: a number into this table. "again" is a second forward
# and backward of the module, "mixed" is several ways for several weights.
METHODS: tuple[str, ...] = ("none", "grad", "gram", "tiles", "again", "mixed")
LAYOUT_VERSION = 2


@dataclass(frozen=True)
class Target:
    """One thing that is watched.

    Attributes:
        name: module name inside the model, such as `model.layers.0.mlp`.
        kind: a key of `KINDS`.
        rows: units with statistics of their own; 0 when only the norms of the whole tensor are kept.
        layer: decoder layer, -1 outside the layers.
    """

    name: str
    kind: str
    rows: int
    layer: int

    @property
    def shape(self) -> tuple[int, int]:
        """(statistics, rows) of the packed sums."""
        return len(KINDS[self.kind]), self.rows


@dataclass(frozen=True)
class Layout:
    """Shape of a scan: what is watched, and the top share rho.

    Attributes:
        targets: in the order of the packed arrays, each name and kind once.
        rho: share of a target's rows that count as its top on a token, in (0, 1].
    """

    targets: tuple[Target, ...]
    rho: float

    def __post_init__(self) -> None:
        if len({(target.name, target.kind) for target in self.targets}) != len(self.targets):
            raise BenchError("a scan needs each target once")
        if unknown := {target.kind for target in self.targets} - set(KINDS):
            raise BenchError(f"unknown kind of target: {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
        if not 0.0 < self.rho <= 1.0:
            raise BenchError(f"rho={self.rho} is a share of the layer's neurons: choose it in (0, 1], e.g. 0.05")

    @property
    def units(self) -> int:
        """Rows of all targets together."""
        return sum(target.rows for target in self.targets)

    def top(self, rows: int) -> int:
        """How many of `rows` are the top: round(rho * rows), at least one."""
        return max(1, min(rows, round(self.rho * rows)))

    def describe(self) -> dict[str, Any]:
        """The layout as JSON-able values, for fingerprints and file headers."""
        return {
            "version": LAYOUT_VERSION,
            "statistics": {kind: list(KINDS[kind]) for kind in sorted({target.kind for target in self.targets})},
            "targets": [[target.name, target.kind, target.rows, target.layer] for target in self.targets],
            "rho": self.rho,
        }

    @classmethod
    def parse(cls, described: Mapping[str, Any]) -> Layout:
        """The layout back from `describe`.

        Raises:
            BenchError: described by another version.
        """
        statistics = described.get("statistics")
        known = isinstance(statistics, dict) and all(list(KINDS.get(kind, ())) == v for kind, v in statistics.items())
        if described.get("version") != LAYOUT_VERSION or not known:
            raise BenchError("this scan was written by another version of the bench: scan again")
        return cls(tuple(Target(*target) for target in described["targets"]), described["rho"])


@dataclass(frozen=True)
class Totals:
    """Sums of everything scanned so far.

    Attributes:
        layout: what the entries mean.
        sums: per target, float64 (statistics of its kind, rows). Gradient sums are in units of the loss per weight,
            saliency in units of the loss.
        counts: float64 whole numbers, (targets, counters), counters in the order of `COUNTERS`.
        norms: float64 (targets, 2), in the order of `NORMS`.
    """

    layout: Layout
    sums: tuple[np.ndarray, ...]
    counts: np.ndarray
    norms: np.ndarray

    def __post_init__(self) -> None:
        targets = self.layout.targets
        wanted = [target.shape for target in targets]
        found = [part.shape for part in self.sums]
        if found != wanted or self.counts.shape != (len(targets), len(COUNTERS)):
            raise BenchError(f"totals of shapes {found[:3]}…, {self.counts.shape} do not fit the layout {wanted[:3]}…")
        if self.norms.shape != (len(targets), len(NORMS)):
            raise BenchError(f"tensor norms of shape {self.norms.shape} do not fit {len(targets)} targets")

    @classmethod
    def zeros(cls, layout: Layout) -> Totals:
        """Nothing counted yet."""
        targets = len(layout.targets)
        return cls(
            layout,
            tuple(np.zeros(target.shape) for target in layout.targets),
            np.zeros((targets, len(COUNTERS))),
            np.zeros((targets, len(NORMS))),
        )

    def of(self, name: str, statistic: str, kind: str = "") -> np.ndarray:
        """One statistic of one target, float64 (rows,). `kind` is needed where a name is watched in two ways."""
        for target, part in zip(self.layout.targets, self.sums, strict=True):
            if target.name == name and kind in ("", target.kind) and statistic in KINDS[target.kind]:
                return np.asarray(part[KINDS[target.kind].index(statistic)])
        raise BenchError(f"no target {name!r} with statistic {statistic!r} in this scan")


def merge(parts: Iterable[Totals]) -> Totals:
    """Add totals. Parts are added in the order given (float64 sums depend on it).

    Raises:
        BenchError: no part, or parts of different layouts.
    """
    parts = list(parts)
    if not parts:
        raise BenchError("nothing to merge: no worker has committed anything yet")
    result = Totals.zeros(parts[0].layout)
    for part in parts:
        if part.layout != result.layout:
            raise BenchError(
                f"cannot add totals of different layouts (rho={part.layout.rho} and {result.layout.rho}, "
                f"{part.layout.units} and {result.layout.units} units): scan all with one model, targets and rho"
            )
        for total, more in zip(result.sums, part.sums, strict=True):
            total += more
        result.counts[:] += part.counts
        result.norms[:] += part.norms
    return result
