"""A tiny dense model with weights large enough that every neuron matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tinyonn_lib.experts.score import FEATURES
from tinyonn_lib.lm import models


@dataclass(frozen=True)
class Tiny:
    model: Any
    ffns: list[models.FFN]
    ids: torch.Tensor
    scores: pd.DataFrame
    neurons: pd.DataFrame


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
    rng = np.random.default_rng(0)
    index = [(layer, neuron) for layer in range(2) for neuron in range(32)]
    scores = pd.DataFrame(index, columns=["layer", "neuron"])
    scores[["sp", *FEATURES]] = rng.normal(size=(64, 1 + len(FEATURES)))
    neurons = scores[["layer", "neuron"]].assign(act_mean=rng.normal(size=64))
    neurons["act_sq"] = neurons["act_mean"] ** 2 + rng.uniform(0.1, 1, 64)
    return Tiny(model, models.ffns(model), torch.randint(0, 300, (3, 17)), scores, neurons)
