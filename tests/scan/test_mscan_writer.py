from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mscan_files import COUNT, META, TARGETS, make, norms, put

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import lognorm
from tinyonn_lib.scan.mscan import File, Writer, read
from tinyonn_lib.scan.mscan_frames import walk
from tinyonn_lib.scan.mscan_sink import Sink


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
