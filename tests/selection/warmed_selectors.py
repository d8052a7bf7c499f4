"""A model on disk and a selector of it that looks warmed up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinyonn_lib.lm import load
from tinyonn_lib.selection.selector import Selector, of

COMBINED = {
    "combined": {"contrastive": 0.1 + 0.2, "log_mass": -1 / 3, "log_perplexity": -3.0, "intercept": 0.5},
    "perplexity_fitted": {"log_perplexity": -1 / 7, "log_perplexity_squared": 0.1, "intercept": 1.0},
}


def based(folder: Path, make_moe: Callable[..., Any], tokenizer: Any, kind: str = "olmoe", seed: int = 0) -> Path:
    """A model on disk."""
    make_moe(kind, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def warmed(base: Path, dtype: load.Dtype = "float32") -> Selector:
    """A selector of that model, its routers moved by less than bfloat16 can hold, as a training does."""
    start = of(load.load_model(str(base), dtype, "cpu"), load.load_tokenizer(str(base)))
    make = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in start.layers:
            for rows in (layer.weight, layer.bias):
                if rows is not None:
                    rows += 1e-3 * torch.randn(rows.shape, generator=make)
    gap = tuple(torch.randn(layer.experts, generator=make) for layer in start.layers)
    units = tuple(1 / (3 + place) for place in range(len(gap)))
    return replace(start, units=units, gap=gap, combined=COMBINED, about={"loss": "contrastive"})
