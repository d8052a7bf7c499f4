"""Score a data set of any size, chunk by chunk, and cut the best share of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import hub
from tinyonn_lib.lm.files import records
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection.cut import Cut, check, cut
from tinyonn_lib.selection.parts import BYTES, IDS, REASON, Parts, content
from tinyonn_lib.selection.rows import Bad, Row, rows

__all__ = ["Cut", "check", "cut", "score"]

_CHUNK_CHARACTERS = 32_000_000  # so many end a chunk early: what it takes in memory does not depend on the rows


class Scores(Protocol):
    """Scores rows: a table with one line for each that it takes, in their order, and those it does not take."""

    def __call__(self, rows: Sequence[Row], /) -> tuple[pd.DataFrame, list[Bad]]: ...


def score(
    source: str,
    scorer: Scores,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    column: str = "text",
    chunk: int = 1024,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> None:
    """Score all rows of a data set, or a worker's share of them; `cut` goes on from what it leaves in the folder.

    Each chunk is scored by itself and written when it is done: the same call goes on after a kill, and scores do not
    depend on who else works on the data. Chunks of another question in the same folder stay, but are not used.
    `select_worker.run` starts several processes.

    Args:
        source, column: as in `rows`.
        scorer: such as `scoring.Scorer`.
        folder: for the chunks; it will hold a copy of all texts.
        settings: all that the scores depend on besides the rows, as JSON can hold it.
        chunk: records in a chunk.
        share: (w, W): take the chunks w, w + W, w + 2W, …; W workers with the same folder take them all.
        progress: called with (records done, records, ""), for a hub's data, whose size is not known, with as many.

    Raises:
        BenchError: as `rows`; the disk is full.
    """
    worker, workers = share
    if chunk < 1 or not 0 <= worker < workers:
        raise BenchError(f"chunk {chunk}, share {worker} of {workers}: give 1 or more records, and a share from 0.")
    parts = Parts.ask(folder, question(source, settings, column, chunk))
    total = count(source) if progress else 0
    seen = number = 0
    for number, batch in enumerate(_chunks(rows(source, column), chunk), start=1):
        seen += len(batch)
        path = parts.path(number - 1, len(batch))
        if (number - 1) % workers == worker and not path.exists():
            parts.write(path, _scored(batch, scorer))
        if progress:
            progress(seen, max(total, seen), "")
    parts.end(number)


def question(source: str, settings: Mapping[str, Any], column: str, chunk: int) -> dict[str, Any]:
    """All that the chunks of a data set depend on."""
    return {"source": content(source), "settings": dict(settings), "column": column, "chunk": chunk}


def count(source: str) -> int:
    """Records of a local data set; 0 for one from the hub, which would be fetched for that alone.

    Raises:
        BenchError: as `rows`; here it costs seconds, and not what was computed up to there.
    """
    return 0 if hub.local_path(source, "dataset") is None else sum(1 for _ in records(source))


def _chunks(stream: Iterable[Row | Bad], size: int) -> Iterator[list[Row | Bad]]:
    batch: list[Row | Bad] = []
    characters = 0
    for row in stream:
        batch.append(row)
        characters += len(row.text) if isinstance(row, Row) else 0
        if len(batch) == size or characters >= _CHUNK_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _scored(batch: Sequence[Row | Bad], scorer: Scores) -> pa.Table:
    """A chunk as it is stored: scored rows, then bad ones, each in the order of the data."""
    given = [row for row in batch if isinstance(row, Row)]
    table, refused = scorer(given) if given else (pd.DataFrame(), [])
    reasons = {_id(row): row.reason for row in [*batch, *refused] if isinstance(row, Bad)}
    bad = [row for row in batch if _id(row) in reasons]
    good = [row for row in given if _id(row) not in reasons]
    parts = [_ids(bad).append_column(REASON, pa.array([reasons[_id(row)] for row in bad], pa.string()))]
    if good:
        if [*zip(table[IDS[0]], table[IDS[1]], strict=True)] != [_id(row) for row in good]:
            raise ValueError("the scorer's table has other rows than it was given")
        scores = pa.Table.from_pandas(table.drop(columns=list(IDS)), preserve_index=False)
        texts = _ids(good).append_column("text", pa.array([row.text for row in good], pa.string()))
        texts = texts.append_column("prompt", pa.array([row.prompt for row in good], pa.string()))
        sizes = [len(row.text.encode()) + len(row.prompt.encode()) for row in good]
        texts = texts.append_column(BYTES, pa.array(sizes, pa.int64()))
        for name in scores.column_names:
            texts = texts.append_column(name, scores[name])
        parts.insert(0, texts)
    return pa.concat_tables(parts, promote_options="default")


def _id(row: Row | Bad) -> tuple[str, int]:
    return row.source_dataset, row.source_index


def _ids(found: Sequence[Row | Bad]) -> pa.Table:
    return pa.table(
        {
            IDS[0]: pa.array([row.source_dataset for row in found], pa.string()),
            IDS[1]: pa.array([row.source_index for row in found], pa.int64()),
        }
    )
