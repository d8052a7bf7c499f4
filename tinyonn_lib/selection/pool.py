"""A pool with a known answer: passages of real text, a known share of which is replaced by corrupted copies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.corrupt import CORRUPTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def passages(texts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, longest: int, shortest: int) -> pd.DataFrame:
    """Documents cut at line ends into passages of `shortest` to `longest` tokens, special ones not counted.

    A line that is too long is cut at words. What is left over and too short is dropped, and so is a longer word.

    Args:
        texts: columns `text` and `source`.

    Returns:
        Columns `text` and `source`, in the order of the texts.

    Raises:
        BenchError: impossible lengths, or no passage is left.
    """
    if not 0 < shortest <= longest:
        raise BenchError(f"Passages of {shortest} to {longest} tokens do not exist: give 0 < shortest <= longest.")
    lines = [re.findall(r".*\n|.+$", text) for text in texts["text"]]
    pieces = _short_enough(lines, tokenizer, longest)
    rows = [
        (text.strip("\n"), source)
        for source, parts in zip(texts["source"], pieces, strict=True)
        for text in _filled(parts, longest)
    ]
    found = pd.DataFrame(rows, columns=["text", "source"])
    # Counted again as a whole: tokens may join or split where pieces meet.
    found = found[np.fromiter((shortest <= n <= longest for n in _counts(found["text"], tokenizer)), bool, len(found))]
    if found.empty:
        raise BenchError(f"No passage of {shortest} to {longest} tokens in {len(texts)} texts: allow shorter ones.")
    return found.reset_index(drop=True)


Pieces = list[tuple[str, int]]
"""Parts of a text in their order, with their tokens."""


def _short_enough(documents: list[list[str]], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Pieces]:
    """Lines with their tokens; lines of more than `longest` as words. Two calls of the tokenizer in all."""
    counts = iter(_counts(chain.from_iterable(documents), tokenizer))
    counted = [[(line, next(counts)) for line in lines] for lines in documents]
    long = {line for lines in counted for line, count in lines if count > longest}
    words = {line: re.findall(r"\s*\S+\s*$|\s*\S+", line) for line in long}
    each = iter(_counts(chain.from_iterable(words.values()), tokenizer))
    parts = {line: [(word, next(each)) for word in found] for line, found in words.items()}
    return [[piece for line in lines for piece in parts.get(line[0], [line])] for lines in counted]


def _counts(texts: Sequence[str] | pd.Series | chain[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    rows = list(texts)
    if not rows:
        return []
    found = tokenizer(rows, add_special_tokens=False, verbose=False, return_attention_mask=False)
    return [len(ids) for ids in found["input_ids"]]


def _filled(pieces: Pieces, longest: int) -> list[str]:
    """Neighbours joined as long as they have at most `longest` tokens."""
    found, begin, total = [], 0, 0
    for place, (_, count) in enumerate(pieces):
        if total + count > longest:
            found.append((begin, place))
            begin, total = place, 0
        total += count
    return ["".join(text for text, _ in pieces[a:b]) for a, b in [*found, (begin, len(pieces))] if a < b]


def mixed(passages: pd.DataFrame, share: float, seed: int, corruptions: Sequence[str]) -> pd.DataFrame:
    """A share of the rows replaced by corrupted copies, kinds in equal numbers, everything in random order.

    Args:
        passages: columns `text` and `source`.
        share: of the rows, in [0, 1).
        corruptions: keys of `CORRUPTIONS`.

    Returns:
        Columns `text`, `source` and `corruption` ("" if clean).

    Raises:
        BenchError: an impossible share, or no corruption to choose from.
    """
    if not 0 <= share < 1 or not corruptions:
        raise BenchError(
            f"A share of {share} of corruptions {list(corruptions)} cannot be mixed in: give one in [0, 1)."
        )
    rng = Random(seed)
    texts = passages["text"].tolist()
    order = rng.sample(range(len(texts)), len(texts))
    kinds = np.full(len(texts), "", dtype=object)
    for count, row in enumerate(order[: round(share * len(texts))]):
        kinds[row] = corruptions[count % len(corruptions)]
    made = [CORRUPTIONS[kind](text, "", rng, texts) if kind else text for text, kind in zip(texts, kinds, strict=True)]
    pool = pd.DataFrame({"text": made, "source": passages["source"].to_numpy(), "corruption": kinds})
    return pool.iloc[rng.sample(range(len(pool)), len(pool))].reset_index(drop=True)


def fitted(pool: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, longest: int) -> pd.DataFrame:
    """Rows of more than `longest` tokens cut off there: noise has half as many tokens again as the text it was.

    A scorer would leave them out as too long, and a pool would lose most of what is to be found in it.

    Args:
        pool: column `text`.
        longest: tokens without special ones.
    """
    texts = pool["text"].tolist()
    waiting = list(range(len(texts)))
    while waiting:  # again, since what is left of a cut word may take more tokens than it did
        encoded = tokenizer([texts[row] for row in waiting], add_special_tokens=False, verbose=False,
                            return_offsets_mapping=True)["offset_mapping"]  # fmt: skip
        long = [(row, spans) for row, spans in zip(waiting, encoded, strict=True) if len(spans) > longest]
        for row, spans in long:
            texts[row] = texts[row][: spans[longest][0]]
        waiting = [row for row, _ in long]
    return pool.assign(text=texts)


def write(pool: pd.DataFrame, path: Path) -> None:
    """One JSON object per row and line, UTF-8, to be selected from."""
    pool.to_json(path, orient="records", lines=True, force_ascii=False)
