"""One OpenMP thread, no hub, and the smallest model that can answer a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may ask the real hub, whatever the machine can reach."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE over the tasks' own texts: digits with their blank are one token."""
    from tests.align.small import small_tokenizer

    return small_tokenizer()


@pytest.fixture
def model() -> Any:
    """A small Qwen3 with random weights."""
    from tests.align.small import small_model

    return small_model()


@pytest.fixture(scope="session")
def half() -> Callable[[], Any]:
    """A model that answers sums up to 3 rightly about half of the time; a new copy with each call."""
    import copy

    from tests.align.small import small_model, small_prompts, small_tokenizer
    from tinyonn_lib.align.warm import teach

    trained = small_model()
    teach(trained, small_tokenizer(), small_prompts(), steps=60, batch=32, lr=4.0e-3)
    return lambda: copy.deepcopy(trained)


@pytest.fixture(scope="session")
def sums() -> pd.DataFrame:
    """All small sums of the training split."""
    from tests.align.small import small_prompts

    return small_prompts()
