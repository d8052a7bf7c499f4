"""What the student puts in place of FFNs: pruned layers, and layers with budgets that vary around k."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.experts.routing import scaled
from tinyonn_lib.experts.student import Pruned, Routed, budgets
from tinyonn_lib.experts.training import calibrate
from tinyonn_lib.lm import models

from .conftest import Tiny
from .students import WIDTH, layers_of, normal, value


def pruned_layers() -> tuple[list[Tensor], list[Tensor], list[Pruned]]:
    keep = [torch.arange(32) % 3 != place for place in range(2)]
    bias = [0.3 * normal(WIDTH, seed=place) for place in range(2)]
    layers = [Pruned(mask, start) for mask, start in zip(keep, bias, strict=True)]
    with torch.no_grad():
        for place, layer in enumerate(layers):
            layer.factor += 0.2 * normal(32, seed=place + 5)
            layer.gate += 0.2 * normal(64, seed=place + 7).view(2, 32)
            layer.up += 0.2 * normal(64, seed=place + 9).view(2, 32)
    return keep, bias, layers


def test_pruned_layers_scale_and_shift_all_that_remains(tiny: Tiny) -> None:
    keep, bias, layers = pruned_layers()
    model = copy.deepcopy(tiny.model).double()

    def forward(ffn: models.FFN, place: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            layer = layers[place]
            h = F.silu(ffn.gate(x) * layer.gate[0] + layer.gate[1]) * (ffn.up(x) * layer.up[0] + layer.up[1])
            return ffn.down(h * keep[place] * layer.factor.double()) + bias[place]

        return run

    for place, ffn in enumerate(models.ffns(model)):
        ffn.module.forward = forward(ffn, place)
    with torch.no_grad():
        ours = model(tiny.ids).logits.log_softmax(-1)
        dense = copy.deepcopy(tiny.model).double()(tiny.ids).logits.log_softmax(-1)
    expected = (dense.exp() * (dense - ours)).sum(-1).mean()
    assert expected > 0.1
    loss = value(tiny, layers, tiny.ids, goal="kl")
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    for mask, layer in zip(keep, layers, strict=True):
        assert layer.factor.grad is not None
        assert layer.bias.grad is not None
        assert float(layer.factor.grad[~mask].abs().max()) == 0
        assert bool((layer.factor.grad[mask] != 0).all())
        assert bool((layer.bias.grad != 0).all())
        for affine in (layer.gate, layer.up):
            assert affine.grad is not None
            assert float(affine.grad[:, ~mask].abs().max()) == 0
            assert bool((affine.grad[:, mask] != 0).all())


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.3, -0.2)])
@pytest.mark.parametrize("k", [1, 2])
def test_a_variable_number_is_k_in_the_mean(tiny: Tiny, shares: tuple[float, float], k: int) -> None:
    part = tiny.part(shared=0.25)
    layers = layers_of(tiny, part, k, variable=True)
    with torch.no_grad():
        for layer, share in zip(layers, shares, strict=True):
            layer.budget += share
    wanted = [float(budget.detach()) for budget in budgets(layers)]
    assert sum(wanted) == pytest.approx(2 * k)
    assert (wanted[0] > wanted[1] + 0.1) == (shares[0] > shares[1])

    def numbers() -> tuple[list[Tensor], list[Tensor]]:
        seen: list[Tensor] = []

        def watching(layer: Routed) -> Callable[[Tensor, Tensor], Tensor]:
            def scale(x: Tensor, h: Tensor) -> Tensor:
                seen.append(layer.hard(x)[0])
                return layer.scale(x, h)

            return scale

        with torch.no_grad(), scaled(tiny.ffns, [watching(layer) for layer in layers]):
            tiny.model(tiny.ids)
        return seen, [layer.threshold.clone() for layer in layers]

    calibrate(tiny.model, tiny.ffns, layers, tiny.ids)
    on, thresholds = numbers()
    tokens = tiny.ids.numel()
    for each, budget in zip(on, wanted, strict=True):
        assert float(each.sum()) / tokens == pytest.approx(budget, abs=1 / tokens)
        assert len(each.sum(-1).unique()) > 1  # and not k each time
    with torch.no_grad():
        for layer in layers:
            assert layer.router.bias is not None
            layer.router.bias += 3
    calibrate(tiny.model, tiny.ffns, layers, tiny.ids)
    again, higher = numbers()
    assert all(torch.equal(a, b) for a, b in zip(on, again, strict=True))
    torch.testing.assert_close(torch.stack(higher), torch.stack(thresholds) + 3, rtol=0, atol=1e-5)


def test_budgets_keep_k_as_their_mean_where_a_layer_is_full(tiny: Tiny) -> None:
    layers = layers_of(tiny, tiny.part(), 3, variable=True)
    with torch.no_grad():
        layers[0].budget += 1.5
    found = [float(budget.detach()) for budget in budgets(layers)]
    assert 0 < min(found) < max(found) < 4
    assert sum(found) / 2 == pytest.approx(3)


def test_k_is_every_layers_budget_and_pruned_layers_have_none(tiny: Tiny) -> None:
    assert budgets(layers_of(tiny, tiny.part(), 3)) == [3, 3]
    assert budgets(pruned_layers()[2]) == [0, 0]
