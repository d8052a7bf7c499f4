"""Fused experts of transformers 5: counts and per-expert gradient norms against autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scan_models import nll, samples
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.tables import units_table

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen3": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=24)),
    "qwen2": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    ),
    "glm4": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **SIZES, n_routed_experts=6, moe_intermediate_size=24, n_shared_experts=1, first_k_dense_replace=0
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=6)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=6, layer_types=["full_attention"] * 2)
    ),
}  # fmt: skip


def made(family: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # some families start experts or routers at zero
            nn.init.normal_(parameter, std=0.2 if "experts" in name else 0.1)
    model.set_experts_implementation(implementation)
    return model


def reference(model: nn.Module, texts: list[list[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per module of experts: sums over texts of the norms of each expert's slices of the two gradients."""
    exact = copy.deepcopy(model).double().requires_grad_(True)
    exact.set_experts_implementation("eager")
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for text in texts:
        exact.zero_grad()
        nll(exact, torch.tensor([text])).backward()
        for name, module in exact.named_modules():
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                norms = [getattr(module, part).grad.flatten(1).norm(dim=1) for part in ("gate_up_proj", "down_proj")]
                before = found.get(name, (0.0, 0.0))
                found[name] = (before[0] + norms[0].numpy(), before[1] + norms[1].numpy())
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_every_expert_equals_autograd(family: str, trainable: bool) -> None:
    model, texts = made(family).requires_grad_(trainable), samples(2, low=20, high=40)
    expected = reference(model, texts)
    before = [model(input_ids=torch.tensor([text])).logits for text in texts]
    with Observer(model, "experts") as observer:
        for text in texts:
            model.zero_grad()
            nll(model, torch.tensor([text])).backward()
            observer.end_sample()
    totals = observer.totals()
    assert set(observer.methods) == {"grad" if trainable else "again"}
    assert {target.name for target in totals.layout.targets} == set(expected)
    tokens = sum(map(len, texts))
    for number, target in enumerate(totals.layout.targets):
        for part, norms in zip(("grad_gate_up", "grad_down"), expected[target.name], strict=True):
            np.testing.assert_allclose(totals.of(target.name, part), norms, rtol=1e-4, atol=1e-6 * norms.max())
        assert totals.of(target.name, "count").sum() == 2 * tokens  # two experts a token
        assert totals.counts[number].tolist() == [tokens, 2, tokens, 2]
    assert (units_table(totals)["grad"] > 0).any()
    after = [model(input_ids=torch.tensor([text])).logits for text in texts]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_under_checkpointing_and_grouped_kernels(reentrant: bool, trainable: bool) -> None:
    model, texts = made("qwen3", "grouped_mm").requires_grad_(trainable).train(), samples(2, low=20, high=40)
    expected = reference(model, texts)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with Observer(model, "experts,linears", calls=1) as observer:
        for text in texts:
            model.zero_grad()
            nll(model, torch.tensor([text])).backward()
            observer.end_sample()
    totals = observer.totals()
    for name, (gate_up, down) in expected.items():
        np.testing.assert_allclose(totals.of(name, "grad_gate_up"), gate_up, rtol=1e-4, atol=1e-6 * gate_up.max())
        np.testing.assert_allclose(totals.of(name, "grad_down"), down, rtol=1e-4, atol=1e-6 * down.max())


def test_counts_are_the_routing_and_padding_is_not_counted() -> None:
    model = made("qwen3")
    chosen: list[torch.Tensor] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, a: chosen.append(a[1].clone()))
    ids, attention = torch.tensor([[5, 6, 7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    with Observer(model, "experts", gradients=False) as observer:
        model(input_ids=ids, attention_mask=attention)
    expected = np.bincount(chosen[0][:4].flatten().numpy(), minlength=6)
    np.testing.assert_array_equal(observer.totals().of("model.layers.0.mlp.experts", "count"), expected)


def test_a_dense_model_has_no_experts_and_says_so() -> None:
    from scan_models import tiny

    with pytest.raises(BenchError, match="this model has none"):
        Observer(tiny(), "experts")
