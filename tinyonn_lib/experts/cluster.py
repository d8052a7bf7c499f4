"""Clusters of neurons, by a method with a name, and what they are worth.

A method is one function `(points, clusters, seed) → labels` and one line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.balanced import balanced_kmeans, check

Points = NDArray[np.floating]
Labels = NDArray[np.int64]

KMEANS_SAMPLE = 50_000
HDBSCAN_SAMPLE = 10_000
SILHOUETTE_SAMPLE = 3_000
NOISE = -1


def kmeans(points: Points, clusters: int, seed: int) -> Labels:
    """Cluster of each point, `(n, d) → (n,)`; clusters are numbered by size, largest first.

    The centres come from at most `KMEANS_SAMPLE` points drawn at random, the best of four starts.

    Raises:
        BenchError: More clusters than points, or a point that is not finite.
    """
    from sklearn.cluster import KMeans

    check(points, clusters)
    drawn = _sample(len(points), max(KMEANS_SAMPLE, clusters), seed)
    return _by_size(KMeans(clusters, n_init=4, random_state=seed).fit(points[drawn]).predict(points))


def hdbscan(points: Points, least: int, seed: int) -> Labels:
    """Dense groups of at least `least` points, `(n, d) → (n,)`, numbered by size; −1 is noise, in no group.

    Campello et al. 2013 (PAKDD). Its time grows with n²: of more than `HDBSCAN_SAMPLE` points it sees a random sample,
    with `least` scaled down alike but not below 5, and every other point takes the label of the sampled point nearest
    to it, noise included. Only then does the seed matter.

    Raises:
        BenchError: A point is not finite.
    """
    from scipy.spatial import KDTree
    from sklearn.cluster import HDBSCAN

    n = check(points)
    drawn = _sample(n, HDBSCAN_SAMPLE, seed)
    size = max(5, round(least * len(drawn) / n))
    if len(drawn) < 2 * size:
        return np.full(n, NOISE)  # not enough for two groups
    found = HDBSCAN(min_cluster_size=size, copy=False).fit_predict(np.array(points[drawn], dtype=np.float64))
    if len(drawn) < n:
        found = found[KDTree(points[drawn]).query(points, workers=-1)[1]]
    return _by_size(found)


def dense_groups(points: Points, clusters: int, seed: int) -> Labels:
    """`hdbscan` where a number of clusters is given. It finds its own number: `clusters` only sets the least size of a
    group, a quarter of the n / clusters points that equal clusters would have, and at least 10."""
    return hdbscan(points, max(10, len(points) // (4 * clusters)), seed)


METHODS: dict[str, Callable[[Points, int, int], Labels]] = {
    "kmeans": kmeans,
    "hdbscan": dense_groups,
    "balanced": balanced_kmeans,
}
"""Name → function from points, number of clusters and seed to a label per point."""


def find(method: str, points: Points, clusters: int, seed: int) -> Labels:
    """Labels by a method of this name.

    Raises:
        BenchError: There is none.
    """
    if method not in METHODS:
        raise BenchError(f"There is no cluster method '{method}'; known: {', '.join(METHODS)}.")
    return METHODS[method](points, clusters, seed)


def silhouette(points: Points, labels: Labels, seed: int) -> float:
    """Mean silhouette (Rousseeuw 1987), in [−1, 1], of at most `SILHOUETTE_SAMPLE` points that are in a cluster.

    NaN where there are not at least two clusters to compare.
    """
    from sklearn.metrics import silhouette_score

    inside = np.flatnonzero(labels != NOISE)
    drawn = inside[_sample(len(inside), SILHOUETTE_SAMPLE, seed)]
    if not 2 <= len(np.unique(labels[drawn])) < len(drawn):
        return float("nan")
    return float(silhouette_score(points[drawn], labels[drawn]))


def agreement(one: Labels, other: Labels) -> float:
    """Adjusted Rand index of two clusterings of the same points (Hubert and Arabie 1985): 1 the same, 0 by chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(one, other))


def stability(points: Points, labels_of: Callable[[Points, int], Labels], seeds: Sequence[int]) -> float:
    """Mean agreement between the clusterings that `labels_of(points, seed)` gives with different seeds."""
    found = [labels_of(points, seed) for seed in seeds]
    return float(np.mean([agreement(one, other) for one, other in combinations(found, 2)]))


def quality(
    points: Points, halves: tuple[Points, Points] | None, clusters: int, seed: int, method: str = "kmeans"
) -> pd.DataFrame:
    """What the clusters of a method are worth, beside a control without structure.

    Args:
        points: `(n, d)`, a row per neuron.
        halves: The same neurons' rows from two halves of the data, `(n, d)` each; None where there are none.
        clusters, seed, method: As for `find`.

    Returns:
        Frame with `measure, value, meaning`.
    """

    def labels_of(some: Points, number: int) -> Labels:
        return find(method, some, clusters, number)

    labels = labels_of(points, seed)
    shuffled = np.random.default_rng(seed).permuted(points, axis=0)
    control = silhouette(shuffled, labels_of(shuffled, seed), seed)
    rows = [
        ("clusters", len(np.unique(labels[labels != NOISE])), "how many were found"),
        ("noise", float((labels == NOISE).mean()), "share of neurons in no cluster"),
        ("silhouette", silhouette(points, labels, seed), "1 islands, 0 a continuum cut into pieces"),
        ("silhouette, shuffled", control, "control: the same method, every column shuffled by itself"),
        (
            "agreement, seeds",
            stability(points, labels_of, (seed, seed + 1, seed + 2)),
            "adjusted Rand index over three seeds: 1 the same clusters, 0 chance",
        ),
    ]
    if halves is not None:
        agreed = agreement(labels_of(halves[0], seed), labels_of(halves[1], seed))
        rows.append(("agreement, halves", agreed, "adjusted Rand index of clusters from two halves of the data"))
    return pd.DataFrame(rows, columns=["measure", "value", "meaning"])


def _sample(n: int, most: int, seed: int) -> NDArray[np.int64]:
    """Indices of at most so many of n things, ascending."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def _by_size(labels: NDArray[np.integer]) -> Labels:
    """The same clusters, numbered by size, largest first; noise stays noise."""
    order = np.argsort(-np.bincount(labels[labels != NOISE]), kind="stable")
    return np.append(np.argsort(order), NOISE)[labels].astype(np.int64)
