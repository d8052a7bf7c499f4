"""Maps: reproducible, whole, and with a place for every point however degenerate."""

from __future__ import annotations

import numpy as np
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import cluster, maps

HALVES = np.repeat([0, 1], 60)
MAPS = {"umap": maps.umap_map, "tsne": maps.tsne_map}


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(120, 4)) + 20.0 * HALVES[:, None]


@pytest.mark.parametrize("method", MAPS)
def test_map_is_reproducible_and_keeps_blobs_apart(method: str, blobs: np.ndarray) -> None:
    first, second = (MAPS[method](blobs, 3, 8) for _ in range(2))
    assert list(first) == ["x", "y"]
    np.testing.assert_array_equal(first.to_numpy(), second.to_numpy())
    assert cluster.silhouette(first.to_numpy(), HALVES, seed=0) > 0.5


@pytest.mark.parametrize("method", MAPS)
def test_points_between_landmarks(method: str, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(maps.LANDMARKS, method, 50)
    points = np.concatenate([blobs, blobs])  # so that some of the others equal a landmark
    placed = MAPS[method](points, 0, 8).to_numpy()
    assert np.isfinite(placed).all()
    assert cluster.silhouette(placed, np.tile(HALVES, 2), seed=0) > 0.5
    chosen = np.random.default_rng(0).choice(240, 50, replace=False)
    alone = chosen[~np.isin((chosen + 120) % 240, chosen)]
    assert len(alone) > 10
    np.testing.assert_allclose(placed[(alone + 120) % 240], placed[alone], atol=1e-6)


def test_weights_fall_with_the_squared_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "NEAREST", 2)
    points = np.array([[0.0], [100.0], [200.0], [300.0], [400.0], [10.0]])

    class Chooser:
        def choice(self, n: int, most: int, replace: bool) -> np.ndarray:
            return np.arange(5)

    monkeypatch.setattr(maps.np.random, "default_rng", lambda seed: Chooser())
    placed = maps._laid_out(points, lambda marks: np.c_[marks, -marks], most=5, seed=0).to_numpy()
    share = (1 / 90**2) / (1 / 10**2 + 1 / 90**2)  # of the landmark at 100
    np.testing.assert_allclose(placed[5], [100 * share, -100 * share])
    np.testing.assert_array_equal(placed[:5], np.c_[points[:5], -points[:5]])


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize(
    "points",
    [np.zeros((1, 3)), np.eye(3), np.eye(6), np.ones((40, 3)), np.c_[np.arange(40.0), np.ones(40)], np.c_[:40.0]],
    ids=["one", "three", "six", "equal", "constant column", "one column"],
)
def test_degenerate_points_have_places(method: str, points: np.ndarray) -> None:
    placed = MAPS[method](points, 0, 15)
    assert placed.shape == (len(points), 2)
    assert np.isfinite(placed.to_numpy()).all()
    assert len(placed.drop_duplicates()) == len(points)


@pytest.mark.parametrize("method", MAPS)
def test_a_point_that_is_not_finite(method: str) -> None:
    with pytest.raises(BenchError, match="1 of 9 points are not finite"):
        MAPS[method](np.array([[np.inf]] + [[0.0]] * 8), 0, 5)


def test_umap_gets_the_point_itself_first(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.repeat(np.random.default_rng(0).normal(size=(4, 3)), 10, axis=0)  # each has nine equals
    seen: list[tuple[np.ndarray, np.ndarray, None]] = []

    class Mapper:
        def __init__(self, precomputed_knn: tuple[np.ndarray, np.ndarray, None], **rest: object) -> None:
            seen.append(precomputed_knn)

        def fit_transform(self, points: np.ndarray) -> np.ndarray:
            return points[:, :2]

    monkeypatch.setattr("umap.UMAP", Mapper)
    maps.umap_map(points, 0, neighbours=6)
    index, distance, _ = seen[0]
    assert index.shape == distance.shape == (40, 6)
    np.testing.assert_array_equal(index[:, 0], np.arange(40))
    assert all(len(set(row)) == 6 for row in index.tolist())
    np.testing.assert_allclose(np.linalg.norm(points[index] - points[:, None], axis=2), distance, atol=1e-6)
    maps.umap_map(points, 0, neighbours=15)
    index, distance, _ = seen[1]
    order = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[:, :15]
    np.testing.assert_allclose(distance, order, atol=1e-6)
