"""Records from files, folders or the hub, one after the other; what cannot be read comes as a record that says so."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import hub

ENDINGS = (".jsonl", ".json", ".parquet", ".txt")
_BUFFER = 2**20  # bytes of a parquet column read at once: a row group can be as large as its file


class Unreadable(NamedTuple):
    """In the place of a record that cannot be read.

    Attributes:
        reason: two or three words, for a list of such records.
        message: the line for someone who cannot do without it.
    """

    reason: str
    message: str


class Record(NamedTuple):
    """One record.

    Attributes:
        value: a dictionary, a plain text, whatever else JSON can hold, or `Unreadable`.
        source: the file, relative to the folder given, or the hub id.
        number: line, or row from 1.
    """

    value: Any
    source: str
    number: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.number}"


def records(source: str) -> Iterator[Record]:
    """Stream all records; see `texts.load_texts` for what `source` can be. Of a .json file all is in memory at once.

    Raises:
        BenchError: nothing there, no such ending, a .json or .parquet file that is cut off, or a hub that is not
            reachable. What is wrong with a single record is an `Unreadable`, an empty file is one as well.
    """
    path = hub.local_path(source, "dataset")
    if path is None:
        yield from _hub_records(source)
        return
    for file, name in files(path):
        yield from _file_records(file, name)


def files(path: Path) -> list[tuple[Path, str]]:
    """The file itself, or those of a folder at any depth in a fixed order; each with its name relative to the folder.

    Raises:
        BenchError: the folder holds none.
    """
    if path.is_file():
        return [(path, path.name)]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not found:
        raise BenchError(f"The folder {path} holds no {', '.join(ENDINGS)} file.")
    return [(file, file.relative_to(path).as_posix()) for file in found]


def _file_records(path: Path, name: str) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in ENDINGS:
        raise BenchError(f"{name}: files must end in one of {', '.join(ENDINGS)}.")
    if path.stat().st_size == 0:
        yield Record(Unreadable("empty file", f"{name} is empty."), name, 1)
        return
    try:
        if suffix == ".parquet":
            yield from _parquet_records(path, name)
        elif suffix == ".jsonl":
            yield from _jsonl_records(path, name)
        elif suffix == ".json":
            yield from _json_records(path, name)
        else:
            yield from _paragraphs(path, name)
    except PermissionError as error:
        raise BenchError(f"{name} may not be read: check its permissions.") from error


def _jsonl_records(path: Path, name: str) -> Iterator[Record]:
    # Read in bytes and decoded line by line, so that an encoding error has a line number, too.
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            value = _line(raw, name, number)
            if value is not None:
                yield Record(value[0], name, number)


def _line(raw: bytes, name: str, number: int) -> tuple[Any] | None:
    """What a line holds, in a tuple since it may be null; None for a blank one."""

    # Without an end of line it is the file's last one: what is broken there has most likely been cut off.
    def reason(otherwise: str) -> str:
        return otherwise if raw.endswith(b"\n") else "cut off"

    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        return (json.loads(line),) if line else None
    except UnicodeDecodeError:
        message = f"{name} line {number} is not UTF-8: convert the file first."
        return (Unreadable(reason("broken UTF-8"), message),)
    except RecursionError:
        return (Unreadable("nested too deep", _too_deep(name)),)
    except ValueError as error:  # a JSONDecodeError, or a number of thousands of digits
        what = getattr(error, "msg", "a number too long")
        message = f"{name} line {number} is not valid JSON ({what}): is the file cut off? Repair or remove it."
        return (Unreadable(reason("not JSON"), message),)


def _json_records(path: Path, name: str) -> Iterator[Record]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BenchError(_not_utf8(name, error.reason, error.start)) from error
    except RecursionError as error:
        raise BenchError(_too_deep(name)) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record per line under the wrong name is common
            yield from _jsonl_records(path, name)
            return
        raise BenchError(f"{name} line {error.lineno} is not valid JSON ({error.msg}): is the file cut off?") from error
    except ValueError as error:
        raise BenchError(f"{name} holds a number of too many digits to be read: repair or remove it.") from error
    if isinstance(content, dict):
        content = next((value for value in content.values() if isinstance(value, list)), [content])
    if not isinstance(content, list):
        raise BenchError(f"{name} must hold a list of records.")
    yield from (Record(value, name, number) for number, value in enumerate(content, start=1))


def _parquet_records(path: Path, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = itertools.count(1)
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=1024):
                try:
                    values = batch.to_pylist()
                except UnicodeDecodeError:
                    values = [_row(batch.slice(place, 1), name) for place in range(batch.num_rows)]
                yield from (Record(value, name, next(number)) for value in values)
    except (pa.ArrowException, OSError) as error:
        raise BenchError(f"{name} is not a complete parquet file (cut off?): copy or download it again.") from error


def _row(row: Any, name: str) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unreadable("broken UTF-8", _not_utf8(name, error.reason, error.start))


def _paragraphs(path: Path, name: str) -> Iterator[Record]:
    with path.open("rb") as file:
        lines = enumerate(_text_lines(file, name), start=1)
        for blank, group in itertools.groupby(lines, key=lambda pair: pair[1] == ""):
            if blank:
                continue
            block = list(group)
            broken = next((line for _, line in block if isinstance(line, Unreadable)), None)
            yield Record(broken or "\n".join(str(line) for _, line in block), name, block[0][0])


def _text_lines(file: Any, name: str) -> Iterator[str | Unreadable]:
    """Lines as `str.splitlines` parts them, blank ones as ""; one that is not UTF-8 as Unreadable."""
    start = 0
    for raw in file:
        try:
            text = raw.decode("utf-8" if start else "utf-8-sig")
        except UnicodeDecodeError as error:
            yield Unreadable("broken UTF-8", _not_utf8(name, error.reason, start + error.start))
        else:
            yield from (line if line.strip() else "" for line in text.splitlines())
        start += len(raw)


def _not_utf8(name: str, reason: str, byte: int) -> str:
    return f"{name} is not UTF-8 ({reason} near byte {byte}): convert it first."


def _too_deep(name: str) -> str:
    return f"{name} holds JSON nested too deep to be records of text."


def _hub_records(source: str) -> Iterator[Record]:
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
        stream = datasets.load_dataset(hub_id, config, split=wanted, streaming=True)
        for number, value in enumerate(stream, start=1):
            yield Record(value, source, number)
    except BenchError:
        raise
    except Exception as error:  # datasets raises many kinds; for a user they are one
        raise BenchError(f"Cannot read the data set {source}: {(str(error).splitlines() or ['?'])[0][:200]}") from error
