"""Texts from files, folders or the hub, and texts as tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import hub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_ENDINGS = (".jsonl", ".json", ".parquet", ".txt")
_CHAT_COLUMNS = ("messages", "conversations")

Row = tuple[Any, str]  # a record or a plain text, and where it stands


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
    path = hub.local_path(source, "dataset")
    rows = _hub_rows(source) if path is None else _local_rows(path)
    # JSON can hold half a surrogate pair, which no tokenizer takes.
    texts = ((_text(record, column, where).encode("utf-8", "replace").decode(), where) for record, where in rows)
    filled = ((text, where) for text, where in texts if text.strip())
    table = pd.DataFrame(list(itertools.islice(filled, limit)), columns=["text", "source"])
    if table.empty:
        raise BenchError(f"{source} holds no text: check that it is the right file.")
    return table


def _local_rows(path: Path) -> Iterator[Row]:
    if path.is_file():
        yield from _file_rows(path, path.name)
        return
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS and p.is_file())
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise BenchError(f"The folder {path} holds no {', '.join(_ENDINGS)} file.")
    for file in files:
        yield from _file_rows(file, file.relative_to(path).as_posix())


def _file_rows(path: Path, name: str) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix not in _ENDINGS:
        raise BenchError(f"{name}: files must end in one of {', '.join(_ENDINGS)}.")
    if path.stat().st_size == 0:
        raise BenchError(f"{name} is empty.")
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path, name)
        elif suffix == ".jsonl":
            yield from _jsonl_rows(path, name)
        elif suffix == ".json":
            yield from _json_rows(path, name)
        else:
            yield from _paragraphs(path, name)
    except UnicodeDecodeError as error:
        raise BenchError(f"{name} is not UTF-8 ({error.reason} near byte {error.start}): convert it first.") from error
    except PermissionError as error:
        raise BenchError(f"{name} may not be read: check its permissions.") from error
    except RecursionError as error:
        raise BenchError(f"{name} holds JSON nested too deep to be records of text.") from error


def _jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    # Read in bytes and decoded line by line, so that an encoding error has a line number, too.
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield json.loads(line), f"{name}:{number}"
            except UnicodeDecodeError as error:
                raise BenchError(f"{name} line {number} is not UTF-8: convert the file first.") from error
            except json.JSONDecodeError as error:
                raise BenchError(
                    f"{name} line {number} is not valid JSON ({error.msg}): is the file cut off? Repair or remove it."
                ) from error


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record per line under the wrong name is common
            yield from _jsonl_rows(path, name)
            return
        raise BenchError(f"{name} line {error.lineno} is not valid JSON ({error.msg}): is the file cut off?") from error
    if isinstance(content, dict):
        content = next((value for value in content.values() if isinstance(value, list)), [content])
    if not isinstance(content, list):
        raise BenchError(f"{name} must hold a list of records.")
    yield from ((record, f"{name}:{number}") for number, record in enumerate(content, start=1))


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            number = itertools.count(1)
            for batch in table.iter_batches(batch_size=1024):
                yield from ((record, f"{name}:{next(number)}") for record in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise BenchError(f"{name} is not a complete parquet file (cut off?): copy or download it again.") from error


def _paragraphs(path: Path, name: str) -> Iterator[Row]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    for blank, group in itertools.groupby(enumerate(lines, start=1), key=lambda pair: not pair[1].strip()):
        if not blank:
            block = list(group)
            yield "\n".join(line for _, line in block), f"{name}:{block[0][0]}"


def _hub_rows(source: str) -> Iterator[Row]:
    hub_id, *rest = source.split(":")
    if len(rest) > 2:
        raise BenchError(
            f"'{source}': a hub data set is given as owner/name, owner/name:split or owner/name:config:split."
        )
    hub.require_hub(hub_id, "dataset")
    try:
        import datasets
    except ImportError:
        raise BenchError(f"Reading {hub_id} from the hub needs the extra 'hub': pip install 'tinyonn[hub]'.") from None

    config = rest[0] if len(rest) == 2 else None
    try:
        known = datasets.get_dataset_split_names(hub_id, config)
        wanted = rest[-1] if rest else next((s for s in known if s.startswith("train")), known[0])
        if wanted not in known:
            raise BenchError(f"{hub_id} has no split '{wanted}': it has {', '.join(known)}.")
        for number, record in enumerate(datasets.load_dataset(hub_id, config, split=wanted, streaming=True), start=1):
            yield record, f"{source}:{number}"
    except BenchError:
        raise
    except Exception as error:  # datasets raises many kinds; for a user they are one
        raise BenchError(f"Cannot read the data set {source}: {(str(error).splitlines() or ['?'])[0][:200]}") from error


def _text(record: Any, column: str, where: str) -> str:
    """The text of one record; chats are joined."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise BenchError(f"{where} is not a record with named fields but {type(record).__name__}.")
    field = column if column in record else next((name for name in _CHAT_COLUMNS if name in record), None)
    if field is None:
        raise BenchError(f"{where} has no column '{column}': it has {', '.join(map(str, record)) or 'none'}.")
    value = record[field]
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        turns = ((t.get("role", t.get("from", "")), t.get("content", t.get("value", ""))) for t in value)
        return "\n\n".join(f"{role}: {said}" if role else str(said) for role, said in turns)
    if not isinstance(value, str):
        raise BenchError(f"{where}: column '{field}' holds {type(value).__name__}, not text; name another column.")
    return value


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
