"""What would only come out after the work is told before it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pandas as pd

from tinyonn_lib.align.answers import encoded
from tinyonn_lib.errors import BenchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *prompts: pd.DataFrame
) -> None:
    """Whether rewards, distillation and these prompts will work at all; takes no time.

    Args:
        tokenizer: the model's; student: the one that its pupil came with.

    Raises:
        BenchError: trl missing, another tokenizer of the student's, no end token, or no room for an answer.
    """
    if importlib.util.find_spec("trl") is None:
        raise BenchError("Training on rewards and preferences needs TRL: pip install 'tinyonn[align]'")
    if student.get_vocab() != tokenizer.get_vocab():
        raise BenchError(
            "The student has another tokenizer than the model: distillation compares their distributions token by "
            "token, so choose two models that share one."
        )
    for table in prompts:
        encoded(model, tokenizer, table)
