"""Every router against its description in `references`, and what all of them promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from tests.experts import references
from tests.experts.test_controls import evidence_of, planted
from tinyonn_lib.experts import analytic, controls
from tinyonn_lib.experts.evidence import LayerEvidence
from tinyonn_lib.experts.partition import Shape
from tinyonn_lib.experts.routing import energies

NEURONS, EXPERTS = 24, 4
NAMES = ("gate_mean", "representative", "token_centres", "static", "ridge")
INDEX = torch.arange(20).view(5, 4).T.flip(0).contiguous() + 2  # neurons 0, 1, 22, 23 are in no expert


def made(tokens: int, width: int) -> LayerEvidence:
    make = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    weights = (normal(NEURONS, width), normal(NEURONS, width), normal(width, NEURONS))
    return evidence_of(normal(tokens, width) + 0.5, [0] * tokens, weights)


@pytest.fixture(scope="module", params=[(40, 6), (12, 20)], ids=["many tokens", "fewer tokens than inputs"])
def evidence(request: pytest.FixtureRequest) -> LayerEvidence:
    return made(*request.param)


@pytest.fixture
def fresh(evidence: LayerEvidence) -> torch.Tensor:
    return torch.randn(2, 3, evidence.gate.shape[1], generator=torch.Generator().manual_seed(9))


def h_of(evidence: LayerEvidence) -> Any:
    return references.hidden(evidence.tokens.x.numpy(), evidence.gate.numpy(), evidence.up.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_scores_have_a_column_per_expert_in_any_batch(evidence: LayerEvidence, fresh: torch.Tensor, name: str) -> None:
    first, second = (getattr(analytic, name)(replace(evidence), INDEX, 3) for _ in range(2))
    scores = first(fresh)
    assert scores.shape == (2, 3, EXPERTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, second(fresh), rtol=0, atol=0)
    torch.testing.assert_close(scores[1, 2], first(fresh[1, 2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_silent_experts_and_equal_tokens_give_finite_scores(name: str) -> None:
    normal = made(12, 6)
    weights = [w.clone() for w in (normal.gate, normal.up, normal.down)]
    for weight in (weights[0], weights[1], weights[2].T):
        weight[INDEX[0]] = 0
    for x in (normal.tokens.x, normal.tokens.x[:1].expand(12, -1), torch.zeros(12, 6, dtype=torch.float64)):
        odd = evidence_of(x, [0] * 12, (weights[0], weights[1], weights[2]))
        assert getattr(analytic, name)(odd, INDEX, 0)(torch.randn(7, 6)).isfinite().all()


def test_gate_mean_is_the_experts_mean_gate_row(evidence: LayerEvidence, fresh: torch.Tensor) -> None:
    gate = evidence.gate.numpy()
    rows = [[sum(gate[i][j] for i in ids) / len(ids) for j in range(gate.shape[1])] for ids in INDEX.tolist()]
    expected = [[[references.dot(x, row) for row in rows] for x in batch] for batch in fresh.double().numpy()]
    np.testing.assert_allclose(analytic.gate_mean(evidence, INDEX, 0)(fresh), expected, rtol=1e-5, atol=1e-5)


def test_representative_neurons_speak_for_their_experts(evidence: LayerEvidence, fresh: torch.Tensor) -> None:
    marks = references.marked(h_of(evidence), controls.MARKERS)
    chosen = [references.nearest_to_mean(marks, ids) for ids in INDEX.tolist()]
    assert chosen != [ids[0] for ids in INDEX.tolist()]

    def score(x: Any, neuron: int) -> float:
        gate, up = (w[neuron].numpy() for w in (evidence.gate, evidence.up))
        through = references.silu(references.dot(x, gate) / references.length(gate))
        return abs(through * references.dot(x, up) / references.length(up))

    expected = [[[score(x, neuron) for neuron in chosen] for x in batch] for batch in fresh.double().numpy()]
    np.testing.assert_allclose(analytic.representative(evidence, INDEX, 0)(fresh), expected, rtol=1e-4, atol=1e-6)


def test_token_centres_are_those_of_the_partition(evidence: LayerEvidence, fresh: torch.Tensor) -> None:
    centres = controls.token_clusters(evidence, EXPERTS, 5)
    assert not torch.equal(centres[0], centres[1])
    expected = [[[references.dot(x, c) for c in centres.numpy()] for x in batch] for batch in fresh.double().numpy()]
    np.testing.assert_allclose(analytic.token_centres(evidence, INDEX, 5)(fresh), expected, rtol=1e-4, atol=1e-5)


def test_static_prefers_the_first_experts(evidence: LayerEvidence, fresh: torch.Tensor) -> None:
    order = analytic.static(evidence, INDEX, 0)(fresh).argsort(-1, descending=True)
    assert order.tolist() == [[[0, 1, 2, 3]] * 3] * 2


def test_ridge_equals_fitting_once_per_token(evidence: LayerEvidence) -> None:
    x = evidence.tokens.x.numpy()
    target = references.output_norms(h_of(evidence), evidence.down.numpy(), INDEX.tolist()) ** 0.5
    spread = sum(references.dot(row, row) for row in x - x.mean(0)) / min(x.shape)
    weight, bias = references.ridge(x, target, [10 ** (e / 2) * spread for e in range(-8, 5)])
    linear = analytic.ridge(evidence, INDEX, 0)
    np.testing.assert_allclose(linear.weight, weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(linear.bias, bias, rtol=1e-4, atol=1e-5)


def test_ridge_finds_a_linear_rule() -> None:
    """One neuron per expert, whose output norm is the square of a linear function of x: the root is that function."""
    make = torch.Generator().manual_seed(0)
    x = torch.rand(200, 8, generator=make) + 0.5
    rows = torch.rand(4, 8, generator=make)
    # act(z) = z makes h = (x·row)², and the columns of `down` have length 1.
    evidence = evidence_of(x, [0] * 200, (rows, rows, torch.eye(8)[:, :4]))
    evidence = LayerEvidence(0, evidence.rows, rows, rows, evidence.down, lambda z: z, evidence.tokens)
    linear = analytic.ridge(evidence, torch.arange(4)[:, None], 0)
    torch.testing.assert_close(linear.weight, rows, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("name", ["gate_mean", "representative", "token_centres", "ridge"])
def test_tokens_find_the_neurons_that_fire_on_them(name: str) -> None:
    evidence, group = planted()
    labels = controls.llama_moe_v2(evidence, Shape(2, 10, 0), 0)
    index = torch.from_numpy(np.stack([np.flatnonzero(labels == e) for e in range(2)]))
    scores = getattr(analytic, name)(evidence, index, 0)(evidence.tokens.x)
    right = torch.from_numpy(group)[index[scores.argmax(1), 0]] == evidence.tokens.sample % 2
    assert right.float().mean() > 0.95


def test_ridge_captures_more_than_the_mean_gate_row() -> None:
    make = torch.Generator().manual_seed(3)
    mix = torch.randn(16, 16, generator=make)
    weights = (torch.randn(64, 16, generator=make), torch.randn(64, 16, generator=make))
    down = torch.randn(16, 64, generator=make)
    x, fresh = (torch.randn(t, 16, generator=make) @ mix / 4 + 1 for t in (600, 400))
    evidence = evidence_of(x, [0] * 600, (*weights, down))
    index = torch.from_numpy(controls.weight_kmeans(evidence, Shape(8, 8, 0), 0)).argsort().view(8, 8)
    energy = energies(index, down)(silu(fresh @ weights[0].T) * (fresh @ weights[1].T))

    def captured(router: Any) -> float:
        return float(energy.gather(1, router(evidence, index, 0)(fresh).topk(2).indices).sum() / energy.sum())

    assert captured(analytic.ridge) > captured(analytic.gate_mean) + 0.02
    assert captured(analytic.gate_mean) > captured(analytic.static)
