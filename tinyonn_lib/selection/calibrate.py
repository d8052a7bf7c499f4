"""What a selector knows besides its routers: units of logits, which experts trash calls, how scores are weighed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.judge import combine
from tinyonn_lib.selection.known import longest
from tinyonn_lib.selection.pairs import columns, padded
from tinyonn_lib.selection.pool import fitted
from tinyonn_lib.selection.routers import Watch
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.scoring import CALLED, Scorer
from tinyonn_lib.selection.selector import Selector, of

if TYPE_CHECKING:
    from tinyonn_lib.selection.warmup import Recipe

SHARPNESS = 0.1
"""A unit of logits, in spreads of the layer's logits. So sharp a softmax needs small changes of the routers: with units
ten times as large they had to move by three times their own size, and the model's choice of experts went with them."""


def cold(model: Any, tokenizer: Any, passages: pd.DataFrame) -> Selector:
    """A selector as it is before any warm-up: what one is compared with.

    Args:
        passages: column `text`; the first ones tell the spread of the logits.
    """
    start = of(model, tokenizer)
    for layer in start.layers:
        never = (layer.weight == 0).all(1)
        if never.any() and not never.all():
            raise BenchError(
                f"The router {layer.name} has {int(never.sum())} rows of zeros, experts that only fill a layer up: "
                "scores would count them. Export with as many experts in each layer (04_experts shared_scope=fixed)."
            )
    ids, mask = padded(
        tokenizer(passages["text"].head(32).tolist(), add_special_tokens=False)["input_ids"], start_token(tokenizer)
    )
    return replace(start, units=tuple(units_of(model, ids, mask).tolist()))


@torch.no_grad()
def units_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Per layer what its logits are measured in: `SHARPNESS` of their root mean square about their mean, `(layers,)`.

    Args:
        ids, mask: clean text, as of `padded`.

    Raises:
        BenchError: routers that tell no expert from another.
    """
    with Watch(model.base_model, inputs=False) as watch:
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
        chosen = mask.flatten().to(model.device)
        found = [rms(logits[chosen] - logits[chosen].mean(-1, keepdim=True)) for logits in watch.logits]
        sizes = [rms(logits[chosen]) for logits in watch.logits]
    same = [place for place, spread in enumerate(found) if spread <= 1e-6 * sizes[place]]  # rounding, no spread
    if same:
        raise BenchError(f"The router of layer {same[0]} gives all experts the same logit: train it first (05_router).")
    return SHARPNESS * torch.tensor(found, dtype=torch.float64)


def rms(values: Tensor) -> float:
    """Root mean square, in float64."""
    return float(values.detach().double().square().mean().sqrt())


def calibrated(selector: Selector, passages: pd.DataFrame, recipe: Recipe) -> Selector:
    """Which experts corrupted text calls, and how `contrastive` and perplexity go together best.

    Args:
        passages: not trained on; each is seen clean and corrupted, in the kinds that were trained on.
    """
    texts, prompts, others = columns(passages)
    rng = random.Random(f"{recipe.seed} calibration")
    kinds = [recipe.corruptions[place % len(recipe.corruptions)] for place in range(len(texts))]
    bad = [
        CORRUPTIONS[kind](text, prompt, rng, others) for kind, text, prompt in zip(kinds, texts, prompts, strict=True)
    ]
    limit = longest(selector.model)
    bad = fitted(pd.DataFrame({"text": bad}), selector.tokenizer, limit)["text"].tolist()
    rows = [
        Row(name, place, text) for name, many in (("clean", texts), ("bad", bad)) for place, text in enumerate(many)
    ]
    table, _ = Scorer(selector, ratio=recipe.ratio, seed=recipe.seed, calls=True)(rows)
    kind_of = {"clean": [""] * len(texts), "bad": kinds}
    known = zip(table["source_dataset"], table["source_index"], strict=True)
    table["corruption"] = [kind_of[name][at] for name, at in known]
    weights = {"combined": combine(table), "perplexity_fitted": combine(table, ())}
    return replace(selector, gap=_gap(table, [layer.experts for layer in selector.layers]), combined=weights)


def _gap(table: pd.DataFrame, experts: list[int]) -> tuple[Tensor, ...]:
    """Per layer `(E,)`, how much more of the probability each expert has of corrupted tokens than of clean ones."""
    called = {}
    for name, own in table.groupby("source_dataset"):
        shares = torch.tensor(own.filter(like=CALLED).to_numpy())
        tokens = torch.tensor(own["tokens"].to_numpy(), dtype=torch.float64)
        called[name] = (tokens @ shares / tokens.sum()).float()
    return (called["bad"] - called["clean"]).split(experts)
