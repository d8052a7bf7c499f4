"""Train a projector on caches of real texts: towards the student's own cache, or towards the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.data import Batch, Caches, own_of, teachers_of
from tinyonn_lib.kv.handover import nats
from tinyonn_lib.kv.loss import compute_kv_loss
from tinyonn_lib.kv.projector import KVDimensionProjector
from tinyonn_lib.lm.record import HeldOut
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.train import fit
from tinyonn_lib.progress import Progress

ANCHOR = 3.0
"""Weight, in "lm", of the distance to the student's own cache. Without it the caches drift apart (R² of keys below 0),
which every-token hand-overs do not notice and a student that reads on by itself does: what it adds no longer fits."""

LOOKS = 4
"""How often in a training validation texts are looked at."""

Objective = Literal["mse", "cosine", "normalised", "lm"]


@dataclass(frozen=True)
class Recipe:
    """How a projector learns.

    Attributes:
        objective: a measure of `compute_kv_loss` to the student's own cache, or "lm": the student's loss on the next
            token, its weights frozen, plus `ANCHOR` times the mean squared error.
        lr: AdamW's peak rate for the projector; the document's 1e-3 by default.
        lr_student: AdamW's peak rate for the student, which then trains, too (document: 5e-5); 0: frozen.
        batch: texts per step.
        steps: optimiser steps.
        seed: order of the texts, and dropout.
    """

    objective: str = "mse"
    lr: float = 1e-3
    lr_student: float = 0.0
    batch: int = 8
    steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise BenchError(f"Unknown objective '{self.objective}': choose one of {', '.join(get_args(Objective))}.")
        if not 0 < self.lr < math.inf or not 0 <= self.lr_student < math.inf or self.batch < 1:
            raise BenchError(
                f"lr={self.lr}, lr_student={self.lr_student}, batch={self.batch}: give a rate above 0, one from 0, and "
                "one text or more."
            )


def train(
    projector: KVDimensionProjector,
    caches: Caches,
    recipe: Recipe,
    *,
    validation: Caches | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train a projector in place (document 003, §Training script).

    Args:
        caches: of training texts. With `lr_student` their student is trained in place as well: give a copy.
        validation: of other texts. Its loss is looked at `LOOKS` times, and the weights with the least are kept.
        checkpoint, progress, options: of `lm.train.fit`; a killed training goes on from the checkpoint.

    Returns:
        The history of `fit`: step, loss, lr, grad_norm …

    Raises:
        BenchError: a loss that is not finite, or a projector that is frozen.
    """
    trained = [p for p in projector.parameters() if p.requires_grad]
    if not trained:
        raise BenchError("The projector is frozen: make it with trainable=True.")
    student = caches.student
    groups: list[dict[str, Any]] = [{"params": trained, "lr": recipe.lr}]
    modules = nn.ModuleList([projector])
    if recipe.lr_student:
        student.model.requires_grad_(True)
        groups.append({"params": list(student.model.parameters()), "lr": recipe.lr_student})
        modules.append(student.model)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = shuffled(torch.arange(len(caches))[:, None], min(recipe.batch, len(caches)), recipe.seed)
    # What a projector computes is not in the shapes of its weights alone: another one's checkpoint is not its own.
    tag = repr((recipe, projector.options, projector.layer_maps))
    held_out = None
    if validation is not None:
        held_out = HeldOut(lambda: _held_out(projector, validation, recipe), max(1, recipe.steps // LOOKS), LOOKS)
    projector.train()
    try:
        with torch.random.fork_rng(devices=[student.device] if student.device.type == "cuda" else []):
            torch.manual_seed(recipe.seed)
            return fit(
                modules, lambda batch: loss(projector, caches, batch, recipe), lambda step: caches[rows(step)[:, 0]],
                optimizer, steps=recipe.steps, warmup_steps=min(20, recipe.steps // 4), checkpoint=checkpoint,
                progress=progress, tag=tag, held_out=held_out, **options,
            )  # fmt: skip
    finally:
        projector.eval()
        student.model.requires_grad_(False)


@torch.no_grad()
def _held_out(projector: KVDimensionProjector, validation: Caches, recipe: Recipe) -> float:
    projector.eval()
    total, tokens = 0.0, 0
    for batch in validation.batches():
        count = int(batch["mask"].sum())
        total, tokens = total + float(loss(projector, validation, batch, recipe)) * count, tokens + count
    projector.train()
    return total / tokens


def loss(projector: KVDimensionProjector, caches: Caches, batch: Batch, recipe: Recipe) -> Tensor:
    """What one batch costs; differentiable in the projector and, if it trains, in the student."""
    said = projector(teachers_of(batch, caches.names))
    if recipe.objective == "lm":
        each = nats(caches.student, said, batch["ids"], batch["mask"])
        near = compute_kv_loss(own_of(batch), said, mask=batch["mask"])
        return each.sum() / batch["mask"][:, 1:].sum() + ANCHOR * near
    own = caches.student.read(batch["ids"]) if recipe.lr_student else own_of(batch)
    return compute_kv_loss(own, said, recipe.objective, heads=caches.student.widths.heads, mask=batch["mask"])
