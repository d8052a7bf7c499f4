"""Texts from files, folders or the hub, and texts as tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.files import Record, Unreadable, records

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CHAT_COLUMNS = ("messages", "conversations")


def load_texts(source: str, limit: int | None = None, column: str = "text") -> pd.DataFrame:
    """Read texts from a file, a folder, or the hub.

    Args:
        source: a .jsonl, .json (list of records), .parquet or .txt file (paragraphs between blank lines are the
            texts), a folder holding such files at any depth, or a hub id, "owner/name", "owner/name:split" or
            "owner/name:config:split" (streamed).
        limit: at most this many texts, from the front; None for all.
        column: the field that holds the text. Where it is missing and the row has `messages` (or `conversations`),
            the chat is joined into one text. Blank texts are left out.

    Returns:
        Columns `text` and `source`: "file.jsonl:12" (line, or row from 1; path relative to the folder given), so
        each text can be found again.

    Raises:
        BenchError: missing, empty, damaged, not UTF-8, wrong column, or a hub that is not reachable.
    """
    if limit is not None and limit < 1:
        raise BenchError(f"limit is {limit}: give at least 1, or null for all texts.")
    texts = ((encodable(_text(record, column)), record.where) for record in records(source))
    filled = ((text, where) for text, where in texts if text.strip())
    table = pd.DataFrame(list(itertools.islice(filled, limit)), columns=["text", "source"])
    if table.empty:
        raise BenchError(f"{source} holds no text: check that it is the right file.")
    return table


def _text(record: Record, column: str) -> str:
    """The text of one record; chats are joined."""
    value, where = record.value, record.where
    if isinstance(value, Unreadable):
        raise BenchError(value.message)
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise BenchError(f"{where} is not a record with named fields but {type(value).__name__}.")
    field = column if column in value else next((name for name in CHAT_COLUMNS if name in value), None)
    if field is None:
        raise BenchError(f"{where} has no column '{column}': it has {', '.join(map(str, value)) or 'none'}.")
    said = value[field]
    if said is None:
        return ""
    if isinstance(said, list) and all(isinstance(turn, dict) for turn in said):
        return join_turns([turn_of(turn) for turn in said])
    if not isinstance(said, str):
        raise BenchError(f"{where}: column '{field}' holds {type(said).__name__}, not text; name another column.")
    return said


def turn_of(turn: dict[str, Any]) -> tuple[Any, Any]:
    """Who speaks in one turn of a chat, and what; in either of the two usual spellings."""
    return turn.get("role", turn.get("from", "")), turn.get("content", turn.get("value", ""))


def join_turns(turns: Iterable[tuple[Any, Any]]) -> str:
    """A chat as one text."""
    return "\n\n".join(f"{role}: {said}" if role else str(said) for role, said in turns)


def encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, which no tokenizer takes and no file: a ? in its place."""
    return text.encode("utf-8", "replace").decode()


def encode(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None, min_length: int = 1
) -> list[list[int]]:
    """Token ids of each text with the tokenizer's own special tokens, cut to `max_length` tokens (None: not cut).

    Texts shorter than `min_length` tokens are left out; with `min_length=0` every text keeps its place.

    Raises:
        BenchError: nothing is left.
    """
    rows = list(texts)
    # The notice about texts beyond the model's length would be wrong here: cutting is what we do next.
    ids = tokenizer(rows, verbose=False)["input_ids"] if rows else []
    kept = [list(row[:max_length]) for row in ids if len(row) >= min_length]
    if not kept:
        raise BenchError(
            f"None of {len(rows)} text(s) has {min_length} tokens: give longer texts or a smaller minimum."
        )
    return kept


def pack(documents: Sequence[Sequence[int]], length: int, eos: int, seed: int | None = None) -> torch.Tensor:
    """Blocks of tokens for training, (N, length) int64: documents one after the other, EOS before and after each.

    Args:
        documents: token ids of each document.
        length: tokens in a block; the rest at the end that fills no block is dropped.
        eos: the token that parts documents.
        seed: shuffles the documents first; None keeps their order.

    Raises:
        BenchError: the documents do not fill one block.
    """
    import numpy as np
    import torch

    if length < 2:
        raise BenchError(f"A block of {length} token(s) has nothing to predict: choose at least 2.")
    order = np.arange(len(documents)) if seed is None else np.random.default_rng(seed).permutation(len(documents))
    stream = [np.array([eos])]
    for place in order:
        stream += [np.asarray(documents[place], dtype=np.int64), np.array([eos])]
    tokens = np.concatenate(stream).astype(np.int64)
    blocks = len(tokens) // length
    if not blocks:
        raise BenchError(f"{len(tokens)} tokens do not fill one block of {length}: give more text or shorter blocks.")
    return torch.from_numpy(tokens[: blocks * length].reshape(blocks, length))
