"""One adapter against a reference in float64: its three kinds, its three starts, dropout, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.adapter import Residual, adapter, dead_units

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}


def parts(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, kind)]


def disturbed(module: nn.Module) -> nn.Module:
    """Away from a start in which biases are 0, gains 1 and some layers silent."""
    generator = torch.Generator().manual_seed(3)
    for value in module.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return module.double().eval()


def written_out(module: nn.Module, x: Tensor, kind: str, activation: str, layernorm: bool) -> Tensor:
    """The adapter by hand, from its weights in the order of the document."""
    linears = parts(module, nn.Linear)
    direct = x @ linears[0].weight.T + linears[0].bias if kind != "mlp" else 0
    if kind == "linear":
        return direct
    up, down = linears[-2:]
    normed = x
    if layernorm:
        (norm,) = parts(module, nn.LayerNorm)
        mean = x.mean(-1, keepdim=True)
        spread = ((x - mean) ** 2).mean(-1, keepdim=True)
        normed = (x - mean) / (spread + 1e-5).sqrt() * norm.weight + norm.bias
    return direct + PHI[activation](normed @ up.weight.T + up.bias) @ down.weight.T + down.bias


@pytest.mark.parametrize("layernorm", [True, False])
@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("kind", ["mlp", "linear", "residual"])
def test_equals_the_formula(kind: str, activation: str, layernorm: bool) -> None:
    module = disturbed(adapter(6, 4, kind=kind, mlp_ratio=1.5, activation=activation, layernorm=layernorm))
    x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 1
    expected = written_out(module, x, kind, activation, layernorm)
    assert expected.abs().max() > 1
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert len(parts(module, nn.LayerNorm)) == (kind != "linear" and layernorm)


def test_the_document_s_layers_in_the_document_s_order() -> None:
    module = adapter(6, 4)
    assert [type(part) for part in module.children()] == [nn.LayerNorm, nn.Linear, nn.SiLU, nn.Dropout, nn.Linear]


@pytest.mark.parametrize(
    ("width", "ratio", "hidden"), [(8, 0.5, 4), (8, 1, 8), (8, 2.0, 16), (7, 0.5, 4), (5, 0.01, 1)]
)
def test_hidden_width(width: int, ratio: float, hidden: int) -> None:
    up, down = parts(adapter(width, 3, mlp_ratio=ratio), nn.Linear)
    assert (up.in_features, up.out_features, down.in_features, down.out_features) == (width, hidden, hidden, 3)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("init", ["xavier", "kaiming", "normal"])
def test_starts(init: str, kind: str) -> None:
    torch.manual_seed(0)
    for layer in parts(adapter(400, 200, kind=kind, mlp_ratio=1.5, init_method=init), nn.Linear):
        weight, fan_in, fan_out = layer.weight.detach().double(), layer.in_features, layer.out_features
        edge = {"xavier": math.sqrt(6 / (fan_in + fan_out)), "kaiming": math.sqrt(6 / fan_in), "normal": math.inf}[init]
        std = edge / math.sqrt(3) if init != "normal" else 0.02
        assert float(weight.std()) == pytest.approx(std, rel=0.01)
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel())
        if init == "normal":  # a uniform one of the same spread ends at 1.7 standard deviations
            assert float((weight.abs() < std).double().mean()) == pytest.approx(0.6827, abs=0.01)
            assert float(weight.abs().max()) > 3.5 * std
        else:
            assert 0.999 * edge < float(weight.abs().max()) <= edge * (1 + 1e-6)
        assert not layer.bias.any()


@pytest.mark.parametrize("init", ["xavier", "kaiming", "normal"])
def test_a_residual_begins_as_its_linear_and_learns_at_once(init: str) -> None:
    module = adapter(6, 4, kind="residual", init_method=init)
    assert isinstance(module, Residual)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.eval()(x), module.linear(x), rtol=0, atol=0)
    module(x).square().sum().backward()
    *_, up, down = parts(module, nn.Linear)
    assert down.weight.grad.abs().min() > 0
    assert up.weight.abs().min() > 0
    disturbed(module)
    assert (module(x.double()) - module.linear(x.double())).abs().max() > 0.1
    module.hush()
    torch.testing.assert_close(module(x.double()), module.linear(x.double()), rtol=0, atol=0)


def test_dropout_in_training_only_and_between_activation_and_last_layer() -> None:
    module = adapter(4, 1000, mlp_ratio=250, dropout=0.25)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    parts(module, nn.Linear)[-1].register_forward_hook(lambda layer, given, said: seen.append(given[0]))
    torch.manual_seed(0)
    module.eval()(x), module(x), module.train()(x), module(x)
    calm, again, one, two = seen
    assert torch.equal(calm, again)
    assert not torch.equal(one, two)
    assert float((one == 0).float().mean()) == pytest.approx(0.25, abs=0.06)  # 1000 hidden units
    kept = one != 0
    torch.testing.assert_close(one[kept], calm[kept] / 0.75)
    torch.manual_seed(0)
    still = adapter(4, 3, dropout=0.0).train()
    assert torch.equal(still(x), still(x))


def test_dead_units_are_those_that_never_are_on() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    for kind in ("mlp", "residual"):
        module = adapter(6, 3, kind=kind, mlp_ratio=10 / 6, activation="relu", layernorm=False)
        _, up, _ = parts(module, nn.Linear) if kind == "residual" else (None, *parts(module, nn.Linear))
        up.bias.data[:3] = -1000.0
        up.bias.data[3:] = 1.0
        up.weight.data[3] = 0.0
        up.bias.data[3] = 5e-4  # on, but by less than counts
        up.weight.data[4] = 0.0
        up.bias.data[4] = 5e-3
        assert dead_units(module, x) == pytest.approx(0.4)
        assert dead_units(module, x.view(5, 10, 6)) == pytest.approx(0.4)
        one = torch.zeros(50, 6)
        one[17, 0] = 1.0
        up.weight.data[0], up.bias.data[0] = torch.tensor([2000.0, 0, 0, 0, 0, 0]), -1000.0
        assert dead_units(module, one) == pytest.approx(0.3)  # on in a single row is on
    below = adapter(6, 3, layernorm=False)
    parts(below, nn.Linear)[0].bias.data.fill_(-1.0)
    parts(below, nn.Linear)[0].weight.data.zero_()
    assert dead_units(below, x) == 0  # SiLU of -1 is -0.27: on
    assert math.isnan(dead_units(adapter(6, 3, kind="linear"), x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "MLP"}, "Unknown kind 'MLP': choose one of mlp, linear, residual"),
        ({"kind": ""}, "Unknown kind ''"),
        ({"init_method": "orthogonal"}, "Unknown init_method 'orthogonal': choose one of xavier, kaiming, normal"),
        ({"init_method": None}, "Unknown init_method 'None'"),
        ({"activation": "swish"}, "Unknown activation 'swish': choose one of silu, relu, gelu"),
        ({"kind": "linear", "init_method": "Xavier"}, "Unknown init_method 'Xavier'"),
        *(({"mlp_ratio": r}, f"mlp_ratio is {r}: give a number above 0") for r in (0, -1.0, math.nan, math.inf)),
        *(({"dropout": d}, f"dropout is {d}: give a share") for d in (1.0, 1, -0.1, math.nan, 2)),
    ],
)
def test_what_it_refuses_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BenchError) as caught:
        adapter(6, 4, **options)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
