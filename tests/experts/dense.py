"""Tiny dense models of each exportable kind, with every weight, bias and norm different from its default."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tinyonn_lib.experts.partition import Partition

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def dense(kind: str, **options: Any) -> Any:
    """A model of this `model_type`, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, "rope_theta": 1000.0, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.3 if parameter.ndim == 2 else 0.1)
        parameter.add_(1.0 if "norm" in name else 0.0)
    return model


def divide(
    layers: int = 2,
    neurons: int = 64,
    *,
    counts: tuple[int, ...] = (4, 4),
    shared: int = 0,
    dropped: int = 0,
    sizes: tuple[int, ...] = (),
) -> Partition:
    """A random partition; each layer's shared neurons are what its experts of `sizes` (else all) leave."""
    rng = np.random.default_rng(0)
    parts: list[list[torch.Tensor]] = [[], [], []]
    for layer in range(layers):
        order = torch.from_numpy(rng.permutation(neurons))
        size = sizes[layer] if sizes else (neurons - shared - dropped) // counts[layer]
        routed = size * counts[layer]
        parts[0].append(order[:routed].view(counts[layer], size).sort(-1).values)
        parts[1].append(order[routed : neurons - dropped].sort().values)
        parts[2].append(order[neurons - dropped :].sort().values)
    return Partition("random", *(tuple(part) for part in parts))
