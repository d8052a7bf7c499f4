"""Warm a selector up: train the routers of a mixture of experts, and nothing else (document 001, stage one).

The document trains on the language model's loss alone (`loss="lm"`). Nothing in it makes an expert a trash expert
(ERRATA 001), so `loss="contrastive"` teaches it: of a text and a corrupted copy the text is to score higher.
"""

from __future__ import annotations

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
from tinyonn_lib.lm.threads import default_shards
from tinyonn_lib.lm.train import fit
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection.calibrate import calibrated, cold, rms
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.known import apart
from tinyonn_lib.selection.pairs import Batch, Pairs
from tinyonn_lib.selection.routers import Layer, Watch
from tinyonn_lib.selection.scores import text_scores, trash_experts
from tinyonn_lib.selection.selector import Selector, in_float32, save

CALIBRATION = 0.2
"""Share of the passages that is not trained on: which experts corrupted text calls, and the weight of perplexity, are
measured on it."""

LEARNED = ("contrastive", "log_mass")
"""Scores by which a text is to lie above its corrupted copy: log odds alone may be paid for by tokens that are all too
good, the log probability counts what is bad."""


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
    peaks = [recipe.lr * max(rms(weight), 1e-8) for weight in params]
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


def _later(pairs: Pairs, first: int, device: torch.device, step: int) -> Batch:
    return pairs(first + step, device)


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
