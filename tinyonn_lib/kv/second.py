"""A second teacher, grown here: smaller, with a tokenizer of its own, so that two teachers disagree about tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tinyonn_lib.kv import judge
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import Texts
from tinyonn_lib.kv.data import foreign, teachers_of
from tinyonn_lib.kv.projector import SIDES, KVDimensionProjector
from tinyonn_lib.kv.ridge import fit_ridge
from tinyonn_lib.kv.train import Recipe, train
from tinyonn_lib.lm import load, models, texts, tokenizer
from tinyonn_lib.pretrain import recipe as growth
from tinyonn_lib.pretrain.train import pretrain
from tinyonn_lib.progress import Progress


def grow(
    train_texts: Sequence[str],
    *,
    tokens: int,
    length: int,
    vocabulary: int = 1024,
    width: int = 96,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """A model of two layers and a byte-level BPE tokenizer of `vocabulary` entries.

    Its tokens are shorter than those of 01_pretrain, so its context is twice `length`.

    Args:
        tokens: training budget, tokens of its own.
        length: of its training blocks, tokens.

    Returns:
        (model in eval mode, tokenizer).
    """
    tok = tokenizer.train_bpe(train_texts, vocabulary, max_length=2 * length)
    blocks = texts.pack(texts.encode(train_texts, tok, max_length=None), 2 * length, tok.eos_token_id, seed=seed)
    model = models.new_model(
        vocab_size=len(tok), width=width, layers=2, heads=2, kv_heads=1, head_dim=48, ffn=3 * width, seed=seed + 1,
        max_length=2 * length, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    pretrain(blocks, model, growth.Recipe(batch=8), tokens=tokens, seed=seed, checkpoint=checkpoint, progress=progress)
    return model, tok


def teachers(
    origin: str,
    table: pd.DataFrame,
    models: Mapping[str, KVModel],
    tokenizers: Mapping[str, Any],
    resume: Path,
    progress: Callable[[str, str], Progress],
    *,
    tokens: int,
    grow_tokens: int,
    length: int,
    device: str = "auto",
    **size: Any,
) -> Texts:
    """The same texts with a second teacher's caches beside the first's.

    Args:
        origin: "grow", or the second teacher's folder or hub id.
        table: texts with a `split`; a grown teacher learns from "train", or where there is none from "calibration".
        models, tokenizers: of "teacher" and "student".
        grow_tokens: training budget of a grown teacher; tokens, length, size: of `Texts.draw`.
    """
    if origin == "grow":
        learn = table[table["split"] == ("train" if "train" in set(table["split"]) else "calibration")]["text"].tolist()
        where: dict[str, Any] = {"checkpoint": resume / "second.pt", "progress": progress("second teacher", "steps")}
        model, tok = grow(learn, tokens=grow_tokens, length=length, seed=size["seed"], **where)
    else:
        model, tok = load.load_model(origin, device=device), load.load_tokenizer(origin)
    every = {"teacher": models["teacher"], "second": KVModel(model.to(models["student"].device))}
    return Texts.draw(
        table, tokenizers["student"], models["student"], every, tokens=tokens, length=length,
        tokenizers=foreign({**tokenizers, "second": tok}), **size,
    )  # fmt: skip


def together(
    seen: Texts,
    names: Sequence[str],
    recipe: Recipe,
    resume: Path | None = None,
    progress: Callable[[str, str], Progress] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each teacher alone and all of them through gates, same texts, steps and rate.

    Args:
        seen: caches with every teacher.
        names: of the teachers.
        options: of `from_configs`.

    Returns:
        `judge.table` for every teacher, all together, and the floors, with `kind`; and how much each counted where
        all speak: `teacher, layer, keys, values` (mean weight over held-out tokens).
    """
    configs = {name: seen.train.teachers[name].model.config for name in names}
    losses = {label: [judge.loss(source, seen.heldout)] for label, source in judge.floors(seen.train).items()}
    made: dict[str, KVDimensionProjector] = {}
    for label, chosen in [*((name, [name]) for name in names), (" and ".join(names), list(names))]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            chosen_configs = {name: configs[name] for name in chosen}
            one = KVDimensionProjector.from_configs(chosen_configs, seen.train.student.model.config, **(options or {}))
        fit_ridge(one.to(seen.train.student.device), seen.train, seen.validation)
        told, kept = progress and progress(f"from {label}", "steps"), resume and resume / f"together_{len(made)}.pt"
        train(one, seen.train, recipe, validation=seen.validation, progress=told, checkpoint=kept)
        made[label] = one
        losses[label] = [judge.loss(judge.projected(one), seen.heldout)]
    table = judge.table(losses, seen.heldout.source)
    kinds = dict.fromkeys(made, "ours") | {judge.OWN: "reference"}
    table["kind"] = [kinds.get(label, "floor") for label in table["cache"]]
    return table, _weights(made[" and ".join(names)], seen)


@torch.no_grad()
def _weights(projector: KVDimensionProjector, seen: Texts) -> pd.DataFrame:
    total, count = torch.zeros(()), 0
    for batch in seen.heldout.batches():
        weights = projector.weights(teachers_of(batch, list(projector.teachers)))
        real = batch["mask"][None, None, :, None].to(weights)  # as (side, teacher, batch, layer, token)
        total, count = total + (weights * real).sum((2, 4)).cpu(), count + int(batch["mask"].sum())
    shares = dict(zip(SIDES, total / count, strict=True))  # (teachers, layers) each
    return pd.DataFrame(
        {"teacher": name, "layer": layer} | {side: float(share[place, layer]) for side, share in shares.items()}
        for place, name in enumerate(projector.teachers)
        for layer in range(projector.student_layers)
    )
