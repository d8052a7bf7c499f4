"""The table of partition methods: S_p in its variants, and the controls that it must beat.

Adding one is a function `(LayerEvidence, Shape, seed) → Labels` and a line in `METHODS`, with the router that the
method's authors use over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import analytic, controls, families
from tinyonn_lib.experts.analytic import Router, Score
from tinyonn_lib.experts.balanced import balanced_kmeans
from tinyonn_lib.experts.controls import with_shared
from tinyonn_lib.experts.evidence import Evidence, LayerEvidence
from tinyonn_lib.experts.partition import Labels, Partition, Shape
from tinyonn_lib.experts.score import FEATURES
from tinyonn_lib.progress import Progress

Split = Callable[[LayerEvidence, Shape, int], Labels]


@dataclass(frozen=True)
class Method:
    """How a layer is divided, and how the same authors would route.

    Attributes:
        split: one layer's evidence, the shape to fill and a seed → a label per neuron.
        router: its own analytic router, training-free.
        seeded: whether the seed matters.
        about: one line for tables.
    """

    split: Split
    router: Router
    seeded: bool
    about: str


def by_features(score: str, features: Sequence[str]) -> Split:
    """Document 000 §1.5: the highest scores are shared; balanced clusters of the feature vectors are the experts.

    Expert 0 has the highest mean score.
    """

    def split(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
        values = evidence.rows[score].to_numpy(np.float64)
        points = evidence.rows[[score, *features]].to_numpy(np.float64)

        def cluster(rest: Labels) -> Labels:
            labels = balanced_kmeans(points[rest], shape.experts, seed)
            means = np.bincount(labels, values[rest]) / shape.size
            return np.argsort(np.argsort(-means, kind="stable"))[labels]

        return with_shared(values, shape, cluster)

    return split


_LIKE = [name for name in FEATURES if name not in ("z_grad", "z_saliency")]

METHODS: dict[str, Method] = {
    "sp": Method(by_features("sp", FEATURES), analytic.ridge, True, "S_p and its features, balanced k-means"),
    "sp_minus_gradient": Method(
        by_features("sp_minus_gradient", FEATURES), analytic.ridge, True, "the same, gradient counted for a neuron"
    ),
    "sp_no_gradient": Method(by_features("sp_no_gradient", _LIKE), analytic.ridge, True, "the same without gradients"),
    "random": Method(controls.random, analytic.gate_mean, True, "shuffle and cut"),
    "weight_kmeans": Method(controls.weight_kmeans, analytic.gate_mean, True, "MoEfication: similar gate rows"),
    "coactivation": Method(controls.coactivation, analytic.gate_mean, True, "MoEfication: neurons that fire together"),
    "wanda": Method(controls.wanda, analytic.static, False, "by ‖h‖·‖W_down‖, best first, static"),
    "cmoe": Method(controls.cmoe, analytic.representative, False, "CMoE: activation rates, representative neurons"),
    "expertweaver": Method(controls.expertweaver, analytic.gate_mean, True, "ExpertWeaver: gate profiles of samples"),
    "llama_moe_v2": Method(controls.llama_moe_v2, analytic.token_centres, True, "LLaMA-MoE v2: saliency by tokens"),
    "flap_static": Method(controls.flap_static, analytic.static, False, "FLAP: Var(h)·‖W_down‖², best first, static"),
}


def named(methods: str, *always: str) -> list[str]:
    """The names in "all" or "sp random …", and those that are always needed, each once, in the table's order.

    Raises:
        BenchError: unknown method.
    """
    wanted = {*(METHODS if methods.strip() == "all" else methods.split()), *always}
    if unknown := sorted(wanted - set(METHODS)):
        raise BenchError(f"There is no partition method '{unknown[0]}'; known: {', '.join(METHODS)}.")
    return [name for name in METHODS if name in wanted]


@dataclass(frozen=True)
class Divided:
    """A partition, and by name of the router the scores of every layer: of `ridge`, and of the method's own."""

    partition: Partition
    scores: Mapping[str, tuple[Score, ...]]


def shapes(
    evidence: Evidence, experts: int, *, size: int = 0, shared: float = 0.0, per_layer: bool = False
) -> list[Shape]:
    """The shape of every layer, the same for all methods, so that they are compared at the same active parameters.

    Args:
        experts, size, shared: as in `Shape.of`.
        per_layer: let the shared share differ between layers by ExpertWeaver's rule (`controls.expertweaver_shared`),
            `shared` being its mean (if no layer comes to its limits, 1 % and 95 %).
    """
    widths = [ffn.neurons for ffn in evidence.ffns]
    if not per_layer:
        return [Shape.of(width, experts, size=size, shared=shared) for width in widths]
    if size or not 0 < shared < 1:
        raise BenchError("A shared share per layer needs its mean: give shared in (0, 1) and no size.")
    rule = np.array([controls.expertweaver_shared(layer) for layer in evidence])
    fractions = np.clip(rule * shared / rule.mean(), 0.01, 0.95)
    return [Shape.of(width, experts, shared=float(f)) for width, f in zip(widths, fractions, strict=True)]


def refuse_unexportable(config: Any, layer_shapes: Sequence[Shape]) -> None:
    """Can a standard checkpoint hold a model divided like this and its ridge router? To be asked before `divide`.

    Args:
        config: the dense model's.
        layer_shapes: from `shapes`.

    Raises:
        BenchError: none can, as `families.family` says.
    """
    labels = [controls.best_first(np.zeros(s.experts * s.size + s.shared), s) for s in layer_shapes]
    families.family(config, Partition.of("", labels, [shape.experts for shape in layer_shapes]), bias=True)


def divide(
    evidence: Evidence,
    names: Iterable[str],
    layer_shapes: Sequence[Shape],
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> dict[str, list[Divided]]:
    """Divide every layer by every named method, once per seed where the seed matters.

    The ridge router is fitted over every partition, so that a partition is not judged by its authors' router alone.

    Args:
        names: keys of `METHODS`.
        layer_shapes: from `shapes`.

    Raises:
        BenchError: unknown method.
    """
    names = named(" ".join(names))
    runs = [(name, seed) for name in names for seed in (seeds if METHODS[name].seeded else seeds[:1])]
    labels: Mapping[tuple[str, int], list[Labels]] = {run: [] for run in runs}
    scores: Mapping[tuple[str, int], dict[str, list[Score]]] = {run: {} for run in runs}
    for number, (layer, shape) in enumerate(zip(evidence, layer_shapes, strict=True)):
        for done, (name, seed) in enumerate(runs):
            if progress:
                progress(number * len(runs) + done, len(evidence) * len(runs), f"{name}, layer {layer.layer}")
            method = METHODS[name]
            found = method.split(layer, shape, seed)
            index = Partition.of(name, [found], [shape.experts]).experts[0]
            labels[name, seed].append(found)
            both: set[Router] = {analytic.ridge, method.router}
            for router in sorted(both, key=lambda each: each is not analytic.ridge):
                scores[name, seed].setdefault(router.__name__, []).append(router(layer, index, seed))
    if progress:
        progress(len(evidence) * len(runs), len(evidence) * len(runs), "")
    counts = [shape.experts for shape in layer_shapes]
    divided: dict[str, list[Divided]] = {name: [] for name in names}
    for name, seed in runs:
        by_router = {router: tuple(layers) for router, layers in scores[name, seed].items()}
        divided[name].append(Divided(Partition.of(name, labels[name, seed], counts), by_router))
    return divided


def alike(evidence: Evidence, name: str, partition: Partition, seed: int = 0) -> Partition:
    """Divide by method `name` into the same shapes as `partition` has, for a fair comparison.

    Raises:
        BenchError: unknown method.
    """
    layer_shapes = [
        Shape(index.shape[0], index.shape[1], len(shared))
        for index, shared in zip(partition.experts, partition.shared, strict=True)
    ]
    method = METHODS[named(name)[0]]
    labels = [method.split(layer, shape, seed) for layer, shape in zip(evidence, layer_shapes, strict=True)]
    return Partition.of(name, labels, [shape.experts for shape in layer_shapes])


def about(divided: Mapping[str, Sequence[Divided]]) -> pd.DataFrame:
    """What each partition is: `partition, how, own router, seeds, experts, neurons each, shared` (mean over layers)."""
    rows = []
    for name, parts in divided.items():
        part = parts[0].partition
        rows.append(
            {
                "partition": name,
                "how": METHODS[name].about,
                "own router": METHODS[name].router.__name__,
                "seeds": len(parts),
                "experts": part.count,
                "neurons each": round(float(np.mean([index.shape[1] for index in part.experts])), 1),
                "shared": round(float(np.mean([len(shared) for shared in part.shared])), 1),
            }
        )
    return pd.DataFrame(rows)
