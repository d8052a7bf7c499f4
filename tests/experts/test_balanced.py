"""Balanced clusters: sizes as promised, and an assignment that nothing can beat."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import balanced

KINDS = ("plain", "ties", "heavy", "equal")


def total(cost: np.ndarray, labels: np.ndarray) -> float:
    return float(cost[np.arange(len(cost)), labels].sum())


def optimum(cost: np.ndarray, capacity: int) -> float:
    seats = np.repeat(cost, capacity, axis=1)
    return float(seats[linear_sum_assignment(seats)].sum())


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum()) for c in np.unique(labels))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(["plain", "ties", "heavy", "equal"])
)
def test_assignment_is_the_cheapest(columns: int, capacity: int, seed: int, kind: str) -> None:
    cost = np.random.default_rng(seed).random((columns * capacity, columns))
    cost = {"plain": cost, "ties": np.round(cost, 1), "heavy": np.exp(9 * cost), "equal": np.ones_like(cost)}[kind]
    labels = balanced.assign_balanced(cost, capacity)
    assert np.bincount(labels, minlength=columns).tolist() == [capacity] * columns
    assert total(cost, labels) == pytest.approx(optimum(cost, capacity), rel=1e-9)


def test_assignment_when_nearly_all_rows_want_one_column() -> None:
    cost = np.random.default_rng(0).random((200, 5)) + np.array([0, 9, 9, 9, 9])
    assert total(cost, balanced.assign_balanced(cost, 40)) == pytest.approx(optimum(cost, 40), rel=1e-12)


def test_rows_that_do_not_fill_the_columns() -> None:
    with pytest.raises(ValueError, match="7 rows do not fill 2 columns of 3"):
        balanced.assign_balanced(np.zeros((7, 2)), 3)


def test_equal_blobs_are_found() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 25)
    points = rng.normal(size=(100, 2)) * 0.1 + np.array([[0, 0], [3, 0], [0, 3], [3, 3]])[truth]
    labels = balanced.balanced_kmeans(points, 4, seed=0)
    assert len({tuple(pair) for pair in zip(truth, labels, strict=True)}) == 4


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
def test_sizes_differ_by_at_most_one(n: int, clusters: int, seed: int, repeated: bool) -> None:
    points = np.random.default_rng(seed).normal(size=(n, 2))
    if repeated:  # many dead neurons are one and the same point
        points[: n // 2] = 1.0
    clusters = min(clusters, n)
    sizes = np.bincount(balanced.balanced_kmeans(points, clusters, seed), minlength=clusters)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


def test_rounds_are_as_good_as_with_exact_assignment() -> None:
    """scipy's optimum for the clusters' own means may be 3 % cheaper at most."""
    points = np.random.default_rng(1).normal(size=(400, 5))
    labels = balanced.balanced_kmeans(points, 8, seed=0)
    centres = np.stack([points[labels == c].mean(0) for c in range(8)])
    cost = ((points[:, None] - centres) ** 2).sum(-1)
    assert inertia(points, labels) <= 1.03 * optimum(cost, 50)
    shuffled = np.random.default_rng(2).permutation(labels)
    assert inertia(points, shuffled) > 1.3 * optimum(cost, 50)


def test_scale_and_offset_do_not_matter() -> None:
    points = np.random.default_rng(0).normal(size=(120, 4))
    plain, moved = (balanced.balanced_kmeans(x, 6, seed=3) for x in (points, 2.0**-70 * (points + 64.0)))
    assert (plain == moved).mean() > 0.9
    np.testing.assert_array_equal(plain, balanced.balanced_kmeans(points, 6, seed=3))


def test_outlier_and_spread_do_not_break_it() -> None:
    points = np.exp(2 * np.random.default_rng(0).normal(size=(600, 3)))
    points[0] = 1e6
    assert np.bincount(balanced.balanced_kmeans(points, 12, seed=0)).tolist() == [50] * 12


def test_what_cannot_be_clustered() -> None:
    with pytest.raises(BenchError, match="3 points cannot make 4 clusters: choose 1 to 3"):
        balanced.balanced_kmeans(np.zeros((3, 2)), 4, seed=0)
    with pytest.raises(BenchError, match="1 of 3 points are not finite"):
        balanced.balanced_kmeans(np.array([[0.0], [np.nan], [1.0]]), 2, seed=0)
