"""Scoring by several processes, started by `accelerate launch`: the same parts, whatever becomes of a process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import select_worker
from tinyonn_lib.selection.select import cut, score
from tinyonn_lib.selection.select_worker import Job, run, take_part

from .select_fakes import Hashed, make

RECORDS = 96


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[None]:
    """Processes find the module with their scorer, with one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def job(tmp_path: Path) -> Job:
    lines = [json.dumps({"text": f"text {n}"}) for n in range(RECORDS - 1)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, "5"]) + "\n")
    (tmp_path / "selector").mkdir()
    (tmp_path / "selector" / "selector.json").write_text("{}")
    return Job(str(tmp_path / "data.jsonl"), str(tmp_path / "scored"), str(tmp_path / "selector"), chunk=10)


def outputs(folder: Path, out: Path) -> dict[str, bytes]:
    cut(folder, "random", 0.4, out / "a.parquet", out / "a.jsonl")
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_processes_one_of_them_killed(tmp_path: Path, job: Job) -> None:
    """The second of three kills itself at its third chunk, until that is its only one left."""
    options: dict[str, Any] = {"kill_at": 3, "rank": 1}
    job = replace(job, options=options)
    with pytest.raises(BenchError, match=r"a scoring process was killed by signal 9 .*finished chunks are kept"):
        run(job, 3, module="select_fakes", log=lambda line: None)
    parts = next(path for path in (tmp_path / "scored").iterdir() if path.is_dir())
    before = {path: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.parquet")}
    names = {path.name for path in before}
    assert {"0000001-10.parquet", "0000004-10.parquet"} <= names
    assert "0000007-10.parquet" not in names
    with pytest.raises(BenchError, match="are scored: score again"):
        outputs(tmp_path / "scored", tmp_path / "out")

    told: list[tuple[int, int, str]] = []
    log: list[str] = []
    run(job, 3, module="select_fakes", log=log.append, progress=lambda *a: told.append(a))
    assert told[0][0] >= sum(int(path.stem.partition("-")[2]) for path in before)
    assert told[-1] == (RECORDS, RECORDS, "")
    assert not [line for line in log if "Error" in line or "Traceback" in line]
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time
    score(job.source, Hashed(), tmp_path / "alone", settings={}, chunk=10)
    assert outputs(tmp_path / "scored", tmp_path / "out") == outputs(tmp_path / "alone", tmp_path / "expected")


def test_what_a_process_says_went_wrong(job: Job) -> None:
    with pytest.raises(BenchError, match="^no heart for it$"):
        run(replace(job, options={"fail_at": 2}), 2, module="select_fakes", log=lambda line: None)


def test_nothing_is_loaded_when_all_is_done(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(job: Job, device: str) -> Any:
        made.append(device)
        return make(job, device)

    monkeypatch.setattr(select_worker, "make_scorer", counted)
    told: list[tuple[int, int, str]] = []
    run(job, progress=lambda *a: told.append(a))
    assert told[-1] == (RECORDS, RECORDS, "")
    run(job)
    run(replace(job, device="cpu"), 3)
    assert made == ["auto"]
    (Path(job.selector) / "selector.json").write_text('{"warmed": "again"}')
    run(job)
    run(replace(job, options={"seed": 1}))
    run(replace(job, dtype="bfloat16"))
    assert len(made) == 4


def test_refusals(tmp_path: Path, job: Job) -> None:
    with pytest.raises(BenchError, match="0 processes cannot score"):
        run(job, 0)
    with pytest.raises(BenchError, match="No such file or folder"):
        run(replace(job, selector=str(tmp_path / "no/selector/here")))
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"job": {"sauce": "x"}, "processes": 2}))
    with pytest.raises(BenchError, match="not a job for a scoring process"):
        take_part(file, make)
    file.write_text(json.dumps({"job": asdict(job), "processes": 2}))
    with pytest.raises(BenchError, match="2 scoring processes were asked for and accelerate started 1"):
        take_part(file, make)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [select_worker._device(wanted, 1) for wanted in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(BenchError, match="2 GPUs here and more processes"):
        select_worker._device("auto", 2)
