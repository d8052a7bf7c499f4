"""MMLU from a folder, without the hub: the same questions, asked as lm-eval asks them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate.task import Task, shipped

_CELLS = 6  # question, four choices, answer
_ANSWERS = {name: place for place, pair in enumerate(("0A", "1B", "2C", "3D")) for name in pair}


def tasks(folder: str | Path, fewshot: int = 5) -> list[Task]:
    """One task per subject that has a test, "mmlu_anatomy" and so on; together they are "mmlu".

    Args:
        folder: either dev/*_dev.csv and test/*_test.csv, with the columns question, choice0 to choice3 and answer
            (0 to 3), or without a header and with A to D as answers, as in the original archive (Hendrycks et al.
            2021); or one folder per subject with dev-*.parquet and test-*.parquet, as the hub's cais/mmlu.
        fewshot: examples in front of each question, the first ones of dev.

    Raises:
        BenchError: no such files, a damaged row, or too few examples.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise BenchError(f"No folder {folder}: give MMLU's folder, with dev/*.csv and test/*.csv in it.")
    tests = _files(folder, "test")
    if not tests:
        raise BenchError(f"{folder} holds no test/*_test.csv: give MMLU's folder, with dev/ and test/ in it.")
    examples = _files(folder, "dev") if fewshot else {}
    return [_task(subject, path, examples.get(subject), fewshot) for subject, path in tests.items()]


def _files(folder: Path, split: str) -> dict[str, Path]:
    """Subject to its file, by name."""
    found = {path.stem.removesuffix(f"_{split}"): path for path in folder.glob(f"{split}/*.csv")}
    # The hub's folder also holds "all", every subject once more.
    hub = {path.parent.name: path for path in folder.glob(f"*/{split}-*.parquet") if path.parent.name != "all"}
    return dict(sorted((found or hub).items()))


def _task(subject: str, test: Path, dev: Path | None, fewshot: int) -> Task:
    config = shipped("mmlu")
    config |= {
        "task": f"mmlu_{subject}",
        "description": config["description"].replace("{subject}", subject.replace("_", " ")),
        "num_fewshot": fewshot,
    }
    documents = {"test": list(_rows(test, subject)), "dev": list(_rows(dev, subject)) if dev else []}
    if not documents["test"]:
        raise BenchError(f"{test.name} holds no question: is the file cut off?")
    if len(documents["dev"]) < fewshot:
        raise BenchError(
            f"{subject} has {len(documents['dev'])} examples in dev, {fewshot} were asked for: complete the folder, or "
            "ask with fewer."
        )
    if not fewshot:
        del documents["dev"], config["fewshot_split"], config["fewshot_config"]
    return Task(config, documents, parent="mmlu")


def _rows(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    for number, cells in _cells(path):
        if len(cells) != _CELLS:
            raise BenchError(
                f"{path.name} row {number} has {len(cells)} cells, not {_CELLS}: question, four choices, answer."
            )
        question, *choices, answer = (str(cell) for cell in cells)
        if answer.strip() not in _ANSWERS:
            raise BenchError(f"{path.name} row {number}: the answer '{answer[:20]}' is none of 0 to 3 or A to D.")
        if not question.strip():
            raise BenchError(f"{path.name} row {number} has no question.")
        yield {"question": question, "subject": subject, "choices": choices, "answer": _ANSWERS[answer.strip()]}


def _cells(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """(number from 1, cells) of every row that is not the header."""
    try:
        if path.suffix == ".parquet":
            import pandas as pd

            table = pd.read_parquet(path, columns=["question", "choices", "answer"])
            for number, (question, choices, answer) in enumerate(table.itertuples(index=False), start=1):
                yield number, [question, *choices, answer]
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.reader(file), start=1):
                if cells and not (number == 1 and cells[-1].strip().lower() == "answer"):
                    yield number, cells
    except (OSError, ValueError, KeyError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        line = (str(error).splitlines() or ["?"])[0][:200]
        raise BenchError(f"{path.name} is damaged: {line}. Copy it again.") from error
