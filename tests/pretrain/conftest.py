"""One OpenMP thread (two on a busy core run ten times slower), and small models of all architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "vocab_size": 50, "width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 96, "max_length": 64,
}  # fmt: skip


@pytest.fixture
def sizes() -> dict[str, Any]:
    """What `architectures.new` needs for a small model."""
    return dict(SIZES)


@pytest.fixture
def alive() -> Callable[..., Any]:
    """A small model all of whose branches count: nothing is zero, routers are decided. In float64, in eval mode."""
    from tinyonn_lib.pretrain.architectures import new

    def make(name: str, **more: Any) -> Any:
        model = new(name, **{**SIZES, **more}).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.ndim > 1 and "embed_tokens" not in key:
                    weight.normal_(0, 0.3, generator=generator)
        if hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # the default knows no float64
        return model.eval()

    return make
