"""Partitions: which neuron goes to which expert, by `sp` or by a control that it must beat.

A method is one function `(Evidence, layer, experts, seed) -> Partition row` and one line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.cluster import balanced_kmeans
from tinyonn_lib.experts.score import FEATURES


@dataclass(frozen=True)
class Partition:
    """Neuron → expert, layer by layer.

    Attributes:
        method: Name in `METHODS`.
        experts: Per layer an int64 tensor `(experts, size)`: row e lists expert e's neurons, ascending.
    """

    method: str
    experts: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """Experts per layer."""
        return int(self.experts[0].shape[0])

    @property
    def size(self) -> int:
        """Neurons per expert."""
        return int(self.experts[0].shape[1])

    def k(self, active: float) -> int:
        """How many experts hold the fraction `active` of the neurons, at least one."""
        return max(1, round(active * self.count))

    def table(self) -> pd.DataFrame:
        """One row per neuron: `layer, expert, position, neuron`."""
        rows = [
            pd.DataFrame(
                {
                    "layer": layer,
                    "expert": np.repeat(np.arange(self.count), self.size),
                    "position": np.tile(np.arange(self.size), self.count),
                    "neuron": index.numpy().ravel(),
                }
            )
            for layer, index in enumerate(self.experts)
        ]
        return pd.concat(rows, ignore_index=True)

    @staticmethod
    def from_table(table: pd.DataFrame, method: str) -> Partition:
        """The inverse of `table`."""
        ordered = table.sort_values(["layer", "expert", "position"])
        shape = (int(table["expert"].max()) + 1, int(table["position"].max()) + 1)
        return Partition(
            method,
            tuple(torch.tensor(rows["neuron"].to_numpy()).view(shape) for _, rows in ordered.groupby("layer")),
        )


Labels = Callable[[pd.DataFrame, int, int], NDArray[np.int64]]


def _sp(rows: pd.DataFrame, experts: int, seed: int) -> NDArray[np.int64]:
    """Balanced clusters of the layer's feature vectors (document 000 §1.5); expert 0 has the highest mean S_p."""
    labels = balanced_kmeans(rows[["sp", *FEATURES]].to_numpy(np.float64), experts, seed)
    rank = rows["sp"].groupby(labels).mean().rank(ascending=False, method="first").astype(int) - 1
    return rank.to_numpy()[labels]


def _random(rows: pd.DataFrame, experts: int, seed: int) -> NDArray[np.int64]:
    """Control: shuffle and cut."""
    rng = np.random.default_rng([seed, int(rows["layer"].iloc[0])])
    return rng.permutation(np.arange(len(rows)) % experts)


METHODS: dict[str, Labels] = {"sp": _sp, "random": _random}
"""Name → function from one layer's score rows, the number of experts and a seed to an expert per neuron."""


def partition(method: str, scores: pd.DataFrame, experts: int, seed: int = 0) -> Partition:
    """Divide every layer's neurons among `experts` experts of equal size.

    Args:
        scores: One row per neuron: `layer, neuron, sp` and the columns of `FEATURES`.

    Raises:
        BenchError: Unknown method, or a number of experts that does not divide the layer.
    """
    if method not in METHODS:
        raise BenchError(f"There is no partition method '{method}'; known: {', '.join(METHODS)}.")
    layers = []
    for layer, rows in scores.sort_values(["layer", "neuron"]).groupby("layer"):
        if experts > len(rows) or len(rows) % experts:
            fit = [d for d in range(2, len(rows) + 1) if len(rows) % d == 0]
            near = min(fit, key=lambda d: abs(d - experts))
            raise BenchError(
                f"{len(rows)} neurons of layer {layer} do not divide into {experts} experts; {near} would fit."
            )
        labels = METHODS[method](rows.reset_index(drop=True), experts, seed)
        order = np.argsort(labels, kind="stable").reshape(experts, -1)
        layers.append(torch.from_numpy(np.sort(rows["neuron"].to_numpy()[order], axis=1)))
    return Partition(method, tuple(layers))


def flap_scores(neurons: pd.DataFrame, down: Sequence[Tensor]) -> list[Tensor]:
    """FLAP's importance Var(h_i)·‖W_down[:, i]‖² per layer, `(d_ffn,)` (An et al. 2024, arXiv:2312.11983).

    `down` holds each layer's `down_proj.weight`, `(d_model, d_ffn)`.
    """
    found = []
    for (_, rows), weight in zip(neurons.sort_values(["layer", "neuron"]).groupby("layer"), down, strict=True):
        if len(rows) != weight.shape[1]:
            raise BenchError(
                f"The statistics have {len(rows)} neurons a layer and the model {weight.shape[1]}: "
                "they belong to another model; scan this one."
            )
        variance = torch.tensor((rows["act_sq"] - rows["act_mean"] ** 2).to_numpy()).clamp(min=0)
        found.append(variance * weight.detach().cpu().double().square().sum(0))
    return found
