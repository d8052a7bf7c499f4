"""Samples for scanning, training and judging: which texts, in which order, how many tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import corpus
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.lm.texts import load_texts


def divided(source: str | Path, seed: int, limit: int | None = None) -> pd.DataFrame:
    """Texts with a `split`: kept if they come with one (as from 01_pretrain), else divided by source here.

    Args:
        source: a parquet file with `text, source, split`, or anything `load_texts` reads.
        limit: at most this many texts of a source that is divided here.
    """
    if Path(source).suffix == ".parquet" and Path(source).is_file():
        import pyarrow.parquet as pq

        if "split" in pq.read_schema(source).names:
            return pd.read_parquet(source)
    return corpus.split(load_texts(str(source), limit), seed, calibration=0.45, heldout=0.1)


def draw(texts: pd.DataFrame, tokenizer: Any, tokens: int, length: int, seed: int) -> pd.DataFrame:
    """Texts in a random order, tokenised and cut into pieces, until the budget of tokens is reached.

    Args:
        texts: columns `text` and `source`.
        tokens: budget; the last sample is the one that reaches it.
        length: longest sample in tokens; a longer text gives several samples, one after the other.

    Returns:
        One row per sample, `source, ids, text`: its token ids and the text they stand for. A text's first sample begins
        with the start token, so that the text's first token is predicted, too.

    Raises:
        BenchError: no text is left.
    """
    start, rows, total = start_token(tokenizer), [], 0
    for place in np.random.default_rng(seed).permutation(len(texts)):
        text, source = texts["text"].iat[place], texts["source"].iat[place]
        ids = [start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        for begin in range(0, len(ids), length):
            piece = ids[begin : begin + length]
            if len(piece) < 2 or total >= tokens:
                break
            rows.append((source, piece, tokenizer.decode(piece, skip_special_tokens=True)))
            total += len(piece)
        if total >= tokens:
            break
    if not rows:
        raise BenchError("No text to draw samples from: the split is empty; give more texts or a larger share.")
    return pd.DataFrame(rows, columns=["source", "ids", "text"])


def blocks(samples: pd.DataFrame, length: int) -> torch.Tensor:
    """All samples end to end as `(N, length)` token ids, for training; the rest that fills no block is dropped.

    Raises:
        BenchError: fewer tokens than one block.
    """
    stream = torch.tensor([token for ids in samples["ids"] for token in ids])
    count = len(stream) // length
    if not count:
        raise BenchError(f"{len(stream)} tokens do not fill one block of {length}: draw more or shorten the blocks.")
    return stream[: count * length].view(count, length)


def shuffled(rows: torch.Tensor, batch: int, seed: int) -> Callable[[int], torch.Tensor]:
    """A function step → `(batch, length)` rows, in a new random order each epoch; a pure function of the step."""

    def at(step: int) -> torch.Tensor:
        places = np.arange(step * batch, (step + 1) * batch)
        orders = {
            e: np.random.default_rng([seed, e]).permutation(len(rows)) for e in {int(i // len(rows)) for i in places}
        }
        return rows[torch.tensor([orders[int(i // len(rows))][i % len(rows)] for i in places])]

    return at
