"""Small models of five architectures from the same few sizes, all of them plain transformers classes.

What is saved loads with `AutoModelForCausalLM` and no code of ours: compatibility is the lifeline (document 002 §1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.models import new_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_GRAIN = 8  # widths of experts are multiples of it: 16 bytes in bfloat16, which the grouped kernels of a GPU want
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@dataclass(frozen=True)
class _Sizes:
    """What `new` was asked for."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    max_length: int
    experts: int
    active: int
    tie: bool
    eos_token_id: int | None
    pad_token_id: int | None

    @property
    def common(self) -> dict[str, Any]:
        """What all configs call alike."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_length,
            "rope_parameters": _ROPE,
            "tie_word_embeddings": self.tie,
            "bos_token_id": self.eos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "dtype": "float32",
        }

    def expert_width(self, parts: int) -> int:
        """Neurons of an expert when `parts` of them make up the active `ffn`."""
        if (width := self.ffn // parts // _GRAIN * _GRAIN) < _GRAIN:
            raise BenchError(f"ffn={self.ffn} is too narrow for experts: it must be at least {_GRAIN * parts} here.")
        return width


def _qwen3_moe(sizes: _Sizes) -> PreTrainedConfig:
    """Every FFN is `experts` experts of ffn / active neurons."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **sizes.common,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.active,
        moe_intermediate_size=sizes.expert_width(sizes.active),
        norm_topk_prob=sizes.active > 1,  # with one expert the normalised weight is always 1: nothing for the router
    )


def _qwen2_moe(sizes: _Sizes) -> PreTrainedConfig:
    """A shared expert as wide as the active ones together, as in Qwen1.5-MoE; it also takes what rounding leaves."""
    from transformers import Qwen2MoeConfig

    width = sizes.expert_width(2 * sizes.active)
    return Qwen2MoeConfig(
        **sizes.common,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.active,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=(sizes.ffn - sizes.active * width) // _GRAIN * _GRAIN,
        norm_topk_prob=False,  # the family's own, which llama.cpp takes for granted
    )


def _deepseek_v3(sizes: _Sizes) -> PreTrainedConfig:
    """Latent attention, one shared expert, and a dense FFN in the first of several layers."""
    from transformers import DeepseekV3Config

    if sizes.head_dim % 4:
        raise BenchError(f"head_dim={sizes.head_dim} is no multiple of 4: latent attention rotates half of each head.")
    if sizes.width < 4 * _GRAIN:
        raise BenchError(f"width={sizes.width} is too narrow for latent attention: choose at least {4 * _GRAIN}.")
    # MLA compresses instead of sharing heads, and only the rotated half of a head is the rotary encoding's.
    common = {**sizes.common, "num_key_value_heads": sizes.heads, "head_dim": sizes.head_dim // 2}
    return DeepseekV3Config(
        **common,
        kv_lora_rank=sizes.width // 4 // _GRAIN * _GRAIN,
        q_lora_rank=sizes.width // 2 // _GRAIN * _GRAIN,
        qk_rope_head_dim=sizes.head_dim // 2,
        qk_nope_head_dim=sizes.head_dim // 2,
        v_head_dim=sizes.head_dim,
        n_routed_experts=sizes.experts,
        num_experts_per_tok=sizes.active,
        moe_intermediate_size=sizes.expert_width(sizes.active + 1),
        n_shared_experts=1,
        first_k_dense_replace=min(1, sizes.layers - 1),
        n_group=1,
        topk_group=1,
        norm_topk_prob=sizes.active > 1,
        routed_scaling_factor=1.0,
        num_mtp_layers=0,  # kept beside the standard weights (mtp.py)
    )


def _gemma3n(sizes: _Sizes) -> PreTrainedConfig:
    """Per-layer embeddings of an eighth of the width (as Gemma-3n), AltUp with two streams, LAuReL, full attention."""
    from transformers import Gemma3nTextConfig

    if sizes.width % sizes.heads:
        raise BenchError(f"width={sizes.width} is not a multiple of heads={sizes.heads}, which gemma3n asks for.")
    return Gemma3nTextConfig(
        **{**sizes.common, "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
        layer_types=["full_attention"] * sizes.layers,
        sliding_window=sizes.max_length,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * sizes.layers,
        vocab_size_per_layer_input=sizes.vocab_size,
        hidden_size_per_layer_input=max(8, sizes.width // 8),
        altup_num_inputs=2,
        laurel_rank=max(8, sizes.width // 32),
    )


# Name → its config; qwen3 is `lm.models.new_model`, the dense model of all other phases.
ARCHITECTURES: dict[str, Callable[[_Sizes], PreTrainedConfig] | None] = {
    "qwen3": None,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "deepseek_v3": _deepseek_v3,
    "gemma3n": _gemma3n,
}


def new(
    name: str,
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    max_length: int,
    experts: int = 8,
    active: int = 2,
    tie: bool = True,
    seed: int = 0,
    eos_token_id: int | None = 0,
    pad_token_id: int | None = 1,
) -> PreTrainedModel:
    """A fresh model in float32 from random weights, its residual branches (o_proj, down_proj) starting at zero.

    As in `lm.models.new_model`, which is what "qwen3" calls: but for gemma3n, whose AltUp and LAuReL mix between the
    layers, the untrained model is the identity from embedding to final norm.

    Args:
        name: one of `ARCHITECTURES`.
        vocab_size, width, layers, heads, kv_heads, head_dim: as everywhere; `kv_heads` means nothing to deepseek_v3,
            which keeps one latent of width / 4 and half a head of rotated key per token instead.
        ffn: neurons that a token uses in each layer: the FFN, or the shared expert and the active experts together.
            Experts are multiples of 8 neurons wide, rounded down: qwen3_moe ffn / active each; qwen2_moe half of it
            for the shared expert, ffn / (2 active) for each other; deepseek_v3 ffn / (active + 1) each, the shared one,
            too, and a dense FFN of `ffn` in the first of several layers.
        max_length: in tokens.
        experts, active: routed experts of a layer and how many of them a token uses; the dense models take no notice.
        tie: one table for embedding and head.
        seed: of the weights; the global random state is left as it was.

    Raises:
        BenchError: unknown name, or sizes that do not fit together.
    """
    from transformers import AutoModelForCausalLM

    if name not in ARCHITECTURES:
        raise BenchError(f"Unknown architecture '{name}': choose one of {', '.join(ARCHITECTURES)}.")
    make = ARCHITECTURES[name]
    if make is None:
        return new_model(
            vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            ffn=ffn, max_length=max_length, tie=tie, seed=seed, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
        )  # fmt: skip
    sizes = _Sizes(
        vocab_size, width, layers, heads, kv_heads, head_dim, ffn, max_length, experts, active, tie, eos_token_id,
        pad_token_id,
    )  # fmt: skip
    _check(sizes)
    config = make(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast("PreTrainedModel", AutoModelForCausalLM.from_config(config))
    for key, weight in model.named_parameters():
        if key.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            nn.init.zeros_(weight)
    return model


def _check(sizes: _Sizes) -> None:
    numbers = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_length", "active")
    if bad := [f"{name}={getattr(sizes, name)}" for name in numbers if getattr(sizes, name) < 1]:
        raise BenchError(f"Model sizes must be positive: {', '.join(bad)}.")
    if sizes.heads % sizes.kv_heads:
        raise BenchError(f"heads={sizes.heads} is not a multiple of kv_heads={sizes.kv_heads}.")
    if sizes.head_dim % 2:
        raise BenchError(f"head_dim={sizes.head_dim} is odd: rotary positions turn pairs, choose an even number.")
    if not sizes.active <= sizes.experts >= 2:
        raise BenchError(f"active={sizes.active} of experts={sizes.experts}: take at least 2 experts and no more.")


def counts(model: nn.Module) -> dict[str, int]:
    """How large a model is, in parameters.

    Returns:
        total: all parameters, tied ones once. active: those for one token, the total without the experts that its
        routers leave out (tables count whole). embedding: the tables indexed by token, also the per-layer ones of
        gemma3n, and the output head if it is not tied.
    """
    parts = cast("Any", model)
    named = dict(model.named_parameters())  # tied ones once
    routed = [weight for name, weight in named.items() if ".experts." in name]  # (E, …) each
    idle = sum(weight[0].numel() * (len(weight) - parts.config.num_experts_per_tok) for weight in routed)
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    tables[id(parts.get_output_embeddings().weight)] = parts.get_output_embeddings().weight
    total = sum(weight.numel() for weight in named.values())
    return {"total": total, "active": total - idle, "embedding": sum(weight.numel() for weight in tables.values())}


def matched(name: str, parameters: int, **sizes: Any) -> int:
    """The `ffn`, a multiple of 8, with which an architecture comes nearest to so many parameters in all.

    Experts come in steps: 8 neurons more in each of E experts are 24 · E · width parameters a layer, and half of such
    a step is how far off the result can be.

    Args:
        name: one of `ARCHITECTURES`.
        parameters: to come near to; `counts(...)["total"]` of another model.
        sizes: as in `new`, without `ffn`.

    Raises:
        BenchError: as in `new`, or the narrowest FFN has more.
    """

    def total(ffn: int) -> int:
        with torch.device("meta"):  # shapes only
            return counts(new(name, ffn=ffn, **sizes))["total"]

    active = int(sizes.get("active", 2))
    low = _GRAIN * {"qwen3_moe": active, "qwen2_moe": 2 * active, "deepseek_v3": active + 1}.get(name, 1)
    if total(low) > parameters:
        raise BenchError(
            f"{name} has {total(low):,} parameters with the narrowest FFN already, not {parameters:,}: take fewer "
            "layers, a smaller width or fewer experts."
        )
    high = 2 * low
    while total(high) <= parameters:
        low, high = high, 2 * high
    while high - low > _GRAIN:  # total(low) <= parameters < total(high)
        middle = (low + high) // 2 // _GRAIN * _GRAIN
        low, high = (middle, high) if total(middle) <= parameters else (low, middle)
    return min(low, high, key=lambda ffn: abs(total(ffn) - parameters))
