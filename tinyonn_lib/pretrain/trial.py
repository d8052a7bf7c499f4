"""One architecture trained with one tokenizer: a model that fits it, and how many tokens a second it learns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from tinyonn_lib.lm.tokenizer import END
from tinyonn_lib.pretrain.turns import in_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOOK_SECONDS, _LOOK_STEPS = 1.0, 16  # of one look at a speed: about so long, at most so many steps


class Build(Protocol):
    """Makes a fresh model; `functools.partial(architectures.new, "qwen3", width=…, …)` is one."""

    def __call__(
        self, *, vocab_size: int, eos_token_id: int | None, pad_token_id: int | None, seed: int
    ) -> PreTrainedModel: ...


class Train(Protocol):
    """Trains a model in place on `tokens` tokens of blocks (N, length); the seed orders the blocks."""

    def __call__(self, model: PreTrainedModel, blocks: Tensor, tokens: int, seed: int) -> object: ...


@dataclass(frozen=True)
class Trial:
    """A tokenizer that takes part.

    Attributes:
        tokenizer: `prepared`.
        blocks: (N, length) training tokens.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    blocks: Tensor
    build: Build
    train: Train

    def run(self, tokens: int, seed: int) -> tuple[PreTrainedModel, float]:
        """A model after so many tokens, and the seconds of its training."""
        model = fresh(self.build, self.tokenizer, seed)
        began = time.perf_counter()
        self.train(model, self.blocks, tokens, seed)
        return model, time.perf_counter() - began


def speeds(trials: Sequence[Trial], step_tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each, see `turns.in_turns`.

    Args:
        step_tokens: of one optimiser step.
        rounds: after a first one that does not count.
    """

    def look(trial: Trial) -> Callable[[], float]:
        first = trial.run(step_tokens, 0)[1]
        tokens = step_tokens * max(1, min(_LOOK_STEPS, round(_LOOK_SECONDS / max(first, 1e-9))))
        return lambda: max(trial.run(tokens, 0)[1], 1e-9) / tokens

    return {name: 1 / took for name, took in in_turns({each.name: look(each) for each in trials}, rounds).items()}


def fresh(build: Build, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """An untrained model for a tokenizer that is `prepared`."""
    eos, pad = cast("int", tokenizer.eos_token_id), cast("int | None", tokenizer.pad_token_id)
    # The embedding of a model's pad token never learns: EOS must not be it.
    own = None if pad == eos else pad
    return build(vocab_size=entries(tokenizer), eos_token_id=eos, pad_token_id=own, seed=seed)


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding for this tokenizer needs: some have gaps between their ids."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy for training from scratch: with an EOS, which also starts a text, as `judge.bits_per_byte` takes it."""
    own = copy.deepcopy(tokenizer)
    if own.eos_token_id is None:
        own.add_special_tokens({"eos_token": own.bos_token or own.sep_token or END})
    own.bos_token = own.eos_token
    return own
