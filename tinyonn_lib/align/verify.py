"""How often a model answers rightly, prompt by prompt, and whether one model does so more often than another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tinyonn_lib.align.answers import answers
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import Loss, paired

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOW = ("greedy", "sampled")


def success(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    n: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Ask every prompt once greedily and `n` times by sampling.

    Training on rewards sharpens a model: what it answers anyway becomes likelier, so `sampled` rises even where nothing
    new was learned. `greedy` is the control of that, because a sharper model's likeliest answer is the same.

    Returns:
        One row per prompt, in their order: task, prompt (its text), greedy (1 or 0), sampled (share of right answers).
    """
    greedy = answers(model, tokenizer, prompts, 1, 0.0)
    drawn = answers(model, tokenizer, prompts, n, temperature, seed)
    return pd.DataFrame(
        {
            "task": prompts["task"].to_numpy(),
            "prompt": prompts["prompt"].to_numpy(),
            "greedy": greedy["right"].to_numpy(float),
            "sampled": drawn.groupby("prompt")["right"].mean().to_numpy(),
        }
    )


def rates(found: pd.DataFrame) -> pd.DataFrame:
    """Success per task: task, prompts, greedy, sampled."""
    return found.groupby("task", sort=False).agg(
        prompts=("prompt", "size"), greedy=("greedy", "mean"), sampled=("sampled", "mean")
    ).reset_index()  # fmt: skip


def lift(
    tuned: Sequence[pd.DataFrame] | pd.DataFrame, base: Sequence[pd.DataFrame] | pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """How much more often the tuned model is right, with a paired bootstrap over the prompts and the seeds.

    Args:
        tuned: of `success`; several are the seeds of one method, averaged, and drawn like the prompts. A single one
            cannot tell how much another training would differ: the interval is then over prompts alone.
        base: of `success` on the same prompts; as many as of `tuned`, whose seeds are drawn together, or a single one.
        seed: of the bootstrap.

    Returns:
        One row per task and way of asking: task, how ("greedy" or "sampled"), base, tuned (shares), difference (tuned
        minus base) with its 95 % interval low, high (NaN below eight prompts), prompts, standing ("better", "worse",
        "no clear difference" or "too few sources").

    Raises:
        BenchError: the two were not asked the same.
    """
    ours = [tuned] if isinstance(tuned, pd.DataFrame) else list(tuned)
    theirs = [base] if isinstance(base, pd.DataFrame) else list(base)
    first = ours[0]
    if any(not found[["task", "prompt"]].equals(first[["task", "prompt"]]) for found in (*ours, *theirs)):
        raise BenchError("The two models were not asked the same prompts: judge both on the same table.")
    rows = []
    for task in first["task"].unique():
        chosen = (first["task"] == task).to_numpy()
        asked, one = first.loc[chosen, "prompt"], np.ones(int(chosen.sum()), np.int64)
        for how in HOW:
            # As failures, because `paired` compares losses: fewer is better.
            failed = [[Loss(1.0 - found.loc[chosen, how].to_numpy(), one) for found in side] for side in (ours, theirs)]
            gap = paired(failed[0], failed[1], asked.tolist(), seed=seed, over_seeds=True)
            before, after = (1.0 - float(np.mean([item.mean for item in side])) for side in reversed(failed))
            rows.append({"task": task, "how": how, "base": before, "tuned": after, "difference": -gap.mean,
                         "low": -gap.high, "high": -gap.low, "prompts": gap.groups,
                         "standing": gap.standing})  # fmt: skip
    return pd.DataFrame(rows)
