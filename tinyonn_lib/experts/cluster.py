"""Clusters of neurons and their map: k-means, its balanced variant, and UMAP for the eye."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Points = NDArray[np.float64]


def kmeans(points: Points, clusters: int, seed: int) -> NDArray[np.int64]:
    """Cluster of each point, `(n, d) → (n,)`; clusters are numbered by size, largest first."""
    from sklearn.cluster import KMeans

    labels = KMeans(clusters, n_init=4, random_state=seed).fit_predict(points)
    order = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    return np.argsort(order)[labels].astype(np.int64)


def balanced_kmeans(points: Points, clusters: int, seed: int, rounds: int = 10) -> NDArray[np.int64]:
    """Clusters of equal size, `(n, d) → (n,)`; n must be a multiple of `clusters`.

    Lloyd iterations with `assign_balanced` for the assignment step: fractions of a second where an exact assignment
    takes many (PEERS: 17 to 38 s for 7,000 points in 100 clusters).
    """
    from sklearn.cluster import kmeans_plusplus

    capacity, rest = divmod(len(points), clusters)
    if rest:
        raise ValueError(f"{len(points)} points do not divide into {clusters} equal clusters")
    centres, _ = kmeans_plusplus(points, clusters, random_state=seed)
    best, best_cost = np.zeros(len(points), np.int64), np.inf
    for _ in range(rounds):
        distance = ((points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)).clip(min=0)
        labels = assign_balanced(distance, capacity)
        cost = float(distance[np.arange(len(points)), labels].sum())
        if cost >= best_cost * (1 - 1e-9):
            break
        best, best_cost = labels, cost
        centres = np.stack([points[labels == c].mean(0) for c in range(clusters)])
    return best


def assign_balanced(cost: Points, capacity: int) -> NDArray[np.int64]:
    """Give each row a column, exactly `capacity` rows a column, `(n, k) → (n,)`, at little more than least cost.

    First a price per column at which demand meets capacity, by entropic transport (Cuturi 2013, arXiv:1306.0895);
    then, at these prices, rounds of bids: every free row bids for its cheapest open column, and a column keeps the
    bids with the largest regret (second-cheapest minus cheapest). Ends after at most k rounds.
    """
    n, k = cost.shape
    cost = cost + _prices(cost, capacity)
    labels = np.full(n, -1, np.int64)
    room = np.full(k, capacity)
    free = np.arange(n)
    while len(free):
        open_columns = np.flatnonzero(room)
        bids = cost[np.ix_(free, open_columns)]
        choice = bids.argmin(1)
        if len(open_columns) > 1:
            two = np.partition(bids, 1, axis=1)
            regret = two[:, 1] - two[:, 0]
        else:
            regret = np.zeros(len(free))
        order = np.lexsort((free, -regret, choice))
        rank = np.arange(len(free)) - np.searchsorted(choice[order], choice[order])
        taken = order[rank < room[open_columns[choice[order]]]]
        labels[free[taken]] = open_columns[choice[taken]]
        room -= np.bincount(labels[free[taken]], minlength=k)
        free = free[labels[free] < 0]
    return labels


def _prices(cost: Points, capacity: int, sharpness: float = 0.05, rounds: int = 60) -> Points:
    """What each column must charge so that about `capacity` rows prefer it, `(n, k) → (k,)`."""
    from scipy.special import softmax

    blur = sharpness * float(cost.std()) or 1.0
    prices = np.zeros(cost.shape[1])
    for _ in range(rounds):
        prices += blur * np.log(softmax(-(cost + prices) / blur, axis=1).sum(0) / capacity + 1e-12)
    return prices


def umap_map(points: Points, seed: int, neighbours: int = 15, min_dist: float = 0.1) -> pd.DataFrame:
    """UMAP coordinates `x, y` of every point, `(n, d) → (n, 2)`, reproducible for a seed.

    The neighbours are computed exactly first: that is faster than nn-descent at this size and spares its
    compilation.
    """
    import warnings

    from sklearn.neighbors import NearestNeighbors

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from umap import UMAP

        # The point itself comes first, as UMAP expects of a precomputed neighbour table.
        distance, index = NearestNeighbors(n_neighbors=min(neighbours, len(points) - 1)).fit(points).kneighbors(points)
        mapper = UMAP(
            n_neighbors=index.shape[1],
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(index.astype(np.int32), distance.astype(np.float32), None),
        )
        embedded = mapper.fit_transform(points.astype(np.float32))
    return pd.DataFrame({"x": embedded[:, 0], "y": embedded[:, 1]})


def silhouette(points: Points, labels: NDArray[np.int64], seed: int, sample: int = 3000) -> float:
    """Mean silhouette of at most `sample` points, in [−1, 1]."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(points, labels, sample_size=min(sample, len(points)), random_state=seed))
