"""Supervised training on answers: the warm-up before reinforcement, and what the controls are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.align.answers import encoded
from tinyonn_lib.align.parts import Part, only
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.threads import default_shards
from tinyonn_lib.lm.train import fit
from tinyonn_lib.pretrain.layout import IGNORED
from tinyonn_lib.pretrain.recipe import Recipe, optimizers
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pd.DataFrame,
    *,
    steps: int,
    batch: int = 64,
    part: Part = "all",
    lr: float = 3.0e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train a model in place on prompts and solutions; only the solutions and their end count in the loss.

    Args:
        pairs: columns prompt and solution: the gold ones, or right answers of the model itself.
        steps: optimiser steps; few leave the success partial, which is what reinforcement needs.
        batch: pairs per step.
        part: what is trained, see `parts.Part`.
        lr: peak rate of AdamW on embeddings, head and norms; Muon on the matrices of the layers takes five times it.
        checkpoint, every_seconds, progress: see `lm.train.fit`.
        seed: order of the pairs.

    Returns:
        The history of `fit`; loss is nats per answer, not per token.

    Raises:
        BenchError: no pairs, or prompts too long for the model.
    """
    if batch < 1 or lr <= 0:
        raise BenchError(f"batch={batch} and lr={lr} must be above 0.")
    rows = packed(model, tokenizer, pairs)
    plan = Recipe(lr_matrix=5 * lr, lr_other=lr, weight_decay=0.0)
    device = next(model.parameters()).device
    # Behind the shortest prompt: the head of a small model is half of its work, and prompts need none.
    kept = int((rows[:, 1] != IGNORED).any(0).flip(0).nonzero().max()) + 1

    shards = default_shards(device)
    model.train()
    try:
        with only(model, part):
            return fit(
                model, lambda data: answer_nats(model, data, kept), shuffled(rows, batch, seed, device),
                optimizers(model, plan, shards), steps=steps, schedule="trapezoidal", warmup_steps=min(10, steps // 4),
                shards=shards, checkpoint=checkpoint, every_seconds=every_seconds, progress=progress,
                tag=f"teach {seed} {batch}",
            )  # fmt: skip
    finally:
        model.eval()


def answer_nats(model: PreTrainedModel, rows: Tensor, kept: int = 0) -> Tensor:
    """Mean nats per answer, its end included, of `(n, 2, length)` rows of `packed`; a scalar.

    Args:
        kept: places at the end that hold all answers; 0: any place may.
    """
    logits = model(input_ids=rows[:, 0, :-1], use_cache=False, logits_to_keep=kept).logits
    labels = rows[:, 1, 1:][:, -kept:]
    each = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(1).mean()


def packed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame) -> Tensor:
    """`(pairs, 2, length)`: token ids, and the same as labels with prompt and padding ignored.

    Prompt and solution are tokenised apart, as they are when the model answers. Padding stands on the right, where
    causal attention never looks at it.
    """
    prompts, room = encoded(model, tokenizer, pairs)
    solutions = tokenizer(pairs["solution"].tolist(), add_special_tokens=False, verbose=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    length = max(map(len, prompts)) + room
    rows = torch.full((len(pairs), 2, length), end)
    rows[:, 1] = IGNORED
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        whole = torch.tensor([*prompt, *solution, end])
        rows[row, 0, : len(whole)] = whole
        rows[row, 1, len(prompt) : len(whole)] = whole[len(prompt) :]
    return rows
