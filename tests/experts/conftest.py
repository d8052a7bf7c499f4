"""A tiny dense model with weights large enough that every neuron matters, scanned in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.experts import evidence, score
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm import models
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.scan import frozen_eval, next_token_loss
from tinyonn_lib.scan.tables import neurons_table


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
