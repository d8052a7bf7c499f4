"""Run folders: done means manifest and matching inputs; nothing foreign is taken for one's own."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench import params, runs
from tinyonn_lib.workbench.phases import PHASES

PRETRAIN, SCAN = PHASES["pretrain"], PHASES["scan"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYONN_HOME", str(tmp_path))
    monkeypatch.delenv("TINYONN_BATCH", raising=False)
    return tmp_path


def values(phase: Any, **changed: Any) -> dict[str, Any]:
    return {**params.defaults(phase), **changed}


def finish(phase: Any, text: str = "result", **changed: Any) -> dict[str, Any]:
    """Do a phase's work: one artefact."""
    chosen = values(phase, **changed)
    run = runs.open_run(phase, params.validate(phase, chosen))
    run.path("model/out.txt").write_text(text)
    run.finish({"score": 1.0}, headline=("score", "1"))
    return chosen


def test_states() -> None:
    assert runs.state(PRETRAIN, values(PRETRAIN)) == "not run"
    chosen = finish(PRETRAIN)
    assert runs.state(PRETRAIN, chosen) == "done"
    assert runs.state(PRETRAIN, {**chosen, "tokens": 5}) == "stale"
    assert runs.state(PRETRAIN, {**chosen, "run": "other"}) == "not run"


def test_manifest_says_what_where_and_how() -> None:
    chosen = finish(PRETRAIN, tokens=77)
    folder, manifest = runs.find("pretrain", "default") or pytest.fail("no manifest")
    assert manifest["params"] == chosen
    assert manifest["changed"] == {"tokens": [params.defaults(PRETRAIN)["tokens"], 77]}
    assert manifest["outputs"]["model/out.txt"] == {"sha256": runs.sha256(folder / "model/out.txt"), "bytes": 6}
    assert {"metrics", "headline", "versions", "device", "seconds", "finished", "digest"} <= set(manifest)
    assert not (folder / ".resume").exists()


def test_later_phase_is_stale_when_its_input_changes() -> None:
    finish(PRETRAIN)
    chosen = finish(SCAN)
    assert runs.state(SCAN, chosen) == "done"
    finish(PRETRAIN)  # the same again: same digest
    assert runs.state(SCAN, chosen) == "done"
    finish(PRETRAIN, text="another model")
    assert runs.state(SCAN, chosen) == "stale"
    with pytest.raises(BenchError, match=r"cluster needs scan, whose own inputs have changed since: `tinyonn scan`"):
        runs.input_digests(PHASES["cluster"], values(PHASES["cluster"]))


def test_missing_input_names_the_command() -> None:
    with pytest.raises(BenchError, match="scan needs pretrain.*`tinyonn pretrain run=x`"):
        runs.input_digests(SCAN, values(SCAN, run="x"))


def test_base_run_lends_its_phases() -> None:
    finish(PRETRAIN)
    assert runs.state(SCAN, values(SCAN, run="sweep", base="default")) == "not run"
    chosen = finish(SCAN, run="sweep", base="default")
    assert runs.state(SCAN, chosen) == "done"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_artefact_is_noticed(damage: str, home: Path) -> None:
    chosen = finish(PRETRAIN)
    file = home / "runs/default/pretrain/model/out.txt"
    if damage == "remove":
        file.unlink()
    else:
        file.write_text("resul" if damage == "truncate" else "rEsult")
    assert runs.state(PRETRAIN, chosen) == "stale"
    run = runs.open_run(SCAN, params.validate(SCAN, values(SCAN)))
    with pytest.raises(BenchError, match="pretrain/model/out.txt is not what pretrain wrote.*`tinyonn pretrain`"):
        run.input("pretrain", "model")


def test_checkpoints_of_other_parameters_are_dropped() -> None:
    run = runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN)))
    (run.resume / "state").write_text("x")
    run.lock.release()
    again = runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN)))
    assert (again.resume / "state").exists()
    again.lock.release()
    other = runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN, tokens=5)))
    assert not (other.resume / "state").exists()
    other.path("model/out.txt")  # from the first artefact on, nothing of the other is kept
    assert list(other.resume.parent.iterdir()) == [other.resume]


def test_a_mistake_leaves_the_earlier_result_alone() -> None:
    chosen = finish(PRETRAIN)
    run = runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN, tokens=5)))
    (run.resume / "state").write_text("x")
    run.lock.release()  # it fails before it writes anything
    assert runs.state(PRETRAIN, chosen) == "done"
    run = runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN, tokens=5)))
    run.path("other.txt")
    run.lock.release()  # it fails later
    assert runs.state(PRETRAIN, chosen) == "not run"
    assert not (run.folder / "model").exists()


def test_by_hand_leaves_no_page_of_an_earlier_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "runs/default/pretrain"
    for batch, kept in (("", False), ("pretrain", True)):
        finish(PRETRAIN)
        (folder / "notebook.ipynb").write_text("{}")
        monkeypatch.setenv("TINYONN_BATCH", batch)
        run = runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN)))
        run.path("x")
        run.lock.release()
        assert (folder / "notebook.ipynb").exists() == kept
        monkeypatch.delenv("TINYONN_BATCH")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_ones_own_texts_are_an_input(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "texts.jsonl" if kind == "file" else tmp_path / "folder"
    if kind == "folder":
        source.mkdir()
    content = source if kind == "file" else source / "a.txt"
    content.write_text("one")
    chosen = finish(PRETRAIN, texts=str(source))
    assert runs.state(PRETRAIN, chosen) == "done"
    content.write_text("another")
    assert runs.state(PRETRAIN, chosen) == "stale"


def test_full_disk_is_refused_before_the_artefact(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    with pytest.raises(BenchError, match=r"needs 20 MB on disk and 1 MB are free.*TINYONN_HOME"):
        run.need_space(20_000_000)


def test_batch_mode_leaves_sealing_to_the_command(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("TINYONN_BATCH", "pretrain")
    finish(PRETRAIN)
    folder = home / "runs/default/pretrain"
    assert runs.read_manifest(folder) is None
    runs.seal(folder)
    assert runs.read_manifest(folder) is not None


def test_torn_manifest_counts_as_none(home: Path) -> None:
    chosen = finish(PRETRAIN)
    file = home / "runs/default/pretrain/manifest.json"
    file.write_text(file.read_text()[:50])
    assert runs.state(PRETRAIN, chosen) == "not run"


def _hold(ready: Any, leave: Any) -> None:
    runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN)))
    ready.set()
    leave.wait(30)


def test_second_process_is_told() -> None:
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(ready, leave))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(BenchError, match="Another process is working on runs/default/pretrain.*run=NAME"):
            runs.open_run(PRETRAIN, params.validate(PRETRAIN, values(PRETRAIN)), patience=0.2)
    finally:
        leave.set()
        holder.join(30)


def test_secret_never_reaches_the_manifest() -> None:
    with pytest.raises(BenchError, match="TINYONN_REDIS_PASSWORD"):
        params.validate(SCAN, values(SCAN, redis_url="redis://:hunter2@host:6379/0"))
    finish(PRETRAIN)
    finish(SCAN)
    _, manifest = runs.find("scan", "default") or pytest.fail("no manifest")
    assert "password" not in json.dumps(manifest).lower()
