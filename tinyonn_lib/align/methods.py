"""The ways to align: each one function and one line in `METHODS`, which names what it trains and at which rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from tinyonn_lib.align.answers import answers
from tinyonn_lib.align.borrow import NothingToLearn
from tinyonn_lib.align.imitate import imitate
from tinyonn_lib.align.parts import Part
from tinyonn_lib.align.prefer import pairs, prefer
from tinyonn_lib.align.reinforce import Kind, reinforce
from tinyonn_lib.align.warm import teach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rate = tuple[Part, float]


@dataclass(frozen=True)
class Budget:
    """What every method may spend.

    Attributes:
        steps: rounds of GSPO and GRPO.
        prompts_per_step, group: prompts in each, and answers to each prompt.
        updates: optimiser steps in each.
        temperature: of all sampling; beta: weight of the KL divergence in GSPO and GRPO.
        samples: answers per prompt when judging.
    """

    steps: int = 20
    prompts_per_step: int = 32
    group: int = 8
    updates: int = 4
    temperature: float = 1.0
    beta: float = 0.0
    samples: int = 4

    @property
    def answers(self) -> int:
        """Generated in all."""
        return self.steps * self.prompts_per_step * self.group

    @property
    def batch(self) -> int:
        """Answers in an optimiser step."""
        return max(1, self.prompts_per_step * self.group // self.updates)


@dataclass(frozen=True)
class Method:
    """A way to align.

    Attributes:
        name: in a sentence.
        train: (model, tokenizer, prompts, budget, part=, lr=, seed=, checkpoint=, every_seconds=, progress=) → history
            with a column `tokens`, those generated so far; trains in place. Raises `NothingToLearn`, the model as it
            was, or a `BenchError`, "not finite" in the line of one that diverged. A column `reward` (share of right
            answers) is drawn next to the others', round by round of the budget.
        rates: what of the model it trains and at which peak rate, to choose from; what did best on the embedded model
            first.
    """

    name: str
    train: Callable[..., pd.DataFrame]
    rates: tuple[Rate, ...]


def _rewarded(
    kind: Kind,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    plan: Budget,
    **options: Any,
) -> pd.DataFrame:
    history = reinforce(
        model, tokenizer, prompts, kind=kind, steps=plan.steps, prompts_per_step=plan.prompts_per_step,
        group=plan.group, updates=plan.updates, temperature=plan.temperature, beta=plan.beta, **options,
    )  # fmt: skip
    if history["zero_spread"].eq(1).all():
        raise NothingToLearn(
            "The answers to each prompt were all right or all wrong: warm up more or less, or raise group.",
            int(history["tokens"].iloc[-1]),
        )
    return history


def _rejection(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: pd.DataFrame, plan: Budget, **options: Any
) -> pd.DataFrame:
    """Few rounds of many answers do best: on the embedded model 4 instead of 12, as many answers and steps in all.

    On 600 held-out sums, two seeds: 61.3 % of the sampled answers right, 73.3 % of the likeliest, against 58.8 % and
    72.8 %; with new moments in each round and a constant rate 61.2 % and 71.4 %.
    """
    rounds = min(4, plan.steps)
    history = imitate(
        model, tokenizer, prompts, rounds=rounds, prompts_per_round=plan.steps * plan.prompts_per_step // rounds,
        group=plan.group, steps=plan.steps * plan.updates // rounds, batch=plan.batch, temperature=plan.temperature,
        **options,
    )  # fmt: skip
    return history.drop(columns="reward")  # its rounds are others


def _dpo(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: pd.DataFrame, plan: Budget, **options: Any
) -> pd.DataFrame:
    n = max(2, -(-plan.answers // len(prompts)))
    few = prompts.head(plan.answers // n)  # as many answers as the others: perhaps not all of the prompts
    drawn = answers(model, tokenizer, few, n, plan.temperature, options["seed"])
    tokens = int(drawn["tokens"].sum())
    steps = plan.steps * plan.updates
    try:
        return prefer(model, tokenizer, pairs(few, drawn), steps=steps, batch=plan.batch, **options).assign(
            tokens=tokens
        )
    except NothingToLearn as error:
        error.tokens = tokens
        raise


def _gold(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: pd.DataFrame, plan: Budget, **options: Any
) -> pd.DataFrame:
    history = teach(model, tokenizer, prompts, steps=plan.steps * plan.updates, batch=plan.batch, **options)
    return history.assign(tokens=0)


METHODS: dict[str, Method] = {
    # Importance of the whole answer, or of each token.
    "gspo": Method("GSPO", partial(_rewarded, "gspo"), (("gains", 1e-2), ("gains", 2e-2), ("gains", 5e-3))),
    "grpo": Method("GRPO", partial(_rewarded, "grpo"), (("gains", 1e-2), ("gains", 2e-2), ("gains", 5e-3))),
    # As many answers generated, and as many optimiser steps.
    "rejection": Method(
        "imitating its own right answers", _rejection, (("gains", 1e-2), ("gains", 2e-2), ("gains", 5e-3))
    ),
    "dpo": Method("DPO", _dpo, (("gains", 3e-3), ("gains", 1e-3), ("gains", 1e-2))),
    # As many optimiser steps; knows more than the others are told.
    "gold": Method("more solutions", _gold, (("gains", 1e-2), ("all", 1e-3), ("all", 3e-3))),
}
LEADER = "gspo"
"""The method that the others are controls of."""
