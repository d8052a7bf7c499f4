"""Warm a selector up: train the routers of a mixture of experts, and nothing else (document 001, stage one).

The document trains on the language model's loss alone (`loss="lm"`). Nothing in it makes an expert a trash expert
(ERRATA 001), so `loss="contrastive"` teaches it: of a text and a corrupted copy the text is to score higher.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import load, resume
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.lm.threads import default_shards
from tinyonn_lib.lm.train import fit
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.judge import combine
from tinyonn_lib.selection.known import apart, longest
from tinyonn_lib.selection.pool import fitted
from tinyonn_lib.selection.routers import Layer, Watch
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.scores import text_scores, trash_experts
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import Selector, in_float32, of, save

CALIBRATION = 0.2
"""Share of the passages that is not trained on: which experts corrupted text calls, and the weight of perplexity, are
measured on it."""

SHARPNESS = 0.1
"""A unit of logits, in spreads of the layer's logits. So sharp a softmax needs small changes of the routers: with units
ten times as large they had to move by three times their own size, and the model's choice of experts went with them."""

LEARNED = ("contrastive", "log_mass")
"""Scores by which a text is to lie above its corrupted copy: log odds alone may be paid for by tokens that are all too
good, the log probability counts what is bad."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How routers learn.

    Attributes:
        loss: "contrastive", or "lm" as in the document.
        corruptions: what clean text is contrasted with.
        ratio: share of experts that become trash, the last ones.
        epochs: times through the passages; the learning rate rises and falls in each, so that each ends finished.
        batch: passages per step.
        lr: AdamW's peak rate, in multiples of the root mean square of a router's own weights.
        seed: order and corruptions.
    """

    loss: str = "contrastive"
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    ratio: float = 0.125
    epochs: int = 2
    batch: int = 16
    lr: float = 0.05
    seed: int = 0


def warm_up(
    model: Any,
    tokenizer: Any,
    passages: pd.DataFrame,
    recipe: Recipe,
    *,
    checkpoints: Path | None = None,
    every_seconds: float = 10.0,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Selector, pd.DataFrame]]:
    """Train the routers of a model in place.

    Args:
        model: an MoE; all but its routers is frozen.
        passages: columns `text` and, if there are any, `prompt`; each fits the model's context.
        checkpoints: private folder for resuming.

    Yields:
        After each epoch its number (from 1), the selector, and the epoch's history as of `fit`, with `epoch`. The
        selector shares the model that goes on learning: save it, or use it, before asking for the next.

    Raises:
        BenchError: a dense model, too few passages, or what `fit` says.
    """
    layers = in_float32(model)
    training, calibration = apart(passages, max(8, round(len(passages) * CALIBRATION)))
    steps = len(training) // recipe.batch
    if not steps:
        raise BenchError(
            f"{len(passages)} passages are too few to warm up on: after {len(calibration)} for calibration, "
            f"batch={recipe.batch} of them make a step."
        )
    trash = trash_experts([layer.experts for layer in layers], recipe.ratio)
    start = cold(model, tokenizer, passages)
    pairs = Pairs(tokenizer, training, recipe)
    units = torch.tensor(start.units, dtype=torch.float64)
    params = [weight for layer in layers for weight in (layer.weight, layer.bias) if weight is not None]
    model.requires_grad_(False)
    for weight in params:
        weight.requires_grad_(True)
    peaks = [recipe.lr * max(_rms(weight), 1e-8) for weight in params]
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in params], weight_decay=0.0)
    tag = resume.fingerprint({"recipe": asdict(recipe), "passages": training.to_dict("list")}, [units], None)
    device = layers[0].weight.device
    with Watch(model.base_model if recipe.loss == "contrastive" else model) as watch:
        loss = _contrast(watch, layers, trash, units) if recipe.loss == "contrastive" else _language(model)
        for epoch in range(recipe.epochs):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak  # `fit` leaves the rate of its last step

            def told(done: int, of_all: int, note: str, before: int = epoch * steps) -> None:
                if progress is not None:
                    progress(before + done, recipe.epochs * of_all, note)

            history = fit(
                params, loss, partial(_later, pairs, epoch * steps, device), optimizer, steps=steps,
                warmup_steps=min(5, steps // 4), shards=default_shards(device), progress=told,
                checkpoint=checkpoints and checkpoints / f"warm_{recipe.seed}_{epoch + 1}.pt",
                every_seconds=every_seconds, tag=tag,
            )  # fmt: skip
            about = asdict(recipe) | {"epoch": epoch + 1, "passages": len(training)}
            made = replace(start, about=about)
            yield epoch + 1, calibrated(made, calibration, recipe), history.assign(epoch=epoch + 1)


def warm_up_all(
    path: str,
    passages: pd.DataFrame,
    recipe: Recipe,
    folder: Callable[[str], Path],
    *,
    seeds: int = 1,
    full: bool = False,
    dtype: load.Dtype = "float32",
    device: str = "auto",
    progress: Callable[[str, str], Progress] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Warm the same model up with several seeds, and save a selector after each epoch.

    Args:
        path: folder or hub id of the MoE.
        folder: name → where it is to be saved: `epoch_1`, `epoch_2` … of the first seed, `seed_1/epoch_1` … of others.
        seeds: how many, from `recipe.seed` on.
        full: save the whole model each time.
        progress: (what, unit) → reporter.
        options: for `warm_up`.

    Returns:
        The histories below each other, with `epoch` and `seed`.
    """
    tables = []
    model, tokenizer = load.load_model(path, dtype, device), load.load_tokenizer(path)
    weights = [weight for layer in in_float32(model) for weight in (layer.weight, layer.bias) if weight is not None]
    begun = [weight.detach().clone() for weight in weights]
    for seed in range(seeds):
        with torch.no_grad():
            for weight, value in zip(weights, begun, strict=True):
                weight.copy_(value)
        own = replace(recipe, seed=recipe.seed + seed)
        told = progress(f"warm-up, seed {own.seed}", "steps") if progress else None
        for epoch, selector, history in warm_up(model, tokenizer, passages, own, progress=told, **options):
            name = f"epoch_{epoch}" if seed == 0 else f"seed_{seed}/epoch_{epoch}"
            save(selector, folder(name), path, full)
            tables.append(history.assign(seed=own.seed))
    return pd.concat(tables, ignore_index=True)


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


class Pairs:
    """Passages and their corrupted copies, step by step: all passages in a random order, then in another.

    A pure function of the step: a resumed training sees what an uninterrupted one would.
    """

    def __init__(self, tokenizer: Any, passages: pd.DataFrame, recipe: Recipe) -> None:
        self._tokenizer, self._recipe = tokenizer, recipe
        self._texts, self._prompts, self._others = columns(passages)
        self._start, self._steps = start_token(tokenizer), len(passages) // recipe.batch
        self._clean: list[list[int]] = tokenizer(self._texts, add_special_tokens=False)["input_ids"]
        self._longest = max(map(len, self._clean), default=1)

    def __call__(self, step: int, device: torch.device | None = None) -> Batch:
        """`clean`, `bad` token ids `(B, T)` with the start token in front; `clean_mask`, `bad_mask` `(B, T)`: what is
        a token of the text."""
        epoch, place = divmod(step, self._steps)
        order = random.Random(f"{self._recipe.seed} {epoch}").sample(range(len(self._texts)), len(self._texts))
        rows = order[place * self._recipe.batch : (place + 1) * self._recipe.batch]
        rng = random.Random(f"{self._recipe.seed} step {step}")
        bad = []
        for row in rows:
            kind = rng.choice(self._recipe.corruptions)
            bad.append(CORRUPTIONS[kind](self._texts[row], self._prompts[row], rng, self._others))
        # Noise takes many more tokens than the text had.
        spoilt = [
            ids[: self._longest] for ids in self._tokenizer(bad, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        clean, clean_mask = padded([self._clean[row] for row in rows], self._start)
        worse, bad_mask = padded(spoilt, self._start)
        found = {"clean": clean, "bad": worse, "clean_mask": clean_mask, "bad_mask": bad_mask}
        return {name: value.to(device or value.device) for name, value in found.items()}


def _later(pairs: Pairs, first: int, device: torch.device, step: int) -> Batch:
    return pairs(first + step, device)


def padded(rows: Sequence[Sequence[int]], start: int) -> tuple[Tensor, Tensor]:
    """Token ids `(B, 1 + longest)` with a start token in front, and which positions are tokens of the text."""
    width = 1 + max(map(len, rows))
    ids, mask = torch.full((len(rows), width), start), torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, 1 : len(row) + 1] = torch.tensor(row)
        mask[place, 1 : len(row) + 1] = True
    return ids, mask


def columns(passages: pd.DataFrame) -> tuple[list[str], list[str], list[str]]:
    """Texts, prompts ("" without), and what a wrong answer is taken from: the answers, or the texts themselves."""
    texts = passages["text"].tolist()
    prompts = passages["prompt"].tolist() if "prompt" in passages else [""] * len(texts)
    return texts, prompts, [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]


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
        found = [_rms(logits[chosen] - logits[chosen].mean(-1, keepdim=True)) for logits in watch.logits]
        sizes = [_rms(logits[chosen]) for logits in watch.logits]
    same = [place for place, spread in enumerate(found) if spread <= 1e-6 * sizes[place]]  # rounding, no spread
    if same:
        raise BenchError(f"The router of layer {same[0]} gives all experts the same logit: train it first (05_router).")
    return SHARPNESS * torch.tensor(found, dtype=torch.float64)


def _rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


def _contrast(
    watch: Watch, layers: Sequence[Layer], trash: Sequence[Tensor], units: Tensor
) -> Callable[[Batch], Tensor]:
    """−log σ(score of the text − score of its corrupted copy), the mean over pairs and the scores `LEARNED`.

    Each router is trained on what it sees (x is not differentiated): that needs no backward pass through the model,
    so no more memory than scoring. What a router changes for later layers through the choice of experts has no
    gradient anyway.
    """

    def loss(batch: Batch) -> Tensor:
        width = max(batch["clean"].shape[1], batch["bad"].shape[1])
        ids, mask = (
            torch.cat([F.pad(batch[name], (0, width - batch[name].shape[1])) for name in names])
            for names in (("clean", "bad"), ("clean_mask", "bad_mask"))
        )
        with torch.no_grad():  # causal attention never looks at padding behind a text
            watch.model(input_ids=ids, use_cache=False)
        logits = [F.linear(x.float(), layer.weight, layer.bias) for x, layer in zip(watch.inputs, layers, strict=True)]
        scores = text_scores(logits, mask, trash, units.tolist())
        pairs = (scores[name].chunk(2) for name in LEARNED)
        return torch.stack([F.softplus(bad - good).mean() for good, bad in pairs]).mean()

    return loss


def _language(model: Any) -> Callable[[Batch], Tensor]:
    """Nats per token of the clean texts; every text counts alike, so that shards of a batch do."""

    def loss(batch: Batch) -> Tensor:
        ids, mask = batch["clean"], batch["clean_mask"][:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(mask.shape)
        return ((each * mask).sum(1) / mask.sum(1)).mean()

    return loss


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
    gap = [worse - better for worse, better in zip(_called(selector, bad), _called(selector, texts), strict=True)]
    scorer = Scorer(selector, ratio=recipe.ratio, seed=recipe.seed)
    kind_of = {"clean": [""] * len(texts), "bad": kinds}
    rows = [
        Row(name, place, text) for name, many in (("clean", texts), ("bad", bad)) for place, text in enumerate(many)
    ]
    table, _ = scorer(rows)
    known = zip(table["source_dataset"], table["source_index"], strict=True)
    table["corruption"] = [kind_of[name][at] for name, at in known]
    weights = {"combined": combine(table), "perplexity_fitted": combine(table, ())}
    return replace(selector, gap=tuple(gap), combined=weights)


@torch.no_grad()
def _called(selector: Selector, texts: Sequence[str], batch: int = 32) -> list[Tensor]:
    """Per layer the mean share of probability that each expert has, `(E,)`, by softmax over logits in units."""
    ids = sorted(selector.tokenizer(list(texts), add_special_tokens=False)["input_ids"], key=len)
    start, body = start_token(selector.tokenizer), selector.model.base_model
    totals: list[Tensor] = []
    with Watch(body, inputs=False) as watch:
        for first in range(0, len(ids), batch):
            rows, mask = padded(ids[first : first + batch], start)
            body(input_ids=rows.to(selector.model.device), use_cache=False)
            shares = [
                (logits[mask.flatten()] / unit).softmax(-1).sum(0).cpu()
                for logits, unit in zip(watch.logits, selector.units, strict=True)
            ]
            totals = [total + share for total, share in zip(totals, shares, strict=True)] if totals else shares
    return [total / total.sum() for total in totals]
