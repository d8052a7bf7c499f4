"""Clusters by every method, and measures that tell structure from none."""

from __future__ import annotations

import numpy as np
import pandas as pd
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


def test_agreement_is_about_points_in_a_cluster_both_times() -> None:
    none = cluster.NOISE
    one, other = np.array([0, 0, 1, 1, 0, none, none]), np.array([1, 1, 0, 0, none, 0, none])
    assert cluster.agreement(one, other) == 1.0  # noise is no cluster on which to agree or not
    crossed = np.array([0, 1, 0, 1, none, none, none])
    assert cluster.agreement(one, crossed) == -0.5  # by hand


@pytest.mark.parametrize(
    ("one", "other"),
    [([-1, -1, -1, -1], [-1, -1, -1, -1]), ([0, 0, 0, 0], [0, 0, 0, 0]), ([0, 0, 1, 1], [0, 0, 0, 0]),
     ([0, 0, 1, -1], [0, 0, -1, 1])],
    ids=["noise", "one cluster", "one against two", "one in what is shared"],
)  # fmt: skip
def test_without_two_clusters_there_is_no_agreement(one: list[int], other: list[int]) -> None:
    assert np.isnan(cluster.agreement(np.array(one), np.array(other)))
    assert np.isnan(cluster.agreement(np.array(other), np.array(one)))


def test_stability_is_the_mean_over_pairs() -> None:
    same, renamed, crossed = np.array([[0, 0, 1, 1, -1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]])
    # ARI by hand: 1 for the same partition by other names, −0.5 for the crossed one.
    value, share = cluster.stability([(same, renamed), (same, crossed), (crossed, same), (crossed, crossed)])
    assert value == pytest.approx((1 - 0.5 - 0.5 + 1) / 4)
    assert share == pytest.approx((0.8 + 0.8 + 0.8 + 1) / 4)
    assert np.isnan(cluster.stability([(same, renamed), (same, np.zeros(5, np.int64))])[0])


def quality(points: np.ndarray, halves: tuple[np.ndarray, np.ndarray] | None, method: str = "kmeans") -> pd.DataFrame:
    """With three clusters, seed 0; by measure."""
    labels = cluster.find(method, points, 3, 0)
    table = cluster.quality(points, labels, halves, 3, 0, method)
    assert list(table) == ["measure", "value", "meaning"]
    return table.set_index("measure")


@pytest.fixture
def islands() -> np.ndarray:
    # Along a line, so that columns shuffled by themselves fill the space between.
    return np.random.default_rng(0).normal(size=(240, 4)) * 0.1 + np.repeat(np.arange(3.0), 80)[:, None]


@pytest.mark.parametrize("method", cluster.METHODS)
def test_quality_tells_islands_from_a_cloud(method: str, islands: np.ndarray) -> None:
    again = islands + np.random.default_rng(1).normal(size=islands.shape) * 0.05
    table = quality(islands, (islands, again), method)
    value = table["value"]
    assert value["clusters"] == 3
    assert value["noise"] < 0.05
    assert value["silhouette"] > 0.8
    assert value["agreement, halves"] > 0.95
    # The control may have fewer than two dense groups, and then no silhouette.
    assert not value["silhouette, shuffled"] > 0.5
    if method == "hdbscan":  # nothing is left to chance here, so seeds cannot differ
        assert np.isnan(value["agreement, seeds"])
        assert "hdbscan finds the same with every seed" in table["meaning"]["agreement, seeds"]
        assert "seeds" not in table["meaning"]["agreement, halves"]
    else:
        assert value["agreement, seeds"] > 0.95
        assert "three seeds" in table["meaning"]["agreement, halves"]


def test_nothing_but_noise_has_no_quality() -> None:
    cloud = np.random.default_rng(0).uniform(size=(30, 8))
    table = quality(cloud, (cloud, cloud + 0.01), "hdbscan")
    assert (table["value"]["clusters"], table["value"]["noise"]) == (0, 1)
    rest = table.drop(["clusters", "noise"])
    assert rest["value"].isna().all()
    assert rest["meaning"].str.startswith("no value: ").all()
    assert "fewer than two clusters" in rest["meaning"]["agreement, halves"]


def test_seeds_matter_to_hdbscan_on_a_sample(blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HDBSCAN_SAMPLE", 80)
    assert quality(blobs, None, "hdbscan")["value"]["agreement, seeds"] > 0.9


def test_quality_says_what_share_of_neurons_agreement_is_about(islands: np.ndarray) -> None:
    far = np.arange(1.0, 61)[:, None] * [50.0, -50, 50, -50]  # 60 points with none beside them
    points = np.concatenate([islands, far])
    table = quality(points, (points, points + 1e-3), "hdbscan")
    inside = (cluster.find("hdbscan", points, 3, 0) != cluster.NOISE).mean()
    assert table["value"]["agreement, halves"] == 1.0
    assert 0.7 < inside < 1
    assert f"of the {inside:.1%} of neurons in a cluster both times" in table["meaning"]["agreement, halves"]
    assert "both times" not in quality(points, (points, points + 1e-3))["meaning"]["agreement, halves"]


def test_what_is_the_same_in_both_halves_does_not_make_them_agree() -> None:
    rng = np.random.default_rng(0)
    same = np.repeat(np.arange(3.0), 80)[:, None] * 9  # rules the clusters, and is no evidence
    one, other = (np.hstack([rng.normal(size=(240, 2)), same]) for _ in range(2))
    assert cluster.agreement(*(cluster.kmeans(half, 3, 0) for half in (one, other))) == 1.0
    table = quality(np.hstack([one, rng.normal(size=(240, 2))]), (one, other))
    expected = [
        cluster.agreement(*(cluster.kmeans(half[:, :2], 3, seed) for half in (one, other))) for seed in range(3)
    ]
    assert table["value"]["agreement, halves"] == pytest.approx(np.mean(expected))
    assert abs(np.mean(expected)) < 0.1
    said = table["meaning"]["agreement, halves"]
    assert said.endswith("without feature columns: 1 the same in both and 2 that only the whole has")
    assert "without" not in quality(one[:, :2], (one[:, :2], other[:, :2]))["meaning"]["agreement, halves"]


def test_halves_that_do_not_differ_are_no_evidence(blobs: np.ndarray) -> None:
    table = quality(blobs, (blobs, blobs))
    assert np.isnan(table["value"]["agreement, halves"])
    assert table["meaning"]["agreement, halves"] == "no value: the halves do not differ"


def test_quality_without_halves(blobs: np.ndarray) -> None:
    assert "agreement, halves" not in quality(blobs, None).index


def test_many_neurons_are_measured_on_one_sample(blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "QUALITY_SAMPLE", 50)
    seen: list[np.ndarray] = []

    def first_column(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
        seen.append(points)
        return (points[:, 0] > 2.5).astype(np.int64)

    monkeypatch.setitem(cluster.METHODS, "kmeans", first_column)
    labels = np.append(np.arange(119) % 3, cluster.NOISE)
    table = cluster.quality(blobs, labels, (blobs, blobs + 1e-9), 3, 0).set_index("measure")
    control, *three = seen[:4]
    assert all(len(points) == 50 for points in seen)
    for points in three[1:] + seen[4:]:  # the same neurons every time
        np.testing.assert_allclose(points, three[0], atol=1e-6)
    np.testing.assert_array_equal(np.sort(control, axis=0), np.sort(three[0], axis=0))
    assert table["value"]["clusters"] == 3  # these two are counted, not drawn
    assert table["value"]["noise"] == 1 / 120
    drawn = table["meaning"].str.endswith("; 50 neurons at random")
    assert drawn.tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"clusters": 8, "silhouette": 0.35, "silhouette, shuffled": 0.2, "agreement, halves": 0.7},
         "8 clusters have a silhouette of 0.35, shuffled columns 0.20: structure, in pieces of a continuum rather than "
         "islands. Clusters from two halves of the texts agree by 0.70 (adjusted Rand index)."),
        ({"clusters": 3, "silhouette": 0.6, "silhouette, shuffled": 0.58},
         "3 clusters have a silhouette of 0.60, shuffled columns 0.58: no more than chance."),
        ({"clusters": 2, "silhouette": 0.7}, "0.70; in shuffled columns the method finds none."),
        ({"clusters": 0}, "0 clusters were found: there is nothing to compare."),
    ],
)  # fmt: skip
def test_the_verdict_says_what_was_measured(values: dict[str, float], says: str) -> None:
    assert cluster.verdict(pd.Series(values)).endswith(says)
