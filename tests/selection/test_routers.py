"""Routers of every family are found by type; what is captured is what they computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.routers import Watch, routers, shifted

FAMILIES = ("olmoe", "granitemoe", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "lfm2_moe")
NAMES = {
    "olmoe": "model.layers.{}.mlp.gate",
    "granitemoe": "model.layers.{}.block_sparse_moe.router",
    "qwen2_moe": "model.layers.{}.mlp.gate",
    "qwen3_moe": "model.layers.{}.mlp.gate",
    "mixtral": "model.layers.{}.mlp.gate",
    "glm4_moe": "model.layers.{}.mlp.gate",
    "gpt_oss": "model.layers.{}.mlp.router",
    "lfm2_moe": "model.layers.{}.feed_forward.gate",
}
PLACES = {"qwen3_moe": (0, 2), "glm4_moe": (1, 2), "lfm2_moe": (1, 2)}
IDS = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 7, [1] * 4 + [0] * 3])


@pytest.mark.parametrize("kind", FAMILIES)
def test_finds_the_routers_and_nothing_else(kind: str, make_moe: Callable[..., Any]) -> None:
    model = make_moe(kind)
    layers = routers(model)
    assert [layer.name for layer in layers] == [NAMES[kind].format(i) for i in PLACES.get(kind, (0, 1))]
    for layer in layers:
        assert layer.module is model.get_submodule(layer.name)
        assert layer.weight.shape == (layer.experts, 32)
        assert (layer.bias is not None) == (kind == "gpt_oss")
    counts = {getattr(model.config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    assert {layer.experts for layer in layers} == counts - {None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_captured_logits_are_those_of_the_captured_inputs(kind: str, make_moe: Callable[..., Any]) -> None:
    model = make_moe(kind)
    with Watch(model) as watch:
        own = model(input_ids=IDS, attention_mask=MASK, use_cache=False, output_router_logits=True).router_logits
    for layer, logits, inputs, theirs in zip(watch.layers, watch.logits, watch.inputs, own, strict=True):
        assert logits.dtype == torch.float32
        assert logits.shape == (21, layer.experts)
        bias = None if layer.bias is None else layer.bias.double()
        exact = F.linear(inputs.double(), layer.weight.double(), bias)
        assert (logits - exact).abs().max() <= 1e-6
        assert exact.std(0).min() > 0.1  # the tokens differ: nothing constant was compared
        assert torch.equal(logits, theirs.reshape(logits.shape).float())


def test_jetmoe_declares_a_list_and_its_inner_routers_are_found() -> None:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=16,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = JetMoeForCausalLM(config).eval()
    layers = routers(model)
    assert [type(layer.module).__name__ for layer in layers] == ["JetMoeTopKGating"] * 4
    with Watch(model) as watch:
        own = model(input_ids=IDS, output_router_logits=True).router_logits
    pairs = [[torch.equal(x, y) for y in own] for x in watch.logits]
    assert [sum(row) for row in pairs] == [1, 2, 1, 2]  # transformers names those of the attention twice
    assert all(sum(column) == 1 for column in zip(*pairs, strict=True))


def test_several_matrices_are_refused_by_name() -> None:
    from transformers import DogeConfig, DogeForCausalLM

    model = DogeForCausalLM(
        DogeConfig(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_experts=16, num_experts_per_tok=2, is_moe=True,
        )
    )  # fmt: skip
    with pytest.raises(BenchError, match=r"model\.layers\.0\.mlp \(DogeCDMoE\) is not one matrix"):
        routers(model)


def test_a_dense_model_is_refused_with_a_way_out(make_moe: Callable[..., Any]) -> None:
    model = make_moe("qwen3")
    with pytest.raises(BenchError, match=r"no router.*02_scan to 05_router.*OLMoE"):
        routers(model)
    with pytest.raises(BenchError, match=r"no router"):
        Watch(model)


def test_probabilities_are_refused(make_moe: Callable[..., Any]) -> None:
    model = make_moe()
    for layer in routers(model):
        layer.module.register_forward_hook(lambda _, __, output: (output[0].softmax(-1), *output[1:]))
    with Watch(model) as watch:
        model(input_ids=IDS)
    with pytest.raises(BenchError, match="probabilities instead of raw logits"):
        _ = watch.logits


def test_a_forward_drops_what_the_last_one_left_and_leaving_removes_the_hooks(make_moe: Callable[..., Any]) -> None:
    model = make_moe()
    with Watch(model) as watch:
        with pytest.raises(BenchError, match="did not run"):
            _ = watch.logits
        model(input_ids=IDS)
        first = watch.logits[1]
        model(input_ids=IDS[:1])
        assert watch.logits[1].shape == (7, 8)
        with pytest.raises(RuntimeError), torch.inference_mode():
            model(input_ids=IDS, attention_mask=MASK[:, :3].bool(), position_ids=torch.zeros(5, 9, 2))
        with pytest.raises(BenchError, match="did not run"):
            _ = watch.logits
    model(input_ids=IDS)
    assert first.shape == (21, 8)
    with torch.no_grad(), Watch(model, inputs=False) as lean:
        model(input_ids=IDS)
    assert lean.inputs == []
    assert torch.equal(lean.logits[1], first)
    assert not any(layer.module._forward_hooks for layer in watch.layers)
    assert not model._forward_pre_hooks


def test_threads_see_their_own_forwards(olmoe: Any) -> None:
    with Watch(olmoe) as watch:

        def one(length: int) -> list[torch.Tensor]:
            with torch.no_grad():
                for _ in range(5):
                    olmoe(input_ids=IDS[:, :length])
            return watch.logits

        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(one, (2, 5, 7)))
        alone = [one(length) for length in (2, 5, 7)]
    assert all(torch.equal(x, y) for a, b in zip(together, alone, strict=True) for x, y in zip(a, b, strict=True))


def test_gradients_reach_the_rows(make_moe: Callable[..., Any]) -> None:
    model = make_moe().requires_grad_(True)
    with Watch(model) as watch:
        model(input_ids=IDS)
        watch.logits[0].sum().backward()
    exact = watch.inputs[0].double().sum(0).expand(8, -1)
    assert (watch.layers[0].weight.grad - exact).abs().max() < 1e-4


def test_shifted_adds_one_vector_and_takes_it_back_exactly(make_moe: Callable[..., Any]) -> None:
    model = make_moe()
    before = [layer.weight.clone() for layer in routers(model)]
    vector = torch.randn(2, 32)
    with torch.no_grad(), Watch(model) as watch:
        plain = model(input_ids=IDS).logits
        inputs, logits = watch.inputs, watch.logits
        with shifted(model, vector):
            moved = model(input_ids=IDS).logits
            for place in (0, 1):
                expected = logits[place].double() + (inputs[place].double() @ vector[place].double())[:, None]
                assert (watch.logits[place] - expected).abs().max() < 1e-4
    assert (moved - plain).abs().max() < 1e-5 * plain.abs().max()
    assert all(torch.equal(layer.weight, old) for layer, old in zip(routers(model), before, strict=True))
