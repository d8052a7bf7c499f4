"""The writing end of an `.mscan` file: segments in order, and going on where a file was left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.mscan_file import File
from tinyonn_lib.scan.mscan_frames import DATA, Columns, Header, Segment, describe, frame, index, pack

SEGMENT_ROWS = 65536  # about 250 KB in the file
_BLOCK = 2**20


class Sink:
    """Puts frames at the end of an open file and remembers where they are.

    Args:
        file: open for writing, positioned at its end.
        segments: those that are in it already.
    """

    def __init__(self, file: BinaryIO, segments: Sequence[Segment] = ()) -> None:
        self.file = file
        self.segments = list(segments)

    def write(self, data: bytes) -> None:
        """All of `data`: an unbuffered file may take less at a time."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def add(self, columns: Columns) -> None:
        """One segment."""
        segment = describe(self.file.tell(), columns)
        self.write(frame(DATA, pack(columns)))
        self.segments.append(segment)

    def finish(self) -> None:
        """Index and end marker."""
        self.write(index(self.segments, self.file.tell()))

    def sync(self) -> None:
        """Wait until the disk has it all."""
        os.fsync(self.file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block succeeds, and leaves no trace when it fails.

    Raises:
        BenchError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def open_sink(path: Path, header: Header, *, append: bool, before_step: int | None) -> Sink:
    """A file to write segments to: a new one, or the good part of one that exists.

    Args:
        path: the file; what is there is replaced unless `append`.
        header: of the new file; one that exists must have the same.
        append: go on behind the last good segment, without torn end and index.
        before_step: with `append`, drop records of this and later steps too.

    Raises:
        BenchError: the file is damaged or has another header.
        OSError: it cannot be written.
    """
    start = header.start()
    begun = append and path.exists()
    if begun and path.stat().st_size < len(start) and start.startswith(path.read_bytes()):
        begun = False  # killed before its header was complete
    if not begun:
        sink = Sink(path.open("wb", buffering=0))
        sink.write(start)
        return sink
    kept = _drop(File(path), header, before_step)
    file = path.open("r+b", buffering=0)
    file.seek(0, os.SEEK_END)
    return Sink(file, kept)


def _drop(found: File, header: Header, before_step: int | None) -> list[Segment]:
    """Cut off the file's torn end, its index and all steps from `before_step` on; returns the segments that stay."""
    same_header(found.path, found.header, header)
    kept = [segment for segment in found.segments if before_step is None or segment.last < before_step]
    cut = next(iter(found.segments[len(kept) :]), None)
    if before_step is None or cut is None or cut.first >= before_step:
        with found.path.open("r+b") as file:
            file.truncate(cut.offset if cut else found.end)
            os.fsync(file.fileno())
        return kept
    columns = found.codes(cut)
    stays = columns["step"] < before_step
    with found.path.open("rb") as old, replacing(found.path) as new:  # a kill now must not cost the steps that stay
        for at in range(0, cut.offset, _BLOCK):
            new.write(old.read(min(_BLOCK, cut.offset - at)))
        sink = Sink(new, kept)
        sink.add({name: values[stays] for name, values in columns.items()})
    return sink.segments


def same_header(path: Path, there: Header, wanted: Header) -> None:
    """Make sure that two headers say the same.

    Raises:
        BenchError: they do not; the line names what differs.
    """
    if there.payload() == wanted.payload():
        return
    differing = [name for name in ("targets", "methods") if getattr(there, name) != getattr(wanted, name)]
    keys = sorted({*there.meta, *wanted.meta})
    differing += [
        f"meta {key!r} ({there.meta.get(key)!r:.60} and {wanted.meta.get(key)!r:.60})"
        for key in keys
        if there.meta.get(key) != wanted.meta.get(key)
    ]
    raise BenchError(
        f"{path} belongs to another scan, its {', '.join(differing[:3])} differ: go back to the old values, or write "
        "another file"
    )
