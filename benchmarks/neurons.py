"""Scores, clusters, maps and balanced experts of 10,000 to a million neurons: seconds, memory, and how they grow.

The statistics are synthetic, of the kind that a scan of a language model gives: log-normal activation and gradient
that correlate at 0.97 within a layer, frequency and saliency that follow the activation, two in a hundred neurons dead.
Every size runs in a process of its own, so that its peak memory is its own; UMAP's seconds include its compilation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from harness import Bar, Row, main

from tinyonn_lib.scan.tables import COLUMNS

LAYER, CLUSTERS, EXPERTS = 6_912, 8, 64
SIZES = {10_000: 4, 100_000: 20, 40 * LAYER: 40, 1_000_000: 50}  # neurons: layers
QUICK = {2_000: 4, 10_000: 4}
WEIGHTS = 2_560  # width of the weight rows that some partitions cluster
TOKENS, SAMPLES = 100_000, 400


def statistics(neurons: int, layers: int, seed: int = 0) -> pd.DataFrame:
    """A table like `scan.tables.neurons_table` gives."""
    rng = np.random.default_rng(seed)
    layer = np.repeat(np.arange(layers), neurons // layers)
    n = len(layer)
    loud = rng.normal(size=n)

    def like(correlation: float) -> np.ndarray:
        return correlation * loud + np.sqrt(1 - correlation**2) * rng.normal(size=n)

    act = np.exp(0.8 * loud + 0.05 * layer - 3)
    grad = np.exp(0.9 * like(0.97) - 0.03 * layer - 8)
    dead = rng.random(n) < 0.02
    act[dead] = grad[dead] = 0.0
    table = pd.DataFrame(
        {
            "layer": layer, "neuron": np.tile(np.arange(n // layers), layers), "tokens": TOKENS, "samples": SAMPLES,
            "act": act, "act_mean": 0.3 * act * rng.normal(size=n), "act_sq": 2 * act**2,
            "freq": np.where(dead, 0.0, rng.binomial(TOKENS, 0.05 * np.exp(like(0.9) - 1).clip(max=9)) / TOKENS),
            "grad_gate": grad * 0.5, "grad_up": grad * 0.6, "grad_down": grad * 0.62, "grad": grad,
            "saliency": np.where(dead, 0.0, np.exp(1.5 * like(0.8) - 12)),
        }
    )  # fmt: skip
    return table[list(COLUMNS)]


class Clock:
    """Rows of seconds for one number of neurons."""

    def __init__(self, neurons: int) -> None:
        self.neurons, self.rows = neurons, list[Row]()

    @contextmanager
    def __call__(self, work: str) -> Iterator[Row]:
        row: Row = {"work": work, "neurons": self.neurons}
        began = time.perf_counter()
        yield row
        row["seconds"] = time.perf_counter() - began
        row["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        self.rows.append(row)


def whole_scan(neurons: int, layers: int) -> list[Row]:
    """What the notebook of clusters does with so many neurons."""
    from tinyonn_lib import plots
    from tinyonn_lib.experts import cluster, maps, score

    table = statistics(neurons, layers)
    clock = Clock(len(table))
    with clock("features and S_p"):
        scores = score.feature_table(table)
        scores["sp"] = score.sp(scores)
    points = scores[[name for name in score.FEATURES if name in scores]].to_numpy()
    for method in ("kmeans", "hdbscan"):
        with clock(f"{method}, {CLUSTERS} clusters"):
            labels = cluster.find(method, points, CLUSTERS, 0)
        if method == "kmeans":
            scores["cluster"] = labels
    with clock("quality of kmeans"):
        halves = (points, points + 0.1 * np.random.default_rng(0).normal(size=points.shape))
        cluster.quality(points, scores["cluster"].to_numpy(), halves, CLUSTERS, 0, "kmeans")
    for make in (maps.umap_map, maps.tsne_map):
        name = make.__name__.removesuffix("_map")
        with clock(f"map by {name}") as row:
            place = make(points, 0, 15)
        if name == "umap":
            row["figure MB"] = len(plots.neuron_map(scores.join(place)).to_json()) / 1e6
    return clock.rows


def one_layer() -> list[Row]:
    """Balanced experts of one layer, by features and by weight rows; and one exact assignment alone."""
    from tinyonn_lib.experts import balanced, score

    features = score.feature_table(statistics(LAYER, 1))
    low = np.column_stack([score.sp(features), features[[name for name in score.FEATURES if name in features]]])
    rng = np.random.default_rng(0)
    high = rng.normal(size=(LAYER, 40)) @ rng.normal(size=(40, WEIGHTS)) * 0.3 + rng.normal(size=(LAYER, WEIGHTS))
    clock = Clock(LAYER)
    balanced.balanced_kmeans(low[: LAYER // 8], 8, 0)  # imports
    for what, points in ((f"{low.shape[1]} features", low), (f"weight rows of {WEIGHTS}", high)):
        for seed in range(3):
            with clock(f"balanced, {EXPERTS} experts of one layer, {what}"):
                balanced.balanced_kmeans(points, EXPERTS, seed)
        clock.rows[-3:] = [sorted(clock.rows[-3:], key=lambda row: row["seconds"])[1]]  # the median
    centres = low[rng.choice(LAYER, EXPERTS, replace=False)]
    cost = ((low[:, None] - centres) ** 2).sum(-1)
    with clock(f"one exact assignment to {EXPERTS} experts"):
        balanced.assign_balanced(cost, LAYER // EXPERTS)
    return clock.rows


def alone(work: Callable[..., list[Row]], *arguments: int) -> list[Row]:
    """Run in a fresh process that finds nothing compiled."""
    with TemporaryDirectory() as empty, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        os.environ["NUMBA_CACHE_DIR"] = empty
        return pool.submit(work, *arguments).result()


def seconds(rows: list[Row], neurons: int, *works: str) -> float:
    """Seconds of all work whose name begins so."""
    return sum(row["seconds"] for row in rows if row["neurons"] == neurons and row["work"].startswith(works))


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    rows = alone(one_layer)
    sizes = QUICK if args.quick else SIZES
    for neurons, layers in sizes.items():
        rows += alone(whole_scan, neurons, layers)
    last: dict[str, Row] = {}
    for row in rows:  # exponent of growth since the size before: 1 is linear
        if before := last.get(row["work"]):
            row["growth"] = np.log(row["seconds"] / before["seconds"]) / np.log(row["neurons"] / before["neurons"])
        last[row["work"]] = row
    n = max(QUICK) if args.quick else 40 * LAYER
    layer = seconds(rows, LAYER, f"balanced, {EXPERTS} experts")
    low = next(row["seconds"] for row in rows if row["work"].endswith("features") and row["neurons"] == LAYER)
    figure = max(row.get("figure MB", 0.0) for row in rows if row["neurons"] == n)
    return rows, [
        Bar(f"scores, k-means and HDBSCAN of {n:,} neurons, seconds",
            seconds(rows, n, "features and S_p", "kmeans", "hdbscan"), 60, "lower"),
        Bar(f"UMAP map of {n:,} neurons with compilation, seconds", seconds(rows, n, "map by umap"), 120, "lower"),
        Bar(f"balanced, {LAYER:,} neurons into {EXPERTS} experts by features, seconds", low, 2, "lower"),
        Bar(f"balanced, {LAYER:,} neurons into {EXPERTS} experts by weight rows, seconds", layer - low, 2, "lower"),
        Bar("map figure, MB", figure, 15, "lower"),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(__doc__, "neurons", measure))
