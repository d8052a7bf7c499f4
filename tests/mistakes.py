"""What tests of bad input share: a finished run, the command beside it, and what it must say and leave."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import load
from tinyonn_lib.workbench import params, runs
from tinyonn_lib.workbench.phases import PHASES

from . import tiny


@dataclass(frozen=True)
class Case:
    """A command in a run of its own, whose earlier phases are the finished run's, and what its one line must say."""

    phase: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def bad(phase: str, *arguments: object, says: tuple[str, ...], **environment: str) -> Case:
    return Case(phase, tuple(map(str, arguments)), says, environment)


def sizes(phase: str, home: Path) -> list[str]:
    """The overrides that make this phase small."""
    return [o.removeprefix(f"{phase}.") for o in tiny.overrides(home / "texts.jsonl") if o.startswith(f"{phase}.")]


def cells(phase: str, overrides: list[str]) -> None:
    """A phase's notebook, cell by cell in this process: what the command does, without its kernel."""
    notebook = load_notebook_node(str(PHASES[phase].notebook))
    notebook = parameterize_notebook(notebook, params.compose(PHASES[phase], overrides), kernel_name="python3")
    namespace: dict[str, Any] = {"In": []}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            namespace["In"].append(cell.source)
            exec(cell.source, namespace)


def stranger(home: Path, family: str, folder: str = "", **options: Any) -> Path:
    """A tiny model of another family with the tokenizer of `pretrain`, in this folder, else in one of its name."""
    import transformers

    made = load.load_tokenizer(str(home / "runs/default/pretrain/model"))
    torch.manual_seed(0)
    shape = {"vocab_size": len(made), "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": made.bos_token_id}
    shape |= {"eos_token_id": made.eos_token_id, "pad_token_id": None}
    config = getattr(transformers, f"{family}Config")(**(shape | options))
    place = home / (folder or family)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    made.save_pretrained(place)
    return place


def mixture(home: Path) -> Path:
    """A mixture of experts that is nobody's work: spares the phases that make one."""
    return stranger(
        home, "Olmoe", "moe", intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip


@contextmanager
def finished(folder: Path, *phases: str) -> Iterator[Path]:
    """Run `default` with these phases done: their notebooks' cells, run here to spare the kernels."""
    tiny.write_texts(folder / "texts.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYONN_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("TINYONN_BATCH", raising=False)
        for phase in phases:
            cells(phase, [*sizes(phase, folder), *([f"model={mixture(folder)}"] if phase == "selector" else [])])
        yield folder


def fingerprints(home: Path) -> dict[str, str]:
    files = [path for path in (home / "runs/default").rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): runs.sha256(path) for path in files}


def call(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    surrounding = tiny.environment(home) | environment
    return subprocess.run(
        tiny.command(*arguments), env=surrounding, capture_output=True, text=True, timeout=300, check=False
    )


def one_line(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tinyonn: ")
    for said in says:
        assert said in lines[0]
    assert "Traceback" not in done.stdout


def stops(phase: str, home: Path, name: str, arguments: list[str], says: str) -> None:
    """The phase's cells end in one line that says this, leave no result, and leave run `default` alone.

    Args:
        phase: Which notebook's cells.
        home: Where the runs are; `{}` in the arguments stands for it.
        name: The mistake's; the run is called after it.
        arguments: The mistake, as overrides of a small phase's parameters.
        says: A regular expression for the line.
    """
    given = [argument.replace("{}", str(home)) for argument in arguments]
    run, before = name.replace(" ", "_"), fingerprints(home)
    with pytest.raises(BenchError, match=says) as error:
        cells(phase, [*sizes(phase, home), f"run={run}", "base=default", *given])
    assert "\n" not in str(error.value)
    assert fingerprints(home) == before
    assert not (home / "runs" / run / phase / "manifest.json").exists()


def refused(home: Path, cases: Mapping[str, Case], subtests: pytest.Subtests) -> None:
    """Two commands at a time: each says its one line, keeps its partial notebook, and leaves run `default` alone."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        case = cases[name]
        return call(home, case.phase, f"run={name}", "base=default", *case.arguments, **case.environment)

    before = fingerprints(home)
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(cases, pool.map(run, cases), strict=True))
    for name, done in answers.items():
        with subtests.test(name):
            one_line(done, *cases[name].says)
            assert "secret" not in done.stdout + done.stderr
            folder = home / "runs" / name / cases[name].phase
            assert (folder / "notebook.ipynb").is_file(), "the partial notebook stays"
            assert not list(folder.glob("*manifest.json*"))
    assert fingerprints(home) == before
