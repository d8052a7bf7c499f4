"""Reading an `.mscan` file: checked as a whole on opening, then segment by segment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import lognorm
from tinyonn_lib.scan.mscan_frames import (
    COLUMNS,
    DATA,
    END,
    HEAD,
    SCHEMA,
    Frame,
    Header,
    Segment,
    check_preamble,
    describe,
    frame_at,
    read_index,
    unpack,
    walk,
)


class File:
    """An `.mscan` file, finished or not.

    Opening reads it once from end to end and checks every CRC; rows are decoded when they are asked for, one segment
    at a time. Iterating gives one table per segment. No handle stays open.

    Args:
        path: the file.
        strict: a file without its end is an error.
        salvage: damaged segments are left out and listed in `damaged` instead of being an error.

    Attributes:
        header: targets, methods and meta.
        segments: index of the readable segments, in the order of the file.
        torn: why the file has no proper end (still being written, killed, cut off); None when it is complete.
        damaged: what was left out, one line each; empty without `salvage`.
        end: first byte after the last good segment.

    Raises:
        BenchError: cannot be read, not an `.mscan` file, of another version, damaged, or torn and `strict`.
    """

    def __init__(self, path: str | Path, *, strict: bool = False, salvage: bool = False) -> None:
        self.path = Path(path)
        self.torn: str | None = None
        self.damaged: list[str] = []
        try:
            with self.path.open("rb") as file:
                self._open(file)
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror or error}") from None
        except BenchError as error:
            raise BenchError(f"{path}: {error}") from None
        if self.damaged and not salvage:
            rest = f"{self.records} records in {len(self.segments)} other segments are good"
            raise BenchError(
                f"{path}: {self.damaged[0]} is damaged ({rest}): copy the file again, or read the rest with salvage"
            )
        if self.torn and strict:
            raise BenchError(f"{path}: {self.torn}: let the scan finish, or resume it")

    def _open(self, file: BinaryIO) -> None:
        check_preamble(file)
        size = os.fstat(file.fileno()).st_size
        frames, gaps = walk(file, size)
        if [frame.kind for frame in frames[:2]] != [HEAD, SCHEMA]:
            raise BenchError("its header is incomplete or damaged, nothing can be read: copy it again, or scan again")
        self.header = Header.parse((frame_at(file, frames[0].offset) or (None, b""))[1])
        data = [frame for frame in frames if frame.kind == DATA]
        self.end = [*frames[1:2], *data][-1].end
        finished = frames[-1].kind == END
        listed = read_index(file, frames[-1]) if finished else None
        self.segments = self._segments(file, data, listed)
        inner = [gap for gap in gaps if gap[1] < size]
        if inner and not self.damaged:
            self.damaged = [_place(gap, frames) for gap in inner]
        elif finished and listed is None:
            self.damaged.append("its index (not where the end mark says: bytes were lost or added)")
        if not finished:
            last = f"up to step {self.segments[-1].last} " if self.segments else ""
            self.torn = (
                f"torn: it has no end mark, so its writer is still at work, was stopped, or the end was cut off; "
                f"{self.records} records {last}are complete, {size - self.end} bytes after them are not"
            )
        elif frames[-1].end != size:
            self.torn = f"torn: {size - frames[-1].end} bytes that do not belong to it follow its end mark"

    def _segments(self, file: BinaryIO, data: list[Frame], listed: list[Segment] | None) -> list[Segment]:
        if listed is None:  # no index: look into each segment
            return [describe(frame.offset, _columns(file, frame.offset)) for frame in data]
        found = {frame.offset for frame in data}
        if found - {segment.offset for segment in listed}:
            raise BenchError("its index does not fit its segments: copy it again, or scan again")
        self.damaged = [
            f"segment {number} of {len(listed)} (steps {segment.first} to {segment.last}, at byte {segment.offset})"
            for number, segment in enumerate(listed, 1)
            if segment.offset not in found
        ]
        return [segment for segment in listed if segment.offset in found]

    @property
    def records(self) -> int:
        """Rows in all readable segments."""
        return sum(segment.records for segment in self.segments)

    def codes(self, segment: Segment) -> dict[str, np.ndarray]:
        """One segment as it is stored: an array (records,) per column, `act` and `grad` as uint16 codes.

        Raises:
            BenchError: the file has changed since it was opened.
        """
        with self.path.open("rb") as file:
            return _columns(file, segment.offset)

    def all_codes(self) -> dict[str, np.ndarray]:
        """All segments as they are stored, one after the other."""
        parts = [self.codes(segment) for segment in self.segments]
        empty = {field.name: np.empty(0, field.type.to_pandas_dtype()) for field in COLUMNS}
        return {name: np.concatenate([empty[name], *(part[name] for part in parts)]) for name in COLUMNS.names}

    def __iter__(self) -> Iterator[pd.DataFrame]:
        return (self.decode(self.codes(segment)) for segment in self.segments)

    def table(self) -> pd.DataFrame:
        """All rows, columns as in `mscan.read`."""
        return self.decode(self.all_codes())

    def decode(self, codes: dict[str, np.ndarray]) -> pd.DataFrame:
        """Stored columns as a table with names and norms instead of numbers and codes."""
        targets = self.header.targets
        names, name_of = _categories([target.name for target in targets])
        kinds, kind_of = _categories([target.kind for target in targets])
        which = codes["target"]
        return pd.DataFrame(
            {
                "step": codes["step"],
                "sequence": codes["sequence"],
                "tokens": codes["tokens"],
                "target": pd.Categorical.from_codes(name_of[which], categories=names),
                "layer": np.array([target.layer for target in targets], dtype=np.int64)[which],
                "kind": pd.Categorical.from_codes(kind_of[which], categories=kinds),
                "method": pd.Categorical.from_codes(codes["method"].astype(np.int64), categories=self.header.methods),
                "act": lognorm.decode(codes["act"]),
                "grad": lognorm.decode(codes["grad"]),
            }
        )

    def steps(self) -> pd.DataFrame:
        """One row per step: `step, sequence, tokens`, in the order of the rows of `matrix`."""
        codes = self.all_codes()
        _, first = np.unique(codes["step"], return_index=True)
        return pd.DataFrame({name: codes[name][first] for name in ("step", "sequence", "tokens")})

    def matrix(self, norm: str) -> np.ndarray:
        """One norm as float64 (steps, targets), NaN where it was not measured.

        Args:
            norm: `"act"` or `"grad"`.
        """
        if norm not in ("act", "grad"):
            raise BenchError(f"{norm!r} is not a norm in an .mscan file: choose act or grad")
        codes = self.all_codes()
        steps, row = np.unique(codes["step"], return_inverse=True)
        result = np.full((len(steps), len(self.header.targets)), np.nan)
        result[row, codes["target"]] = lognorm.decode(codes[norm])
        return result


def _columns(file: BinaryIO, offset: int) -> dict[str, np.ndarray]:
    found = frame_at(file, offset)
    if found is None or found[0].kind != DATA:
        raise BenchError(f"{file.name}: changed while it was being read: read it again")
    return unpack(found[1])


def _place(gap: tuple[int, int], frames: list[Frame]) -> str:
    before = sum(frame.kind == DATA and frame.offset < gap[0] for frame in frames)
    return f"what follows segment {before} (bytes {gap[0]} to {gap[1]})"


def _categories(names: list[str]) -> tuple[list[str], np.ndarray]:
    """(names without repetition, position in it of each): a name may be watched in two ways."""
    unique = list(dict.fromkeys(names))
    return unique, np.array([unique.index(name) for name in names])
