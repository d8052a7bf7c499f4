"""What tests of several parts share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.mistakes", "tests.gguf_files")  # what they assert is shown as in a test


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of something that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """A small Qwen3 with non-zero branches, so that every weight has a gradient."""
    import torch

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
