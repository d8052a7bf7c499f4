"""The student's losses and penalties against their formulas, and gradients against finite differences."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import analytic
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.routing import scaled
from tinyonn_lib.experts.soft import END, START
from tinyonn_lib.experts.student import Routed, Student

from .conftest import Tiny
from .students import dense_inputs, divided_logits, expert_outputs, layers_of, normal, soft_gates, value

SETTINGS = [("sigmoid", 0.25, False), ("softmax", 0.0, False), ("sigmoid", 0.0, True)]


@pytest.mark.parametrize(("gates", "shared", "variable"), SETTINGS)
@pytest.mark.parametrize("width", [START, 0.1])
def test_layer_loss_is_the_relative_squared_error(
    tiny: Tiny, gates: str, shared: float, variable: bool, width: float
) -> None:
    part = tiny.part(shared=shared)
    layers = layers_of(tiny, part, 2, gates, variable=variable)
    errors = []
    for place, x in enumerate(dense_inputs(tiny, tiny.ids)):
        soft, weights, _ = soft_gates(layers[place], x, width)
        each, always = expert_outputs(tiny, part, place, x)
        dense = each.sum(0) + always
        errors.append(float((((soft * weights).T[..., None] * each).sum(0) + always - dense).square().sum()))
        errors[-1] /= float(dense.square().sum())
    found = value(tiny, layers, tiny.ids, width, goal="layer")
    assert min(errors) > 0.01
    assert float(found.detach()) == pytest.approx(sum(errors) / 2, rel=1e-4)


@pytest.mark.parametrize(("gates", "shared", "variable"), SETTINGS)
def test_kl_and_lm_are_those_of_the_divided_model(tiny: Tiny, gates: str, shared: float, variable: bool) -> None:
    part = tiny.part(shared=shared)
    layers = layers_of(tiny, part, 2, gates, variable=variable)
    with torch.no_grad():
        dense = copy.deepcopy(tiny.model).double()(tiny.ids).logits.log_softmax(-1)
    ours = divided_logits(tiny, part, layers, tiny.ids, 0.2)[0].log_softmax(-1)
    kl = (dense.exp() * (dense - ours)).sum(-1).mean()
    rows, places = torch.arange(3)[:, None], torch.arange(16)
    lm = -ours[rows, places, tiny.ids[:, 1:]].mean()
    assert float(kl) > 0.05
    assert float(value(tiny, layers, tiny.ids, 0.2, goal="kl").detach()) == pytest.approx(float(kl), rel=2e-4)
    assert float(value(tiny, layers, tiny.ids, 0.2, goal="lm").detach()) == pytest.approx(float(lm), rel=1e-5)


@pytest.mark.parametrize("gates", ["sigmoid", "softmax"])
def test_with_every_expert_on_nothing_is_lost(tiny: Tiny, gates: str) -> None:
    part = tiny.part(shared=0.25)
    almost = layers_of(tiny, part, 4 - 1e-5, gates, gain=1e-6)
    for goal in ("kl", "layer"):
        assert abs(float(value(tiny, almost, tiny.ids, goal=goal).detach())) < 1e-6
        assert float(value(tiny, layers_of(tiny, part, 3, gates, gain=1e-6), tiny.ids, goal=goal).detach()) > 1e-3
    with torch.no_grad():
        dense = float(F.cross_entropy(tiny.model(tiny.ids).logits[:, :-1].flatten(0, 1), tiny.ids[:, 1:].flatten()))
    assert float(value(tiny, almost, tiny.ids, goal="lm").detach()) == pytest.approx(dense, abs=1e-4)
    whole = layers_of(tiny, part, 4, gates, gain=1e-6)  # k = E: nothing to choose, and no NaN
    loss = value(tiny, whole, tiny.ids, goal="kl")
    assert abs(float(loss.detach())) < 1e-6
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for each in whole for p in each.parameters() if p.grad is not None)


def test_cold_and_soft_is_the_finished_model(tiny: Tiny) -> None:
    layers = layers_of(tiny, tiny.part(shared=0.25), 2, gain=0.05)
    with torch.no_grad():
        for layer in layers:
            layer.router.weight *= 100  # decided
        dense = tiny.model(tiny.ids).logits.log_softmax(-1)
        with scaled(tiny.ffns, [layer.scale for layer in layers]):
            hard = tiny.model(tiny.ids).logits.log_softmax(-1)
    expected = float((dense.exp() * (dense - hard)).sum(-1).mean())
    assert float(value(tiny, layers, tiny.ids, END, goal="kl").detach()) == pytest.approx(expected, rel=0.05)
    assert float(value(tiny, layers, tiny.ids, END / 30, goal="kl").detach()) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("goal", ["kl", "lm", "layer"])
@pytest.mark.parametrize("variable", [False, True])
def test_gradients_by_finite_differences(tiny: Tiny, goal: str, variable: bool) -> None:
    part = tiny.part()
    layers = layers_of(tiny, part, 2, variable=variable)
    options: dict[str, Any] = {"goal": goal, "balance": 0.3, "z_loss": 0.2}
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == (8 if variable else 6)
    grads = torch.autograd.grad(value(tiny, layers, tiny.ids, **options), parameters)
    for number, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        along = normal(*parameter.shape, seed=number) if parameter.ndim else torch.ones(())
        step = 0.01 / float(along.norm())
        ends = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter += sign * step * along
                ends.append(float(value(tiny, layers, tiny.ids, **options)))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((grad * along).sum()) == pytest.approx(slope, rel=2e-2, abs=5e-4 * float(along.norm()))


def test_unknown_goal(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="^Unknown loss 'mse': choose one of layer, kl, lm.$"):
        Student(tiny.model, tiny.ffns, [], goal="mse")


def penalties(weight: Tensor, x: Tensor, k: int, bias: Tensor | None = None) -> Tensor:
    experts = len(weight)
    part = Partition("any", (torch.arange(2 * experts).view(experts, 2),))
    router = Router(analytic.Linear(weight, torch.zeros(experts)), x, "sigmoid", 1.0)
    with torch.no_grad():
        router.weight.copy_(weight)
        if bias is not None and router.bias is not None:
            router.bias.copy_(bias)
    layer = Routed(router, part, 0, k)
    return layer(x, torch.ones(*x.shape[:-1], 2 * experts), torch.tensor([0.01]), k)[1].detach()


def test_balance_is_nothing_for_equal_shares_and_grows_to_the_number_of_experts() -> None:
    eye = torch.eye(6)
    assert float(penalties(eye, eye, 1)[0]) == pytest.approx(0, abs=1e-6)
    assert float(penalties(eye + eye.roll(1, 0), eye.view(2, 3, 6), 2)[0]) == pytest.approx(0, abs=1e-6)
    one, two = torch.tensor([9.0, 0, 0, 0, 0, 0]), torch.tensor([9.0, 9, 0, 0, 0, 0])
    assert float(penalties(eye, eye, 1, one)[0]) == pytest.approx(6 - 1, abs=1e-4)  # all on one expert: E² / E − 1
    assert float(penalties(eye, eye, 2, two)[0]) == pytest.approx(3 - 1, abs=1e-4)
    half = torch.cat([eye[:1].expand(3, 6), eye[3:]])  # one expert for half of six tokens, three for one each
    assert float(penalties(eye, half, 1)[0]) == pytest.approx(6 * (9 + 3) / 36 - 1, abs=1e-4)


def test_z_loss_is_the_mean_squared_log_sum_of_exponentials() -> None:
    weight, x = normal(5, 6), normal(2, 7, 6, seed=1)
    logits = (x @ weight.T).flatten(0, 1).double()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 14
    assert float(penalties(weight, x, 2)[1]) == pytest.approx(expected, rel=1e-5)


def test_penalties_enter_with_their_weights_as_the_mean_of_the_layers(tiny: Tiny) -> None:
    layers = layers_of(tiny, tiny.part(), 2)
    balance, z = 0.0, 0.0
    for layer, x in zip(layers, dense_inputs(tiny, tiny.ids), strict=True):
        soft, _, logits = soft_gates(layer, x, START)
        balance += float((soft.mean(0) * 2).square().mean() - 1) / 2
        z += float(logits.logsumexp(-1).square().mean()) / 2
    bare = value(tiny, layers, tiny.ids, goal="layer").detach()
    found = value(tiny, layers, tiny.ids, goal="layer", balance=0.5, z_loss=0.25).detach()
    assert balance > 0.01
    assert float(found - bare) == pytest.approx(0.5 * balance + 0.25 * z, rel=1e-4)
