"""Scored rows in the order of a ranking, with memory for their numbers but not for their texts.

Ids, scores and sizes of all rows are sorted in memory (some 80 bytes a row). Texts go through buckets on disk, each a
stretch of the ranking that fits into memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.parts import BYTES, IDS, TEXTS, scored

QUALITY = "quality_score"


def wanted(share: float, rows: int) -> int:
    """How many rows a share is: ⌊share · rows + ½⌋ of the share as it is written, at least one."""
    return max(1, math.floor(Fraction(str(share)) * rows + Fraction(1, 2)))


_BUCKET = 16_000_000  # bytes of text in a bucket
_ROW = 1_000  # what a row costs besides its text
_PENDING = 16_000_000  # bytes on their way to buckets


@dataclass(frozen=True)
class Ranking:
    """All scored rows in the order of the data; a row's place in it is its number.

    Attributes:
        parts: the chunks' files.
        starts: the first row of each chunk, and the number of rows at the end.
        names: data sets, sorted.
        dataset, index: of each row; `dataset` is a place in `names`.
        quality: what is sorted by, descending.
        order: rows from best to worst.
        rank: place of each row in `order`.
        bucket: of each rank; does not fall.
    """

    parts: list[Path]
    starts: np.ndarray
    names: list[str]
    dataset: np.ndarray
    index: np.ndarray
    quality: np.ndarray
    order: np.ndarray
    rank: np.ndarray
    bucket: np.ndarray


def ranked_by(by: str) -> tuple[str, int]:
    """The column that a ranking sorts by, and its sign.

    Raises:
        BenchError: no such ranking.
    """
    from tinyonn_lib.selection.scores import RANKINGS

    if by not in RANKINGS:
        raise BenchError(f"Unknown ranking '{by}': choose one of {', '.join(RANKINGS)}.")
    return RANKINGS[by]


def rank_rows(parts: list[Path], by: str, reasons: Mapping[str, int]) -> Ranking:
    """Sort all scored rows.

    Args:
        parts: as `Parts.finished`.
        by: a key of `scores.RANKINGS`.
        reasons: kinds of records that were not scored, for the error's line.

    Raises:
        BenchError: no such ranking, no row, or no number to sort by.
    """
    column, sign = ranked_by(by)
    codes: dict[str, int] = {}
    # Arrays that grow: joined in the end, pieces would be in memory twice.
    datasets, indices, sizes, qualities, counts = array("i"), array("q"), array("q"), array("d"), [0]
    for part in parts:
        table = scored(part, [*IDS, BYTES, column])
        counts.append(len(table))
        if not len(table):
            continue
        if column not in table.column_names:
            raise BenchError(f"The scores lack '{column}', which the ranking '{by}' sorts by: choose another ranking.")
        names = table[IDS[0]].combine_chunks().dictionary_encode()
        own = np.array([codes.setdefault(name, len(codes)) for name in names.dictionary.to_pylist()], dtype=np.int32)
        datasets.frombytes(own[names.indices.to_numpy()].tobytes())
        indices.frombytes(table[IDS[1]].to_numpy().tobytes())
        sizes.frombytes(table[BYTES].to_numpy().tobytes())
        qualities.frombytes((sign * table[column].to_numpy().astype(np.float64)).tobytes())
    if not qualities:
        listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "it holds no record"
        raise BenchError(f"No row of the data set could be scored ({listed}): check the column and the files.")
    index, size, quality = np.frombuffer(indices, np.int64), np.frombuffer(sizes, np.int64), np.frombuffer(qualities)
    ordered = sorted(codes)
    dataset = np.argsort([codes[name] for name in ordered]).astype(np.int32)[np.frombuffer(datasets, np.int32)]
    missing = np.isnan(quality)
    if missing.all():
        raise BenchError(f"'{by}' is not a number for any row (ifd needs prompts): choose another ranking.")
    order = np.lexsort((index, dataset, np.where(missing, 0, -quality), missing))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    reached = size[order]
    reached += _ROW
    bucket = (np.cumsum(reached, out=reached) // _BUCKET).astype(np.int32)
    return Ranking(parts, np.cumsum(counts), ordered, dataset, index, quality, order, rank, bucket)


def walk(ranking: Ranking, work: Path, wanted: int) -> Iterator[pa.Table]:
    """All rows with their texts and ranks, from best to worst, a bucket at a time.

    Each stretch takes a pass over the chunks: the first is as long as what is wanted, since mostly no more is needed.
    """
    low, high = 0, wanted
    while low < len(ranking.order):
        _fill(ranking, work, low, high)
        for bucket in np.unique(ranking.bucket[low:high]):
            path = work / f"{bucket}.arrows"
            yield _read_bucket(path)
            path.unlink()
        low, high = high, min(2 * high, len(ranking.order))


def _fill(ranking: Ranking, work: Path, low: int, high: int) -> None:
    """Spread the rows of these ranks over their buckets' files."""
    pending: list[pa.Table] = []
    held = 0
    for place, part in enumerate(ranking.parts):
        start, end = ranking.starts[place], ranking.starts[place + 1]
        ranks = ranking.rank[start:end]
        picked = np.flatnonzero((ranks >= low) & (ranks < high))
        if not len(picked):
            continue
        rows = scored(part).take(picked)
        scores = [name for name in rows.column_names if name not in (*IDS, *TEXTS, BYTES)]
        texts = rows.append_column(QUALITY, pa.array(ranking.quality[start:end][picked], from_pandas=True))
        rows = texts.select([*IDS, "text", QUALITY, "prompt", *scores])
        pending.append(rows.append_column("rank", pa.array(ranks[picked])))
        held += pending[-1].nbytes
        if held > _PENDING:
            _spread(ranking, work, pending)
            pending, held = [], 0
    if pending:
        _spread(ranking, work, pending)


def _spread(ranking: Ranking, work: Path, pending: Sequence[pa.Table]) -> None:
    table = pa.concat_tables(pending).sort_by("rank")
    buckets, starts = np.unique(ranking.bucket[table["rank"].to_numpy()], return_index=True)
    for bucket, start, end in zip(buckets, starts, [*starts[1:], len(table)], strict=True):
        # One stream after the other in a file: open files would be as many as there are buckets.
        with (work / f"{bucket}.arrows").open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(start, end - start))


def _read_bucket(path: Path) -> pa.Table:
    tables, size = [], path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            tables.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(tables).sort_by("rank")
