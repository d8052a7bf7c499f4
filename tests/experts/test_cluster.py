"""Clusters by every method, and measures that tell structure from none."""

from __future__ import annotations

import numpy as np
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import cluster

TRUTH = np.repeat(np.arange(3), [60, 40, 20])


@pytest.fixture
def blobs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(120, 3)) * 0.2 + np.array([[0, 0, 0], [5, 0, 5], [0, 5, 5]])[TRUTH]


def test_kmeans_numbers_clusters_by_size() -> None:
    points = np.concatenate([np.zeros((5, 1)), np.full((20, 1), 9.0), np.full((10, 1), 5.0)])
    assert np.bincount(cluster.kmeans(points, 3, seed=0)).tolist() == [20, 10, 5]


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_sampled_centres_label_every_point(method: str, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "KMEANS_SAMPLE", 60)
    monkeypatch.setattr(cluster, "HDBSCAN_SAMPLE", 60)
    found = cluster.find(method, blobs, 3, seed=1)
    np.testing.assert_array_equal(found, TRUTH)
    np.testing.assert_array_equal(found, cluster.find(method, blobs, 3, seed=1))


def test_hdbscan_leaves_what_is_in_no_group_as_noise(blobs: np.ndarray) -> None:
    far = np.array([[40.0, 40, 40], [-40, 30, 0], [0, -50, 20]])
    found = cluster.hdbscan(np.concatenate([blobs, far]), least=10, seed=0)
    np.testing.assert_array_equal(found, np.append(TRUTH, [cluster.NOISE] * 3))


def test_hdbscan_on_too_few_points() -> None:
    assert cluster.find("hdbscan", np.zeros((4, 2)), 2, seed=0).tolist() == [cluster.NOISE] * 4


@pytest.mark.parametrize("method", cluster.METHODS)
@pytest.mark.parametrize("points", [np.ones((30, 3)), np.c_[np.arange(30.0), np.ones(30)]], ids=["equal", "constant"])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_degenerate_points_get_labels(method: str, points: np.ndarray) -> None:
    labels = cluster.find(method, points, 3, seed=0)
    assert labels.shape == (30,)
    assert labels.dtype == np.int64
    assert set(labels) <= {-1, 0, 1, 2}


@pytest.mark.parametrize("method", cluster.METHODS)
def test_a_point_that_is_not_finite(method: str) -> None:
    points = np.ones((30, 3))
    points[4, 1] = np.nan
    with pytest.raises(BenchError, match="1 of 30 points are not finite"):
        cluster.find(method, points, 3, seed=0)


def test_unknown_method() -> None:
    with pytest.raises(BenchError, match="no cluster method 'magic'; known: kmeans, hdbscan, balanced"):
        cluster.find("magic", np.ones((4, 1)), 2, seed=0)


def test_silhouette_by_hand_and_without_noise() -> None:
    points = np.array([[0.0], [1.0], [10.0], [11.0], [500.0]])
    labels = np.array([0, 0, 1, 1, cluster.NOISE])
    outer, inner = 1 - 1 / 10.5, 1 - 1 / 9.5  # 1 − own / nearest other mean distance
    assert cluster.silhouette(points, labels, seed=0) == pytest.approx((outer + inner) / 2)
    assert np.isnan(cluster.silhouette(points, np.zeros(5, np.int64), seed=0))
    assert np.isnan(cluster.silhouette(points, np.full(5, cluster.NOISE), seed=0))


def test_stability_is_the_mean_over_pairs() -> None:
    answers = {0: np.array([0, 0, 1, 1]), 1: np.array([1, 1, 0, 0]), 2: np.array([0, 1, 0, 1])}
    # ARI by hand: 1 for the same partition by other names, −0.5 for the crossed one.
    found = cluster.stability(np.zeros((4, 1)), lambda points, seed: answers[seed], (0, 1, 2))
    assert found == pytest.approx((1 - 0.5 - 0.5) / 3)


@pytest.mark.parametrize("method", cluster.METHODS)
def test_quality_tells_islands_from_a_cloud(method: str) -> None:
    rng = np.random.default_rng(0)
    # Along a line, so that columns shuffled by themselves fill the space between.
    islands = rng.normal(size=(240, 4)) * 0.1 + np.repeat(np.arange(3.0), 80)[:, None]
    halves = (islands, islands + rng.normal(size=islands.shape) * 0.05)
    table = cluster.quality(islands, halves, 3, seed=0, method=method)
    value = table.set_index("measure")["value"]
    assert list(table) == ["measure", "value", "meaning"]
    assert value["clusters"] == 3
    assert value["noise"] < 0.05
    assert value["silhouette"] > 0.8
    assert value["agreement, seeds"] > 0.95
    assert value["agreement, halves"] > 0.95
    # The control may have fewer than two dense groups, and then no silhouette.
    assert not value["silhouette, shuffled"] > 0.5


def test_quality_without_halves(blobs: np.ndarray) -> None:
    assert "agreement, halves" not in set(cluster.quality(blobs, None, 3, seed=0)["measure"])
