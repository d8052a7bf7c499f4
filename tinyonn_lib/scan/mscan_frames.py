"""The bytes of an `.mscan` file: frames that find every flipped bit and every cut (layout: docs/mscan.md).

A frame is `kind` (4 letters), length and CRC-32 of the payload, and a CRC-32 of these twelve bytes, so that a damaged
length is noticed before it is followed. Reading goes over all frames; where one is bad the next good one is searched
for by its letters. Bad bytes with a good frame after them are *damage*; bad bytes up to the end are a *tear*.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.lognorm import CODING
from tinyonn_lib.scan.statistics import Target

VERSION = 1
MAGIC = b"\x89mscan\r\n"  # a first byte that no text has, line ends that careless copying changes
HEAD, SCHEMA, DATA, FOOT, END = b"HEAD", b"SCHM", b"DATA", b"FOOT", b"END!"

# One row per step and target. Changing it is a new version.
COLUMNS = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("step", pa.uint32()), ("sequence", pa.int64()), ("tokens", pa.uint32()), ("target", pa.uint16()),
            ("method", pa.uint8()), ("act", pa.uint16()), ("grad", pa.uint16()),
        )
    ]
)  # fmt: skip
Columns = Mapping[str, np.ndarray]

_CRC = struct.Struct("<I")
_PREAMBLE = struct.Struct("<8sI")  # magic, version; a CRC-32 follows
_PREFIX = struct.Struct("<4sII")  # kind, length and CRC-32 of the payload; a CRC-32 of these follows
PREAMBLE_BYTES, PREFIX_BYTES = _PREAMBLE.size + _CRC.size, _PREFIX.size + _CRC.size
_OFFSET = struct.Struct("<Q")


class Frame(NamedTuple):
    """Place of a complete, undamaged frame: kind, first byte, bytes of payload."""

    kind: bytes
    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.offset + PREFIX_BYTES + self.length


@dataclass(frozen=True)
class Segment:
    """What the index says of one segment: place in the file, rows, and first and last step."""

    offset: int
    records: int
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """What the rows of a file mean.

    Attributes:
        targets: what was watched; column `target` is a position in it.
        methods: names of the ways to get at a gradient norm; column `method` is a position in it.
        meta: JSON-able facts about the scan (model, data, parameters).
    """

    targets: tuple[Target, ...]
    methods: tuple[str, ...]
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not 0 < len(self.targets) <= 2**16 or not 0 < len(self.methods) <= 2**8:
            raise BenchError(
                f"an .mscan file has 1 to 65536 targets and 1 to 256 methods, not {len(self.targets)} and "
                f"{len(self.methods)}: choose fewer targets"
            )

    def payload(self) -> bytes:
        """The header as JSON, the same bytes for the same content.

        Raises:
            BenchError: `meta` holds something that JSON cannot.
        """
        content = {
            "format": "mscan",
            "version": VERSION,
            "coding": CODING,
            "methods": list(self.methods),
            "targets": [asdict(target) for target in self.targets],
            "meta": dict(self.meta),
        }
        try:
            return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise BenchError(f"meta of an .mscan file must be JSON: {error}") from None

    @classmethod
    def parse(cls, payload: bytes) -> Header:
        """The header back from `payload`.

        Raises:
            BenchError: not a header of this version.
        """
        try:
            content = json.loads(payload)
            if content["coding"] != CODING:
                raise BenchError("its values are coded in a way that this version does not know: update tinyonn")
            targets = tuple(Target(**target) for target in content["targets"])
            return cls(targets, tuple(content["methods"]), content["meta"])
        except (ValueError, TypeError, KeyError):
            raise BenchError("its header does not follow the format (docs/mscan.md): write the file again") from None

    def start(self) -> bytes:
        """All bytes of a file before its first segment."""
        preamble = _PREAMBLE.pack(MAGIC, VERSION)
        schema = COLUMNS.serialize().to_pybytes()
        return preamble + _CRC.pack(zlib.crc32(preamble)) + frame(HEAD, self.payload()) + frame(SCHEMA, schema)


def frame(kind: bytes, payload: bytes) -> bytes:
    """A payload with its prefix."""
    prefix = _PREFIX.pack(kind, len(payload), zlib.crc32(payload))
    return prefix + _CRC.pack(zlib.crc32(prefix)) + payload


def frame_at(file: BinaryIO, offset: int) -> tuple[Frame, bytes] | None:
    """The frame that begins at `offset` and its payload; None unless it is complete and undamaged."""
    file.seek(offset)
    prefix = file.read(PREFIX_BYTES)
    if len(prefix) < PREFIX_BYTES or prefix[-_CRC.size :] != _CRC.pack(zlib.crc32(prefix[: -_CRC.size])):
        return None
    kind, length, crc = _PREFIX.unpack_from(prefix)
    payload = file.read(length)
    return (Frame(kind, offset, length), payload) if len(payload) == length and zlib.crc32(payload) == crc else None


def walk(file: BinaryIO, size: int) -> tuple[list[Frame], list[tuple[int, int]]]:
    """(all good frames in order, all gaps between them as (first byte, byte after)).

    Reads the first `size` bytes, all there was when reading began: a file may grow meanwhile, and a frame that was
    half there must not look like damage because the next one has come.
    """
    frames: list[Frame] = []
    gaps: list[tuple[int, int]] = []
    at = PREAMBLE_BYTES
    while at < size:
        found = frame_at(file, at)
        if found is not None and found[0].end <= size:
            frames.append(found[0])
            at = found[0].end
        else:
            after = _next_frame(file, at + 1, size)
            gaps.append((at, size if after is None else after))
            at = gaps[-1][1]
    return frames, gaps


def _next_frame(file: BinaryIO, start: int, size: int) -> int | None:
    found = []
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
        for kind in (DATA, FOOT, END):
            at = view.find(kind, start)
            while at >= 0 and frame_at(file, at) is None:  # the letters may also stand in a payload
                at = view.find(kind, at + 1)
            if at >= 0:
                found.append(at)
    return min(found, default=None)


def check_preamble(file: BinaryIO) -> None:
    """Make sure that this is an `.mscan` file of a version that can be read.

    Raises:
        BenchError: it is not; the line lacks the name of the file.
    """
    data = file.read(PREAMBLE_BYTES)
    if len(data) < PREAMBLE_BYTES and MAGIC.startswith(data[: len(MAGIC)]):
        raise BenchError("ends before its header: nothing was written into it; delete it and scan again")
    if data[: len(MAGIC)] != MAGIC:
        raise BenchError("is not an .mscan file, or its first bytes are damaged")
    if data[-_CRC.size :] != _CRC.pack(zlib.crc32(data[: -_CRC.size])):
        raise BenchError("is damaged in its first bytes: copy it again")
    version = _PREAMBLE.unpack_from(data)[1]
    if version != VERSION:
        raise BenchError(f"has version {version} of the format and this tinyonn reads version {VERSION}: update it")


def pack(columns: Columns) -> bytes:
    """Rows as an Arrow record batch message with zstd-compressed buffers; columns as in `COLUMNS`."""
    batch = pa.RecordBatch.from_arrays([pa.array(columns[f.name], type=f.type) for f in COLUMNS], schema=COLUMNS)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 3), use_threads=False)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, COLUMNS, options=options) as stream:
        stream.write_batch(batch)
    messages = list(pa.ipc.MessageReader.open_stream(sink.getvalue()))
    return messages[1].serialize(alignment=8).to_pybytes()  # the first one is the schema, which the file has once


def unpack(payload: bytes) -> dict[str, np.ndarray]:
    """Rows back from `pack`, one array per column."""
    batch = pa.ipc.read_record_batch(pa.py_buffer(payload), COLUMNS)
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in COLUMNS.names}


def describe(offset: int, columns: Columns) -> Segment:
    """The index entry of rows that lie at `offset`."""
    steps = columns["step"]
    return Segment(offset, len(steps), int(steps[0]), int(steps[-1]))


def index(segments: Sequence[Segment], offset: int) -> bytes:
    """The footer, which begins at `offset`, and the end marker, which points back to it."""
    rows = [[s.offset, s.records, s.first, s.last] for s in segments]
    content = {"records": sum(s.records for s in segments), "segments": rows}
    return frame(FOOT, json.dumps(content, separators=(",", ":")).encode()) + frame(END, _OFFSET.pack(offset))


def read_index(file: BinaryIO, end: Frame) -> list[Segment] | None:
    """The index that the end marker points to, None when it is damaged."""
    _, payload = frame_at(file, end.offset) or (end, b"")
    found = frame_at(file, _OFFSET.unpack(payload)[0]) if len(payload) == _OFFSET.size else None
    if found is None or found[0].kind != FOOT:
        return None
    return [Segment(*row) for row in json.loads(found[1])["segments"]]
