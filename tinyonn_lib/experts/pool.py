"""A pool: so many experts over all layers together, as document 000 counts them ("100 experts of 128 neurons").

A neuron belongs to its layer, so an expert's neurons do, too; what is shared out over the layers is the number of
experts.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.balanced import balanced_kmeans
from tinyonn_lib.experts.partition import DROPPED, SHARED, Partition
from tinyonn_lib.experts.score import FEATURES


def pool(
    scores: pd.DataFrame, experts: int = 100, size: int = 128, *, rest: str = "shared", seed: int = 0
) -> Partition:
    """Exactly `experts` experts of `size` neurons: the neurons with the highest S_p, in balanced clusters by layer.

    A layer gets experts in proportion to its neurons among the `experts · size` best of the model (largest remainders),
    then gives its own best ones. With z-scores within the layer that is nearly the same number for each; with global
    ones layers compete.

    Args:
        scores: `layer, neuron, sp` and features of every neuron.
        rest: the other neurons become `shared` (always on) or `dropped`.

    Raises:
        BenchError: more neurons than there are.
    """
    if rest not in ("shared", "dropped"):
        raise BenchError(f"rest={rest}: choose shared or dropped.")
    wanted = experts * size
    if experts < 1 or size < 1 or wanted > len(scores):
        raise BenchError(f"A pool of {experts} experts of {size} needs {wanted} neurons, there are {len(scores)}.")
    ordered = scores.sort_values(["layer", "neuron"]).reset_index(drop=True)
    best = ordered["sp"].nlargest(wanted, keep="first").index
    sizes = ordered.groupby("layer").size().to_numpy()
    counts = _allot(ordered.loc[best].groupby("layer").size().reindex(range(len(sizes)), fill_value=0).to_numpy(),
                    sizes // size, experts)  # fmt: skip
    features = [name for name in FEATURES if name in ordered.columns]
    labels = []
    for (_, rows), count in zip(ordered.groupby("layer"), counts, strict=True):
        label = np.full(len(rows), SHARED if rest == "shared" else DROPPED, np.int64)
        top = np.sort(np.argsort(-rows["sp"].to_numpy(), kind="stable")[: count * size])
        if count:
            label[top] = balanced_kmeans(rows[["sp", *features]].to_numpy(np.float64)[top], int(count), seed)
        labels.append(label)
    return Partition.of("pool", labels, counts.tolist())


def _allot(votes: np.ndarray, room: np.ndarray, seats: int) -> np.ndarray:
    """Seats in proportion to votes by largest remainders, no layer more than its room."""
    quota = votes / votes.sum() * seats
    given = np.minimum(np.floor(quota).astype(np.int64), room)
    while (left := seats - int(given.sum())) > 0:
        order = np.argsort(-(quota - given), kind="stable")
        waiting = order[(given < room)[order]]
        if not len(waiting):
            raise BenchError(f"{seats} experts do not fit into the layers one by one: choose smaller ones.")
        given[waiting[:left]] += 1  # one each: a second one only when all have had theirs
    return given
