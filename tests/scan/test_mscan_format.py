from __future__ import annotations

import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mscan_files import COUNT, META, TARGETS, equal, flipped, make, norms, properties, put

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import lognorm
from tinyonn_lib.scan.mscan import File, Writer, delta_sc, integral, read, summarise, to_parquet
from tinyonn_lib.workbench import cli


def test_what_is_written_is_read(path: Path) -> None:
    make(path, (3, 4, 9))
    table = read(path)
    assert list(table.columns) == ["step", "sequence", "tokens", "target", "layer", "kind", "method", "act", "grad"]
    assert table.attrs == {"meta": META, "torn": None, "damaged": []}
    assert table["step"].tolist() == [step for step in (3, 4, 9) for _ in TARGETS]
    assert table["sequence"].tolist() == [1000 + step // 3 for step in (3, 4, 9) for _ in TARGETS]
    assert table["tokens"].tolist() == [50 + step for step in (3, 4, 9) for _ in TARGETS]
    assert table["target"].tolist() == [target.name for target in TARGETS] * 3
    assert table["kind"].tolist() == [target.kind for target in TARGETS] * 3
    assert table["layer"].tolist() == [0, 0, 0, -1] * 3
    assert table["method"].tolist() == ["none", "grad", "gram", "tiles"] * 3
    written = np.concatenate([norms(step) for step in (3, 4, 9)])
    np.testing.assert_allclose(table[["act", "grad"]], written, rtol=lognorm.RELATIVE_ERROR)
    file = File(path)
    assert file.header.targets == TARGETS
    assert (file.records, len(file.segments), file.torn) == (12, 1, None)
    equal(pd.concat(list(file)), table)
    for column, name in enumerate(("act", "grad")):
        np.testing.assert_array_equal(file.matrix(name), table[name].to_numpy().reshape(3, COUNT))
        np.testing.assert_allclose(file.matrix(name)[1], norms(4)[:, column], rtol=lognorm.RELATIVE_ERROR)
    assert file.steps().to_numpy().tolist() == [[3, 1001, 53], [4, 1001, 54], [9, 1003, 59]]
    with pytest.raises(BenchError, match="choose act or grad"):
        file.matrix("weight")


def test_same_records_same_bytes(path: Path, tmp_path: Path) -> None:
    turned = dict(reversed(META.items()))
    with Writer(tmp_path / "b", TARGETS, turned) as file:
        for step in range(5):
            put(file, step)
    assert make(path, range(5)).read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_scan_is_a_whole_file(path: Path) -> None:
    table = read(make(path, ()), strict=True)
    assert len(table) == 0
    assert table["target"].dtype == "category"
    assert File(path).matrix("grad").shape == (0, COUNT)
    assert summarise(File(path)).warning == "there are no records"
    assert len(delta_sc(table)) == len(integral(delta_sc(table))) == 0
    to_parquet(path, path.with_suffix(".parquet"))
    assert pq.read_table(path.with_suffix(".parquet")).num_rows == 0


def test_the_layout_is_the_documented_one(whole: Path) -> None:
    """A second reader, written from docs/mscan.md alone."""
    data = whole.read_bytes()
    assert data[:12] == b"\x89mscan\r\n" + struct.pack("<I", 1)
    assert struct.unpack_from("<I", data, 12)[0] == zlib.crc32(data[:12])
    at, found = 16, []
    while at < len(data):
        kind, length, crc, check = struct.unpack_from("<4sIII", data, at)
        assert check == zlib.crc32(data[at : at + 12])
        payload = data[at + 16 : at + 16 + length]
        assert crc == zlib.crc32(payload)
        found.append((kind, at, payload))
        at += 16 + length
    assert [kind for kind, *_ in found] == [b"HEAD", b"SCHM", *[b"DATA"] * 5, b"FOOT", b"END!"]
    header = json.loads(found[0][2])
    assert (header["format"], header["version"], header["meta"]) == ("mscan", 1, META)
    coding = header["coding"]
    assert coding["relative_error"] == lognorm.RELATIVE_ERROR
    stream = b"".join(payload for kind, _, payload in found if kind in (b"SCHM", b"DATA"))
    rows = pa.ipc.open_stream(stream).read_all().to_pandas()
    code = rows["grad"].astype("float64")
    norm = coding["low"] * (coding["high"] / coding["low"]) ** (
        (code - coding["first"]) / (coding["last"] - coding["first"])
    )
    np.testing.assert_allclose(norm, read(whole)["grad"], rtol=1e-12)
    assert struct.unpack("<Q", found[-1][2])[0] == found[-2][1]
    assert json.loads(found[-2][2]) == {
        "records": 10 * COUNT,
        "segments": [[at, 2 * COUNT, 2 * n, 2 * n + 1] for n, (_, at, _) in enumerate(found[2:-2])],
    }


@given(cut=st.integers(min_value=0))
@properties
def test_cut_at_any_byte(whole: Path, ends: list[int], tmp_path: Path, cut: int) -> None:
    data = whole.read_bytes()
    cut %= len(data)
    (tmp_path / "cut").write_bytes(data[:cut])
    if cut < ends[0]:
        with pytest.raises(BenchError, match="header"):
            File(tmp_path / "cut")
        return
    file = File(tmp_path / "cut")
    complete = sum(end <= cut for end in ends[1:-1])
    assert len(file.segments) == complete
    equal(file.table(), read(whole).head(2 * COUNT * complete))
    assert file.torn is not None
    assert f"{8 * complete} records" in file.torn
    with pytest.warns(UserWarning, match="torn"):
        assert read(tmp_path / "cut").attrs["torn"] == file.torn
    with pytest.raises(BenchError, match="torn"):
        File(tmp_path / "cut", strict=True)


def assert_found(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        torn = File(path).torn
    except BenchError:
        return
    assert torn is not None


@given(at=st.integers(min_value=0), bit=st.integers(0, 7), finished=st.booleans())
@settings(properties, max_examples=300)
def test_any_flipped_bit_is_found(
    whole: Path, ends: list[int], tmp_path: Path, at: int, bit: int, finished: bool
) -> None:
    data = whole.read_bytes()[: None if finished else ends[-2]]
    assert_found(tmp_path / "flipped", flipped(data, at % len(data), bit))


def test_every_bit_of_preamble_prefixes_and_end_mark_is_checked(whole: Path, ends: list[int], tmp_path: Path) -> None:
    data = whole.read_bytes()
    places = [
        *range(32),
        *range(ends[1], ends[1] + 16),
        *range(ends[-2], ends[-2] + 16),
        *range(ends[-1] - 24, ends[-1]),
    ]
    for number, (at, bit) in enumerate(itertools.product(places, range(8))):
        assert_found(tmp_path / str(number), flipped(data, at, bit))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.filterwarnings("ignore:.*torn")
@pytest.mark.parametrize("inside", [0, 5, 9, 13, 100])  # kind, length, CRC, CRC of these, payload
def test_a_damaged_segment_is_named_and_the_others_are_salvaged(
    whole: Path, ends: list[int], path: Path, inside: int, finished: bool
) -> None:
    path.write_bytes(flipped(whole.read_bytes(), ends[2] + inside, 3)[: None if finished else ends[-2]])
    where = f"segment 3 of 5.*at byte {ends[2]}" if finished else f"follows segment 2 .bytes {ends[2]} to {ends[3]}"
    with pytest.raises(BenchError, match=f"{where}.*32 records in 4 other segments.*salvage"):
        File(path)
    file = File(path, salvage=True)
    assert len(file.damaged) == 1
    equal(file.table(), read(whole).query("step not in (4, 5)"))
    with pytest.warns(UserWarning, match="damaged and left out"):
        assert len(read(path, salvage=True)) == 32
    with pytest.raises(BenchError, match="damaged"):  # going on would cut off good segments
        Writer(path, TARGETS, META, append=True)


def test_a_damaged_index_costs_no_record(whole: Path, ends: list[int], path: Path) -> None:
    path.write_bytes(flipped(whole.read_bytes(), ends[-2] + 20, 0))
    with pytest.raises(BenchError, match="what follows segment 5 .*40 records in 5 other segments are good"):
        File(path)
    equal(File(path, salvage=True).table(), read(whole))


def test_a_segment_cut_out_is_missed(whole: Path, ends: list[int], path: Path) -> None:
    data = whole.read_bytes()
    path.write_bytes(data[: ends[2]] + data[ends[3] :])
    with pytest.raises(BenchError, match="its index .not where the end mark says: bytes were lost"):
        File(path)
    equal(File(path, salvage=True).table(), read(whole).query("step not in (4, 5)"))


def test_bytes_after_the_end_are_reported(whole: Path, path: Path) -> None:
    path.write_bytes(whole.read_bytes() + bytes(7))
    file = File(path)
    assert file.torn is not None
    assert "7 bytes that do not belong" in file.torn
    equal(file.table(), read(whole))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "ends before its header"),
        (b"\x89msc", "ends before its header"),
        (b"PAR1" + bytes(99), "is not an .mscan file"),
        (b"\x89mscan\r\n" + bytes(8), "damaged in its first bytes"),
        (b"\x89mscan\r\n" + struct.pack("<II", 2, zlib.crc32(b"\x89mscan\r\n\2\0\0\0")), "version 2.*reads version 1"),
        (None, "No such file"),
    ],
)
def test_other_files_are_one_line(
    path: Path, content: bytes | None, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchError, match=line):
        File(path)
    assert cli.main(["mscan", "info", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
