"""Rejection sampling: the model is taught its own right answers, round by round (expert iteration).

The strongest control of reinforcement at equal samples: it uses the same program as the judge and the same number of
generated answers, and only the right ones. With wrong answers never pushed away (arXiv 2504.11343: RAFT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch

from tinyonn_lib.align.answers import answers
from tinyonn_lib.align.parts import Part
from tinyonn_lib.align.seeds import seed_of
from tinyonn_lib.align.warm import teach
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    *,
    rounds: int = 4,
    prompts_per_round: int = 160,
    group: int = 8,
    steps: int = 20,
    batch: int = 64,
    part: Part = "gains",
    lr: float = 1.0e-2,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Let the model answer, keep what is right, teach it that, and again.

    Args:
        prompts: columns task, prompt, solution; the solutions are not used.
        rounds: times that it answers; prompts_per_round, group: prompts and answers to each in a round.
        steps: optimiser steps per round; batch: answers in each.
        part, lr, temperature, seed, progress: as in `teach` and `reinforce`.

    Returns:
        One row per round: step (from 1), reward (share of right answers), right (different right answers), loss (nats
        per answer, last step), tokens (generated in all, so far).

    Raises:
        BenchError: no right answer in a round.
    """
    order = shuffled(torch.arange(len(prompts)), prompts_per_round, seed)
    rows, tokens = [], 0
    for number in range(rounds):
        asked = prompts.iloc[order(number).tolist()].reset_index(drop=True)
        drawn = answers(model, tokenizer, asked, group, temperature, seed_of(seed, number))
        tokens += int(drawn["tokens"].sum())
        good = drawn[drawn["right"]]
        if not len(good):
            raise BenchError("Not one right answer to learn from: warm up longer or take a smaller size.")
        taught = asked.iloc[good["prompt"]].assign(solution=good["completion"].to_numpy())
        history = teach(
            model, tokenizer, taught, steps=steps, batch=batch, part=part, lr=lr, schedule="constant",
            seed=seed_of(seed, number),
        )  # fmt: skip
        different = len(taught.drop_duplicates(["prompt", "solution"]))
        rows.append((number + 1, drawn["right"].mean(), different, history["loss"].iloc[-1], tokens))
        if progress is not None:
            progress(number + 1, rounds, f"reward {drawn['right'].mean():.3f}")
    return pd.DataFrame(rows, columns=["step", "reward", "right", "loss", "tokens"])
