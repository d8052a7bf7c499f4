"""One vector added to all rows of a router: the model is the same, and so must be the order of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.selection.routers import routers, shifted
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.scores import SCORES
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import Selector

TEXTS = 240


def rankings(selector: Selector, texts: list[str], vector: torch.Tensor) -> dict[str, float]:
    """Spearman correlation of every score with itself after the shift."""
    given = [Row("a", place, text) for place, text in enumerate(texts)]
    scorer = Scorer(selector, ratio=0.25)
    plain, _ = scorer(given)
    with shifted(selector.model, vector):
        moved, _ = scorer(given)
    assert not plain.equals(moved)
    return {name: float(pd.Series(plain[name]).corr(moved[name], method="spearman")) for name in SCORES}


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("olmoe", 1.0), ("granitemoe", 1.0), ("qwen2_moe", 1.0), ("qwen3_moe", 1.0), ("mixtral", 1.0), ("gpt_oss", 1.0),
     ("glm4_moe", 1e-4)],
)  # fmt: skip
def test_identified_scores_keep_their_order(
    kind: str, scale: float, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    """Glm4Moe's gates are sigmoids, which see the shift: at the small rows that exports have, by next to nothing."""
    model = make_moe(kind)
    for layer in routers(model):
        layer.weight.mul_(scale)
    spread = float(routers(model)[0].weight.std())
    vector = spread * torch.randn(32, generator=torch.Generator().manual_seed(3))
    found = rankings(Selector(model, tokenizer, (scale, scale)), make_texts(TEXTS), vector)
    assert min(found[name] for name in SCORES[1:]) >= 0.9999, found
    assert found["literal"] < 0.9, found
