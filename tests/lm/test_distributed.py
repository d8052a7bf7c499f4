"""Training by two processes on a CPU, started by `accelerate launch`: DDP, ZeRO-2, ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import train_worker

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.launch import command, launch
from tinyonn_lib.lm.parallel import _one_by_element
from tinyonn_lib.lm.worker import PROCESSES_VARIABLE, run

CONFIGS = Path(__file__).parents[2] / "params" / "accelerate"
KINDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
# What is compared with one process: the whole module, in pieces, bare parameters, an early end (also of weights
# that ZeRO-3 deems too small to share out).
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "pieces": {"accumulate": 3},
    "listed": {"listed": True, "clip": None},
    "look": {"look": True},
    "small": {"look": True},
}
DROPPED = {"dropout": 0.1}  # random numbers, too, must go on where they were


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Workers find their module, with one thread each; the folder is where torch would compile operations."""
    folder = tmp_path_factory.mktemp("home") / "extensions"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield folder


def config(kind: str) -> Path | None:
    if kind != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'tinyonn[train]'")
    return None if kind == "ddp" else CONFIGS / f"{kind}.yaml"


@pytest.fixture(scope="module", params=list(KINDS))
def done(request: pytest.FixtureRequest, home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """All runs of a kind, in one launch; with ZeRO-2 after one whose first process killed itself."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    file, saved = folder / "job.json", DROPPED | {"checkpoint": str(folder / "saved.pt")}
    told: list[tuple[int, int, str]] = []
    stopped = {"stopped": saved | {"stop_at": 5}}
    if kind == "zero2":
        stopped = {}
        file.write_text(json.dumps({"killed": saved | {"kill_at": 5}}))
        with pytest.raises(BenchError, match="a training process was killed by signal 9 .*from the last checkpoint"):
            launch("train_worker", file, processes=2, config=config(kind), log=lambda line: None)
        assert (folder / "saved.pt.zero" / "5").is_dir()
    runs = PLAIN | stopped | {"resumed": saved, "whole": DROPPED, "refused": {"count": 25}, "broken": {"broken": True}}
    file.write_text(json.dumps(runs))
    log: list[str] = []
    launch("train_worker", file, processes=2, config=config(kind), log=log.append, progress=lambda *a: told.append(a))
    assert log.count("everything is done") == 2
    assert (5, 8, "going on from the last checkpoint") in told
    return kind, folder


def read(folder: Path, name: str) -> tuple[pd.DataFrame, dict[str, torch.Tensor], dict[str, Any]]:
    """What the processes found in a run, after a look whether they found the same."""
    found = [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    histories = [pd.DataFrame(one["history"]) for one in found]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    for weight, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][weight]), weight
    return histories[0], found[0]["weights"], found[0]


@pytest.mark.parametrize("name", list(PLAIN))
def test_two_processes_learn_what_one_does(done: tuple[str, Path], name: str) -> None:
    kind, folder = done
    history, weights, found = read(folder, name)
    assert (found["world"], found["kind"]) == (2, KINDS[kind])
    alone, expected = train_worker.train(**PLAIN[name])
    assert len(history) == (6 if PLAIN[name].get("look") else 8)  # two looks without a new best
    assert alone["loss"].iloc[-1] != pytest.approx(alone["loss"].iloc[0], abs=0.1)
    pd.testing.assert_frame_equal(history, alone, rtol=2e-6, atol=2e-6)
    for weight, value in weights.items():
        torch.testing.assert_close(value, expected[weight], rtol=2e-6, atol=2e-6, msg=weight)


def test_resumed_equals_uninterrupted(done: tuple[str, Path]) -> None:
    resumed, weights, _ = read(done[1], "resumed")
    whole, expected, _ = read(done[1], "whole")
    pd.testing.assert_frame_equal(resumed, whole, rtol=0, atol=1e-6)
    for weight, value in weights.items():
        torch.testing.assert_close(value, expected[weight], rtol=0, atol=1e-6, msg=weight)
    if done[0] != "ddp":
        assert [part.name for part in (done[1] / "saved.pt.zero").iterdir()] == ["8"]  # what is old is gone
    timing: dict[str, float] = {}
    train_worker.train(**DROPPED, checkpoint=str(done[1] / "saved.pt"), timing=timing)
    assert timing["resumed_from"] == 0  # one process begins anew: it cannot read the parts of several


def test_nothing_is_opened_to_the_network_and_nothing_compiled(done: tuple[str, Path], home: Path) -> None:
    addresses = read(done[1], "plain")[2]["listens"]
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not home.exists()


def test_errors_in_one_line(done: tuple[str, Path]) -> None:
    for name, line in (
        ("refused", "A batch of 25 rows cannot be cut into equal pieces for accumulate=1 on 2 processes: make it"),
        ("broken", "The gradient is not finite at step 1 "),
    ):
        for rank in (0, 1):
            found = torch.load(done[1] / f"{name}.{rank}.pt", weights_only=True)
            assert found["weights"]["error"].startswith(line)


def test_optimizers_that_deepspeed_cannot_cut_into_pieces() -> None:
    weight, other = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    for optimizers in ([torch.optim.Muon([weight])], [torch.optim.SGD([weight]), torch.optim.SGD([other])]):
        with pytest.raises(BenchError, match="element by element, such as AdamW"):
            _one_by_element(optimizers)


def worker(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a worker that does this."""
    (tmp_path / "some_worker.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom tinyonn_lib.errors import BenchError\n"
        "from tinyonn_lib.lm import worker\ndef take_part(path):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\nsys.exit(worker.run(take_part))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_worker"


def test_a_workers_own_line_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, log = worker(tmp_path, "print('hello')\nraise BenchError('no such model')", monkeypatch), list[str]()
    with pytest.raises(BenchError, match="^no such model$"):
        launch(module, tmp_path / "job", processes=1, log=log.append)
    assert log == ["hello"]


def test_workers_go_with_the_process_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = worker(tmp_path, "(path.parent / str(os.getpid())).touch()\ntime.sleep(600)", monkeypatch)
    start = f"from pathlib import Path\nfrom tinyonn_lib.lm.launch import launch\nlaunch('{module}', Path({str(tmp_path / 'job')!r}), processes=2)"  # noqa: E501
    parent = subprocess.Popen([sys.executable, "-c", start])
    until(lambda: len(numbers(tmp_path)) == 2)
    pids = numbers(tmp_path)
    parent.kill()
    parent.wait()
    until(lambda: not any(map(psutil.pid_exists, pids)))


def numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def until(what: Callable[[], bool]) -> None:
    for _ in range(1200):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it never happened")


def test_as_many_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--multi_gpu" in command("m", Path("j"), 2)
    assert "--multi_gpu" not in command("m", Path("j"), 2, CONFIGS / "zero2.yaml")
    monkeypatch.setenv(PROCESSES_VARIABLE, "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "job").write_text("{}")
    assert run(train_worker.take_part, [str(tmp_path / "job")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tinyonn: 2 training processes were asked for and accelerate started 1")
    assert said.count("\n") == 1


def test_what_cannot_be_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.yaml").write_text("- a list")
    for processes, file, line in (
        (0, None, "0 processes cannot train"),
        (2, tmp_path / "none.yaml", "is not a config for accelerate"),
        (2, tmp_path / "bad.yaml", "is not a config for accelerate"),
    ):
        with pytest.raises(BenchError, match=line):
            launch("m", tmp_path / "job", processes=processes, config=file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'tinyonn\[train\]'"):
        launch("m", tmp_path / "job", processes=2, config=CONFIGS / "zero3.yaml")
