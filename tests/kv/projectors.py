"""Teachers, caches and projectors that the tests of `KVDimensionProjector` share."""

from __future__ import annotations

from typing import Any

import torch

from tinyonn_lib.kv.cache import KV
from tinyonn_lib.kv.projector import KVDimensionProjector

TEACHERS = {"Qwen2-7B": {"d_model": 6, "num_layers": 5}, "Qwen2-14B": {"d_model": 10, "num_layers": 3}}


def cache(width: int, layers: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> KV:
    generator = torch.Generator().manual_seed(seed)
    return KV(*(torch.randn(2, layers, 7, width, generator=generator, dtype=dtype) for _ in range(2)))


def caches(**more: Any) -> dict[str, KV]:
    return {name: cache(each["d_model"], each["num_layers"], number, **more)
            for number, (name, each) in enumerate(TEACHERS.items())}  # fmt: skip


def disturbed(projector: KVDimensionProjector) -> KVDimensionProjector:
    """Away from a start in which biases and gates are 0, gains 1 and some layers silent; in float64."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in projector.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    return projector.double().eval()
