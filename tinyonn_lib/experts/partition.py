"""Partitions: which neuron is shared, belongs to expert e, or is dropped, layer by layer.

What divides a layer is a method of `methods.METHODS`; here are the shapes it has to fill and the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyonn_lib.errors import BenchError

SHARED, DROPPED = -1, -2
"""What a label says instead of an expert's number; `routing.per_neuron` uses them as indices from the end."""

Labels = NDArray[np.int64]
"""`(d_ffn,)`: the expert of each neuron of a layer, or `SHARED`, or `DROPPED`."""


@dataclass(frozen=True)
class Shape:
    """Into what a layer is divided: `experts` of `size` neurons each, and `shared` neurons that are always on."""

    experts: int
    size: int
    shared: int

    @staticmethod
    def of(neurons: int, experts: int, *, size: int = 0, shared: float = 0.0) -> Shape:
        """The shape of a layer of `neurons`.

        Args:
            size: neurons per expert; 0: as many as the shared share leaves.
            shared: share of the neurons that is always on, in [0, 1); what does not divide by `experts` is shared, too.
                0 with no size: everything must divide.

        Raises:
            BenchError: more experts than neurons, a size too large, or neurons that do not divide.
        """
        if not 0 <= shared < 1:
            raise BenchError(f"shared={shared} is the share of neurons that is always on: choose it in [0, 1).")
        if size and shared:
            raise BenchError("Give the experts' size or the shared share, not both: one follows from the other.")
        if size * experts > neurons:
            raise BenchError(
                f"{experts} experts of {size} neurons need {size * experts}, a layer has {neurons}: choose fewer or "
                f"smaller ones, such as {experts} of {neurons // experts}."
            )
        routed = int((1 - shared) * neurons + 1e-6)
        if experts < 1 or routed < experts:
            raise BenchError(
                f"{neurons} neurons{f' ({shared:.0%} of them shared)' if shared else ''} are too few for {experts} "
                "experts: choose fewer experts."
            )
        if not size and not shared and neurons % experts:
            fit = [d for d in range(1, neurons + 1) if neurons % d == 0]
            near = min(fit, key=lambda d: abs(d - experts))
            raise BenchError(
                f"{neurons} neurons of a layer do not divide into {experts} experts; {near} would fit, or let some "
                "neurons be shared."
            )
        size = size or routed // experts
        return Shape(experts, size, neurons - size * experts)


@dataclass(frozen=True)
class Partition:
    """Neuron → shared, expert e, or dropped, layer by layer.

    Attributes:
        method: Name in `methods.METHODS`.
        experts: Per layer an int64 tensor `(experts, size)`: row e lists expert e's neurons, ascending.
        shared: Per layer the neurons that are always on, int64, ascending.
        dropped: Per layer the neurons that are left out, int64, ascending.
    """

    method: str
    experts: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()
    dropped: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        none = tuple(torch.empty(0, dtype=torch.long) for _ in self.experts)
        object.__setattr__(self, "shared", self.shared or none)
        object.__setattr__(self, "dropped", self.dropped or none)

    @staticmethod
    def of(method: str, labels: Sequence[Labels], experts: Sequence[int]) -> Partition:
        """From each layer's labels and number of experts; a layer's experts have the same number of neurons each."""
        found, shared, dropped = [], [], []
        for row, count in zip(labels, experts, strict=True):
            groups = [np.flatnonzero(row == e) for e in range(count)]
            found.append(torch.from_numpy(np.stack(groups)) if count else torch.empty(0, 0, dtype=torch.long))
            shared.append(torch.from_numpy(np.flatnonzero(row == SHARED)))
            dropped.append(torch.from_numpy(np.flatnonzero(row == DROPPED)))
        return Partition(method, tuple(found), tuple(shared), tuple(dropped))

    @property
    def count(self) -> int:
        """Experts per layer; of a pool, in the layer that has most."""
        return max(index.shape[0] for index in self.experts)

    @property
    def size(self) -> int:
        """Neurons per expert; in the layer with the largest ones where layers differ."""
        return max(index.shape[1] for index in self.experts)

    @property
    def neurons(self) -> int:
        """Neurons of all layers together, dropped ones included."""
        return sum(part.numel() for parts in (self.experts, self.shared, self.dropped) for part in parts)

    def k(self, active: float) -> int:
        """How many experts a layer may have on so that about the share `active` of all neurons is, at least one."""
        shared = sum(part.numel() for part in self.shared)
        size = sum(index.shape[1] for index in self.experts)
        return min(self.count, max(1, round((active * self.neurons - shared) / size)))

    def share(self, k: int) -> float:
        """The share of all neurons that is on with k experts."""
        on = sum(min(k, index.shape[0]) * index.shape[1] for index in self.experts)
        return (on + sum(part.numel() for part in self.shared)) / self.neurons

    def owner(self, layer: int) -> Tensor:
        """The labels of a layer, `(d_ffn,)`."""
        index, parts = self.experts[layer], (self.shared[layer], self.dropped[layer])
        named = torch.cat([index.reshape(-1), *parts])
        if not torch.equal(named.sort().values, torch.arange(len(named))):
            raise BenchError(f"The partition of layer {layer} is damaged: a neuron is missing or named twice.")
        owner = torch.empty(len(named), dtype=torch.long)
        owner[index.reshape(-1)] = torch.arange(index.shape[0]).repeat_interleave(index.shape[1])
        owner[parts[0]], owner[parts[1]] = SHARED, DROPPED
        return owner

    def check(self, neurons: Sequence[int]) -> None:
        """Does it fit a model with so many neurons in each layer?

        Raises:
            BenchError: another depth or width, or a neuron left out or named twice.
        """
        if len(neurons) != len(self.experts):
            raise BenchError(
                f"The partition has {len(self.experts)} layers and the model {len(neurons)}: "
                "it was made from another model's statistics; scan this one."
            )
        for layer, width in enumerate(neurons):
            parts = (self.experts[layer].reshape(-1), self.shared[layer], self.dropped[layer])
            if not torch.equal(torch.cat(parts).sort().values, torch.arange(width)):
                raise BenchError(
                    f"The partition does not name each of layer {layer}'s {width} neurons exactly once: "
                    "it was made from another model's statistics; scan this one."
                )

    def table(self) -> pd.DataFrame:
        """One row per neuron: `layer, expert, position, neuron`; expert −1: shared, −2: dropped."""
        rows = []
        for layer, index in enumerate(self.experts):
            groups = [(DROPPED, self.dropped[layer]), (SHARED, self.shared[layer]), *enumerate(index)]
            rows += [
                pd.DataFrame({"layer": layer, "expert": e, "position": np.arange(len(g)), "neuron": g.numpy()})
                for e, g in groups
            ]
        return pd.concat(rows, ignore_index=True)

    @staticmethod
    def read(path: Path) -> Partition:
        """From a parquet file of `table`; the file's name says the method.

        Raises:
            BenchError: missing, damaged, or another table.
        """
        try:
            return Partition.from_table(pd.read_parquet(path), path.stem.removeprefix("partition_"))
        except Exception as error:  # pandas, pyarrow and torch raise a dozen kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BenchError(f"{path} is not a partition table of 04_experts: {reason}") from error

    @staticmethod
    def from_table(table: pd.DataFrame, method: str) -> Partition:
        """The inverse of `table`."""
        layers = []
        for _, rows in table.sort_values(["layer", "expert", "position"]).groupby("layer"):
            routed = rows[rows["expert"] >= 0]
            count = int(rows["expert"].max()) + 1 if len(routed) else 0
            index = torch.tensor(routed["neuron"].to_numpy(), dtype=torch.long).view(count, -1 if count else 0)
            rest = (
                torch.tensor(rows.loc[rows["expert"] == e, "neuron"].to_numpy(), dtype=torch.long)
                for e in (SHARED, DROPPED)
            )
            layers.append((index, *rest))
        experts, shared, dropped = zip(*layers, strict=True)
        return Partition(method, experts, shared, dropped)
