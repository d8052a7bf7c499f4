"""A short warm-up and texts for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from tinyonn_lib.selection.selector import Selector
from tinyonn_lib.selection.warmup import Recipe, warm_up

RECIPE = Recipe(corruptions=("byte_noise", "word_shuffle"), ratio=0.25, epochs=2, batch=8, lr=0.1)


def passages(make_texts: Callable[..., list[str]], number: int = 40, seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"text": make_texts(number, seed=seed, least=6)})


def trained(model: Any, tokenizer: Any, texts: pd.DataFrame, recipe: Recipe, **more: Any) -> list[Selector]:
    return [selector for _, selector, _ in warm_up(model, tokenizer, texts, recipe, **more)]
