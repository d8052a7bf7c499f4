"""Caches taken out of models and put in again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_families import FAMILIES, family, some_ids, tiny

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV, KVModel, as_kv, widths
from tinyonn_lib.kv.rope import Rotation


def own_cache(model: Any, ids: torch.Tensor) -> Any:
    """As the model fills it itself, all tokens of sliding layers kept."""
    from transformers import DynamicCache

    with torch.no_grad():
        return model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("name", FAMILIES)
def test_read_and_put_back_is_the_models_own_cache(name: str, tokens: int) -> None:
    model = family(name)
    reader, ids = KVModel(model), some_ids(2, tokens)
    own, again = own_cache(model, ids), reader.cache(reader.read(ids))
    assert again.get_seq_length() == tokens
    for mine, theirs in zip(again.layers, own.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=0, atol=1e-5)
        assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("name", FAMILIES)
def test_widths_of_config_and_of_cache_agree(name: str) -> None:
    model = family(name)
    reader = KVModel(model)
    kv = reader.read(some_ids(2, 3))
    assert widths(model.config) == reader.widths
    assert kv.shape == (2, reader.widths.layers, 3, reader.widths.width)


def test_widths_are_those_of_the_kv_heads() -> None:
    model = tiny("Qwen3", head_dim=24, num_key_value_heads=1, num_hidden_layers=3)
    assert (widths(model.config).layers, widths(model.config).heads, widths(model.config).head_dim) == (3, 1, 24)
    assert widths(model.config).width == 24
    assert widths(tiny("Falcon", alibi=False, new_decoder_architecture=True, num_kv_heads=2).config).heads == 2


@pytest.mark.parametrize("name", ["default", "YaRN", "partial", "two kinds"])
def test_half_precision(name: str) -> None:
    """Of the order of its rounding (2^-8), and never another dtype."""
    model = family(name).bfloat16()
    reader, ids = KVModel(model), some_ids(2, 30)
    kv, own = reader.read(ids), own_cache(model, ids)
    assert kv.keys.dtype == kv.values.dtype == reader.dtype == torch.bfloat16
    for layer, theirs in zip(reader.cache(kv).layers, own.layers, strict=True):
        assert layer.keys.dtype == torch.bfloat16
        assert (layer.keys - theirs.keys).float().norm() <= 2**-7 * theirs.keys.float().norm()
        assert torch.equal(layer.values, theirs.values)
    wide = reader.cache(KV(kv.keys.float(), kv.values.float()))
    assert {t.dtype for layer in wide.layers for t in (layer.keys, layer.values)} == {torch.bfloat16}


def test_padding_at_the_end_changes_nothing_before_it(student: KVModel) -> None:
    ids = some_ids(1, 9)
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), 1)
    torch.testing.assert_close(student.read(padded).keys[:, :, :9], student.read(ids).keys, rtol=0, atol=1e-5)


def test_heads_lie_side_by_side(student: KVModel) -> None:
    ids = some_ids(2, 5)
    own, kv = own_cache(student.model, ids), student.read(ids)
    for layer in range(3):
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            assert torch.equal(kv.values[:, layer, :, part], own.layers[layer].values[:, head])


def test_reading_follows_grad_mode_and_the_model_is_frozen(student: KVModel) -> None:
    assert not any(p.requires_grad for p in student.model.parameters())
    assert not student.read(some_ids(1, 3)).keys.requires_grad
    trained = KVModel(tiny("Llama", num_hidden_layers=1))
    trained.model.requires_grad_(True)
    kv = trained.read(some_ids(1, 3))
    assert kv.keys.requires_grad
    assert not kv.detach().keys.requires_grad
    assert not kv.detach().values.requires_grad


def test_a_cache_can_be_differentiated(student: KVModel) -> None:
    kv = student.read(some_ids(1, 5))
    keys = kv.keys.clone().requires_grad_(True)
    cache = student.cache(KV(keys, kv.values))
    (slope,) = torch.autograd.grad(sum(layer.keys.square().sum() for layer in cache.layers), keys)
    torch.testing.assert_close(slope, 2 * kv.keys, rtol=1e-4, atol=1e-5)  # rotations keep lengths


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "latent attention": (
        "DeepseekV3", {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                       "first_k_dense_replace": 4, "moe_intermediate_size": 16}, "has latent attention"
    ),
    "recurrent": ("Mamba", {"state_size": 4}, "has linear_attention|has no attention"),
    "linear attention": ("Qwen3Next", {"head_dim": 8, "num_experts": 2}, "has linear_attention"),
    "convolutions": (
        "Lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_ff_dim": 32}, "has conv"
    ),
    "chunks": (
        "Llama4Text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}, "has chunked_attention"
    ),
    "widths by layer": (
        "Gemma4Text",
        {"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
         "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
        "keys and values of several widths",
    ),
    "values of another width": (
        "MiMoV2Flash", {"head_dim": 12, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
        "keys and values of several widths",
    ),
    "ALiBi": ("Bloom", {"n_head": 4, "n_layer": 4}, "neither transformers' rotary embedding nor"),
    "a rotation without a module": (
        "GPTJ", {"n_embd": 32, "n_head": 4, "n_layer": 4, "rotary_dim": 4, "n_positions": 64, "vocab_size": 64,
                 "bos_token_id": 1, "eos_token_id": 2}, "neither transformers' rotary embedding nor"
    ),
    "a norm after the rotation": ("HunYuanDenseV1", {"head_dim": 8}, "does not undo"),
    "no cache": ("Bert", {}, "cannot be read with a cache of keys and values"),
    "no cache in its code": (
        "OpenAIGPT", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64},
        "cannot be read with a cache"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_work_gives_one_clear_line(name: str) -> None:
    stem, options, said = REFUSED[name]
    with pytest.raises(BenchError, match=said) as caught:
        KVModel(tiny(stem, **options))
    assert "choose another model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_rotation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies that are not the model's own leave a trace in the first layer."""
    model = family("Llama 3")
    right = Rotation._turned

    def plain(self: Rotation, keys: torch.Tensor, layer: int, positions: torch.Tensor, sign: int) -> torch.Tensor:
        return right(self, keys, layer, 2 * positions, sign)

    monkeypatch.setattr(Rotation, "_turned", plain)
    with pytest.raises(BenchError, match="Layer 0 of LlamaForCausalLM .* does not undo"):
        KVModel(model)


def test_layers_without_rope_are_found() -> None:
    """Their keys stand in the cache as they are."""
    model = family("some NoPE")
    reader, ids = KVModel(model), some_ids(1, 12)
    kv, own = reader.read(ids), own_cache(model, ids)
    same = [torch.equal(kv.keys[:, n], layer.keys.transpose(1, 2).flatten(2)) for n, layer in enumerate(own.layers)]
    assert same == [False, True, False, True]


# as_kv ------------------------------------------------------------------------------------------------------------


def test_every_usual_form_of_a_cache_is_the_same(student: KVModel) -> None:
    own = own_cache(student.model, some_ids(2, 4))
    pairs = [(layer.keys, layer.values) for layer in own.layers]
    flat = [tuple(t.transpose(1, 2).reshape(2, 4, 16) for t in pair) for pair in pairs]
    kv = as_kv(own)
    assert as_kv(kv) is kv
    assert kv.shape == (2, 3, 4, 16)
    for other in (as_kv(pairs), as_kv(tuple(pairs)), as_kv(flat)):
        assert torch.equal(other.keys, kv.keys)
        assert torch.equal(other.values, kv.values)
    assert torch.equal(kv[1:].keys, kv.keys[1:])
    assert torch.equal(kv[torch.tensor([1, 0])].values, kv.values.flip(0))


def test_no_cache_at_all() -> None:
    from transformers import DynamicCache

    model = tiny("Mamba", state_size=4)
    recurrent = model(some_ids(1, 3), use_cache=True).cache_params
    for nothing in (None, [], DynamicCache(), recurrent, [(torch.zeros(1, 2, 3),)], [(torch.zeros(1, 2, 3), None)]):
        with pytest.raises(BenchError, match="use_cache=True"):
            as_kv(nothing)


def test_layers_that_differ_are_refused() -> None:
    one, two = torch.zeros(1, 2, 5, 8), torch.zeros(1, 4, 5, 8)
    with pytest.raises(BenchError, match=r"differ in shape \(\(1, 2, 5, 8\), \(1, 4, 5, 8\)\)"):
        as_kv([(one, one), (two, two)])
    with pytest.raises(BenchError, match="differ in shape"):
        as_kv([(one, two)])
    # Equally wide, but of other heads: one RoPE cannot turn both.
    with pytest.raises(BenchError, match="differ in shape"):
        as_kv([(one, one), (torch.zeros(1, 1, 5, 16), torch.zeros(1, 1, 5, 16))])


def test_keys_and_values_of_other_shapes() -> None:
    with pytest.raises(BenchError, match=r"got \(1, 2, 3, 4\) and \(1, 2, 3, 5\)"):
        KV(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5))
    with pytest.raises(BenchError, match="of one shape"):
        KV(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


def test_another_models_cache_is_refused(student: KVModel, teacher: KVModel) -> None:
    kv = teacher.read(some_ids(1, 4))
    with pytest.raises(BenchError, match="5 layers of width 32; the model wants 3 of 16: project it first"):
        student.cache(kv)
    with pytest.raises(BenchError, match="3 layers of width 32"):
        student.cache(KV(kv.keys[:, :3], kv.values[:, :3]))
    own = student.read(some_ids(1, 4))
    with pytest.raises(BenchError, match="2 layers of width 16"):
        student.cache(KV(own.keys[:, :2], own.values[:, :2]))
