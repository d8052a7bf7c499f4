from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from scan_models import samples, tiny
from scan_totals import bits
from scan_workers import committed, until

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import launch as launching
from tinyonn_lib.scan import workers
from tinyonn_lib.scan.launch import command, launch, scan
from tinyonn_lib.scan.records import merge_records
from tinyonn_lib.scan.server import PrivateServer
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.workers import Job, main, take_part

DRAWN = samples(400, low=50, high=100)
SEQUENCES = [index // 2 for index in range(len(DRAWN))]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    tiny().save_pretrained(folder / "model")
    pd.DataFrame({"ids": DRAWN, "sequence": SEQUENCES}).to_parquet(folder / "samples.parquet")
    return Job(
        model=str(folder / "model"), samples=str(folder / "samples.parquet"), device="cpu", rho=0.1, shards=4,
        flush_seconds=0.0, fingerprint={"model": "tiny"}, records=str(folder / "records"),
    )  # fmt: skip


def test_two_workers_of_which_one_is_killed_equal_one(
    job: Job, store: Store, server: PrivateServer, tmp_path: Path
) -> None:
    pids: list[int] = []

    def kill_one() -> None:
        until(lambda: sum(shard.epoch > 0 for shard in store.shards()) >= 2)
        pids.extend(shard.holder.pid for shard in store.shards() if shard.holder)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(BenchError, match="a scan worker was killed by signal 9 .*run the same command again"):
        launch(job, store, 2, log=lambda line: None)
    killer.join()
    assert len(set(pids)) == 2
    assert not any(map(psutil.pid_exists, pids))
    assert 0 < committed(store) < len(DRAWN)

    told: list[tuple[int, int, str]] = []
    found = launch(job, store, 2, progress=lambda *event: told.append(event))
    assert told[0][2] == "going on from the last commit"
    assert told[-1][:2] == (len(DRAWN), len(DRAWN))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Store(server.url, "one-worker") as one:
        whole = scan(replace(job, records=tmp_path / "one"), one, 1, tiny())
    torch.set_num_threads(threads)
    assert bits(found) == bits(whole)
    folders = (Path(job.records), tmp_path / "one")
    assert len({merge_records(folder, tmp_path / "all.mscan").read_bytes() for folder in folders}) == 1


def test_a_workers_own_line_is_the_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["tinyonn_lib.scan.launch"]
    monkeypatch.setattr(module, "command", lambda job, _: [sys.executable, "-m", "tinyonn_lib.scan.workers", str(job)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    log: list[str] = []
    with pytest.raises(BenchError, match="^1 scan workers were asked for and accelerate started 2"):
        launch(Job(model="m", samples="s"), store, 1, log=log.append)
    assert log == []
    with pytest.raises(BenchError, match="9 workers cannot share 8 shards"):
        launch(Job(model="m", samples="s"), store, 9)


def test_a_worker_leaves_with_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job")  # it waits for somebody to write the job
    worker = subprocess.Popen(
        [sys.executable, "-m", "tinyonn_lib.scan.workers", tmp_path / "job"],
        env=os.environ | {workers.PARENT_VARIABLE: "1"}, stdin=subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdin is not None
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(0.5)
    worker.stdin.close()
    assert worker.wait(60) == 1


def test_what_else_can_go_wrong() -> None:
    elastic = "E1121 10:03:35.8 14527 torch/distributed/elastic/api.py:1002] failed (exitcode: -9) local_rank: 0"
    for code, tail, line in (
        (1, ["loading", elastic, "exitcode : -15 (pid: 3)"], "a worker was killed by signal 9 (out of memory?); again"),
        (1, ["Traceback", "ValueError: 7", "", elastic.replace("-9", "1")], "exit code 1 (ValueError: 7); again"),
        (2, [], "a worker ended with exit code 2 (no output); again"),
    ):
        assert launching.reason(code, tail, "worker", "again").endswith(line)


def test_as_many_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--multi_gpu" in command(Path("j"), 2)
    assert "--multi_gpu" not in command(Path("j"), 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(BenchError, match="2 scan workers were asked for and accelerate started 1"):
        take_part(Job(model="m", samples="s", processes=2))


def test_samples_that_cannot_be_read(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"cannot read the samples in .*none\.parquet"):
        scan(Job(model="m", samples=tmp_path / "none.parquet"), store, 1, tiny())
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "texts.parquet")
    with pytest.raises(BenchError, match="has no column ids"):
        scan(Job(model="m", samples=tmp_path / "texts.parquet"), store, 1, tiny())


def test_each_worker_of_a_host_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers._device("cpu", 1) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [workers._device(name, rank) for name, rank in (("auto", 0), ("cuda", 1), ("cpu", 1))] == [
        "cuda:0",
        "cuda:1",
        "cpu",
    ]
    with pytest.raises(BenchError, match="2 GPUs here and more workers"):
        workers._device("auto", 2)


def test_a_job_comes_back_from_its_file(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    (tmp_path / "bad.json").write_text('{"modell": "m"}')
    for arguments, line in (
        ([str(tmp_path / "bad.json")], "is not a job for a scan worker: .*modell"),
        ([str(tmp_path / "none.json")], "is not a job for a scan worker: .*No such file"),
        ([], "give one argument"),
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("tinyonn: ")
        assert said.count("\n") == 1
        with pytest.raises(BenchError, match=line):
            raise BenchError(said)
