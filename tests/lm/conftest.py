"""One OpenMP thread (two on a busy core run ten times slower), and no hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may ask the real hub, whatever the machine can reach."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """A small Qwen3 with non-zero branches, so that every weight has a gradient."""
    from tinyonn_lib.lm.models import new_model

    def make(seed: int = 0, **more: Any) -> Any:
        sizes = {"vocab_size": 300, "width": 64, "layers": 2, "ffn": 128, "heads": 2, "head_dim": 32, "max_length": 32}
        model = new_model(**(sizes | more), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.normal_(0, 0.05, generator=generator)
        return model.eval()

    return make
