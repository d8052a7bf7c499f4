"""Samples for scanning and judging, batches for training: which texts, in which order, how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
            texts = pd.read_parquet(source)
            if missing := {"calibration", "heldout"} - set(texts["split"]):
                raise BenchError(
                    f"{source} has a column 'split' without {' and '.join(sorted(missing))}: calibration texts are "
                    "scanned and heldout ones judged on; name them so, or leave the column out."
                )
            return texts
    return corpus.split(load_texts(str(source), limit), seed, calibration=0.45, heldout=0.1)


def draw(texts: pd.DataFrame, tokenizer: Any, tokens: int, length: int, seed: int) -> pd.DataFrame:
    """Texts tokenised and cut into pieces; pieces in a random order until the budget of tokens is reached.

    Args:
        texts: columns `text` and `source`.
        tokens: budget; the last sample is the one that reaches it.
        length: longest piece in tokens.

    Returns:
        One row per sample, `source, ids, text`: its token ids and the text they stand for. A text's first piece begins
        with the start token, so that the text's first token is predicted, too.

    Raises:
        BenchError: no text is left.
    """
    start = start_token(tokenizer)
    rows = texts["text"].tolist()
    encoded = tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"] if rows else []
    pieces = [
        (source, piece)
        for source, ids in zip(texts["source"], encoded, strict=True)
        for begin in range(0, len(ids) + 1, length)
        if len(piece := [start, *ids][begin : begin + length]) > 1
    ]
    if not pieces:
        raise BenchError("No text to draw samples from: the split is empty; give more texts or a larger share.")
    order = np.random.default_rng(seed).permutation(len(pieces))
    sizes = np.cumsum([len(pieces[i][1]) for i in order])
    chosen = [pieces[i] for i in order[: int(np.searchsorted(sizes, tokens)) + 1]]
    found = [(source, piece, tokenizer.decode(piece, skip_special_tokens=True)) for source, piece in chosen]
    return pd.DataFrame(found, columns=["source", "ids", "text"])


def other(source: str, tokenizer: Any, tokens: int, length: int, seed: int) -> dict[str, pd.DataFrame]:
    """Samples from another domain, under a name for it: texts of one's own, or Python's own source code.

    Args:
        source: anything `load_texts` reads; empty: the code of the standard library, docstrings and comments removed.
        tokens, length, seed: as in `draw`.
    """
    if not source:
        return {"Python code": draw(corpus.python_code(), tokenizer, tokens, length, seed)}
    name = Path(source).stem or source
    if name == "held-out":
        name = source
    return {name: draw(load_texts(source, limit=max(1000, tokens // 20)), tokenizer, tokens, length, seed)}


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


def shuffled(
    rows: torch.Tensor, batch: int | Sequence[int], seed: int, device: torch.device | None = None
) -> Callable[[int], torch.Tensor]:
    """A function step → `(batch, …)`: all rows once in a random order, then all again in another.

    A pure function of the step, so that a resumed training sees what an uninterrupted one would.

    Args:
        rows: (N, …).
        batch: rows of a step, or of every step in turn.
    """
    orders: dict[int, np.ndarray] = {}
    ends = None if isinstance(batch, int) else np.cumsum(batch)

    def at(step: int) -> torch.Tensor:
        if isinstance(batch, int):
            places = np.arange(step * batch, (step + 1) * batch)
        else:
            assert ends is not None
            places = np.arange(ends[step] - batch[step], ends[step])
        for epoch in {int(e) for e in places // len(rows)} - orders.keys():
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(rows))
        picked = [orders[int(place // len(rows))][place % len(rows)] for place in places]
        return rows[torch.as_tensor(np.array(picked))].to(device or rows.device)

    return at
