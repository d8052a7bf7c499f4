"""Passages next to their corrupted copies, as batches of token ids: what routers learn from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.selection.corrupt import CORRUPTIONS

if TYPE_CHECKING:
    from tinyonn_lib.selection.warmup import Recipe

Batch = dict[str, Tensor]


class Pairs:
    """Passages and their corrupted copies, step by step: all passages in a random order, then in another.

    A pure function of the step: a resumed training sees what an uninterrupted one would.
    """

    def __init__(self, tokenizer: Any, passages: pd.DataFrame, recipe: Recipe) -> None:
        self._tokenizer, self._recipe = tokenizer, recipe
        self._texts, self._prompts, self._others = columns(passages)
        self._start, self._steps = start_token(tokenizer), len(passages) // recipe.batch
        self._clean: list[list[int]] = tokenizer(self._texts, add_special_tokens=False)["input_ids"]
        self._longest = max(map(len, self._clean), default=1)
        self._order: tuple[int, list[int]] = -1, []  # epoch, and the passages as it shows them

    def __call__(self, step: int, device: torch.device | None = None) -> Batch:
        """`clean`, `bad` token ids `(B, T)` with the start token in front; `clean_mask`, `bad_mask` `(B, T)`: what is
        a token of the text."""
        epoch, place = divmod(step, self._steps)
        if self._order[0] != epoch:
            rng = random.Random(f"{self._recipe.seed} {epoch}")
            self._order = epoch, rng.sample(range(len(self._texts)), len(self._texts))
        rows = self._order[1][place * self._recipe.batch : (place + 1) * self._recipe.batch]
        rng = random.Random(f"{self._recipe.seed} step {step}")
        bad = []
        for row in rows:
            kind = rng.choice(self._recipe.corruptions)
            bad.append(CORRUPTIONS[kind](self._texts[row], self._prompts[row], rng, self._others))
        # Noise takes many more tokens than the text had.
        spoilt = [
            ids[: self._longest] for ids in self._tokenizer(bad, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        clean, clean_mask = padded([self._clean[row] for row in rows], self._start)
        worse, bad_mask = padded(spoilt, self._start)
        found = {"clean": clean, "bad": worse, "clean_mask": clean_mask, "bad_mask": bad_mask}
        return {name: value.to(device or value.device) for name, value in found.items()}


def padded(rows: Sequence[Sequence[int]], start: int) -> tuple[Tensor, Tensor]:
    """Token ids `(B, 1 + longest)` with a start token in front, and which positions are tokens of the text."""
    width = 1 + max(map(len, rows))
    ids, mask = torch.full((len(rows), width), start), torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, 1 : len(row) + 1] = torch.tensor(row)
        mask[place, 1 : len(row) + 1] = True
    return ids, mask


def columns(passages: pd.DataFrame) -> tuple[list[str], list[str], list[str]]:
    """Texts, prompts ("" without), and what a wrong answer is taken from: the answers, or the texts themselves."""
    texts = passages["text"].tolist()
    prompts = passages["prompt"].tolist() if "prompt" in passages else [""] * len(texts)
    return texts, prompts, [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]
