"""What the command makes of its words, without running a notebook."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench import cli, params, runs
from tinyonn_lib.workbench.phases import PHASES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYONN_HOME", str(tmp_path))
    return tmp_path


def plan(which: str, *overrides: str, sweep: bool = False) -> dict[str, dict[str, Any]]:
    return {phase.name: values for phase, values in cli._plan(which, overrides, sweep)}


def finish(phase: str, **changed: Any) -> None:
    chosen = PHASES[phase]
    run = runs.open_run(chosen, params.validate(chosen, {**params.defaults(chosen), **changed}))
    run.finish({}, headline=("n", "1"))


def test_overrides_find_their_phase() -> None:
    found = plan("all", "scan.tokens=7", "run=x")
    assert set(found) == set(PHASES)
    assert found["scan"]["tokens"] == 7
    assert {values["run"] for values in found.values()} == {"x"}
    assert plan("scan", "tokens=7")["scan"] == plan("scan", "scan.tokens=7")["scan"]
    with pytest.raises(BenchError, match="'tokens=7': say whose"):
        plan("all", "tokens=7")


def test_own_model_and_texts_need_no_pretraining() -> None:
    own = ["scan.model=a/b", "scan.texts=c/d", "selector.texts=c/d", "target.model=e/f"]
    own += ["kv.teacher=g/h", "kv.student=i/j", "kv.texts=c/d"]
    own += ["align.model=g/h", "align.student=i/j", "align.texts=c/d"]
    assert list(plan("all", *own)) == [name for name in PHASES if name != "pretrain"]
    for place in range(len(own)):
        assert "pretrain" in plan("all", *own[:place], *own[place + 1 :]), f"without {own[place]} a phase reads it"


def test_a_run_keeps_what_was_chosen_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    finish("pretrain", tokens=5)
    assert plan("all")["pretrain"]["tokens"] == 5
    assert "pretrain keeps tokens=5" in capsys.readouterr().out
    assert plan("all", "pretrain.tokens=6")["pretrain"]["tokens"] == 6
    assert plan("all", "run=other")["pretrain"]["tokens"] == params.defaults(PHASES["pretrain"])["tokens"]


def test_a_profile_that_is_named_counts_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a profile could not bring a value back to its default."""
    folder = tmp_path / "params"
    shutil.copytree(params.ROOT / "params", folder)
    (folder / "mine").mkdir()
    default = params.defaults(PHASES["pretrain"])["tokens"]
    (folder / "mine/pretrain.yaml").write_text(f"tokens: {default}  # as the default\n")
    monkeypatch.setattr(params, "ROOT", tmp_path)
    finish("pretrain", tokens=5)
    assert plan("pretrain")["pretrain"]["tokens"] == 5
    assert plan("pretrain", "profile=mine")["pretrain"]["tokens"] == default


def test_sweep_names_are_folder_names_on_the_same_base() -> None:
    found = plan("scan", "texts=my data/a.jsonl", "tokens=7", sweep=True)["scan"]
    assert found["run"] == "default,texts=my-data-a.jsonl,tokens=7"
    assert found["base"] == "default"
    long = [plan("scan", f"texts={'/folder' * 40}", f"tokens={tokens}", sweep=True)["scan"]["run"] for tokens in (7, 8)]
    assert long[0] != long[1], "two jobs of a sweep never share a folder"
    assert plan("scan", "run='quoted'")["scan"]["run"] == "quoted"


def test_paths_are_those_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert plan("scan", "texts=here.jsonl")["scan"]["texts"] == str(tmp_path / "here.jsonl")
    assert plan("scan", "texts=owner/name")["scan"]["texts"] == "owner/name"


def test_status_says_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    assert "next: `tinyonn pretrain`" in capsys.readouterr().out
    finish("pretrain")
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert "01 pretrain   done" in said
    assert "next: `tinyonn scan`" in said
    assert cli.main(["status", "nothing"]) == 1
    assert "There is no run 'nothing'" in capsys.readouterr().err


def test_help_explains_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["scan", "--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    for key, comment in params.comments(PHASES["scan"]).items():
        assert key in said
        assert comment in said


def test_home_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("TINYONN_HOME", "/dev/null/x")
    assert cli.main(["pretrain"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "TINYONN_HOME" in said
