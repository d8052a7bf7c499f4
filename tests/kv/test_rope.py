"""Keys lose exactly the rotation that their model gave them: what is left is what `k_proj` or `k_norm` said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_families import FAMILIES, family, some_ids, tiny
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.rope import Rotation

TOLERANCE = 1e-5
ROTATING = [name for name in FAMILIES if name not in ("positions embedded", "a mask for each text")]
HOOKED = ("k_proj", "k_norm", "k_layernorm", "qkv_proj")


def heard_keys(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """Layer → `(batch, tokens, width)`: what its last module before the rotation says."""
    said: dict[int, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.split(".")[-1] in HOOKED:
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            hooks.append(module.register_forward_hook(lambda _m, _i, out, layer=layer: said.__setitem__(layer, out)))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    config = model.config
    heads = config.num_key_value_heads
    for layer, out in said.items():
        if out.ndim == 4:  # norms look at one head at a time, some before the heads go in front and some after
            out = (out if out.shape[2] == heads else out.transpose(1, 2)).flatten(2)
        if type(model).__name__.startswith("Phi3"):  # one matrix for all three
            width = heads * config.hidden_size // config.num_attention_heads
            out = out[..., config.hidden_size : config.hidden_size + width]
        said[layer] = out
    return said


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("name", [name for name in ROTATING if name != "one KV head"])
def test_keys_as_read_are_those_before_the_rotation(name: str, tokens: int) -> None:
    model = family(name)
    ids = some_ids(2, tokens)
    read = KVModel(model).read(ids)
    heard = heard_keys(model, ids)
    assert set(range(read.shape[1])) <= set(heard)
    for layer in range(read.shape[1]):
        torch.testing.assert_close(read.keys[:, layer], heard[layer], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ROTATING)
def test_a_token_has_one_key_wherever_it_stands(name: str) -> None:
    """In the first layer, which sees no other token: needs no hook, so it holds for fused matrices, too."""
    model = KVModel(family(name))
    ids = some_ids(1, 40)
    alone = torch.cat([model.read(token).keys[:, 0] for token in ids.T[..., None]], 1)
    torch.testing.assert_close(model.read(ids).keys[:, 0], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ROTATING)
def test_rotating_back_and_forth(name: str) -> None:
    model = family(name)
    config = model.config
    rotation = Rotation(model)
    heads = 1 if name == "one KV head" else config.num_key_value_heads
    keys = torch.randn(2, heads, 50, getattr(config, "head_dim", None) or 8)
    places = torch.randint(0, 64, (50,))
    for layer in range(config.num_hidden_layers):
        turned = rotation.rotate(keys, layer, places)
        assert (turned - keys).norm() > 0.1 * keys.norm()
        assert (rotation.unrotate(turned, layer, places) - keys).abs().max() <= TOLERANCE
        assert (rotation.rotate(rotation.unrotate(keys, layer, places), layer, places) - keys).abs().max() <= TOLERANCE


def test_a_rotation_written_out() -> None:
    """Dimension i and i + half turn by position ÷ 10000^(i / half)."""
    rotation = Rotation(family("default"))
    keys = torch.randn(1, 2, 3, 8, dtype=torch.float64).float()
    places = torch.tensor([0, 7, 33])
    angles = places[:, None].double() * 10000.0 ** (-torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    expected = torch.complex(keys[..., :4].double(), keys[..., 4:].double()) * turn
    torch.testing.assert_close(
        rotation.rotate(keys, 0, places), torch.cat((expected.real, expected.imag), -1).float(), rtol=0, atol=1e-6
    )


def test_two_kinds_of_layers_turn_differently() -> None:
    rotation = Rotation(family("two kinds"))
    keys, places = torch.randn(1, 2, 5, 8), torch.arange(10, 15)
    sliding, full = (rotation.rotate(keys, layer, places) for layer in (0, 2))
    assert (sliding - full).abs().max() > 0.1
    assert torch.equal(sliding, rotation.rotate(keys, 3, places))


def test_partial_rotation_leaves_the_other_dimensions_alone() -> None:
    rotation = Rotation(family("partial"))
    keys, places = torch.randn(1, 2, 5, 8), torch.arange(3, 8)
    turned = rotation.rotate(keys, 0, places)
    assert torch.equal(turned[..., 4:], keys[..., 4:])
    assert (turned[..., :4] - keys[..., :4]).abs().min(2).values.max() > 0


def test_the_reach_of_dynamic_ntk_is_that_of_the_model() -> None:
    """Read beyond the original length, then within it: each time what the model itself just used is taken off."""
    model = family("dynamic NTK")
    reader = KVModel(model)
    for tokens in (40, 50, 20, 5, 30):
        ids = some_ids(1, tokens, seed=tokens)
        heard = heard_keys(model, ids)
        read = reader.read(ids)
        for layer in range(4):
            torch.testing.assert_close(read.keys[:, layer], heard[layer], rtol=0, atol=TOLERANCE)


def test_models_without_rope_keep_their_keys() -> None:
    rotation = Rotation(family("positions embedded"))
    keys = torch.randn(1, 4, 3, 8)
    assert rotation.module is None
    assert rotation.rotate(keys, 0, torch.arange(3)) is keys
    assert rotation.unrotate(keys, 0, torch.arange(3)) is keys


def test_half_precision_stays() -> None:
    rotation = Rotation(family("YaRN"))
    keys = torch.randn(1, 2, 30, 8).bfloat16()
    turned = rotation.rotate(keys, 0, torch.arange(30))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, rotation.rotate(keys.float(), 0, torch.arange(30)).bfloat16(), rtol=0, atol=0)


def test_a_rotation_of_a_models_own_kind_is_refused() -> None:
    model = tiny("Llama4Text", head_dim=8, num_local_experts=2, intermediate_size_mlp=32)
    with pytest.raises(BenchError, match="rotates its keys in a way of its own"):
        Rotation(model)
