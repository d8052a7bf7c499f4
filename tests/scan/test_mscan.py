from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import lognorm
from tinyonn_lib.scan.mscan import File, Writer, delta_sc, integral, merge, read, running, summarise, to_parquet
from tinyonn_lib.scan.mscan_frames import walk
from tinyonn_lib.scan.mscan_sink import Sink
from tinyonn_lib.scan.statistics import Target
from tinyonn_lib.workbench import cli

TARGETS = (
    Target("model.layers.0.self_attn.q_proj", "linear", 0, 0),
    Target("model.layers.0.mlp", "neurons", 8, 0),
    Target("model.layers.0.mlp", "experts", 4, 0),  # one name, watched in two ways
    Target("model.embed_tokens", "embedding", 0, -1),
)
META = {"model": "tiny", "tokens": 100, "rho": 0.05}
COUNT = len(TARGETS)
properties = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def norms(step: int, count: int = COUNT) -> np.ndarray:
    """What step `step` measures, the same on every call."""
    draw = np.random.default_rng(step)
    return np.exp(np.linspace(-4, 4, count)[:, None] + draw.normal(0, 0.5, (count, 2)))


def put(file: Writer, step: int) -> None:
    count = len(file.header.targets)
    file.write(step, 1000 + step // 3, 50 + step, norms(step, count), np.arange(count) % 4)


def make(path: Path, steps: Iterable[int], flush: Iterable[int] = (), **options: object) -> Path:
    with Writer(path, TARGETS, META, **options) as file:  # type: ignore[arg-type]
        for step in steps:
            put(file, step)
            if step in flush:
                file.flush()
    return path


def leave(file: Writer) -> None:
    """End the thread without the end marker, as a kill after a flush would."""
    file._stop(finish=False)


def equal(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scan.mscan"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in five segments, finished."""
    return make(tmp_path_factory.mktemp("whole") / "whole.mscan", range(10), flush=(1, 3, 5, 7))


@pytest.fixture(scope="module")
def ends(whole: Path) -> list[int]:
    """Byte after the header, after each segment, and the size."""
    file = File(whole)
    return [segment.offset for segment in file.segments] + [file.end, whole.stat().st_size]


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


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


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


# The coding.


@given(st.floats(lognorm.LOW, lognorm.HIGH))
@properties
def test_the_bound_holds(value: float) -> None:
    found = float(lognorm.decode(lognorm.encode(np.array(value))))
    assert abs(found - value) <= 3.2e-4 * value


def test_the_bound_holds_over_18_decades() -> None:
    assert np.log10(lognorm.HIGH / lognorm.LOW) == pytest.approx(18)
    values = np.geomspace(lognorm.LOW, lognorm.HIGH, 1_000_003)
    codes = lognorm.encode(values)
    worst = np.max(np.abs(lognorm.decode(codes) - values) / values)
    assert 3.1e-4 < worst <= 3.2e-4
    assert (np.diff(codes.astype(int)) >= 0).all()
    every = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(lognorm.encode(lognorm.decode(every)), every)


def test_the_ends_of_the_scale() -> None:
    found = lognorm.decode(lognorm.encode(np.array([0.0, -0.0, np.nan, 1e-300, lognorm.LOW, lognorm.HIGH])))
    np.testing.assert_array_equal(found, [0.0, 0.0, np.nan, lognorm.LOW, lognorm.LOW, lognorm.HIGH])
    for bad, why in ((np.inf, "infinite"), (-np.inf, "negative"), (-1e-300, "negative"), (1.001e8, r"above 1e\+08")):
        with pytest.raises(lognorm.Unstorable, match=why) as caught:
            lognorm.encode(np.array([[0.0, 1.0], [bad, np.nan]]))
        assert caught.value.index == (1, 0)


@pytest.mark.parametrize(("count", "steps"), [(25, 3000), (200, 400), (25, 40)])
def test_at_most_8_bytes_per_record(path: Path, count: int, steps: int) -> None:
    targets = [Target(f"model.layers.{n // 8}.part{n % 8}", "linear", 0, n // 8) for n in range(count)]
    draw = np.random.default_rng(0)
    scale = draw.normal(0, 3, (count, 2))
    with Writer(path, targets, META) as file:
        for step, tokens in enumerate(draw.integers(20, 512, steps)):
            values = np.exp(scale + draw.normal(0, 0.5, (count, 2)))
            file.write(step, step // 4, int(tokens), values, np.arange(count) % 3)
    assert path.stat().st_size / (count * steps) <= 8


# The writer.


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every write to the disk takes that long from now on."""
    write = Sink.write

    def slow(sink: Sink, data: bytes) -> None:
        time.sleep(seconds)
        write(sink, data)

    monkeypatch.setattr(Sink, "write", slow)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float64", "numpy"])
def test_write_takes_a_copy(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.rand(COUNT, 2, dtype=getattr(torch, kind, torch.float16))
    values, tokens = wanted.clone().requires_grad_(), torch.tensor(7)
    given = values.detach().numpy() if kind == "numpy" else values
    methods = np.ones(COUNT, dtype=np.uint8)
    with Writer(path, TARGETS, META, rows_per_segment=1) as file:
        slow_down(monkeypatch, 0.05)  # the thread is still busy with step 0 when step 1 is spoilt
        for step in range(2):
            file.write(step, 0, tokens, given, methods)
        values.detach().zero_()
        tokens.zero_()
        methods[:] = 0
    np.testing.assert_allclose(File(path).matrix("act"), [wanted[:, 0].double().numpy()] * 2, rtol=3.2e-4)
    assert set(read(path)["tokens"]) == {7}
    assert set(read(path)["method"]) == {"grad"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_write_does_not_wait_for_the_device(path: Path) -> None:
    busy = torch.rand(8192, 8192, device="cuda")
    values, tokens = torch.rand(COUNT, 2, device="cuda"), torch.tensor(7, device="cuda")
    wanted = values.cpu().numpy()
    with Writer(path, TARGETS, META) as file:
        file.write(0, 0, tokens, values, [0] * COUNT)  # pinned memory is made once
        file.flush()
        for _ in range(50):
            busy = busy @ busy * 1e-4
        began = time.perf_counter()
        file.write(1, 0, tokens, values, [0] * COUNT)
        handed = time.perf_counter() - began
        values.zero_()  # on the same stream, after the copy
        torch.cuda.synchronize()
        assert handed < (time.perf_counter() - began) / 5
    np.testing.assert_allclose(File(path).matrix("act")[1], wanted[:, 0], rtol=lognorm.RELATIVE_ERROR)


def test_flush_puts_everything_into_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.stat().st_size))
    file = Writer(path, TARGETS, META)
    for step in range(6):
        put(file, step)
        if step % 2:
            file.flush()
            assert synced[-1] == path.stat().st_size
            seen = File(path)
            assert seen.torn is not None
            assert seen.steps()["step"].tolist() == list(range(step + 1))
    file.flush()  # nothing new: nothing is written
    assert len(File(path).segments) == 3
    file.close()
    file.close()
    assert File(path, strict=True).records == 6 * COUNT
    with pytest.raises(BenchError, match="was closed"):
        put(file, 7)


def test_a_file_may_grow_while_it_is_read(whole: Path, ends: list[int], path: Path) -> None:
    """Half a segment was there when reading began; it and the next ones arrive before it is looked at."""
    path.write_bytes(whole.read_bytes())
    with path.open("rb") as file:
        frames, gaps = walk(file, ends[2] + 20)
    assert [frame.end for frame in frames[2:]] == ends[1:3]
    assert gaps == [(ends[2], ends[2] + 20)]


def test_segments_are_written_as_they_fill(path: Path) -> None:
    make(path, range(7), rows_per_segment=2 * COUNT)
    assert [(s.first, s.last) for s in File(path).segments] == [(0, 1), (2, 3), (4, 5), (6, 6)]


def test_an_error_in_the_block_leaves_an_unfinished_file(path: Path) -> None:
    def steps() -> Iterator[int]:
        yield 0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make(path, steps())
    assert File(path).records == COUNT
    assert File(path).torn is not None


def test_wrong_calls_are_refused_at_once(path: Path) -> None:
    with Writer(path, TARGETS, META) as file:
        put(file, 5)
        for step, sequence in ((5, 0), (4, 0), (-1, 0), (2**32, 0), (6, 2**63)):
            with pytest.raises(BenchError, match="cannot follow step 5"):
                file.write(step, sequence, 1, norms(0), [0] * COUNT)
        with pytest.raises(BenchError, match=r"norms \(3, 2\) and 4 methods"):
            file.write(6, 0, 1, norms(0)[:3], [0] * COUNT)
        with pytest.raises(BenchError, match="3 methods"):
            file.write(6, 0, 1, norms(0), [0] * 3)
    assert File(path, strict=True).records == COUNT
    with pytest.raises(BenchError, match="must be JSON"):
        Writer(path, TARGETS, {"model": object()})
    with pytest.raises(BenchError, match="must be JSON"):
        Writer(path, TARGETS, {"loss": float("nan")})
    with pytest.raises(BenchError, match="1 to 65536 targets"):
        Writer(path, (), META)
    assert File(path, strict=True).records == COUNT  # nothing of this touched the file


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ((1, 1, np.inf), "the gradient norm of model.layers.0.mlp in step 2 is inf"),
        ((3, 0, -1.0), "the activation norm of model.embed_tokens in step 2 is -1, which is negative"),
        ((0, 0, 1e9), "q_proj in step 2 is 1e\\+09, which is above"),
    ],
)
def test_a_bad_norm_is_named_and_what_was_before_it_is_safe(
    path: Path, spoil: tuple[int, int, float], line: str
) -> None:
    file = Writer(path, TARGETS, META)
    put(file, 0)
    put(file, 1)
    bad = norms(2)
    bad[spoil[:2]] = spoil[2]
    file.write(2, 0, 1, bad, [0] * COUNT)
    for call in (file.flush, lambda: put(file, 3), file.close):
        with pytest.raises(BenchError, match=f"{line}.*steps up to 1 are safe"):
            call()
    file.close()
    assert File(path).steps()["step"].tolist() == [0, 1]
    assert File(path).torn is not None


@pytest.mark.parametrize(("tokens", "method"), [(-1, 0), (2**32, 0), (1, 6), (1, -1)])
def test_tokens_and_methods_that_cannot_be_are_refused(path: Path, tokens: int, method: int) -> None:
    file = Writer(path, TARGETS, META)
    file.write(0, 0, tokens, norms(0), [0, 0, 0, method])
    with pytest.raises(BenchError, match="tokens, or a method that the header does not name; no step is in the file"):
        file.close()


def test_not_measured_is_not_zero(path: Path) -> None:
    values = norms(0)
    values[:, 1] = np.nan
    values[0] = 0.0
    with Writer(path, TARGETS, META) as file:
        file.write(0, 0, 1, values, [0] * COUNT)
    assert read(path)["grad"].isna().tolist() == [False, True, True, True]
    assert read(path)["act"][0] == read(path)["grad"][0] == 0.0


def full_after(count: int) -> Callable[[Sink, bytes], None]:
    """A disk that has room for `count` more writes and half of the next."""
    left = [count]

    def write(sink: Sink, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            sink.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sink.file.write(data)

    return write


def test_a_full_disk_is_one_line_and_the_scan_can_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sink, "write", full_after(2))  # the header and one segment
    file = Writer(path, TARGETS, META)
    put(file, 0)
    file.flush()
    put(file, 1)
    with pytest.raises(BenchError, match=r"scan\.mscan: cannot write: No space left.*steps up to 0 are safe"):
        file.flush()
    with pytest.raises(BenchError, match="No space left"):
        put(file, 2)
    with pytest.raises(BenchError, match="No space left"):
        file.close()
    monkeypatch.undo()
    assert File(path).torn is not None
    assert File(path).records == COUNT
    make(path, (1, 2), append=True)
    assert File(path, strict=True).steps()["step"].tolist() == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_room_for_the_header(path: Path) -> None:
    path.symlink_to("/dev/full")
    with pytest.raises(BenchError, match="cannot write .*No space left"):
        Writer(path, TARGETS, META)
    with pytest.raises(BenchError, match="cannot write .*No such file"):
        Writer(path.parent / "none" / "x.mscan", TARGETS, META)


def test_a_bug_in_the_thread_is_not_swallowed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Writer(path, TARGETS, META)
    monkeypatch.setattr(Sink, "add", lambda *_: 1 / 0)
    put(file, 0)
    with pytest.raises(RuntimeError, match="no step is in the file") as caught:
        file.close()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_slow_disk_does_not_slow_the_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Writer(path, TARGETS, META, rows_per_segment=1)
    slow_down(monkeypatch, 0.02)
    began = time.perf_counter()
    for step in range(20):
        put(file, step)
    handed = time.perf_counter() - began
    file.close()
    assert handed < 0.1 * (time.perf_counter() - began)
    assert File(path, strict=True).records == 20 * COUNT


def test_a_kill_loses_nothing_that_was_flushed(path: Path) -> None:
    code = f"""
import os, numpy as np
from tinyonn_lib.scan.mscan import Writer
from tinyonn_lib.scan.statistics import Target
file = Writer({str(path)!r}, [Target("a", "linear", 0, 0)], {{}}, rows_per_segment=3)
for step in range(10):
    file.write(step, 0, 1, np.ones((1, 2)), [0])
file.flush()
for step in range(10, 1000):
    file.write(step, 0, 1, np.ones((1, 2)), [0])
os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    found = File(path)
    assert found.torn is not None
    assert found.records >= 10
    assert found.steps()["step"].tolist() == list(range(found.records))


# Going on, and putting together.


@pytest.mark.parametrize("before", [None, 0, 2, 5, 6, 9, 99])
@pytest.mark.parametrize("state", ["finished", "unfinished", "torn"])
def test_going_on_drops_what_will_be_done_again(
    whole: Path, ends: list[int], path: Path, before: int | None, state: str
) -> None:
    cut = {"finished": None, "unfinished": ends[-2], "torn": ends[-2] - 3}[state]
    path.write_bytes(whole.read_bytes()[:cut])
    stays = list(range(8 if state == "torn" else 10))[:before]
    with Writer(path, TARGETS, META, append=True, before_step=before) as file:
        assert File(path).steps()["step"].tolist() == stays
        assert File(path).torn is not None
        for step in range(len(stays), 12):
            put(file, step)
    merge([path], path)
    assert path.read_bytes() == canonical(path.parent / "wanted", range(12)).read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["scan.mscan", "wanted"]


def canonical(path: Path, steps: Iterable[int]) -> Path:
    merge([make(path, steps)], path)
    return path


def test_going_on_from_nothing(path: Path, whole: Path, ends: list[int]) -> None:
    wanted = make(path, range(3)).read_bytes()
    for cut in (0, 1, 15, 16, ends[0] - 1):
        path.write_bytes(wanted[:cut])  # killed before the header was complete
        assert make(path, range(3), append=True).read_bytes() == wanted
    path.unlink()
    assert make(path, range(3), append=True, before_step=0).read_bytes() == wanted


def test_only_the_same_scan_goes_on(path: Path) -> None:
    before = make(path, range(3)).read_bytes()
    with pytest.raises(BenchError, match="meta 'tokens' .100 and 7."):
        Writer(path, TARGETS, {**META, "tokens": 7}, append=True)
    with pytest.raises(BenchError, match="its targets differ"):
        Writer(path, TARGETS[:2], META, append=True)
    path.with_name("other").write_bytes(b"a diary, not a scan")
    with pytest.raises(BenchError, match="is not an .mscan file"):
        Writer(path.with_name("other"), TARGETS, META, append=True)
    assert path.read_bytes() == before
    with Writer(path, TARGETS, META, append=True) as file, pytest.raises(BenchError, match="cannot follow step 2"):
        put(file, 2)


@given(
    owner=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    flush=st.sets(st.integers(0, 11)),
    rows=st.integers(1, 40),
)
@settings(properties, max_examples=25)
def test_merged_bytes_depend_on_the_records_alone(tmp_path: Path, owner: list[int], flush: set[int], rows: int) -> None:
    parts = [
        make(tmp_path / str(worker), [s for s in range(12) if owner[s] == worker], flush, rows_per_segment=rows)
        for worker in (2, 0, 1)
    ]
    merge([*parts, parts[0]], tmp_path / "merged")  # one of them twice: kept once
    assert (tmp_path / "merged").read_bytes() == canonical(tmp_path / "wanted", range(12)).read_bytes()


def test_merged_segments_have_a_fixed_number_of_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyonn_lib.scan.mscan.SEGMENT_ROWS", 10)
    before = read(make(path, range(8), flush=(2, 3)))
    merge([path], path)
    assert [segment.records for segment in File(path).segments] == [10, 10, 10, 2]
    equal(read(path, strict=True), before)


def test_what_does_not_belong_together_is_not_merged(path: Path, tmp_path: Path, whole: Path, ends: list[int]) -> None:
    with Writer(path, TARGETS, META) as file:
        file.write(3, 1001, 53, norms(4), np.arange(COUNT))
    for paths, line in (
        ([whole, path], "step 3 of .*q_proj is there twice with different values"),
        ([], "nothing to merge"),
        ([tmp_path / "none"], "No such file"),
    ):
        with pytest.raises(BenchError, match=line):
            merge(paths, tmp_path / "merged")
    with Writer(tmp_path / "other", TARGETS, {}) as file:
        put(file, 20)
    with pytest.raises(BenchError, match="belongs to another scan"):
        merge([whole, tmp_path / "other"], tmp_path / "merged")
    (tmp_path / "torn").write_bytes(whole.read_bytes()[: ends[3]])
    with pytest.raises(BenchError, match="torn"):
        merge([tmp_path / "torn"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge([tmp_path / "torn"], tmp_path / "merged", strict=False)
    assert File(tmp_path / "merged", strict=True).records == 6 * COUNT


# Analysis.


def rows(act: object, grad: object, sequence: object = 0) -> pd.DataFrame:
    """A table of one linear target per column of `act` and `grad` (steps, targets)."""
    act, grad = np.atleast_2d(np.asarray(act, float).T).T, np.atleast_2d(np.asarray(grad, float).T).T
    step, target = (part.ravel() for part in np.indices(act.shape))
    return pd.DataFrame(
        {
            "step": step, "sequence": np.broadcast_to(sequence, len(act))[step], "tokens": 10, "target": target,
            "kind": "linear", "layer": 0, "act": act.ravel(), "grad": grad.ravel(),
        }
    )  # fmt: skip


def z(values: np.ndarray) -> np.ndarray:
    logs = np.log(values)
    return (logs - logs.mean(0)) / logs.std(0)


def test_delta_sc_is_the_difference_of_z_scores(whole: Path) -> None:
    file = File(whole)
    wanted = z(file.matrix("act")) - z(file.matrix("grad"))
    delta = delta_sc(read(whole))
    np.testing.assert_allclose(delta["delta_sc"].to_numpy().reshape(10, COUNT), wanted, rtol=1e-9)
    found = integral(delta)
    assert found["sequence"].tolist() == [1000, 1001, 1002, 1003]
    assert found[["steps", "measured"]].to_numpy().tolist() == [[3, 3], [3, 3], [3, 3], [1, 1]]
    assert found["tokens"].tolist() == [153, 162, 171, 59]
    means = wanted.mean(1)
    np.testing.assert_allclose(found["integral"], [means[n : n + 3].sum() for n in (0, 3, 6, 9)], rtol=1e-9)
    steps = running(delta)
    assert steps["targets"].tolist() == [COUNT] * 10
    np.testing.assert_allclose(steps["integral"][3:6], np.cumsum(means[3:6]), rtol=1e-9)


def test_delta_sc_says_nothing_where_nothing_was_seen() -> None:
    act = np.array([[1.0, 5.0], [2.0, 6.0], [4.0, 5.5], [3.0, 7.0]])
    grad = np.array([[1.0, np.nan], [0.0, np.nan], [2.0, 3.0], [4.0, 0.0]])
    delta = delta_sc(rows(act, grad, sequence=[0, 1, 0, 0]))
    found = delta["delta_sc"].to_numpy().reshape(4, 2)
    seen = [0, 2, 3]
    np.testing.assert_allclose(found[seen, 0], z(act[seen, 0]) - z(grad[seen, 0]))
    assert np.isnan(found[1, 0])  # no gradient
    assert np.isnan(found[:, 1]).all()  # one measured step has nothing to be compared with
    steps = running(delta)
    assert steps["targets"].tolist() == [1, 1, 1, 0]
    sums = integral(delta)
    np.testing.assert_allclose(sums["integral"][0], found[seen, 0].sum())
    assert np.isnan(sums["integral"][1])
    assert sums[["steps", "measured"]].to_numpy().tolist() == [[3, 3], [1, 0]]
    with pytest.raises(BenchError, match="no column delta_sc"):
        integral(rows(act, grad))


def test_a_constant_norm_has_no_say() -> None:
    """Nor has one that only jumps between two neighbouring codes."""
    jump = lognorm.decode(np.array([40000, 40001, 40000, 40000], dtype=np.uint16))
    grad = np.array([1.0, 2.0, 3.0, 4.0])
    for act in (np.full(4, 3.3), jump):
        np.testing.assert_allclose(delta_sc(rows(act, grad))["delta_sc"], -z(grad))
    assert (delta_sc(rows(jump, jump))["delta_sc"] == 0).all()


@pytest.mark.parametrize(
    ("grad", "warning"),
    [(0.0, "every measured gradient is 0"), (np.nan, "no gradient was measured"), (1.0, None)],
)
def test_a_scan_without_gradients_is_called_out(
    path: Path, grad: float, warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    values = norms(0)
    values[:, 1] = grad
    values[0, 1] = np.nan
    with Writer(path, TARGETS, META) as file:
        file.write(0, 0, 9, values, [1] * COUNT)
    found = summarise(File(path))
    assert (found.records, found.steps, found.sequences, found.tokens) == (4, 1, 1, 9)
    assert found.methods == {"grad": 4}
    assert (found.warning or "").startswith(warning or "")
    assert (found.warning is None) == (warning is None)
    assert cli.main(["mscan", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert ("warning: " in out) == (warning is not None)
    if grad == 0:
        assert "75.0% 0, 25.0% not measured" in out


# Out of the format, and the command.


def test_parquet_says_the_same(whole: Path, tmp_path: Path) -> None:
    to_parquet(whole, tmp_path / "x.parquet")
    equal(pd.read_parquet(tmp_path / "x.parquet"), read(whole))
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert json.loads(file.schema_arrow.metadata[b"mscan"])["meta"] == META
    assert file.num_row_groups == 5


def test_info_and_head(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mscan", "info", str(whole)]) == 0
    out = capsys.readouterr().out
    for line in ("40 in 5 segments", "10, from 0 to 9", "4: 1 linear, 1 neurons, 1 experts, 1 embedding", "meta model"):
        assert line in out
    assert "torn" not in out
    assert "warning" not in out
    assert cli.main(["mscan", "head", str(whole), "-n", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].split() == ["step", "sequence", "tokens", "target", "layer", "kind", "method", "act", "grad"]


def test_export_by_command(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.parquet", "a.csv"):
        assert cli.main(["mscan", "export", str(whole), str(tmp_path / name)]) == 0
    assert capsys.readouterr().err == ""
    found = pd.read_csv(tmp_path / "a.csv")
    np.testing.assert_allclose(found["grad"], read(whole)["grad"], rtol=1e-5)
    assert found["target"].tolist() == read(whole)["target"].tolist()
    for out, line in (("a.txt", ".parquet or .csv"), ("none/a.csv", "No such file")):
        assert cli.main(["mscan", "export", str(whole), str(tmp_path / out)]) == 1
        assert line in capsys.readouterr().err


def test_torn_and_damaged_files_by_command(
    whole: Path, ends: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn, damaged = tmp_path / "torn", tmp_path / "damaged"
    torn.write_bytes(whole.read_bytes()[: ends[2] + 9])
    assert cli.main(["mscan", "info", str(torn)]) == 0
    assert "\ntorn: " in capsys.readouterr().out
    assert cli.main(["mscan", "export", str(torn), str(tmp_path / "t.csv")]) == 0
    assert "16 records up to step 3 are complete, 9 bytes after them are not" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "t.csv")) == 16
    damaged.write_bytes(flipped(whole.read_bytes(), ends[2] + 50, 0))
    assert cli.main(["mscan", "info", str(damaged)]) == 1
    assert "segment 3 of 5" in capsys.readouterr().err
    assert cli.main(["mscan", "info", str(damaged), "--salvage"]) == 0
    assert "damaged: segment 3 of 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["mscan"])
