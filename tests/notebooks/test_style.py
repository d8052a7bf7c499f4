"""Notebooks keep the form of a lab journal: short cells, no logic, no stored output."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tinyonn_lib.workbench.phases import PHASES, ROOT

EVERY = pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)


def read(phase: Any) -> Any:
    return nbformat.read(phase.notebook, as_version=4)


def code(phase: Any) -> list[Any]:
    return [cell for cell in read(phase).cells if cell.cell_type == "code"]


def test_every_notebook_has_its_phase_and_params() -> None:
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == sorted(p.notebook for p in PHASES.values())
    assert sorted((ROOT / "params").glob("*.yaml")) == sorted(p.params_file for p in PHASES.values())


@EVERY
def test_stored_without_outputs(phase: Any) -> None:
    notebook = read(phase)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"
    assert "papermill" not in notebook.metadata
    for cell in code(phase):
        assert cell.outputs == []
        assert cell.execution_count is None


@EVERY
def test_cells_are_short_and_define_nothing(phase: Any) -> None:
    cells = code(phase)
    assert len(cells) <= 14
    for cell in cells:
        assert len(cell.source.splitlines()) <= 15, cell.source
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source))), cell.source


@EVERY
def test_rhythm(phase: Any) -> None:
    cells = read(phase).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert cells[0].source.startswith(f"# {phase.title}\n")
    assert phase.title.endswith("?")
    places = [text.index(part) for part in ("## What we expect", "## 1 · ", "## What we learned", "## Hand-off")]
    assert places == sorted(places)
    # No two code cells in a row without a word between them, apart from parameters and set-up or a call and its figure.
    kinds = "".join(c.cell_type[0] for c in cells)
    assert "ccc" not in kinds


@EVERY
def test_names_no_path_of_a_machine(phase: Any) -> None:
    text = Path(phase.notebook).read_text("utf-8")
    assert not any(root in text for root in ("/home/", "/root/", "/Users/", "C:\\\\"))
