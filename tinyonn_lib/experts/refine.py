"""Joint refinement of a partition and its router: tokens choose experts, then neurons choose experts, by turns.

The router that foresees the oracle best (ridge regression) says which tokens each expert sees. Every neuron then goes
where the tokens are that it matters to, all of them at once, by an exact assignment to experts of equal size; the
shared neurons are an expert that sees every token. What is maximised is the energy ‖W_down[:, i] h_i‖² of the neurons
that are on, summed over tokens: an alternating maximisation in the way of k-means, except that tokens choose several
experts, and only through what a linear router can know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.experts import analytic
from tinyonn_lib.experts.balanced import assign_balanced
from tinyonn_lib.experts.evidence import LayerEvidence
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.routing import top_mask
from tinyonn_lib.progress import Progress

ROUNDS = 6
"""Rounds after which the energy hardly rises any more: most of it comes with the first two."""


@dataclass(frozen=True)
class Refined:
    """What came out.

    Attributes:
        partition: the refined one, with the same shapes.
        energy: share of all neurons' energy that is on, on the tokens it was refined with: `layer, round, share`.
    """

    partition: Partition
    energy: pd.DataFrame


def refine(
    evidence: Iterable[LayerEvidence],
    partition: Partition,
    *,
    k: int,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Refined:
    """Refine every layer for k active experts per token; what a layer had at its best round counts.

    Shared neurons take part when they are as many as some experts together, else they stay. Dropped ones stay.

    Args:
        evidence: of calibration tokens.
        rounds: assignments; 0 leaves the partition as it is.
    """
    experts: list[Tensor] = []
    shared: list[Tensor] = []
    rows = []
    layers = len(partition.experts)
    for place, layer in enumerate(evidence):
        index, always = partition.experts[place], partition.shared[place]
        value = layer.h.float().square() * layer.contribution.square()
        best = -1.0
        for number in range(rounds + 1):
            on = top_mask(analytic.ridge(layer, index, seed)(layer.x), k)
            share = float((on * value[:, index].sum(-1)).sum() + value[:, always].sum()) / float(value.sum())
            rows.append((layer.layer, number, share))
            if share > best:
                best, kept = share, (index, always)
            if number < rounds:
                index, always = _assigned(on, value, index, always)
            if progress:
                progress(place * (rounds + 1) + number + 1, layers * (rounds + 1), f"layer {layer.layer}")
        experts.append(kept[0])
        shared.append(kept[1])
    table = pd.DataFrame(rows, columns=["layer", "round", "share"])
    refined = Partition(partition.method, tuple(experts), tuple(shared), partition.dropped)
    return Refined(refined, table)


def _assigned(on: Tensor, value: Tensor, index: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Experts `(experts, size)` and shared neurons for which the value of what is on is greatest.

    Args:
        on: which experts each token sees, `(T, experts)`.
        value: of each neuron for each token, `(T, d_ffn)`.
    """
    count, size = index.shape
    more = len(shared) // size if len(shared) % size == 0 else 0
    mine = torch.cat([index.flatten(), shared[: more * size]]).sort().values
    gain = torch.cat([on.T @ value[:, mine], value[:, mine].sum(0, keepdim=True).expand(more, -1)]).T.double()
    labels = assign_balanced((-gain / gain.std().clamp(min=1e-30)).numpy(), size)
    groups = torch.from_numpy(np.argsort(labels, kind="stable")).view(count + more, size)
    found = mine[groups]
    return found[:count], found[count:].flatten().sort().values if more else shared
