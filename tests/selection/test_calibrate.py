"""Units, gaps and weights: what a selector knows besides its routers, each by its slow definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.selection import judge, known, scoring
from tinyonn_lib.selection.calibrate import calibrated, cold
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.routers import routers
from tinyonn_lib.selection.scores import trash_experts
from tinyonn_lib.selection.selector import Selector

from .warmups import RECIPE, passages, trained


def auroc(selector: Selector, table: pd.DataFrame, name: str = "contrastive") -> float:
    found = judge.auroc(known.scored(selector, table, ratio=0.25), [name], groups=table["source"])
    return float(found[found["corruption"] == judge.MEAN]["auroc"].iloc[0])


@pytest.mark.parametrize("kind", ["olmoe", "glm4_moe"])
def test_a_contrast_is_learned(
    kind: str, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    model, texts = make_moe(kind), passages(make_texts, 80)
    unseen = passages(make_texts, 60, seed=5).assign(source="x")
    table = known.paired(unseen, tokenizer, 63, 0, ("byte_noise",))
    before = auroc(cold(model, tokenizer, texts), table)
    recipe = replace(RECIPE, corruptions=("byte_noise",), epochs=4)
    *_, after = trained(model, tokenizer, texts, recipe)
    assert auroc(after, table) > max(0.8, before + 0.3)
    assert auroc(after, table, "combined") > 0.8
    # More probability on trash experts for corrupted text: in the gaps, too.
    trash = trash_experts([len(gap) for gap in after.gap], 0.25)
    for gap, bad in zip(after.gap, trash, strict=True):
        assert float(gap[bad].sum()) > 0 > float(gap[~bad].sum())
        assert float(gap.sum()) == pytest.approx(0, abs=1e-5)
    perplexity = {"log_perplexity", "log_perplexity_squared", "intercept"}
    assert after.combined.keys() == {"combined", "perplexity_fitted"}
    assert after.combined["combined"].keys() == {"contrastive", "log_mass"} | perplexity
    assert after.combined["perplexity_fitted"].keys() == perplexity


@pytest.mark.parametrize("kind", ["olmoe", "glm4_moe"])
def test_gaps_are_the_slow_formula(
    kind: str, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    """Each text alone, in float64: every token counts alike, the start token not."""
    texts, recipe = passages(make_texts, 40, seed=2), replace(RECIPE, corruptions=("word_shuffle", "wrong_answer"))
    selector = cold(make_moe(kind), tokenizer, texts)
    found = calibrated(selector, texts, recipe)
    rng, clean = Random(f"{recipe.seed} calibration"), texts["text"].tolist()
    bad = [CORRUPTIONS[recipe.corruptions[n % 2]](text, "", rng, clean) for n, text in enumerate(clean)]

    def called(many: list[str]) -> list[torch.Tensor]:
        tokens: list[list[torch.Tensor]] = [[] for _ in selector.units]
        for text in many:
            ids = [start_token(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
            out = selector.model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False)
            for layer, logits, unit in zip(tokens, out.router_logits, selector.units, strict=True):
                layer.append((logits.reshape(len(ids), -1)[1:].double() / unit).softmax(-1))
        return [torch.cat(layer).mean(0) for layer in tokens]

    for gap, worse, better, layer in zip(found.gap, called(bad), called(clean), selector.layers, strict=True):
        assert gap.shape == (layer.experts,)
        assert float((worse - better).abs().max()) > 1e-3
        torch.testing.assert_close(gap.double(), worse - better, rtol=0, atol=1e-6)


def test_a_calibration_sees_each_text_once(
    make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clean and corrupted; nothing is forwarded a second time for the gaps."""
    model, texts = make_moe(), passages(make_texts, 30)
    selector, recipe = cold(model, tokenizer, texts), replace(RECIPE, corruptions=("word_shuffle",))
    monkeypatch.setattr(scoring, "find_head", lambda _: None)  # looks at texts of its own
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    calibrated(selector, texts, recipe)
    assert sum(seen) == 60


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["olmoe", "glm4_moe"])
def test_a_router_that_tells_no_expert_from_another_is_refused(
    kind: str, value: float, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    model = make_moe(kind)
    row = value * torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routers(model)[1].weight.copy_(row.expand_as(routers(model)[1].weight))
    with pytest.raises(BenchError, match=r"^The router of layer 1 gives all experts the same logit.*05_router"):
        trained(model, tokenizer, passages(make_texts), RECIPE)
