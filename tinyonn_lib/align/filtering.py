"""Which prompts can teach: neither too hard nor too easy.

A group of answers that are all right, or all wrong, has no better and no worse: its advantages are zero (GRPO, GSPO),
and it has no pair (DPO). The design document (002, on reinforcement) drops both kinds, for use of the samples and for
stability.
"""

from __future__ import annotations

import pandas as pd

from tinyonn_lib.errors import BenchError

VERDICTS = ("all wrong", "kept", "all right")


def keep(prompts: pd.DataFrame, samples: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drop the prompts that the model always or never answers rightly.

    Args:
        prompts: columns task, prompt, solution.
        samples: `answers.answers(model, tokenizer, prompts, n=…)` of several answers per prompt.

    Returns:
        The kept prompts with a column `success` (share of right answers), and the counts: one row per task with
        the prompts, the three `VERDICTS` and `success`, the mean over all prompts.

    Raises:
        BenchError: nothing is left.
    """
    share = samples.groupby("prompt")["right"].mean()
    if len(share) != len(prompts):
        raise BenchError(f"The samples are of {len(share)} prompts, not of these {len(prompts)}: draw them again.")
    told = prompts.reset_index(drop=True).assign(success=share.to_numpy())
    verdict = pd.cut(told["success"], [-1.0, 0.0, 1.0 - 1e-9, 1.0], labels=list(VERDICTS))
    counts = pd.crosstab(told["task"], verdict).reindex(columns=list(VERDICTS), fill_value=0)
    counts.insert(0, "prompts", counts.sum(axis=1))
    counts["success"] = told.groupby("task")["success"].mean()
    counts.columns.name = None
    kept = told[verdict == "kept"].reset_index(drop=True)
    if not len(kept):
        wrong, _, right = (int(counts[name].sum()) for name in VERDICTS)
        raise BenchError(
            f"No prompt is left to learn from: {wrong} are always wrong, {right} always right. "
            + ("Warm up longer or take a smaller size" if wrong >= right else "Warm up less or take a larger size")
            + (", or sample more answers at a higher temperature." if wrong and right else ".")
        )
    return kept, counts.reset_index()
