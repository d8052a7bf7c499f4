"""A tiny dense model and rows to train a LoRA on."""

from __future__ import annotations

import random
from typing import Any

import pandas as pd
import torch
from peft.tuners.lora import LoraLayer

from tinyonn_lib.lm.models import new_model

WORDS = ["router", "neuron", "expert", "layer", "token", "model", "scans", "feeds", "splits", "joins", "prunes"]


def dense(seed: int = 0, **sizes: Any) -> Any:
    """Weights large enough that every layer has a say."""
    shape = {"vocab_size": 300, "width": 64, "layers": 2, "ffn": 128, "heads": 2, "head_dim": 32, "max_length": 64}
    model = new_model(**(shape | sizes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.1, generator=generator)
    return model.eval()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Words in a fixed circle, from a random one on: easy to learn."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(WORDS)) for _ in range(count)]
    return [" ".join(WORDS[(start + place) % len(WORDS)] for place in range(6)) + "." for start in starts]


def rows(count: int = 60, seed: int = 0, prompts: bool = True) -> pd.DataFrame:
    """Of every other one the beginning is given, of a length of its own."""
    texts = sentences(count, seed)
    given = [text[: 5 + place % 17] if prompts and place % 2 else "" for place, text in enumerate(texts)]
    return pd.DataFrame({"text": texts, "prompt": given})


def adapted(model: Any) -> set[str]:
    """Names of the layers that LoRA changes."""
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
