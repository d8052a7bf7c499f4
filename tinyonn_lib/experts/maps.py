"""Maps of neurons for the eye: feature vectors laid out in the plane.

With many points only landmarks are laid out, a random sample of `LANDMARKS[name]`. Every other point is placed among
the five landmarks nearest to it in feature space, at the mean of their places weighted by 1 / distance². So the map
shows the density of all points, but no structure that the landmarks miss, and equal points share a place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tinyonn_lib.experts.balanced import check

Points = NDArray[np.floating]

LANDMARKS = {"umap": 20_000, "tsne": 4_000}
NEAREST = 5


def umap_map(points: Points, seed: int, neighbours: int = 15, min_dist: float = 0.1) -> pd.DataFrame:
    """UMAP coordinates `x, y` of every point (McInnes et al. 2018, arXiv:1802.03426), `(n, d) → (n, 2)`.

    Reproducible for a seed. The neighbours are computed exactly first, which spares the compilation of nn-descent, and
    the layout starts from the principal components: as good as a spectral start on neurons, and twice as fast.

    Raises:
        BenchError: A point is not finite.
    """

    def embed(marks: Points) -> Points:
        from sklearn.neighbors import NearestNeighbors

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from umap import UMAP

            # UMAP expects the point itself first. A search for it may find its equals before it, or only them; without
            # points to search for, scikit-learn gives the others alone.
            size = min(neighbours, len(marks) - 1)
            distance, index = NearestNeighbors(n_neighbors=size - 1).fit(marks).kneighbors()
            index = np.c_[np.arange(len(marks)), index]
            distance = np.c_[np.zeros(len(marks)), distance]
            mapper = UMAP(
                n_neighbors=size,
                min_dist=min_dist,
                init=_start(marks, seed),
                random_state=seed,
                n_jobs=1,
                precomputed_knn=(index.astype(np.int32), distance.astype(np.float32), None),
            )
            return np.asarray(mapper.fit_transform(marks.astype(np.float32)))

    return _laid_out(points, embed, LANDMARKS["umap"], seed)


def tsne_map(points: Points, seed: int, neighbours: int = 15) -> pd.DataFrame:
    """t-SNE coordinates `x, y` of every point (van der Maaten and Hinton 2008), `(n, d) → (n, 2)`.

    `neighbours` is its perplexity.

    Raises:
        BenchError: A point is not finite.
    """

    def embed(marks: Points) -> Points:
        from sklearn.manifold import TSNE

        perplexity = min(float(neighbours), (len(marks) - 1) / 3)
        start = (1e-4 * _start(marks, seed)).astype(np.float32)
        mapper = TSNE(perplexity=perplexity, init=start, random_state=seed)
        return np.asarray(mapper.fit_transform(marks.astype(np.float32)))

    return _laid_out(points, embed, LANDMARKS["tsne"], seed)


def _laid_out(points: Points, embed: Callable[[Points], Points], most: int, seed: int) -> pd.DataFrame:
    """Landmarks by `embed`, all other points among them; see the module's text."""
    from scipy.spatial import KDTree

    n = check(points)
    if n < 5:  # too few to have neighbours
        places = _start(points, seed)
    elif n <= most:
        places = embed(points)
    else:
        chosen = np.zeros(n, bool)
        chosen[np.random.default_rng(seed).choice(n, most, replace=False)] = True
        marks = embed(points[chosen])
        distance, index = KDTree(points[chosen]).query(points[~chosen], NEAREST, workers=-1)
        # Never zero: a point equal to a landmark takes its place.
        weight = 1 / np.maximum(distance, 1e-9 * (1 + distance.max())) ** 2
        places = np.empty((n, 2))
        places[chosen] = marks
        places[~chosen] = (weight[:, :, None] * marks[index]).sum(1) / weight.sum(1)[:, None]
    return pd.DataFrame({"x": places[:, 0], "y": places[:, 1]})


def _start(points: Points, seed: int) -> Points:
    """First two principal components over the first one's standard deviation, `(n, 2)`, with a little noise so that no
    two points, however alike, start at the same place."""
    centred = np.asarray(points - points.mean(0), dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    start = np.random.default_rng(seed).normal(0, 1e-4, (len(points), 2))
    flat = centred @ axes[:, ::-1][:, :2]
    start[:, : flat.shape[1]] += flat / (flat[:, 0].std() or 1.0)
    return start
