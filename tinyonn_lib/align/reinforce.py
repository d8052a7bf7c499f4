"""Reinforcement with a program as the judge: GSPO and GRPO through TRL.

Both draw a group of answers per prompt and push towards those better than the group's mean. GRPO (arXiv 2402.03300)
weighs and clips every token by its own importance ratio, GSPO (arXiv 2507.18071) the answer as a whole. The ratio is
1 as long as the model that learns is the model that answered: with one optimiser step per round the two are the same
method. So a round's answers are cut into `updates` parts with a step each, four as in the GSPO paper (§5.1), and from
the second step on the methods differ.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch

from tinyonn_lib.align.answers import encoded, read
from tinyonn_lib.align.borrow import Rounds, borrowed, run
from tinyonn_lib.align.parts import Part, only
from tinyonn_lib.align.tasks import right
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["gspo", "grpo"]
CLIPS: dict[Kind, tuple[float, float]] = {"gspo": (3e-4, 4e-4), "grpo": (0.2, 0.27)}
"""Left and right clipping range, both as in the GSPO paper (§5.1)."""

_COLUMNS = {
    "reward": "reward",
    "zero_spread": "frac_reward_zero_std",
    "clipped": "clip_ratio/region_mean",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "unended": "completions/clipped_ratio",
    "loss": "loss",
    "grad_norm": "grad_norm",
}


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    *,
    kind: Kind = "gspo",
    steps: int = 20,
    prompts_per_step: int = 32,
    group: int = 8,
    updates: int = 4,
    part: Part = "gains",
    lr: float = 1.0e-2,
    temperature: float = 1.0,
    beta: float = 0.0,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train a model in place on the verdict of its tasks' programs: 1 for a right answer, 0 for any other.

    Args:
        prompts: columns task, prompt, solution; tasks may be mixed. Best filtered (`filtering.keep`): a group that is
            all right or all wrong teaches nothing.
        kind: "gspo" (importance of the whole answer) or "grpo" (of each token).
        steps: rounds of answering and learning.
        prompts_per_step: prompts per round; group: answers to each; updates: optimiser steps per round.
        part: what is trained, see `parts.Part`; "all" wants a rate hundreds of times smaller.
        lr: AdamW's rate, decaying linearly over the last half.
        temperature: of the answers.
        beta: weight of the KL divergence to the model as it came. 0 is the methods' own setting. The design document
            saw that with it the model keeps the format but cannot explore, and without it struggles between format
            and reasoning; the warm-up teaches the format before.
        clip: left and right clipping range; None takes the paper's, `CLIPS`. GSPO's are made for answers of
            thousands of tokens, whose mean ratio hardly moves; `clipped` in the history tells what they do to yours.
        seed: order of the prompts and all sampling.
        checkpoint, every_seconds, progress: as in `lm.train.fit`: a killed training that is started again with the
            same arguments and the same starting model goes on between two rounds and ends with the same weights.

    Returns:
        One row per round: step (from 1), reward (mean), zero_spread (share of groups with equal rewards: they teach
        nothing), clipped (share of answers or tokens outside the range), entropy (nats per token), length (tokens per
        answer), unended (share of answers without an end), loss, grad_norm, tokens (generated in all, so far).

    Raises:
        BenchError: unknown kind, sizes that do not divide, prompts too long, trl missing, or a loss not finite.
    """
    if kind not in get_args(Kind):
        raise BenchError(f"Unknown kind '{kind}': choose one of {', '.join(get_args(Kind))}.")
    if min(steps, prompts_per_step, updates) < 1 or group < 2 or lr <= 0 or temperature <= 0 or beta < 0:
        raise BenchError(
            f"steps={steps}, prompts_per_step={prompts_per_step} and updates={updates} must be at least 1, "
            f"group={group} at least 2, lr={lr} and temperature={temperature} above 0, beta={beta} not below."
        )
    if prompts_per_step * group % updates:
        raise BenchError(
            f"{prompts_per_step} prompts with {group} answers cannot be cut into updates={updates} equal parts."
        )
    low, high = clip = clip or CLIPS[kind]
    ids, room = encoded(model, tokenizer, prompts)
    plan = {
        "kind": kind,
        "group": group,
        "prompts": prompts_per_step,
        "T": temperature,
        "beta": beta,
        "clip": [low, high],
    }
    data = [torch.tensor([token for row in ids for token in [*row, -1]])]
    with only(model, part), borrowed(model) as common:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        named = getattr(model.config, "_name_or_path", "")
        if beta:  # TRL loads its reference from the model's path, where another model may lie
            model.config._name_or_path = common["output_dir"]
            model.save_pretrained(common["output_dir"])
        rounds = Rounds(
            model, rounds=steps, updates=updates, lr=lr, seed=seed, plan=plan, data=data,
            columns={**_COLUMNS, **({"kl": "kl"} if beta else {}), "tokens": "tokens"},
            checkpoint=checkpoint, every_seconds=every_seconds, progress=progress,
        )  # fmt: skip
        try:
            if rounds.done < steps:
                order = shuffled(torch.arange(len(prompts)), prompts_per_step, seed)
                rows = torch.cat([order(step) for step in range(rounds.done, steps)]).tolist()
                config = GRPOConfig(
                    **common, seed=seed % 2**32, max_steps=(steps - rounds.done) * updates, beta=beta,
                    per_device_train_batch_size=prompts_per_step * group // updates, steps_per_generation=updates,
                    num_generations=group, max_completion_length=room, temperature=temperature, top_k=0, top_p=1.0,
                    loss_type="grpo", importance_sampling_level="sequence" if kind == "gspo" else "token",
                    epsilon=low, epsilon_high=high, shuffle_dataset=False,
                )  # fmt: skip
                table = prompts[["task", "prompt"]].iloc[rows]
                trainer = GRPOTrainer(
                    model, _reward(tokenizer, rounds), config, Dataset.from_pandas(table, preserve_index=False),
                    processing_class=copy.deepcopy(tokenizer), callbacks=[rounds.callback()],
                    optimizers=(rounds.optimizer, rounds.scheduler),
                )  # fmt: skip
                run(trainer)
        finally:
            model.config._name_or_path = named
    return rounds.table()


def _reward(tokenizer: PreTrainedTokenizerBase, rounds: Rounds) -> Any:
    """The tasks' programs as TRL calls them; also counts what was generated."""

    def verified(
        prompts: list[str], completion_ids: list[list[int]], task: list[str], log_metric: Any, **rest: Any
    ) -> list[float]:
        before = rounds.rows["tokens"][-1] if rounds.rows["tokens"] else 0.0
        log_metric("tokens", before + sum(map(len, completion_ids)))
        texts = [read(tokenizer, ids)[0] for ids in completion_ids]
        return [float(right(*each)) for each in zip(task, prompts, texts, strict=True)]

    return verified
