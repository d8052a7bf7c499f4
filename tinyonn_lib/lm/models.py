"""Causal language models: make a small one, load any (see `load`), find its gated FFNs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import Dtype, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

__all__ = ["FFN", "Dtype", "describe", "ffns", "load_model", "load_tokenizer", "neurons", "new_model"]


@dataclass(frozen=True)
class FFN:
    """The gated FFN of one decoder layer: down(act(gate(x)) * up(x)).

    Neuron i is row i of gate and up and column i of down.
    """

    layer: int  # place of the layer in the decoder, from 0
    name: str  # module name inside the model, for example "model.layers.0.mlp"
    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def width(self) -> int:
        """Size of the residual stream, d_model."""
        return int(self.down.out_features)

    @property
    def neurons(self) -> int:
        """Number of neurons, d_ffn."""
        return int(self.down.in_features)


def new_model(
    *,
    vocab_size: int,
    width: int = 128,
    layers: int = 3,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    ffn: int = 512,
    max_length: int = 256,
    tie: bool = True,
    seed: int = 0,
    rope_theta: float = 10_000.0,
    eos_token_id: int | None = 0,
    pad_token_id: int | None = 1,
) -> Qwen3ForCausalLM:
    """A fresh Qwen3 (gated FFN, RMSNorm, GQA, RoPE) in float32, its residual branches starting at zero.

    o_proj and down_proj are zero, so the untrained model is the identity from embedding to head; with a matrix
    optimiser this trains faster at tiny budgets (PEERS.md §7). `max_length` is in tokens.

    Raises:
        BenchError: sizes that do not fit together.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "ffn": ffn, "max_length": max_length,
    }  # fmt: skip
    if bad := [f"{name}={value}" for name, value in sizes.items() if value < 1]:
        raise BenchError(f"Model sizes must be positive: {', '.join(bad)}.")
    if heads % kv_heads:
        raise BenchError(f"heads={heads} is not a multiple of kv_heads={kv_heads}.")
    if head_dim % 2:
        raise BenchError(f"head_dim={head_dim} is odd: rotary positions turn pairs, choose an even number.")
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tie,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
    return model


def ffns(model: nn.Module) -> list[FFN]:
    """The gated FFNs of a model's decoder layers in order, found by structure, not by class name.

    Raises:
        BenchError: there is none (for example GPT-2, OPT, or a model of experts only), or a layer's shapes disagree.
    """
    decoder: nn.Module = cast("Any", model).get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    experts = tuple(f"{name}." for name, module in decoder.named_modules() if hasattr(module, "experts"))
    found: list[FFN] = []
    routed = 0
    for name, module in decoder.named_modules():
        parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(part, nn.Linear) for part in parts):
            continue
        if name.startswith(experts) and experts:
            routed += 1
            continue
        gate, up, down = cast("list[nn.Linear]", parts)
        if not (gate.out_features == up.out_features == down.in_features):
            raise BenchError(f"The FFN {prefix}{name} has gate, up and down of different width: it cannot be split.")
        layer = next((int(part) for part in name.split(".") if part.isdigit()), len(found))
        found.append(FFN(layer, prefix + name, module, gate, up, down))
    if not found:
        kind = type(model).__name__
        why = "its FFNs are already experts" if routed or experts else "it has none"
        raise BenchError(
            f"{kind} cannot be used: dense gated FFNs (gate_proj, up_proj and down_proj in each layer, as in Llama, "
            f"Qwen or Mistral) are needed, and {why}."
        )
    return found


def neurons(model: nn.Module) -> int:
    """Neurons in all dense gated FFNs of a model; 0 where there are none that could be taken apart."""
    try:
        return sum(part.neurons for part in ffns(model))
    except BenchError:
        return 0


def describe(model: nn.Module) -> dict[str, Any]:
    """Architecture, parameters, layers, d_model, neurons (all layers), dtype and device of a model, for a table.

    Raises:
        BenchError: a model without dense gated FFNs, as in `ffns`.
    """
    parts = ffns(model)
    linears = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
    packed = {key: m.in_features * m.out_features for key, m in linears.items() if m.weight.dtype == torch.uint8}
    first = next(model.parameters())
    return {
        "architecture": type(model).__name__,
        "parameters": sum(packed.get(id(p), p.numel()) for p in model.parameters()),  # NF4 packs two in a byte
        "layers": int(cast("Any", model).config.get_text_config().num_hidden_layers),
        "d_model": parts[0].width,
        "neurons": sum(part.neurons for part in parts),
        "dtype": "nf4" if packed else str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
    }
