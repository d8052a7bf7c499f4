"""Balanced assignment keeps its promise of size and comes close to the optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tinyonn_lib.experts import cluster


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_every_column_gets_its_capacity(columns: int, capacity: int, seed: int, ties: bool) -> None:
    cost = np.random.default_rng(seed).random((columns * capacity, columns))
    labels = cluster.assign_balanced(np.round(cost, 1) if ties else cost, capacity)
    assert np.bincount(labels, minlength=columns).tolist() == [capacity] * columns


def test_assignment_is_close_to_optimal() -> None:
    rng = np.random.default_rng(0)
    points, centres = rng.normal(size=(120, 3)), rng.normal(size=(6, 3))
    cost = ((points[:, None] - centres) ** 2).sum(-1)
    greedy = cost[np.arange(120), cluster.assign_balanced(cost, 20)].sum()
    rows, columns = linear_sum_assignment(np.repeat(cost, 20, axis=1))
    assert greedy <= 1.1 * np.repeat(cost, 20, axis=1)[rows, columns].sum()


def test_balanced_kmeans_finds_equal_blobs() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 25)
    points = rng.normal(size=(100, 2)) * 0.1 + np.array([[0, 0], [3, 0], [0, 3], [3, 3]])[truth]
    labels = cluster.balanced_kmeans(points, 4, seed=0)
    assert len({tuple(pair) for pair in zip(truth, labels, strict=True)}) == 4


def test_balanced_kmeans_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="7 points"):
        cluster.balanced_kmeans(np.zeros((7, 2)), 2, seed=0)


def test_kmeans_numbers_clusters_by_size() -> None:
    points = np.concatenate([np.zeros((5, 1)), np.full((20, 1), 9.0), np.full((10, 1), 5.0)])
    assert np.bincount(cluster.kmeans(points, 3, seed=0)).tolist() == [20, 10, 5]


def test_map_is_reproducible_and_keeps_blobs_apart() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(40, 4)), rng.normal(size=(40, 4)) + 20])
    first, second = (cluster.umap_map(points, seed=3, neighbours=8).to_numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert cluster.silhouette(first, np.repeat([0, 1], 40), seed=0) > 0.6
