"""Rows as blocks of tokens for training: which tokens are learned, and how a batch of them weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.lm.samples import shuffled

GIVEN = -100
"""Target of a token that is not learned: given, or a start."""


def pack(rows: pd.DataFrame, tokenizer: Any, length: int) -> Tensor:
    """Texts end to end as blocks of tokens, `(N, 2, length)` int32: inputs, and what is to be predicted from each.

    An EOS ends each text and is learned, too; a BOS, where it is another token, begins it. A token of `prompt` has the
    target `GIVEN`. Prompt and answer share no token: they are taken apart where the text's own tokens do not part
    there. What fills no block is dropped, and so are blocks without anything to learn.

    Args:
        rows: columns `text` and perhaps `prompt`, the front part that is given ("" for none).

    Raises:
        BenchError: too few tokens for one block, nothing to learn, or a prompt that is not the front of its text.
    """
    if length < 2:
        raise BenchError(f"Blocks of {length} token(s) are too short: choose a length of at least 2.")
    start = start_token(tokenizer)
    end = start if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    opening = [] if start == end else [start]
    ids, targets = [[] if opening else [start]], [[] if opening else [GIVEN]]
    for prompt, answer in _encoded(rows, tokenizer):
        ids.append([*opening, *prompt, *answer, end])
        targets.append([GIVEN] * (len(opening) + len(prompt)) + [*answer, end])
    stream, wanted = (np.concatenate([np.array(part, np.int32) for part in parts]) for parts in (ids, targets))
    count = (len(stream) - 1) // length
    if count < 1:
        raise BenchError(
            f"The {len(rows)} row(s) have {len(stream)} tokens, too few for one block of {length}: select more rows "
            "or choose a shorter length."
        )
    used = count * length
    both = np.stack([stream[:used].reshape(count, length), wanted[1 : used + 1].reshape(count, length)], axis=1)
    both = both[(both[:, 1] != GIVEN).any(1)]
    if not len(both):
        raise BenchError(f"The {len(rows)} row(s) have nothing to learn: every token belongs to a prompt.")
    return torch.from_numpy(both)


def _encoded(rows: pd.DataFrame, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer of each row."""

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    texts = rows["text"].tolist()
    prompts = rows["prompt"].fillna("").tolist() if "prompt" in rows else [""] * len(texts)
    for place, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if not text.startswith(prompt):
            raise BenchError(f"Row {place}: the prompt is not the beginning of the text.")
    some = [place for place, prompt in enumerate(prompts) if prompt]
    given = dict(zip(some, tokens([prompts[place] for place in some]), strict=True))
    found = []
    for place, ids in enumerate(tokens(texts)):
        prompt = given.get(place, [])
        if ids[: len(prompt)] == prompt:
            found.append((prompt, ids[len(prompt) :]))
        else:  # a token would hold the prompt's end and the answer's beginning
            found.append((prompt, tokens([texts[place][len(prompts[place]) :]])[0]))
    return found


def steps_for(blocks: Tensor, batch: int, tokens: int | None = None, epochs: float = 1.0) -> int:
    """Steps of `batch` blocks: for a number of tokens, or else for a number of passes over the blocks.

    Raises:
        BenchError: none of either.
    """
    if batch < 1 or (epochs <= 0 if tokens is None else tokens < 1):
        raise BenchError(f"batch={batch}, tokens={tokens} and epochs={epochs} must be positive.")
    per_step = batch * blocks.shape[2]
    return max(1, round((len(blocks) * blocks.shape[2] * epochs if tokens is None else tokens) / per_step))


def batches(blocks: Tensor, size: int, seed: int, device: torch.device) -> Callable[[int], dict[str, Tensor]]:
    """Step → the batch's inputs and targets `(size, length)`, and `scale` `(size,)`, the rows per learned token."""
    at = shuffled(blocks, size, seed)

    def batch(step: int) -> dict[str, Tensor]:
        inputs, targets = at(step).to(device, torch.long).unbind(1)
        return {"inputs": inputs, "targets": targets, "scale": (size / (targets != GIVEN).sum()).expand(size)}

    return batch
