"""Tiny models of many families, random weights: each places, norms, shares or hides its keys in another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _scaled(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


_LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SLIDING, _FULL = "sliding_attention", "full_attention"

# Original lengths of 16: a text of 40 tokens is far beyond.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("Llama", {}),
    "linear": ("Llama", _scaled("linear", factor=4.0)),
    "dynamic NTK": ("Llama", {**_scaled("dynamic", factor=2.0), "max_position_embeddings": 16}),
    "YaRN": ("Llama", _scaled("yarn", factor=4.0, original_max_position_embeddings=16)),
    "Llama 3": (
        "Llama",
        _scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "LongRoPE": ("Phi3", {**_scaled("longrope", **_LONG), "original_max_position_embeddings": 16}),
    "partial": ("StableLm", _scaled("default", partial_rotary_factor=0.5)),
    "partial, interleaved": ("Glm", {"head_dim": 8}),
    "interleaved": ("Cohere", {}),
    "two kinds": (
        "Gemma3Text", {"head_dim": 8, "sliding_window": 5, "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING]}
    ),
    "some NoPE": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False}),
    "NoPE where full": ("Cohere2", {"sliding_window": 5, "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL]}),
    "sliding": ("Mistral", {"sliding_window": 5}),
    "all sliding": ("Ministral", {"head_dim": 8, "sliding_window": 5}),
    "some sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "key norm": ("Qwen3", {"head_dim": 8}),
    "key norm of all heads": ("Olmo2", {}),
    "soft caps": ("Gemma2", {"head_dim": 8, "sliding_window": 5}),
    "scaled logits": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3}),
    "sinks": ("GptOss", {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "experts": ("Qwen3Moe", {"head_dim": 8, **_MOE}),
    "shared caches": (
        "Gemma3nText",
        {
            "head_dim": 8, "num_kv_shared_layers": 2, "layer_types": [_SLIDING, _FULL] * 2, "sliding_window": 5,
            "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2,
        },
    ),
    "one KV head": ("Falcon", {"alibi": False, "multi_query": True}),
    "positions embedded": ("GPT2", _GPT),
    "a mask for each text": (
        "XGLM",
        {
            "d_model": 32, "num_layers": 4, "attention_heads": 4, "num_key_value_heads": None, "ffn_dim": 48,
            "init_std": 0.3,
        },
    ),
}  # fmt: skip


def tiny(stem: str, **options: Any) -> Any:
    """A model of `transformers` in eval mode; norms and biases drawn, too, so that none is the identity."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**(options if "n_embd" in options else _SMALL | options))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def family(name: str) -> Any:
    """A model of `FAMILIES`."""
    stem, options = FAMILIES[name]
    return tiny(stem, **options)


def some_ids(texts: int, tokens: int, seed: int = 0) -> Tensor:
    """`(texts, tokens)`, none of them a special token."""
    return torch.randint(3, 64, (texts, tokens), generator=torch.Generator().manual_seed(seed))
