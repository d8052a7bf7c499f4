"""Distillation: a small model learns a larger one's whole distribution over the next token (Hinton et al. 2015).

`distil` is `pretrain` with another loss: (1 − share) · next-token loss + share · T² · KL(teacher ‖ student), both at
temperature T. The teacher reads the same rows in the same step: keeping its logits would take 2 bytes per token and
vocabulary entry, to spare a third of a step from the second epoch on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.align.answers import limit_of
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.pretrain.forward import forward, next_token_nats, quick
from tinyonn_lib.pretrain.layout import IGNORED, Rows
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.train import Objective, pretrain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Way:
    """How much a student listens to its teacher.

    Attributes:
        share: of the KL in the loss; 0: the text alone.
        temperature: both distributions are those of logits / temperature; above 1 unlikely tokens count for more.
    """

    share: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not self.temperature > 0:
            raise BenchError(f"share={self.share} must be in [0, 1] and temperature={self.temperature} above 0.")


def teacher_nats(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · cross-entropy of the student's distribution under the teacher's at each place, (…), nats.

    Logits (…, V), divided by T before the softmax. Its gradient for the student is that of T² · KL(teacher ‖ student),
    from which it differs by T² times the teacher's entropy; leaving that out halves the time. Without T² the gradient
    would shrink as 1 / T² (Hinton et al. 2015, §2.1). Computed in the logits' own precision, as `next_token_nats`.
    """
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    with torch.autocast(student.device.type, enabled=False):
        nats = F.cross_entropy(student.flatten(0, -2), teacher.softmax(-1).flatten(0, -2), reduction="none")
    return nats.float().view(student.shape[:-1]) * temperature**2


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows | Tensor,
    way: Way | None = None,
    recipe: Recipe | None = None,
    *,
    tokens: int,
    checkpoint: Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """`pretrain` the student in place with a teacher; with share 0 it is `pretrain`. The teacher stays as it is.

    Args:
        student: float32 weights; left in eval mode.
        teacher: has the student's tokenizer, on the same device.
        rows: what both read, laid out as the recipe says, or packed blocks (N, length).
        way: None is `Way()`.
        recipe: without multi-token prediction; None is the default.
        tokens: budget, rounded to whole steps.
        checkpoint, options: of `pretrain`.

    Returns:
        The history of `fit`; loss is the weighted sum, the teacher's entropy within it (see `teacher_nats`).

    Raises:
        BenchError: different vocabularies, rows that do not fit one of the models, or a diverging loss.
    """
    rows, recipe, way = rows if isinstance(rows, Rows) else Rows(rows), recipe or Recipe(), way or Way()
    _check(student, teacher, rows, recipe)
    objective = None
    if way.share:
        # Whose teacher it is matters to a checkpoint alone.
        read = [] if checkpoint is None else [resume.fingerprint({}, list(teacher.parameters()), ())]
        objective = Objective(lambda model: _loss(model, teacher, rows, way, recipe), f"{astuple(way)} {read}")
    teacher.eval()
    with quick(teacher):
        return pretrain(rows, student, recipe, tokens=tokens, checkpoint=checkpoint, objective=objective, **options)


def _check(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, recipe: Recipe) -> None:
    """What `pretrain` cannot know: it sees no teacher."""
    one, two = (model.config.get_text_config() for model in (student, teacher))
    if one.vocab_size != two.vocab_size:
        raise BenchError(
            f"The student has {one.vocab_size} tokens, the teacher {two.vocab_size}: distillation compares their "
            "distributions token by token, so both need the same tokenizer."
        )
    shortest = min(limit_of(model) for model in (student, teacher))
    if rows.ids.ndim == 2 and rows.ids.shape[1] > shortest:
        raise BenchError(f"Rows of {rows.ids.shape[1]} tokens exceed the {shortest} that both models can read.")
    if recipe.mtp:
        raise BenchError("Distillation has no head for multi-token prediction: give a recipe with mtp=0.")


def _loss(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, way: Way, recipe: Recipe
) -> Callable[[dict[str, Tensor]], Tensor]:
    per_row = rows.targets

    def of(batch: dict[str, Tensor]) -> Tensor:
        ids, asked = batch["ids"][:, :-1], rows.asked(batch["ids"])
        positions = batch["positions"][:, :-1] if "positions" in batch else None
        out = forward(student, ids, positions)
        with torch.no_grad():  # not inference mode: the student's backward pass needs these logits
            wanted = forward(teacher, ids, positions).logits
        nats = way.share * teacher_nats(out.logits, wanted, way.temperature).masked_fill(asked == IGNORED, 0.0)
        if way.share < 1:
            nats = nats + (1 - way.share) * next_token_nats(out.logits, asked)
        return nats.sum() / (per_row * len(ids)) + recipe.balance * out.balance

    return of
