"""Scored rows on disk, chunk by chunk: what a killed run leaves behind, and the next one goes on from.

`FOLDER/DIGEST/CHUNK-RECORDS.parquet` holds one chunk, its scored rows with text and scores, then its bad ones with a
`reason`. The digest is of the data and of everything that scores depend on, so that parts of another question are never
taken for parts of this one. `FOLDER/asked.json` names the digest asked for last; `DIGEST/end.json`, how many chunks
there are, is written by whoever has seen the end of the data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import files, hub

IDS = ("source_dataset", "source_index")
TEXTS = ("text", "prompt")
REASON, BYTES = "reason", "bytes"
_ASKED, _END = "asked.json", "end.json"
_DIGITS = 16  # of a digest
_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
)
_WHOLE_HASH = 1_000_000_000  # bytes: larger data is told apart by the sizes and times of its files


def content(source: str | Path, what: str = "dataset") -> list[Any]:
    """What is in a file or folder, to compare; of a hub id its name.

    Args:
        what: "dataset": only files that `rows` reads. "model": all files.

    Raises:
        BenchError: a path with nothing there.
    """
    path = hub.local_path(str(source), what)
    if path is None:
        return [str(source)]
    if what == "dataset" or path.is_file():
        found = files.files(path)
    else:
        found = [(file, file.relative_to(path).as_posix()) for file in sorted(path.rglob("*")) if file.is_file()]
    small = sum(file.stat().st_size for file, _ in found) <= _WHOLE_HASH
    return [[name, file.stat().st_size, _hash(file) if small else file.stat().st_mtime_ns] for file, name in found]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong on the disk into one line.

    Raises:
        BenchError: no space, or no right to write there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise BenchError(
            f"Cannot write to {folder} ({os.strerror(error.errno)}): make room there, or let it be written to, and run "
            "again; what was scored is kept."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` at the end: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # one name: a kill leaves at most one behind
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Parts:
    """The chunks of one question.

    Attributes:
        folder: with the digest as its name.
    """

    folder: Path

    @classmethod
    def ask(cls, folder: Path, question: Mapping[str, Any]) -> Parts:
        """Those of this question; from here on it is the one that `asked` finds.

        Raises:
            BenchError: cannot be written.
        """
        digest = hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()[:_DIGITS]
        made = cls(folder / digest)
        with writing(folder):
            made.folder.mkdir(parents=True, exist_ok=True)
            if read(folder / _ASKED) != {"digest": digest}:
                with replacing(folder / _ASKED) as part:
                    part.write_text(json.dumps({"digest": digest}) + "\n")
        return made

    @classmethod
    def asked(cls, folder: Path) -> Parts:
        """Those of the question asked last.

        Raises:
            BenchError: none was.
        """
        digest = read(folder / _ASKED).get("digest")
        if not digest:
            raise BenchError(f"{folder} holds no scored rows: score a data set first.")
        return cls(folder / digest)

    def path(self, chunk: int, records: int) -> Path:
        return self.folder / f"{chunk:07d}-{records}.parquet"

    def done(self) -> int:
        """Records in finished chunks."""
        return sum(int(path.stem.partition("-")[2]) for path in self._found())

    def write(self, path: Path, table: pa.Table) -> None:
        """One chunk, whole or not at all.

        Raises:
            BenchError: cannot be written.
        """
        with writing(self.folder), replacing(path) as part:
            pq.write_table(table, part, compression="zstd")

    def drop_others(self) -> None:
        """Delete the chunks of other questions in the same folder; what is not named by a digest stays.

        Raises:
            BenchError: cannot be deleted.
        """
        with writing(self.folder.parent):
            for other in self.folder.parent.glob("[0-9a-f]" * _DIGITS):
                if other != self.folder:
                    shutil.rmtree(other)

    def end(self, chunks: int) -> None:
        """Note how many chunks the data has."""
        if read(self.folder / _END) != {"chunks": chunks}:
            own = self.folder / f".{_END}.{os.getpid()}"  # every process may be the one that comes to the end
            with writing(self.folder):
                own.write_text(json.dumps({"chunks": chunks}) + "\n")
                own.replace(self.folder / _END)

    def complete(self) -> bool:
        """Nothing is left to score."""
        return len(self._found()) == self._chunks()

    def finished(self) -> list[Path]:
        """All chunks in the order of the data.

        Raises:
            BenchError: some are missing.
        """
        found, chunks = self._found(), self._chunks()
        if len(found) != chunks:
            of = "" if chunks is None else f" of {chunks}"
            raise BenchError(f"Only {len(found)}{of} chunks are scored: score again, it goes on where it stopped.")
        return found

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.parquet"))

    def _chunks(self) -> int | None:
        return read(self.folder / _END).get("chunks")


def scored(part: Path, columns: Sequence[str] | None = None, without: Sequence[str] = ()) -> pa.Table:
    """The scored rows of a chunk: all columns but some, or these, where all its rows are bad the few that there are."""
    table = _table(part, None if columns is None else [*columns, REASON], without)
    return table.filter(pc.is_null(table[REASON])).drop_columns([REASON])


def rejected(part: Path) -> pa.Table:
    """The bad rows of a chunk: source_dataset, source_index, reason."""
    table = _table(part, [*IDS, REASON])
    return table.filter(pc.is_valid(table[REASON]))


def _table(part: Path, columns: Sequence[str] | None, without: Sequence[str] = ()) -> pa.Table:
    try:
        with pq.ParquetFile(part) as file:
            present = [name for name in file.schema_arrow.names if name not in without]
            wanted = [name for name in present if columns is None or name in columns]
            return file.read(wanted, use_threads=False)  # small files: threads take longer to start
    except (pa.ArrowException, OSError) as error:
        raise BenchError(f"The scored chunk {part} is damaged: delete it and score again.") from error


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, or half of one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
