"""Parameters: YAML is the truth, Hydra composes, pydantic guards, notebooks mirror."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any, get_args

import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.scores import RANKINGS
from tinyonn_lib.workbench import execute, params, start, values, words
from tinyonn_lib.workbench.notebook import assigned
from tinyonn_lib.workbench.phases import PHASES, ROOT

EVERY = pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
SCAN = PHASES["scan"]


@EVERY
def test_default_is_complete_and_valid(phase: Any) -> None:
    values = params.defaults(phase)
    assert set(values) == set(phase.schema.model_fields)
    assert params.validate(phase, values).model_dump() == values


def test_names_are_those_of_the_library() -> None:
    assert get_args(values.Ranking) == tuple(RANKINGS), (
        "written out there, because the library's takes seconds to import"
    )
    assert get_args(values.Corruption) == tuple(CORRUPTIONS)


def test_params_files_are_clean() -> None:
    files = sorted((ROOT / "params").rglob("*.yaml"))
    kept = [file for file in files if file.parent.name not in ("local", "accelerate")]
    assert params.lint(kept) == []


def test_notebooks_mirror_params() -> None:
    assert params.sync(check=True) == []


@EVERY
def test_parameters_cell_is_packed_and_says_the_same(phase: Any) -> None:
    cell = params.parameters_cell(phase)
    assert assigned([cell]) == params.defaults(phase)
    assert max(map(len, cell.splitlines())) <= 100
    assert len(cell.splitlines()) <= 12  # of 15: parameters will be added


def test_packed_values_may_hold_what_python_reads_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"text": "a; b = 'c' # \"d\" \\ é", "long": "x" * 120, "minus": -0.5, "flag": False, "last": ""}
    monkeypatch.setattr(params, "defaults", lambda phase: values)
    cell = params.parameters_cell(SCAN)
    assert assigned([cell]) == values
    assert len(cell.splitlines()) == 5  # the long one has a line to itself


def test_papermill_injects_below_the_packed_cell() -> None:
    import papermill

    given = {"tokens": 1000, "texts": "my; texts.jsonl"}
    notebook = papermill.execute_notebook(SCAN.notebook, None, given, prepare_only=True)
    assert assigned([cell.source for cell in notebook.cells]) == params.defaults(SCAN) | given


def test_batch_is_without_papermills_warnings_about_packed_lines(caplog: pytest.LogCaptureFixture) -> None:
    import papermill
    from papermill.log import logger

    with execute._packed_parameters():
        papermill.execute_notebook(SCAN.notebook, None, {"tokens": 1000}, prepare_only=True)
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == ["something else"]
    papermill.execute_notebook(SCAN.notebook, None, {"tokens": 1000}, prepare_only=True)
    assert "Passed unknown parameter: tokens" in caplog.text  # outside all is as it was


def test_start_shows_values_and_meanings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setenv("TINYONN_HOME", str(tmp_path))
    monkeypatch.setattr("IPython.display.display", shown.append)
    phase = PHASES["pretrain"]
    p, run = start("pretrain", {**params.defaults(phase), "texts": "<script>"})
    run.lock.release()
    (table,) = (output.data for output in shown)
    assert p.texts == "<script>"
    assert table.startswith(words.PARAMETERS)
    assert "<mark>&quot;&lt;script&gt;&quot;</mark></code> (default <code>&quot;python-docs&quot;</code>)" in table
    assert table.count("<mark>") == 1
    for meaning in params.comments(phase).values():
        assert html.escape(meaning) in table


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("lr: 1e-4  # rate", "1.0e-4"),
        ("lr: ${other}  # rate", "interpolation"),
        ("lr: 0.1", "no comment"),
        ("  nested: 1  # deep", "not a flat"),
    ],
)
def test_lint_finds(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(line + "\n")
    (found,) = params.lint([file])
    assert complaint in found
    assert "x.yaml:1" in found


def test_overrides_profile_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert params.compose(SCAN, ["tokens=2e5"])["tokens"] == 200_000
    folder = tmp_path / "params" / "mine"
    folder.mkdir(parents=True)
    for file in (ROOT / "params").glob("*.yaml"):
        (tmp_path / "params" / file.name).write_text(file.read_text())
    (folder / "scan.yaml").write_text("tokens: 7  # few\nrho: 0.2  # wide\n")
    monkeypatch.setattr(params, "ROOT", tmp_path)
    values = params.compose(SCAN, ["tokens=9"], profile="mine")
    assert (values["rho"], values["tokens"]) == (0.2, 9)  # the overlay counts, and an override beats it
    with pytest.raises(BenchError, match="no profile 'other'.*mine"):
        params.compose(SCAN, profile="other")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokns=3", ["tokns", "did you mean 'tokens'"]),
        ("tokens=abc", ["scan.tokens = 'abc'", "integer"]),
        ("tokens=0", ["scan.tokens = 0", "greater than or equal to 1"]),
        ("rho=1.5", ["scan.rho = 1.5", "less than 1"]),
        ("dtype=fp8", ["scan.dtype = 'fp8'", "'nf4'"]),
        ("batch=4", ["scan.batch = 4"]),
        ("run=../evil", ["scan.run = '../evil'"]),
        ("tokens", ["not an override", "key=value"]),
        ("redis_url=redis://me:secret@host/0", ["TINYONN_REDIS_PASSWORD"]),
    ],
)
def test_bad_value_is_one_clear_line(override: str, words: list[str]) -> None:
    with pytest.raises(BenchError) as error:
        params.compose(SCAN, [override])
    line = str(error.value)
    assert "\n" not in line
    assert "secret" not in line
    for word in words:
        assert word.lower() in line.lower()


def test_sweep_is_the_product() -> None:
    jobs = params.expand(["lr=1.0e-3,3.0e-3", "seed=0,1", "k=5"])
    assert len(jobs) == 4
    assert ["lr=0.001", "seed=1", "k=5"] in jobs


def test_changed_lists_default_and_value() -> None:
    values = params.compose(SCAN, ["tokens=5", "run=x"])
    assert params.changed(SCAN, values) == {"tokens": [params.defaults(SCAN)["tokens"], 5]}


def test_parameters_are_read_from_their_cells_alone() -> None:
    cells = [
        "# Mirrors params/scan.yaml; change it there\ntokens = 5  # few\nname = 'x'",
        "# Parameters\ntokens = 2 * 10**3\nwild = open('/etc/passwd')",
        "scratch = 3",
        "import os",
    ]
    assert assigned(cells) == {"tokens": 2000, "name": "x"}


@pytest.mark.parametrize(
    ("phase", "overrides", "line"),
    [
        ("router", ["batch=8", "accumulate=3"], "batch=8 must be a multiple of accumulate=3"),
        ("target", ["batch=8", "accumulate=3"], "batch=8 must be a multiple of accumulate=3"),
        ("router", ["dtype=nf4", "lr_experts=0.1"], "quantised experts cannot train"),
        ("target", ["dtype=nf4", "processes=2"], "a 4-bit base trains in one process"),
    ],
)
def test_what_trainings_share_and_what_each_adds(phase: str, overrides: list[str], line: str) -> None:
    with pytest.raises(BenchError, match=f"^{phase}: {line}"):
        params.compose(PHASES[phase], overrides)
    assert params.compose(PHASES[phase], ["batch=8", "accumulate=2"])["accumulate"] == 2


def test_rule_over_several_keys_is_one_clear_line() -> None:
    with pytest.raises(BenchError, match=r"^pretrain: heads=3 must be a multiple of kv_heads=2\.$"):
        params.compose(PHASES["pretrain"], ["heads=3", "kv_heads=2"])


def test_one_active_share_may_be_a_number() -> None:
    assert params.compose(PHASES["experts"], ["active=0.3"])["active"] == "0.3"
    with pytest.raises(
        BenchError, match=r"^experts\.active = 1\.5: expected numbers in \(0, 1\], separated by blanks\."
    ):
        params.compose(PHASES["experts"], ["active=1.5"])
