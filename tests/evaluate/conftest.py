"""A tokenizer, held-out texts from several sources, a model that is a table; and no network at all."""

from __future__ import annotations

import random
import socket
from types import SimpleNamespace
from typing import Any, NoReturn

import pandas as pd
import pytest
import torch

from tinyonn_lib.lm import models, tokenizer

torch.set_num_threads(1)
LENGTH = 64
HOSTILE = "{{7 * 7}} <script>alert(1)</script> {% raw %} ü漢"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach anything outside fails, and is listed."""
    tried: list[Any] = []

    def refuse(_: socket.socket, address: Any, *rest: Any) -> NoReturn:
        tried.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tried


@pytest.fixture(scope="session")
def texts() -> pd.DataFrame:
    rng = random.Random(0)
    words = ["router", "neuron", "expert", "layer", "token", "model", "scans", "feeds", "splits", "slowly", "twice"]
    rows = []
    for number in range(48):
        text = " ".join(rng.choices(words, k=rng.randint(20, 60)))
        rows.append({"text": text + ("" if number % 3 else HOSTILE), "source": f"f{number % 12}"})
    rows[0]["text"] = HOSTILE + " " + rows[0]["text"]
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def bpe(texts: pd.DataFrame) -> Any:
    return tokenizer.train_bpe(texts["text"], 320, max_length=LENGTH)


class Table(torch.nn.Module):
    """A model that looks its logits up, at the sum of all token ids so far: a test can do the same."""

    def __init__(self, logits: torch.Tensor, length: int = LENGTH) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(logits)
        self.config = models.new_model(
            vocab_size=len(logits), width=16, layers=1, ffn=16, heads=1, kv_heads=1, head_dim=16, max_length=length
        ).config

    @property
    def device(self) -> torch.device:
        return self.table.device

    def tie_weights(self) -> None:
        """What lm-eval calls."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids.cumsum(1) % len(self.table)])


@pytest.fixture(scope="session")
def table(bpe: Any) -> Table:
    return Table(torch.randn(len(bpe), len(bpe), generator=torch.Generator().manual_seed(0)) * 2)


@pytest.fixture(scope="session")
def other(bpe: Any) -> Table:
    return Table(torch.randn(len(bpe), len(bpe), generator=torch.Generator().manual_seed(1)) * 2)
