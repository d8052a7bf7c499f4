"""Clusters of equal size: Lloyd's iterations around an exact assignment that takes hundredths of a second.

The assignment is a transportation problem: n rows go to k columns of equal capacity at least total cost. Every column
has a price, and a row wants the column whose cost plus price is least. Entropic transport (Cuturi 2013,
arXiv:1306.0895) finds prices at which few rows too many want the same column; these few then move one after the other
along shortest paths between columns (successive shortest paths with potentials: Ahuja, Magnanti and Orlin 1993, chapter
9), which keeps the assignment optimal for the loads it has. The paths run over k columns, not over n rows: hence fast.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tinyonn_lib.errors import BenchError

Array = NDArray[np.floating]
Labels = NDArray[np.int64]

ROUNDS = 10
SLACK = 1e-3  # of the costs' standard deviation: what a move may cost too much, so that many rows can move at once
BLUR = 0.02  # of the costs' standard deviation: how sharply rows prefer the cheapest column while prices are found


def check(points: Array, clusters: int = 1) -> int:
    """The number of points, when they are finite and enough for so many clusters.

    Raises:
        BenchError: They are not.
    """
    n = len(points)
    if not 1 <= clusters <= n:
        raise BenchError(f"{n} points cannot make {clusters} clusters: choose 1 to {n}.")
    bad = n - int(np.isfinite(points).all(1).sum())
    if bad:
        raise BenchError(f"{bad} of {n} points are not finite: leave these neurons out, or scan again.")
    return n


def balanced_kmeans(points: Array, clusters: int, seed: int) -> Labels:
    """Clusters whose sizes differ by at most one, `(n, d) → (n,)`; equal ones when `clusters` divides n.

    Computed in float32 on centred points of unit variance; at most `ROUNDS` rounds, fewer when the sum of squared
    distances falls by less than 1e-4 of itself.

    Raises:
        BenchError: More clusters than points, or a point that is not finite.
    """
    from threadpoolctl import threadpool_limits

    check(points, clusters)
    x = points - points.mean(0)
    x = (x * (1 / (np.linalg.norm(x) / x.size**0.5 or 1.0))).astype(np.float32)
    # A second thread gains nothing on steps this small, and costs tenfold where another process has the core.
    with threadpool_limits(1):
        return _rounds(x, clusters, seed)


def assign_balanced(cost: Array, capacity: int) -> Labels:
    """Give each row a column, exactly `capacity` rows a column, at least total cost, `(n, k) → (n,)`.

    Exact to rounding in the costs' own precision.

    Raises:
        ValueError: n is not k·capacity.
    """
    if len(cost) != cost.shape[1] * capacity:
        raise ValueError(f"{len(cost)} rows do not fill {cost.shape[1]} columns of {capacity}")
    return _settle(cost, _prices(cost, np.zeros(cost.shape[1]), rounds=30))[0]


def _rounds(x: NDArray[np.float32], clusters: int, seed: int) -> Labels:
    """Lloyd's iterations on centred points of unit variance."""
    from scipy.sparse import csr_array
    from sklearn.cluster import kmeans_plusplus

    n = len(x)
    # A sample of 20 points a cluster seeds as well as all of them; k-means++ over thousands of dimensions is slow, and
    # slower in float32, where scikit-learn computes in float64 by pieces.
    sample = x[np.random.default_rng(seed).permutation(n)[: 20 * clusters]].astype(np.float64)
    centres = kmeans_plusplus(sample, clusters, random_state=seed)[0].astype(np.float32)
    prices: Array = np.zeros(clusters)
    best, least = np.zeros(n, np.int64), np.inf
    norm = float(np.einsum("ij,ij->", x, x, dtype=np.float64))
    for round_ in range(ROUNDS):
        # Without the points' own norms, which do not depend on the column.
        distance = x @ (-2 * centres.T) + (centres**2).sum(1)
        # The first means are far from the seeds, so prices start afresh twice.
        prices = _prices(distance, prices, rounds=30 if round_ < 2 else 8)
        labels, prices = _settle(distance, prices, SLACK * float(distance.std()))
        total = norm + float(distance[np.arange(n), labels].sum(dtype=np.float64))
        if total < least:
            best = labels
        if total >= least * (1 - 1e-4):
            break
        least = total
        member = csr_array((np.ones(n, np.float32), (labels, np.arange(n))), shape=(clusters, n))
        centres = ((member @ x) / np.bincount(labels, minlength=clusters)[:, None]).astype(np.float32)
    return best


def _prices(cost: Array, prices: Array, rounds: int) -> Array:
    """What each column must charge so that about as many rows want each, `(n, k) → (k,)`, better than `prices` did."""
    n, k = cost.shape
    spread = float(cost.std()) or 1.0
    for blur in np.geomspace(1.0 if rounds > 8 else BLUR, BLUR, rounds) * spread:
        wish = cost + prices.astype(cost.dtype)
        wish -= wish.min(1, keepdims=True)
        np.exp(wish * cost.dtype.type(-1 / blur), out=wish)
        wish /= wish.sum(1, keepdims=True)
        prices = prices + blur * np.log(wish.sum(0, dtype=np.float64) * k / n + 1e-6)
    return prices


def _settle(cost: Array, prices: Array, slack: float = 0.0) -> tuple[Labels, Array]:
    """Least-cost assignment with loads of ⌊n/k⌋ or ⌈n/k⌉ rows a column, `(n, k) → (n,), (k,)`, and its prices.

    Args:
        slack: How much more than the cheapest row another may cost and move along with it; 0 is exact.
    """
    n, k = cost.shape
    lower, upper = n // k, -(-n // k)
    labels = (cost + prices.astype(cost.dtype)).argmin(1)
    load = np.bincount(labels, minlength=k)
    step = np.stack([_cheapest_moves(cost, labels, column) for column in range(k)])
    while load.max() > upper or load.min() < lower:
        excess = load - (upper if load.max() > upper else lower)
        room = (lower if load.min() < lower else upper) - load
        path, prices = _shortest_path(step, prices, excess > 0, room > 0)
        moves = []
        for source, target in pairwise(path):
            rows = np.flatnonzero(labels == source)
            extra = cost[rows, target] - cost[rows, source]
            moves.append((rows[extra <= extra.min() + slack], target))
        many = min(excess[path[0]], room[path[-1]], *(len(rows) for rows, _ in moves))
        for rows, target in moves:
            labels[rows[:many]] = target
        load[path[0]] -= many
        load[path[-1]] += many
        for column in path:
            step[column] = _cheapest_moves(cost, labels, column)
    return labels, prices - prices.mean()


def _cheapest_moves(cost: Array, labels: Labels, column: int) -> Array:
    """What it costs to move a row of this column to each other one, for the row where that is least, `(k,)`."""
    rows = np.flatnonzero(labels == column)
    moves = (cost[rows] - cost[rows, column][:, None]).min(0, initial=np.inf).astype(np.float64)
    moves[column] = np.inf
    return moves


def _shortest_path(
    step: Array, prices: Array, sources: NDArray[np.bool_], targets: NDArray[np.bool_]
) -> tuple[list[int], Array]:
    """Dijkstra from all sources to the nearest target over `step` plus price differences; the path, and new prices."""
    length = np.maximum(step + prices - prices[:, None], 0.0)  # negative by rounding only
    distance = np.where(sources, 0.0, np.inf)
    before, open_ = np.full(len(prices), -1), distance.copy()
    while not targets[here := int(open_.argmin())]:
        open_[here] = np.inf
        there = distance[here] + length[here]
        nearer = there < distance
        distance[nearer] = open_[nearer] = there[nearer]
        before[nearer] = here
    path = [here]
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path, prices + np.maximum(distance[here] - distance, 0.0)
