"""Every control against its description in `references`, and what all of them promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import silu

from tests.experts import references
from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import controls
from tinyonn_lib.experts.evidence import LayerEvidence, Tokens
from tinyonn_lib.experts.partition import SHARED, Shape

NEURONS, WIDTH, SAMPLES, LENGTH = 24, 6, 4, 10
NAMES = ("random", "weight_kmeans", "coactivation", "wanda", "cmoe", "expertweaver", "llama_moe_v2", "flap_static")
SHAPES = [Shape.of(NEURONS, 4), Shape(3, 7, 3), Shape(2, 4, 16), Shape(1, 20, 4), Shape(24, 1, 0), Shape(5, 4, 4)]


def evidence_of(x: torch.Tensor, sample: Any, weights: tuple[torch.Tensor, ...], layer: int = 0) -> LayerEvidence:
    """Evidence whose scan saw the same tokens; the saliency is made up."""
    gate, up, down = weights
    saliency = torch.rand(len(x), len(gate), generator=torch.Generator().manual_seed(5)).bfloat16()
    h = silu(x @ gate.T) * (x @ up.T)
    rows = pd.DataFrame({"act_sq": (h**2).mean(0).numpy(), "act_mean": h.mean(0).numpy()})
    return LayerEvidence(layer, rows, gate, up, down, silu, Tokens(x, torch.as_tensor(sample), saliency))


@pytest.fixture
def evidence() -> LayerEvidence:
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    weights = (normal(NEURONS, WIDTH), normal(NEURONS, WIDTH), normal(WIDTH, NEURONS))
    # Samples of different length and level, so that neurons differ between them.
    sample = np.repeat(np.arange(SAMPLES), [LENGTH, LENGTH + 1, LENGTH - 3, LENGTH])
    return evidence_of(normal(len(sample), WIDTH) + 0.5 * normal(SAMPLES, WIDTH)[sample], sample, weights)


@pytest.fixture
def h(evidence: LayerEvidence) -> Any:
    return references.hidden(evidence.tokens.x.numpy(), evidence.gate.numpy(), evidence.up.numpy())


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What `controls.<name>` is called with; it answers with equal groups in turn."""
    calls: list[Any] = []

    def stand_in(points: Any, clusters: int, seed: int = 0) -> Any:
        calls.append(points)
        groups = clusters if name == "balanced_kmeans" else points.shape[1]
        return np.arange(len(points)) % groups

    monkeypatch.setattr(controls, name, stand_in)
    return calls


def shared_of(labels: Any) -> list[int]:
    return np.flatnonzero(labels == SHARED).tolist()


def counts(labels: Any, experts: int) -> list[int]:
    return [int((labels == e).sum()) for e in range(SHARED, experts)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_split_fills_the_shape_and_is_reproducible(evidence: LayerEvidence, name: str, shape: Shape) -> None:
    first, second = (getattr(controls, name)(replace(evidence), shape, 7) for _ in range(2))
    assert first.dtype == np.int64
    assert counts(first, shape.experts) == [shape.shared] + [shape.size] * shape.experts
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["dead", "equal", "silent"])
def test_degenerate_layers_are_divided_all_the_same(evidence: LayerEvidence, name: str, kind: str) -> None:
    weights = [w.clone() for w in (evidence.gate, evidence.up, evidence.down.T)]
    for weight in weights:
        if kind == "dead":
            weight[[0, 9, 10]] = 0
        elif kind == "equal":
            weight[:] = weight[0]
        else:
            weight[:] = 0
    odd = evidence_of(evidence.tokens.x, evidence.tokens.sample, (weights[0], weights[1], weights[2].T))
    if kind == "silent":
        odd.tokens.saliency.zero_()
    shape = Shape(4, 5, 4)
    assert counts(getattr(controls, name)(odd, shape, 0), 4) == [4, 5, 5, 5, 5]


def test_equal_values_are_served_in_order() -> None:
    values = np.array([1.0, 2.0, 2.0, 0.0, 1.0, 1.0])
    asked: list[list[int]] = []

    def cluster(rest: Any) -> Any:
        asked.append(rest.tolist())
        return np.array([1, 0, 1, 0])

    assert controls.with_shared(values, Shape(2, 2, 2), cluster).tolist() == [1, -1, -1, 0, 1, 0]
    assert asked == [[0, 3, 4, 5]]
    assert controls.best_first(values, Shape(2, 2, 2)).tolist() == [0, -1, -1, 1, 0, 1]


def test_random_depends_on_seed_and_layer(evidence: LayerEvidence) -> None:
    shape = Shape(4, 5, 4)
    other = LayerEvidence(1, *(getattr(evidence, n) for n in ("rows", "gate", "up", "down", "act", "tokens")))
    base, seed, layer = (controls.random(e, shape, s) for e, s in ((evidence, 0), (evidence, 1), (other, 0)))
    assert (base != seed).any()
    assert (base != layer).any()
    drawn = np.array([controls.random(evidence, shape, s) for s in range(400)])
    np.testing.assert_allclose((drawn == SHARED).mean(0), 4 / NEURONS, atol=0.08)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_static_pruning_takes_the_best_first(evidence: LayerEvidence, h: Any, shape: Shape) -> None:
    down = evidence.down.numpy()
    assert controls.wanda(evidence, shape, 0).tolist() == references.slices(
        references.wanda(h, down), shape.size, shape.shared
    )
    assert controls.flap_static(evidence, shape, 0).tolist() == references.slices(
        references.flap(h, down), shape.size, shape.shared
    )


@pytest.mark.parametrize("shared", [0, 4, 8, 12, 16])
def test_weight_kmeans_sees_unit_gate_rows(
    evidence: LayerEvidence, monkeypatch: pytest.MonkeyPatch, shared: int
) -> None:
    calls = watch(monkeypatch, "balanced_kmeans")
    labels = controls.weight_kmeans(evidence, Shape(4, (NEURONS - shared) // 4, shared), 0)
    gate = evidence.gate.numpy()
    rest = references.left_over(references.weight_norms(gate, evidence.up.numpy(), evidence.down.numpy()), shared)
    assert labels[rest].tolist() == [place % 4 for place in range(len(rest))]
    assert shared_of(labels) == sorted(set(range(NEURONS)) - set(rest))
    np.testing.assert_allclose(calls[0], [gate[i] / references.length(gate[i]) for i in rest], rtol=1e-12)


def test_coactivation_clusters_the_leading_eigenvectors(
    evidence: LayerEvidence, h: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "ACTIVE", 0.2)
    calls = watch(monkeypatch, "balanced_kmeans")
    labels = controls.coactivation(evidence, Shape(4, 5, 4), 0)
    marks = references.marked(h, 5)  # 0.2 · 24
    rest = references.left_over(references.rates(marks, NEURONS), 4)
    assert shared_of(labels) == sorted(set(range(NEURONS)) - set(rest))
    adjacency = references.together(marks, rest, 8)
    assert adjacency.max() > 1
    fires = controls.marks(evidence, 5)
    np.testing.assert_array_equal(controls.together(fires[:, rest]), adjacency)
    np.testing.assert_allclose(calls[0] @ calls[0].T, references.spectral_cosines(adjacency, 4), atol=1e-4)


def test_neurons_without_company_lie_at_the_origin() -> None:
    ring = np.zeros((5, 5), np.float32)
    ring[0, 1] = ring[1, 0] = ring[1, 2] = ring[2, 1] = ring[0, 2] = ring[2, 0] = 2
    points = controls.spectral(ring, 2, seed=0)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), [1, 1, 1, 0, 0], atol=1e-6)
    assert not controls.spectral(np.zeros((4, 4), np.float32), 2, seed=0).any()


def test_large_graphs_come_close_to_the_eigenvectors() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(6), 50)
    chance = np.where(group[:, None] == group, 0.5, 0.05)
    upper = np.triu(rng.random((300, 300)) < chance, 1).astype(np.float32)
    points = controls.spectral(upper + upper.T, 6, seed=0)
    np.testing.assert_allclose(points @ points.T, references.spectral_cosines(upper + upper.T, 6), atol=1e-3)


def test_cmoe_assigns_by_hamming_distance_to_the_busiest(
    evidence: LayerEvidence, h: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch(monkeypatch, "assign_balanced")
    labels = controls.cmoe(evidence, Shape(4, 5, 4), 0)
    marks = references.marked(h, 10)
    rates = references.rates(marks, NEURONS)
    rest = references.left_over(rates, 4)
    leaders = sorted(rest, key=lambda i: (-rates[i], i))[:4]
    assert shared_of(labels) == sorted(set(range(NEURONS)) - set(rest))
    np.testing.assert_array_equal(calls[0], [[references.hamming(marks, i, j) for j in leaders] for i in rest])
    assert labels[rest].tolist() == [place % 4 for place in range(20)]


def test_expertweaver_clusters_the_samples_gates(evidence: LayerEvidence, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch, "balanced_kmeans")
    labels = controls.expertweaver(evidence, Shape(4, 5, 4), 0)
    rows = references.profiles(evidence.tokens.x.numpy(), evidence.tokens.sample.tolist(), evidence.gate.numpy())
    rest = references.left_over([sum(row) for row in rows], 4)
    assert shared_of(labels) == sorted(set(range(NEURONS)) - set(rest))
    np.testing.assert_allclose(calls[0], rows[rest], rtol=1e-12)
    share = references.expertweaver_share(rows, 0.6, 0.2, 0.7)
    assert 0.2 < share < 0.7
    assert controls.expertweaver_shared(evidence) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("experts", "size", "shared"), [(4, 5, 4), (3, 8, 0), (5, 3, 9)])
def test_llama_moe_v2_deals_neurons_by_importance(
    evidence: LayerEvidence, monkeypatch: pytest.MonkeyPatch, experts: int, size: int, shared: int
) -> None:
    calls = watch(monkeypatch, "balanced_kmeans")
    labels = controls.llama_moe_v2(evidence, Shape(experts, size, shared), 0)
    x = evidence.tokens.x.numpy()
    np.testing.assert_array_equal(calls[0], x)
    middles = references.centres(x, [t % experts for t in range(len(x))], experts)
    np.testing.assert_allclose(controls.token_clusters(evidence, experts, 0), middles, rtol=1e-12)
    scores = references.importance(x, evidence.tokens.saliency.double().numpy(), middles)
    found = controls.importance(evidence, torch.from_numpy(middles))
    np.testing.assert_allclose(found, scores, rtol=1e-6)
    assert labels.tolist() == references.dealt(scores, size, references.voted(scores, size, shared))


def test_token_clusters_are_found_once_per_number_and_seed(
    evidence: LayerEvidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def found(points: Any, clusters: int, seed: int) -> Any:
        calls.append((clusters, seed))
        return np.arange(len(points)) % clusters

    monkeypatch.setattr(controls, "balanced_kmeans", found)
    controls.llama_moe_v2(evidence, Shape(4, 5, 4), 1)
    for experts, seed in ((4, 1), (3, 1), (4, 2), (4, 1)):
        assert controls.token_clusters(evidence, experts, seed).shape == (experts, WIDTH)
    assert calls == [(4, 1), (3, 1), (4, 2)]
    other = replace(evidence, layer=1)
    controls.token_clusters(other, 4, 1)
    assert calls[3:] == [(4, 1)]  # another layer's are its own, and go with it


def test_more_experts_than_tokens_is_one_clear_line(evidence: LayerEvidence) -> None:
    tokens = Tokens(*(part[:3] for part in (evidence.tokens.x, evidence.tokens.sample, evidence.tokens.saliency)))
    few = LayerEvidence(0, evidence.rows, evidence.gate, evidence.up, evidence.down, silu, tokens)
    with pytest.raises(BenchError, match="3 calibration tokens cannot be divided among 4 experts"):
        controls.token_clusters(few, 4, 0)


def planted() -> tuple[LayerEvidence, Any]:
    """Even neurons fire on even samples, odd ones on odd samples."""
    make = torch.Generator().manual_seed(1)
    group, sample = torch.arange(20) % 2, torch.arange(8).repeat_interleave(20)
    directions = torch.eye(8)[:2]
    noise: Callable[..., torch.Tensor] = lambda *shape: 0.1 * torch.randn(*shape, generator=make)  # noqa: E731
    x = 3 * directions[sample % 2] + 4 * noise(160, 8)
    rows = 2 * directions[group] - 2 * directions[1 - group] + 4 * noise(20, 8)
    made = evidence_of(x, sample, (rows, rows.abs() + noise(20, 8), torch.randn(8, 20, generator=make)))
    made.tokens.saliency.copy_(made.h.abs())
    return made, group.numpy()


@pytest.mark.parametrize("name", ["weight_kmeans", "coactivation", "cmoe", "expertweaver", "llama_moe_v2"])
def test_neurons_that_fire_on_different_tokens_are_separated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "ACTIVE", 0.4)
    evidence, group = planted()
    labels = getattr(controls, name)(evidence, Shape(2, 10, 0), 0)
    assert set(zip(group.tolist(), labels.tolist(), strict=True)) in ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})
