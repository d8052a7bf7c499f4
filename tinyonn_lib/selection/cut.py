"""Cut the best share of scored rows."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.dedupe import Unique
from tinyonn_lib.selection.parts import BYTES, IDS, REASON, TEXTS, Parts, rejected, replacing, scored, writing
from tinyonn_lib.selection.ranking import QUALITY, Ranking, rank_rows, ranked_by, walk, wanted

SCORES, REJECTED, DUPLICATES = "scores.parquet", "rejected.parquet", "duplicates.parquet"
_GROUP = 65_536  # rows written at once


@dataclass(frozen=True)
class Cut:
    """What was cut.

    Attributes:
        scored: rows with a score.
        kept: rows chosen.
        rejected: kind of reason → records that were not scored.
        duplicates: rows that would have been chosen but for a better one that is nearly the same.
        nan: scored rows whose ranking is not a number: they come last.
        nan_kept: of these, how many were chosen, since there were too few others.
    """

    scored: int
    kept: int
    rejected: dict[str, int]
    duplicates: int
    nan: int
    nan_kept: int


def cut(folder: Path, by: str, share: float, parquet: Path, jsonl: Path | None, *, unique: float = 0.0) -> Cut:
    """Write the best rows, best first: ⌊share · scored + ½⌋ of them, at least one.

    Rows of equal quality are taken in the order of source_dataset, source_index; those whose quality is not a number
    after all others. Both files hold the same rows: source_dataset, source_index, text, quality_score, prompt and all
    scores (JSON has null for what is not a number). Beside `parquet`: `scores.parquet`, all scored rows in the order of
    the data without their texts and with `kept`; `rejected.parquet`, records that were not scored, and why; with
    `unique`, `duplicates.parquet`, rows left out for a better one that is nearly the same, and which one.

    Args:
        folder: as given to `score`.
        jsonl: None writes `parquet` alone, without this file and those beside it: for another cut of the same rows.
        by: a key of `scores.RANKINGS`.
        share: of the scored rows, above 0, at most 1.
        unique: leave out rows whose word 5-grams have this Jaccard similarity or more with a better row's, and go on
            down the ranking; 0: keep all. Takes about 7 kB of memory for each chosen row.

    Raises:
        BenchError: scoring has not finished or scored nothing, no such ranking or share, the disk is full.
    """
    if not 0 < share <= 1 or not 0 <= unique <= 1:
        raise BenchError(f"share {share}, unique {unique}: give a share above 0 and both at most 1.")
    ranked_by(by)
    parts = Parts.asked(folder).finished()
    work = parquet.with_name(f".{parquet.name}.work")
    with writing(parquet.parent), ExitStack() as stack:
        parquet.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)  # of a killed run
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        work.mkdir()
        reasons = _reasons(parts)
        ranking = rank_rows(parts, by, reasons)
        count = wanted(share, len(ranking.order))
        twins = _Twins(ranking, stack.enter_context(Unique(unique, work / "shingles"))) if unique else None
        kept = np.zeros(len(ranking.order), dtype=bool)
        lines = stack.enter_context(replacing(jsonl)) if jsonl else Path(os.devnull)
        out = stack.enter_context(_Out(stack.enter_context(replacing(parquet)), lines))
        for rows in walk(ranking, work, count):
            ranks = rows["rank"].to_numpy()
            chosen = twins.filter(ranks, rows["text"], count - int(kept.sum())) if twins else np.ones(len(ranks), bool)
            kept[ranking.order[ranks[chosen]]] = True
            out.write(rows.filter(pa.array(chosen)).drop_columns(["rank"]))
            if kept.sum() == count:
                break
        if jsonl:
            _write(stack.enter_context(replacing(parquet.with_name(REJECTED))), _rejected(parts))
            _write(stack.enter_context(replacing(parquet.with_name(SCORES))), _all_scores(ranking, kept))
            if twins:
                pq.write_table(twins.table(), stack.enter_context(replacing(parquet.with_name(DUPLICATES))))
            else:
                parquet.with_name(DUPLICATES).unlink(missing_ok=True)  # of another cut
    nan = np.isnan(ranking.quality)
    found = len(twins.found) if twins else 0
    return Cut(len(kept), int(kept.sum()), reasons, found, int(nan.sum()), int((nan & kept).sum()))


def check(folder: Path, names: Sequence[str]) -> None:
    """Say what `cut` would say of these rankings, before anything is written.

    Raises:
        BenchError: as `cut`.
    """
    parts = Parts.asked(folder).finished()
    reasons = _reasons(parts)
    for name in names:
        rank_rows(parts, name, reasons)


def _reasons(parts: Sequence[Path]) -> dict[str, int]:
    """Kind of reason → how many records were not scored for it, most first."""
    found = Counter(reason.partition(":")[0] for part in parts for reason in rejected(part)[REASON].to_pylist())
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _rejected(parts: Sequence[Path]) -> Iterator[pa.Table]:
    """The records that were not scored."""
    schema = pa.schema([(IDS[0], pa.string()), (IDS[1], pa.int64()), (REASON, pa.string())])
    yield schema.empty_table()
    for part in parts:
        yield rejected(part).cast(schema)


def _all_scores(ranking: Ranking, kept: np.ndarray) -> Iterator[pa.Table]:
    """All scored rows without their texts, in the order of the data."""
    for place, part in enumerate(ranking.parts):
        rows = scored(part, without=[*TEXTS, BYTES])
        if len(rows):
            own = slice(ranking.starts[place], ranking.starts[place + 1])
            rows = rows.append_column(QUALITY, pa.array(ranking.quality[own], from_pandas=True))
            yield rows.append_column("kept", pa.array(kept[own]))


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    """As one file, in row groups of many tables: each group costs room and time."""
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        held: list[pa.Table] = []
        for table in chain(tables, [None]):
            if table is not None:
                held.append(table)
            if held and (table is None or sum(map(len, held)) >= _GROUP):
                joined = pa.concat_tables(held)
                writer = writer or stack.enter_context(pq.ParquetWriter(path, joined.schema, compression="zstd"))
                writer.write_table(joined)
                held = []


class _Out:
    """The selection's two files."""

    def __init__(self, parquet: Path, jsonl: Path) -> None:
        self._parquet = parquet
        self._lines = jsonl.open("w", encoding="utf-8", newline="\n")
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Out:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, rows: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._parquet, rows.schema, compression="zstd")
        if len(rows):
            self._writer.write_table(rows)
        for batch in rows.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                self._lines.write(json.dumps({key: _plain(value) for key, value in row.items()}, ensure_ascii=False))
                self._lines.write("\n")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Twins:
    """Leaves out rows that are nearly the same as a better one."""

    def __init__(self, ranking: Ranking, unique: Unique) -> None:
        self._ranking, self._unique = ranking, unique
        self._taken: list[int] = []
        self.found: list[tuple[int, int, float]] = []

    def filter(self, ranks: np.ndarray, texts: pa.ChunkedArray, room: int) -> np.ndarray:
        """Which of these rows to take, at most `room`; those after the last taken one are not looked at."""
        chosen = np.zeros(len(ranks), dtype=bool)
        for place, (rank, text) in enumerate(zip(ranks.tolist(), texts, strict=True)):
            if not room:
                break
            twin = self._unique.twin(text.as_py())
            if twin is None:
                self._taken.append(rank)
                chosen[place] = True
                room -= 1
            else:
                self.found.append((rank, self._taken[twin[0]], twin[1]))
        return chosen

    def table(self) -> pa.Table:
        """source_dataset, source_index, quality_score, kept_dataset, kept_index, similarity; best first."""
        ranking = self._ranking
        ranks = np.array([pair[:2] for pair in self.found], dtype=np.int64).reshape(-1, 2)
        left, kept = ranking.order[ranks[:, 0]], ranking.order[ranks[:, 1]]
        names = np.array(ranking.names, dtype=object)
        return pa.table(
            {
                IDS[0]: pa.array(names[ranking.dataset[left]], pa.string()),
                IDS[1]: ranking.index[left],
                QUALITY: ranking.quality[left],
                "kept_dataset": pa.array(names[ranking.dataset[kept]], pa.string()),
                "kept_index": ranking.index[kept],
                "similarity": np.array([pair[2] for pair in self.found], dtype=np.float64),
            }
        )
