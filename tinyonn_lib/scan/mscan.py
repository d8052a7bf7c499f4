"""The `.mscan` file: what a scan saw of each weight in each observed step, to the reader of tables.

    with Writer(path, targets, meta) as file:
        file.write(step, sequence, tokens, norms, methods)  # per step, never waits
    table = read(path)                                      # also of a file whose end is missing
    integral(delta_sc(table))

Layout of the bytes: docs/mscan.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.delta_sc import delta_sc, integral, running
from tinyonn_lib.scan.lognorm import MISSING, ZERO
from tinyonn_lib.scan.mscan_file import File
from tinyonn_lib.scan.mscan_frames import COLUMNS, Columns
from tinyonn_lib.scan.mscan_sink import SEGMENT_ROWS, Sink, replacing, same_header
from tinyonn_lib.scan.mscan_writer import METHODS, Writer

__all__ = [
    "METHODS", "File", "Summary", "Writer", "delta_sc", "integral", "merge", "read", "running", "summarise",
    "to_parquet",
]  # fmt: skip


def read(path: str | Path, *, strict: bool = False, salvage: bool = False) -> pd.DataFrame:
    """All rows of a file.

    Args:
        path: the file.
        strict: a file without its end is an error, not a warning.
        salvage: leave damaged segments out (with a warning) instead of failing.

    Returns:
        One row per step and target: `step` (uint32), `sequence` (int64), `tokens` (uint32), `target` (categorical
        name), `layer` (int64), `kind`, `method` (categorical), `act` and `grad` (float64: norms of the module's input
        and of its weight gradient, relative error at most 3.2e-4, NaN where not measured). `attrs` has the header's
        `meta`, `torn` (text or None) and `damaged` (list of texts).

    Raises:
        BenchError: as `File`.
    """
    file = File(path, strict=strict, salvage=salvage)
    for line in complaints(file):
        warnings.warn(line, stacklevel=2)
    table = file.table()
    table.attrs = {"meta": dict(file.header.meta), "torn": file.torn, "damaged": file.damaged}
    return table


def complaints(file: File) -> list[str]:
    """What is not right with an opened file, one line each."""
    torn = [f"{file.path}: {file.torn}"] if file.torn else []
    return [*(f"{file.path}: {place} is damaged and left out" for place in file.damaged), *torn]


@dataclass(frozen=True)
class Summary:
    """Counts over all readable rows of a file.

    Attributes:
        records, steps: rows, and steps they belong to.
        first, last: first and last step; -1 without rows.
        sequences, tokens: texts, and tokens over all steps.
        methods: method -> rows.
        zero, missing: norm ("act", "grad") -> rows in which it is exactly 0, in which it was not measured.
    """

    records: int
    steps: int
    first: int
    last: int
    sequences: int
    tokens: int
    methods: dict[str, int]
    zero: dict[str, int]
    missing: dict[str, int]

    @property
    def warning(self) -> str | None:
        """A line when no row has a gradient that is not 0: a scan like this has seen half of what it should."""
        measured = self.records - self.missing["grad"]
        if not self.records:
            return "there are no records"
        if not measured:
            return "no gradient was measured: only forward passes were seen"
        if self.zero["grad"] == measured:
            return "every measured gradient is 0: the backward pass never reached the watched weights"
        return None


def summarise(file: File) -> Summary:
    """Counts over all readable rows of an opened file."""
    codes = file.all_codes()
    steps = file.steps()
    methods = np.bincount(codes["method"], minlength=len(file.header.methods))
    return Summary(
        records=file.records,
        steps=len(steps),
        first=int(steps["step"].min()) if len(steps) else -1,
        last=int(steps["step"].max()) if len(steps) else -1,
        sequences=int(steps["sequence"].nunique()),
        tokens=int(steps["tokens"].sum()),
        methods={name: int(n) for name, n in zip(file.header.methods, methods, strict=True) if n},
        zero={norm: int((codes[norm] == ZERO).sum()) for norm in ("act", "grad")},
        missing={norm: int((codes[norm] == MISSING).sum()) for norm in ("act", "grad")},
    )


def to_parquet(path: str | Path, out: str | Path, *, strict: bool = False, salvage: bool = False) -> None:
    """Write all rows as Parquet, columns as in `read`, one row group per segment; the header is in its metadata.

    Args:
        path: the `.mscan` file.
        out: the Parquet file; it appears when it is complete.
        strict, salvage: as in `read`.
    """
    export_parquet(File(path, strict=strict, salvage=salvage), Path(out))


def export_parquet(file: File, out: Path) -> None:
    """`to_parquet` of an opened file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty = {field.name: np.empty(0, field.type.to_pandas_dtype()) for field in COLUMNS}
    schema = pa.Table.from_pandas(file.decode(empty), preserve_index=False).schema
    schema = schema.with_metadata({**(schema.metadata or {}), b"mscan": file.header.payload()})
    with replacing(out) as new, pq.ParquetWriter(new, schema) as parquet:
        for part in file:
            parquet.write_table(pa.Table.from_pandas(part, schema=schema, preserve_index=False))


def merge(paths: Sequence[str | Path], target: str | Path, *, strict: bool = True) -> None:
    """Put the rows of one or several files into one canonical, finished file.

    The result depends on the rows alone, not on flushes, kills or the split between workers: ordered by step and
    target, a fixed number of rows per segment. It replaces `target` when it is complete.

    Args:
        paths: files with the same header; steps may interleave.
        target: may be one of them.
        strict: refuse files without their end. Without it what they have is taken, and the result looks finished.

    Raises:
        BenchError: no file, differing headers, or two rows of one step and target that differ.
    """
    if not paths:
        raise BenchError("nothing to merge: name at least one .mscan file")
    files = [File(path, strict=strict) for path in paths]
    for other in files[1:]:
        same_header(other.path, other.header, files[0].header)
    parts = [file.all_codes() for file in files]
    columns = _ordered({name: np.concatenate([part[name] for part in parts]) for name in COLUMNS.names}, files[0])
    with replacing(Path(target)) as new:
        sink = Sink(new)
        sink.write(files[0].header.start())
        for start in range(0, len(columns["step"]), SEGMENT_ROWS):
            sink.add({name: values[start : start + SEGMENT_ROWS] for name, values in columns.items()})
        sink.finish()


def _ordered(columns: Columns, file: File) -> dict[str, np.ndarray]:
    order = np.lexsort((columns["target"], columns["step"]))
    rows = {name: values[order] for name, values in columns.items()}
    same = {name: values[1:] == values[:-1] for name, values in rows.items()}
    twice = same["step"] & same["target"]
    clash = np.flatnonzero(twice & ~np.logical_and.reduce(list(same.values())))
    if len(clash):
        step, which = rows["step"][clash[0]], file.header.targets[rows["target"][clash[0]]]
        raise BenchError(
            f"step {step} of {which.name} is there twice with different values: these files come from different scans, "
            "or two workers scanned the same texts; merge the files of one scan only"
        )
    return {name: values[np.concatenate([[True], ~twice])[: len(values)]] for name, values in rows.items()}
