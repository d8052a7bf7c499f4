"""Rejection sampling: the model is taught its own right answers, round by round (expert iteration).

The strongest control of reinforcement at equal samples: it uses the same program as the judge and the same number of
generated answers, and only the right ones. With wrong answers never pushed away (arXiv 2504.11343: RAFT). Its optimiser
and the decay of its learning rate are those of `reinforce`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from tinyonn_lib.align.answers import answers, encoded
from tinyonn_lib.align.borrow import NothingToLearn, Rounds, probabilities
from tinyonn_lib.align.parts import Part, only
from tinyonn_lib.align.seeds import seed_of
from tinyonn_lib.align.warm import answer_nats, packed
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.engine import Local
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.threads import default_shards, threads
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COLUMNS = {name: name for name in ("reward", "right", "loss", "grad_norm", "tokens")}


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
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Let the model answer, keep what is right, teach it that, and again.

    Args:
        prompts: columns task, prompt, solution; the solutions are not used.
        rounds: times that it answers; prompts_per_round, group: prompts and answers to each in a round.
        steps: optimiser steps per round; batch: answers in each. A round without a right answer has none.
        part, lr, temperature, seed, checkpoint, every_seconds, progress: as in `reinforce`.

    Returns:
        One row per round: step (from 1), reward (share of right answers), right (different right answers), loss (nats
        per answer; NaN without a right one), grad_norm, tokens (generated in all, so far).

    Raises:
        NothingToLearn: no right answer in any round; the model is as it was.
        BenchError: settings out of range, prompts too long, or a loss not finite.
    """
    if min(rounds, prompts_per_round, steps, batch) < 1 or lr <= 0:
        raise BenchError(
            f"rounds={rounds}, prompts_per_round={prompts_per_round}, steps={steps} and batch={batch} must be at least "
            f"1, lr={lr} above 0."
        )
    device = next(model.parameters()).device
    order = shuffled(torch.arange(len(prompts)), prompts_per_round, seed)
    data = [torch.tensor([token for row in encoded(model, tokenizer, prompts)[0] for token in [*row, -1]])]
    plan = {"imitate": group, "prompts": prompts_per_round, "batch": batch, "T": temperature}
    model.eval()  # no dropout: threads must not draw random numbers
    with only(model, part), threads(shards := default_shards(device)) as each, probabilities():
        told = Rounds(
            model, rounds=rounds, updates=steps, lr=lr, seed=seed, plan=plan, data=data, columns=_COLUMNS,
            checkpoint=checkpoint, every_seconds=every_seconds, progress=progress,
        )  # fmt: skip
        params = [param for param in model.parameters() if param.requires_grad]
        engine = Local(
            lambda rows: answer_nats(model, rows), params, model, [told.optimizer], clip=1.0, accumulate=1,
            shards=shards, each=each,
        )  # fmt: skip
        for number in range(told.done, rounds):
            asked = prompts.iloc[order(number).tolist()].reset_index(drop=True)
            drawn = answers(model, tokenizer, asked, group, temperature, seed_of(seed, number))
            good = drawn[drawn["right"]]
            taught = asked.iloc[good["prompt"]].assign(solution=good["completion"].to_numpy())
            before = told.rows["tokens"][-1] if told.rows["tokens"] else 0.0
            seen = {
                "reward": float(drawn["right"].mean()),
                "right": float(len(taught.drop_duplicates(["prompt", "solution"]))),
                "tokens": before + float(drawn["tokens"].sum()),
            }
            rows = packed(model, tokenizer, taught) if len(taught) else None
            at = None if rows is None else shuffled(rows, batch, seed_of(seed, number), device)
            for step in range(steps):
                if at is not None:
                    loss, norm = engine.step(at(step))
                    seen |= {"loss": float(loss), "grad_norm": float(norm)}
                else:
                    told.optimizer.step()  # without gradients it does nothing, and the learning rate goes on
                told.scheduler.step()
                told.add(seen)
                seen = {}
            engine.finish()
    if not any(told.rows["right"]):
        raise NothingToLearn(
            "Not one right answer to learn from: warm up longer or take a smaller size.", int(told.rows["tokens"][-1])
        )
    return told.table()
