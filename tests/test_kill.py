"""SIGKILL in every phase: the next call goes on, and the end is that of a run nobody touched."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tinyonn_lib.workbench.phases import PHASES

from . import tiny

# Trainings and scan last some seconds, so that a kill lands inside them: a kernel outlives its command by up to one.
LONGER = (
    "pretrain.calibration=0.4 pretrain.tokens=64000 pretrain.checkpoint_seconds=0.2 "
    "scan.tokens=28000 scan.length=24 scan.flush_seconds=0.1 "
    "router.tokens=24000 router.warm_tokens=0 router.checkpoint_seconds=0.2 "
    "selector.rows=2400 selector.checkpoint_seconds=0.2 select.pool_rows=4000 select.batch_tokens=64 "
    "target.tokens=12000 target.checkpoint_seconds=0.1 kv.steps=40 kv.checkpoint_seconds=0.1"
)


def begin(home: Path, texts: Path, name: str) -> subprocess.Popen[bytes]:
    """`tinyonn all`, its output in files: a pipe would be held open by a kernel that outlives the command."""
    arguments = tiny.command("all", *tiny.overrides(texts), *LONGER.split())
    home.mkdir(exist_ok=True)
    with (home / f"{name}.out").open("wb") as out, (home / f"{name}.err").open("wb") as err:
        return subprocess.Popen(arguments, env=tiny.environment(home), stdout=out, stderr=err)


def processes(home: Path) -> list[psutil.Process]:
    """Everything alive that a run in `home` started: its command, kernels, servers, watchdogs."""
    found = []
    for process in psutil.process_iter():
        try:
            # A server rewrites its environment to show a title, so look at its folder, too.
            traces = [*process.cmdline(), process.cwd(), process.environ().get("TINYONN_HOME", "")]
        except (psutil.Error, OSError):  # gone meanwhile, or someone else's
            continue
        if any(str(home) in trace for trace in traces):
            found.append(process)
    return found


def cells_done(folder: Path, wanted: int) -> bool:
    try:
        cells = json.loads((folder / "notebook.ipynb").read_text("utf-8"))["cells"]
    except (OSError, ValueError):  # not there, or papermill is writing it
        return False
    done = [c for c in cells if c["cell_type"] == "code" and c["metadata"].get("papermill", {}).get("status")]
    return sum(c["metadata"]["papermill"]["status"] == "completed" for c in done) >= wanted


def committed(folder: Path) -> bool:
    logs = folder.glob(".resume/*/store/appendonlydir/*.aof")
    return any(b"position" in log.read_bytes() for log in logs)


AMIDST: dict[str, Callable[[Path], bool]] = {
    "pretrain": lambda folder: any(folder.glob(".resume/*/model.pt")),
    "scan": committed,
    "cluster": lambda folder: cells_done(folder, 4),  # of ten; the map comes later
    "experts": lambda folder: (folder / "checkpoint/model.safetensors").exists(),  # exported, not yet proven
    "router": lambda folder: any(folder.glob(".resume/*/trained_router.pt")),
    "selector": lambda folder: any(folder.glob(".resume/*/warm_0_1.pt")),
    "select": lambda folder: any(folder.glob(".kept/*/0*.parquet")),  # the first of four
    "target": lambda folder: any(folder.glob(".resume/*/contest/*.npz")),  # the first training
    "evaluate": lambda folder: (folder / "tasks/cloze.jsonl").exists(),
    "kv": lambda folder: any(folder.glob(".resume/*/contest/ours*.pt")),
    "align": lambda folder: any(folder.glob(".resume/*/contest/*")),  # GSPO, trained or being judged
}
RESUMED = {
    "pretrain": "model: .* steps", "scan": "scan: .* samples", "router": "trained router: .* steps",
    "selector": "warm-up, seed 0: .* steps",
}  # fmt: skip


def kill_amidst(home: Path, phase: str, running: subprocess.Popen[bytes], patience: float = 120) -> None:
    folder, deadline = home / "runs/default" / phase, time.monotonic() + patience
    while not AMIDST[phase](folder):
        assert running.poll() is None, f"ended before {phase}: {[p.read_text() for p in home.glob('*.err')]}"
        assert time.monotonic() < deadline, f"{phase} never got there"
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert not (folder / "manifest.json").exists()


def results(home: Path) -> dict[str, dict[str, Any]]:
    """What a run says and what it leaves, without when and how fast."""
    found = {}
    for phase in PHASES:
        manifest = json.loads((home / "runs/default" / phase / "manifest.json").read_text())
        found[phase] = {key: manifest[key] for key in ("metrics", "outputs", "inputs", "headline", "digest")}
    return found


def test_a_run_killed_in_every_phase_ends_like_one_that_was_not(tmp_path: Path) -> None:
    texts = tiny.write_texts(tmp_path / "texts.jsonl", 1500)
    whole, broken, last = tmp_path / "whole", tmp_path / "broken", list(PHASES)[-1]
    reference = begin(whole, texts, "all")
    running = begin(broken, texts, "until pretrain")
    try:
        for phase in PHASES:
            kill_amidst(broken, phase, running)
            left = processes(broken)
            running = begin(broken, texts, f"after {phase}")  # at once, while the old kernel may still be there
            _, alive = psutil.wait_procs(left, timeout=30)
            assert not alive, f"outlived the kill in {phase}: {alive}"
        assert running.wait(180) == 0, (broken / f"after {last}.err").read_text()
        assert reference.wait(180) == 0, (whole / "all.err").read_text()
    finally:
        for process in (running, reference):
            process.kill()
            process.wait()

    for phase, line in RESUMED.items():
        said = (broken / f"after {phase}.out").read_text()
        match = re.search(line.replace(".*", r"([\d,]+) of ([\d,]+)") + ", going on from the last", said)
        assert match, said
        done, total = (int(group.replace(",", "")) for group in match.groups())
        assert 0 < done < total, f"{phase} went on from {done} of {total}"
    trained = re.search(r"training: ([\d,]+) of \1 steps, going on", (broken / "after target.out").read_text())
    assert trained, "the training before the contest was done already"
    table = (broken / f"after {last}.out").read_text()
    assert re.findall(r"^(?:\w+) +(ran|up to date) ", table, re.M) == ["up to date"] * (len(PHASES) - 1) + ["ran"]

    expected, found = results(whole), results(broken)
    for phase in PHASES:
        assert found[phase] == expected[phase], phase
    assert {"neurons.parquet", "texts.parquet"} <= set(found["scan"]["outputs"])
    assert "model/model.safetensors" in found["pretrain"]["outputs"]
    assert "checkpoint/model.safetensors" in found["router"]["outputs"]
    assert "checkpoint/model.safetensors" in found["experts"]["outputs"]
    assert {"epoch_2/selector.json", "seed_1/epoch_2/routers.safetensors"} <= set(found["selector"]["outputs"])
    assert {"selected.parquet", "selected.jsonl", "against/full.parquet"} <= set(found["select"]["outputs"])
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(found["target"]["outputs"])
    assert {"results.json", "samples.parquet"} <= set(found["evaluate"]["outputs"])
    assert {"projector/model.safetensors", "contest.parquet", "sweep.parquet"} <= set(found["kv"]["outputs"])
    _, alive = psutil.wait_procs(processes(tmp_path), timeout=15)
    assert not alive
    assert not list(broken.glob("runs/default/*/.resume/*")), "checkpoints of finished phases are removed"
