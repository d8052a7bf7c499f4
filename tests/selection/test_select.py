"""Scoring by chunks: exactly, whatever happens in between; every row is scored or listed with a reason."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import parts, select
from tinyonn_lib.selection.select import score

from .cuts import FILES, contents, cut_to, write
from .select_fakes import Hashed


def test_bad_rows_are_counted_and_listed(tmp_path: Path, data: str) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=50)
    found = cut_to(tmp_path / "scored", tmp_path / "out")
    kinds = {"broken UTF-8": 1, "cut off": 1, "empty": 1, "not text": 1, "too long": 1}
    assert (found.scored, found.kept, found.rejected) == (99, 30, kinds)
    rejected = pd.read_parquet(tmp_path / "out" / "rejected.parquet")
    assert rejected.values.tolist() == [
        ["a.jsonl", 39, "empty"],
        ["a.jsonl", 40, "too long: 3 tokens"],
        ["a.jsonl", 41, "not text"],
        ["a.jsonl", 42, "broken UTF-8"],
        ["a.jsonl", 43, "cut off"],
    ]


def test_nothing_to_score(tmp_path: Path) -> None:
    score(write(tmp_path / "data", a=["zzz", " "]), Hashed(), tmp_path / "scored", settings={})
    with pytest.raises(BenchError, match=r"could be scored \(1 x empty, 1 x too long\)"):
        cut_to(tmp_path / "scored", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_cutting_before_the_end(tmp_path: Path, data: str) -> None:
    with pytest.raises(BenchError, match="holds no scored rows"):
        cut_to(tmp_path / "scored", tmp_path / "out")
    with pytest.raises(BenchError, match="no heart"):
        score(data, Hashed(fail_at=3), tmp_path / "scored", settings={}, chunk=10)
    with pytest.raises(BenchError, match="Only 2 chunks are scored"):
        cut_to(tmp_path / "scored", tmp_path / "out")
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10, share=(1, 3))
    with pytest.raises(BenchError, match="Only 5 of 11 chunks are scored"):
        cut_to(tmp_path / "scored", tmp_path / "out")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, data: str) -> None:
    """SIGKILL in the middle of scoring; the finished chunks are not scored again."""
    program = """
        import sys; from pathlib import Path; from select_fakes import Hashed
        from tinyonn_lib.selection.select import score
        score(sys.argv[1], Hashed(kill_at=6), Path(sys.argv[2]), settings={"a": 1}, chunk=10)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), data, str(tmp_path / "scored")]
    assert subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode == -9
    counted = Hashed()
    told: list[tuple[int, int, str]] = []
    score(data, counted, tmp_path / "scored", settings={"a": 1}, chunk=10, progress=lambda *a: told.append(a))
    assert counted.calls == 11 - 5
    assert told[0] == (10, 104, "")
    assert told[-1] == (104, 104, "")
    cut_to(tmp_path / "scored", tmp_path / "out")
    score(data, Hashed(), tmp_path / "whole", settings={"a": 1}, chunk=10)
    cut_to(tmp_path / "whole", tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert sorted(contents(tmp_path / "out")) == sorted(FILES)


@pytest.mark.parametrize(("workers", "characters"), [(2, 10**9), (3, 10**9), (3, 30)])
def test_shares_make_the_same_parts(
    tmp_path: Path, data: str, workers: int, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_CHUNK_CHARACTERS", characters)  # long rows end a chunk early
    score(data, Hashed(), tmp_path / "alone", settings={}, chunk=7)
    for worker in reversed(range(workers)):
        score(data, Hashed(), tmp_path / "shared", settings={}, chunk=7, share=(worker, workers))
    for name in ("alone", "shared"):
        cut_to(tmp_path / name, tmp_path / f"{name} out")
    (alone,), (shared,) = ([p for p in (tmp_path / n).iterdir() if p.is_dir()] for n in ("alone", "shared"))
    assert contents(alone) == contents(shared)
    assert len(list(alone.glob("[0-9]*"))) == (15 if characters > 30 else 21)
    assert contents(tmp_path / "alone out") == contents(tmp_path / "shared out")


CHANGES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "settings": lambda data, options: options.update(settings={"seed": 2}),
    "column": lambda data, options: options.update(column="body"),
    "chunk": lambda data, options: options.update(chunk=8),
    "text": lambda data, options: (data / "a.jsonl").write_text(
        (data / "a.jsonl").read_text("latin-1").replace("1", "2")
    ),
    "file": lambda data, options: (data / "c.jsonl").write_text('"new"\n'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_is_asked_anew(tmp_path: Path, data: str, change: str) -> None:
    options: dict[str, Any] = {"settings": {"seed": 1}, "column": "text", "chunk": 10}
    score(data, Hashed(), tmp_path / "scored", **options)
    again = Hashed()
    score(data, again, tmp_path / "scored", **options)
    assert again.calls == 0
    CHANGES[change](Path(data), options)
    changed = Hashed()
    score(data, changed, tmp_path / "scored", **options)
    fresh = Hashed()
    score(data, fresh, tmp_path / "fresh", **options)
    assert changed.calls == fresh.calls
    if change != "column":  # where no row is left
        for name in ("scored", "fresh"):
            cut_to(tmp_path / name, tmp_path / f"{name} out")
        assert contents(tmp_path / "scored out") == contents(tmp_path / "fresh out")


def test_large_data_is_told_apart_by_times(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parts.content(data)
    monkeypatch.setattr(parts, "_WHOLE_HASH", 100)
    large = parts.content(data)
    assert [entry[:2] for entry in whole] == [entry[:2] for entry in large]
    assert [entry[2] for entry in large] == [(Path(data) / entry[0]).stat().st_mtime_ns for entry in large]


def test_a_full_disk_loses_nothing(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = pq.write_table, []

    def full(table: Any, where: Any, **options: Any) -> None:
        calls.append(where)
        if len(calls) == 4:
            Path(where).write_bytes(b"PAR1 half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(table, where, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(BenchError, match=r"Cannot write to .*No space left on device.*what was scored is kept"):
        score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10)
    monkeypatch.undo()
    folder = next(p for p in (tmp_path / "scored").iterdir() if p.is_dir())
    assert sorted(file.name for file in folder.iterdir()) == [f"000000{n}-10.parquet" for n in range(3)]
    counted = Hashed()
    score(data, counted, tmp_path / "scored", settings={}, chunk=10)
    assert counted.calls == 11 - 3


def test_a_damaged_chunk_is_named(tmp_path: Path, data: str) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10)
    part = next((tmp_path / "scored").glob("*/0000004-*.parquet"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(BenchError, match="0000004-10.parquet is damaged: delete it and score again"):
        cut_to(tmp_path / "scored", tmp_path / "out")


def test_a_scorer_that_mixes_up_rows_is_found_out(tmp_path: Path, data: str) -> None:
    def wrong(rows: Any) -> Any:
        table, bad = Hashed()(rows)
        return table.iloc[::-1], bad

    with pytest.raises(ValueError, match="other rows"):
        score(data, wrong, tmp_path / "scored", settings={})
