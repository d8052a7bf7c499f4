"""Preferences: DPO through TRL, on pairs of a right and a wrong answer that the model itself gave."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from tinyonn_lib.align.answers import encoded
from tinyonn_lib.align.borrow import NothingToLearn, Rounds, borrowed, run
from tinyonn_lib.align.parts import Part, only
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COLUMNS = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen": "logps/chosen",
    "rejected": "logps/rejected",
    "grad_norm": "grad_norm",
}


def pairs(prompts: pd.DataFrame, samples: pd.DataFrame, most: int = 4) -> pd.DataFrame:
    """A right and a wrong answer to the same prompt, from the model's own samples.

    Args:
        prompts: columns task, prompt, solution.
        samples: of `answers.answers` on exactly these prompts. An answer that did not end is no pair's wrong one.
        most: pairs per prompt, at most; each uses another sample on both sides, equal texts count once.

    Returns:
        task, prompt, solution, chosen, rejected.

    Raises:
        NothingToLearn: no prompt has both.
    """
    rows = []
    told = samples[samples["completion"].notna()].drop_duplicates(["prompt", "completion"])
    for number, own in told.groupby("prompt"):
        task, prompt, solution = prompts[["task", "prompt", "solution"]].iloc[number]
        good, bad = (own.loc[own["right"] == wanted, "completion"].tolist() for wanted in (True, False))
        count = min(most, len(bad)) if good else 0
        # There is often one right text only, and many wrong ones.
        rows += [(task, prompt, solution, good[k % len(good)], bad[k]) for k in range(count)]
    if not rows:
        raise NothingToLearn(
            "No prompt has both a right and a wrong answer: sample more answers, or filter the prompts first."
        )
    return pd.DataFrame(rows, columns=["task", "prompt", "solution", "chosen", "rejected"])


def prefer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: pd.DataFrame,
    *,
    steps: int = 60,
    batch: int = 32,
    part: Part = "gains",
    lr: float = 1.0e-2,
    beta: float = 0.1,
    seed: int = 0,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train a model in place to prefer the right answers (DPO, arXiv 2305.18290).

    Args:
        chosen: of `pairs`.
        steps: optimiser steps; batch: pairs in each.
        part: what is trained, see `parts.Part`.
        lr: AdamW's rate, decaying linearly over the last half.
        beta: how strongly the model is held to the one that came in, which stays as the reference.
        seed: order of the pairs.
        checkpoint, every_seconds, progress: as in `reinforce`.

    Returns:
        One row per step: step, loss, accuracy (share of pairs in the right order), margin (of the implicit rewards),
        chosen, rejected (log-probability of the answers), grad_norm.

    Raises:
        NothingToLearn: every answer merges with the last token of its prompt.
        BenchError: settings out of range, prompts too long, trl missing, or a loss not finite.
    """
    if min(steps, batch) < 1 or lr <= 0 or beta <= 0:
        raise BenchError(f"steps={steps} and batch={batch} must be at least 1, lr={lr} and beta={beta} above 0.")
    chosen, longest = _unmerged(tokenizer, chosen, encoded(model, tokenizer, chosen)[0])
    data = [torch.tensor([ord(mark) for side in ("chosen", "rejected") for mark in "".join(chosen[side])])]
    with only(model, part), borrowed(model) as common:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        reference = copy.deepcopy(model)  # before a checkpoint changes the model
        rounds = Rounds(
            model, rounds=steps, updates=1, lr=lr, seed=seed, plan={"dpo": beta, "batch": batch}, data=data,
            columns=_COLUMNS, checkpoint=checkpoint, every_seconds=every_seconds, progress=progress,
        )  # fmt: skip
        if rounds.done < steps:
            order = shuffled(torch.arange(len(chosen)), batch, seed)
            rows = torch.cat([order(step) for step in range(rounds.done, steps)]).tolist()
            config = DPOConfig(
                **common, seed=seed % 2**32, max_steps=steps - rounds.done, per_device_train_batch_size=batch,
                beta=beta, max_length=longest + 1, train_sampling_strategy="sequential",
            )  # fmt: skip
            table = chosen[["prompt", "chosen", "rejected"]].iloc[rows]
            trainer = DPOTrainer(
                model, reference, config, train_dataset=Dataset.from_pandas(table, preserve_index=False),
                processing_class=copy.deepcopy(tokenizer), callbacks=[rounds.callback()],
                optimizers=(rounds.optimizer, rounds.scheduler),
            )  # fmt: skip
            run(trainer)
    return rounds.table()


def _unmerged(
    tokenizer: PreTrainedTokenizerBase, chosen: pd.DataFrame, ids: Sequence[Sequence[int]]
) -> tuple[pd.DataFrame, int]:
    """The pairs whose answers leave the prompt's tokens as they are, and the longest prompt with its answer, in tokens.

    DPO tokenises prompt and answer as one text. A wrong answer such as "=" may merge with the prompt's last token, and
    would be judged behind a prompt that the model never sees.
    """
    kept, longest = [], 0
    for row, prompt in enumerate(ids):
        texts = [chosen["prompt"].iloc[row] + chosen[side].iloc[row] for side in ("chosen", "rejected")]
        both = tokenizer(texts, verbose=False)["input_ids"]
        if all(whole[: len(prompt)] == prompt for whole in both):
            kept.append(row)
            longest = max(longest, *map(len, both))
    if not kept:
        raise NothingToLearn("No pair is left: every answer merges with the last token of its prompt.")
    return chosen.iloc[kept].reset_index(drop=True), longest
