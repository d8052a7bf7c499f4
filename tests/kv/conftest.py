"""Tiny models that stand for a teacher and a student: another width, depth and number of KV heads, one vocabulary."""

from __future__ import annotations

import pytest
import torch

from tinyonn_lib.kv.cache import KVModel


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, seed: int) -> KVModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=64,
        initializer_range=0.3,  # so that what a token attends to makes a difference
    )  # fmt: skip
    return KVModel(Qwen3ForCausalLM(config).eval())


@pytest.fixture(scope="session")
def teacher() -> KVModel:
    """5 layers of 4 KV heads: width 32."""
    return _qwen3(hidden=48, layers=5, heads=4, kv_heads=4, seed=1)


@pytest.fixture(scope="session")
def student() -> KVModel:
    """3 layers of 2 KV heads: width 16. Frozen; train a copy."""
    return _qwen3(hidden=32, layers=3, heads=4, kv_heads=2, seed=2)
