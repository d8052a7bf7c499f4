"""A tiny dense model with weights large enough that every neuron matters, scanned in memory; texts of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from tinyonn_lib.experts import evidence, score
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm import models
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.scan import frozen_eval, next_token_loss
from tinyonn_lib.scan.tables import neurons_table

Batch = Callable[[int], Tensor]


@dataclass(frozen=True)
class Tiny:
    model: Any
    ffns: list[models.FFN]
    ids: torch.Tensor
    neurons: pd.DataFrame
    scores: pd.DataFrame
    evidence: evidence.Evidence

    def part(self, method: str = "random", experts: int = 4, seed: int = 0, **shape: Any) -> Partition:
        """A partition by name."""
        from tinyonn_lib.experts import methods

        shapes = methods.shapes(self.evidence, experts, **shape)
        return methods.divide(self.evidence, [method], shapes, [seed])[method][0].partition


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    torch.manual_seed(0)
    model = models.new_model(
        vocab_size=300, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=32, max_length=64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    model.eval().requires_grad_(False)
    ffns = models.ffns(model)
    ids = torch.randint(0, 300, (6, 17))
    with frozen_eval(model), Observer(model, "neurons") as watching:
        for row in ids:
            next_token_loss(model, row[None]).backward()
            watching.end_sample()
    neurons = neurons_table(watching.totals())
    scores = score.score_table(neurons.merge(evidence.weight_norms(ffns), on=["layer", "neuron"]))
    tokens = evidence.collect(model, ffns, ids.tolist())
    return Tiny(model, ffns, ids[:3], neurons, scores, evidence.Evidence(ffns, neurons, scores, tokens))


@torch.no_grad()
def written(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """Texts of the model's own, so that it is as good as trained on them, `(rows, length)`."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, 1), generator=make)
    for _ in range(length - 1):
        likely = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=make)], 1)
    return ids


@pytest.fixture(scope="module")
def texts(tiny: Tiny) -> Tensor:
    return written(tiny.model, 320, 13, seed=1)


@pytest.fixture(scope="module")
def validation(texts: Tensor) -> Tensor:
    return texts[:40]


@pytest.fixture(scope="module")
def batch(texts: Tensor) -> Batch:
    pool = texts[40:]
    return lambda step: pool[torch.randint(0, 280, (12,), generator=torch.Generator().manual_seed(step))]
