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
QUALITY_SAMPLE = 20_000
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
    """Adjusted Rand index of two clusterings of the same points (Hubert and Arabie 1985): 1 the same, 0 by chance.

    Only of the points that are in a cluster in both; NaN where these are in fewer than two clusters of either.
    """
    from sklearn.metrics import adjusted_rand_score

    both = (one != NOISE) & (other != NOISE)
    if min(len(np.unique(one[both])), len(np.unique(other[both]))) < 2:
        return float("nan")
    return float(adjusted_rand_score(one[both], other[both]))


def stability(pairs: Sequence[tuple[Labels, Labels]]) -> tuple[float, float]:
    """Mean agreement of pairs of clusterings, NaN where one has none, and the mean share of points it is about."""
    shares = [((one != NOISE) & (other != NOISE)).mean() for one, other in pairs]
    return float(np.mean([agreement(*pair) for pair in pairs])), float(np.mean(shares))


def quality(
    points: Points,
    labels: Labels,
    halves: tuple[Points, Points] | None,
    clusters: int,
    seed: int,
    method: str = "kmeans",
) -> pd.DataFrame:
    """What the clusters of a method are worth, beside a control without structure.

    All but the first two measures are of the same `QUALITY_SAMPLE` points at random where there are more.

    Args:
        points: `(n, d)`, a row per neuron.
        labels: The clusters that the method found, `(n,)`.
        halves: The same neurons' rows from two halves of the data, `(n, e)` each; None where there are none. Columns
            that are the same in both are left out: they would agree whatever the data.
        clusters, seed, method: As for `find`.

    Returns:
        Frame with `measure, value, meaning`; a value is NaN where there is nothing to compare, and `meaning` says why.
    """
    drawn = _sample(len(points), QUALITY_SAMPLE, seed)
    some = points[drawn]
    about = f"; {len(drawn):,} neurons at random" if len(drawn) < len(points) else ""
    # HDBSCAN itself has no seed, only the sample that it is given.
    by_chance = method != "hdbscan" or len(drawn) > HDBSCAN_SAMPLE
    seeds = (seed, seed + 1, seed + 2) if by_chance else (seed,)
    rows = [
        ("clusters", float(len(np.unique(labels[labels != NOISE]))), "how many were found"),
        ("noise", float((labels == NOISE).mean()), "share of neurons in no cluster"),
    ]

    def add(measure: str, value: float, meaning: str, why_not: str = "fewer than two clusters to compare") -> None:
        rows.append((measure, value, (f"no value: {why_not}" if np.isnan(value) else meaning) + about))

    def add_agreement(measure: str, pairs: list[tuple[Labels, Labels]], meaning: str) -> None:
        value, share = stability(pairs)
        add(measure, value, meaning + (f", of the {share:.1%} of neurons in a cluster both times" if share < 1 else ""))

    shuffled = np.random.default_rng(seed).permuted(some, axis=0)
    control = silhouette(shuffled, find(method, shuffled, clusters, seed), seed)
    add("silhouette", silhouette(some, labels[drawn], seed), "1 islands, 0 a continuum cut into pieces")
    add("silhouette, shuffled", control, "control: the same method, every column shuffled by itself")
    if by_chance:
        found = [find(method, some, clusters, each) for each in seeds]
        meaning = "adjusted Rand index over three seeds: 1 the same clusters, 0 chance"
        add_agreement("agreement, seeds", list(combinations(found, 2)), meaning)
    else:
        add("agreement, seeds", np.nan, "", f"{method} finds the same with every seed in so few neurons")
    if halves is not None:
        one, other = (half[drawn] for half in halves)
        differs = (one != other).any(0)
        if differs.any():
            one, other = one[:, differs], other[:, differs]
            pairs = [(find(method, one, clusters, each), find(method, other, clusters, each)) for each in seeds]
            mean = ", mean over three seeds (each in both)" if by_chance else ""
            without = _left_out(int((~differs).sum()), points.shape[1] - len(differs))
            meaning = f"adjusted Rand index of clusters from two halves of the data{mean}{without}"
            add_agreement("agreement, halves", pairs, meaning)
        else:
            add("agreement, halves", np.nan, "", "the halves do not differ")
    return pd.DataFrame(rows, columns=["measure", "value", "meaning"])


def _left_out(same: int, missing: int) -> str:
    """How many columns the halves are clustered without, and why, in words."""
    parts = [f"{same} the same in both"] if same else []
    parts += [f"{missing} that only the whole has"] if missing else []
    return f", without feature columns: {' and '.join(parts)}" if parts else ""


def verdict(measured: pd.Series) -> str:
    """What `quality` found, in words.

    Args:
        measured: its values by measure, those that have one.
    """
    count, own, control = (measured.get(name) for name in ("clusters", "silhouette", "silhouette, shuffled"))
    if own is None:
        return f"{count:.0f} clusters were found: there is nothing to compare."
    said = f"{count:.0f} clusters have a silhouette of {own:.2f}"
    if control is None:
        said += "; in shuffled columns the method finds none"
    else:
        said += f", shuffled columns {control:.2f}: {'structure' if own > control + 0.05 else 'no more than chance'}"
    said += ", in pieces of a continuum rather than islands." if own < 0.5 else "."
    if (halves := measured.get("agreement, halves")) is not None:
        said += f" Clusters from two halves of the texts agree by {halves:.2f} (adjusted Rand index)."
    return said


def _sample(n: int, most: int, seed: int) -> NDArray[np.int64]:
    """Indices of at most so many of n things, ascending."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def _by_size(labels: NDArray[np.integer]) -> Labels:
    """The same clusters, numbered by size, largest first; noise stays noise."""
    order = np.argsort(-np.bincount(labels[labels != NOISE]), kind="stable")
    return np.append(np.argsort(order), NOISE)[labels].astype(np.int64)
