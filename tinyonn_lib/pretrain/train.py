"""Train a small language model in a minute or two of CPU, with a `Recipe`.

The default recipe is that of PEERS.md §7: Muon on matrices, AdamW with its own high rate on the rest, a trapezoidal
schedule.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.load import context_length, pick_device
from tinyonn_lib.lm.threads import default_shards
from tinyonn_lib.lm.train import fit
from tinyonn_lib.pretrain.forward import quick
from tinyonn_lib.pretrain.layout import Rows
from tinyonn_lib.pretrain.recipe import Recipe, loss, optimizers
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tinyonn_lib.pretrain.mtp import MTPHead


@dataclass(frozen=True)
class Objective:
    """Another loss than the recipe's.

    Attributes:
        loss: model → loss of a batch of `Rows.batches`, as `recipe.loss` makes it.
        tag: names what it depends on, so that no checkpoint of another loss is taken up.
    """

    loss: Callable[[PreTrainedModel], Callable[[dict[str, Tensor]], Tensor]]
    tag: str


def pretrain(
    rows: Rows | Tensor,
    model: PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    tokens: int = 1_000_000,
    seconds: float | None = None,
    mtp: MTPHead | None = None,
    objective: Objective | None = None,
    seed: int = 0,
    shards: int | None = None,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    progress: Progress | None = None,
    timing: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Train a causal language model in place.

    Args:
        rows: what to learn from, laid out as the recipe says (`layout.lay`), or packed blocks (N, length); visited in
            a new random order each epoch.
        model: float32 weights; left in eval mode.
        recipe: None is the default.
        tokens: budget, rounded to whole steps; padding counts. A killed and resumed run equals an uninterrupted one to
            the bit.
        seconds: budget by the clock instead: the speed is measured first and `tokens` follows from it, so the result
            depends on the machine. A resumed run keeps the number of tokens that was measured first.
        mtp: trained beside the model if the recipe gives its loss a weight.
        objective: None is the recipe's loss.
        seed: order of the rows.
        shards: threads with a part of the batch each; None takes one per core, at most four, and 1 on a GPU.
        checkpoint, every_seconds, progress, timing: see `lm.train.fit`.

    Returns:
        The history of `fit`: step, tokens, loss (nats per token, with the weighted other losses), lr, grad_norm, spike.

    Raises:
        BenchError: rows that do not fit the model, an empty budget, a recipe with MTP but no head or the other way
            round, or a diverging loss.
    """
    rows, recipe = rows if isinstance(rows, Rows) else Rows(rows), recipe or Recipe()
    _check(rows.ids, model, tokens, seconds)
    if (mtp is None) != (recipe.mtp == 0):
        raise BenchError(f"The recipe weighs MTP with {recipe.mtp:g}: give a head exactly if that is above 0.")
    device = next(model.parameters()).device
    shards = shards or default_shards(device)

    def run(target: PreTrainedModel, head: MTPHead | None, sizes: list[int], **more: Any) -> pd.DataFrame:
        trained = nn.ModuleList([target] if head is None else [target, head])
        own = loss(target, rows, recipe, head) if objective is None else objective.loss(target)
        return fit(
            trained, own, rows.batches(sizes, seed, device),
            optimizers(trained, recipe, shards), steps=len(sizes), clip=recipe.clip, schedule=recipe.schedule,
            warmup_steps=min(recipe.warmup_steps, len(sizes) // 4), decay_share=recipe.decay_share, shards=shards,
            precision=recipe.precision, **more,
        )  # fmt: skip

    length = int(rows.ids.shape[1])
    model.train()
    try:
        with quick(model):
            if seconds is not None:
                plan = checkpoint.with_name(checkpoint.name + ".steps") if checkpoint is not None else None
                trial, what = copy.deepcopy((model, mtp)), f"{seconds} {length} {astuple(recipe)}"
                tokens = _planned(lambda n: run(*trial, [recipe.batch] * n), seconds, recipe.batch * length, plan, what)
                del trial
            return run(
                model, mtp, recipe.sizes(tokens, length), checkpoint=checkpoint, every_seconds=every_seconds,
                progress=progress, timing=timing,
                tag=f"{seed} {astuple(recipe)}{'' if objective is None else objective.tag}",
            )  # fmt: skip
    finally:
        model.eval()


def pretrain_each(
    models: Mapping[str, tuple[PreTrainedModel, int]],
    rows: Rows | Tensor,
    folder: Path,
    progress: Callable[[str, str], Progress],
    *,
    device: str = "auto",
    heads: Mapping[str, MTPHead] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """`pretrain` several models on the same rows, one after the other, each in place.

    Args:
        models: name → model and its budget in tokens.
        folder: where the checkpoints `<name>.pt` go.
        progress: makes a reporter from a name and a unit.
        device: "auto" takes the GPU if there is one.
        heads: name → the model's head for the token after the next, if the recipe trains one.
        options: of `pretrain`.

    Returns:
        The histories below each other, with a column `model`.
    """
    place, histories = pick_device(device), []
    for name, (model, tokens) in models.items():
        model.to(place)  # type: ignore[arg-type]
        head = heads[name].to(place) if heads else None
        checkpoint, report = folder / f"{name}.pt", progress(name, "steps")
        history = pretrain(rows, model, tokens=tokens, mtp=head, checkpoint=checkpoint, progress=report, **options)
        histories.append(history.assign(model=name))
    return pd.concat(histories, ignore_index=True)


def _check(blocks: Tensor, model: PreTrainedModel, tokens: int, seconds: float | None) -> None:
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise BenchError(f"Training blocks must be (N, length ≥ 2) token ids, got shape {tuple(blocks.shape)}.")
    if tokens < 1 or (seconds is not None and seconds <= 0):
        raise BenchError(f"tokens={tokens} and seconds={seconds} must be positive.")
    config = model.config.get_text_config()
    if int(blocks.max()) >= config.vocab_size or int(blocks.min()) < 0:
        raise BenchError(
            f"A block holds token {int(blocks.max())}, the model has {config.vocab_size}: other tokenizer?"
        )
    limit = context_length(model)
    if limit is not None and blocks.shape[1] > limit:
        raise BenchError(f"Blocks of {blocks.shape[1]} tokens exceed the model's {limit}.")


def _planned(trial: Callable[[int], object], seconds: float, per_step: int, plan: Path | None, what: str) -> int:
    """Tokens that fit into `seconds`, measured once; remembered in `plan` so that a resumed run keeps its schedule.

    Args:
        what: the training that the plan is for; one of another training is not used.
    """
    if plan is not None and (kept := resume.read_json(plan)) and kept["of"] == what:
        return int(kept["tokens"])
    began = time.monotonic()
    trial(2)  # the first steps allocate and warm caches
    middle = time.monotonic()
    trial(6)
    ended = time.monotonic()
    tokens = per_step * max(1, math.floor((seconds - (ended - began)) / ((ended - middle) / 6)))
    if plan is not None:
        resume.write_json(plan, {"of": what, "tokens": tokens})
    return tokens
