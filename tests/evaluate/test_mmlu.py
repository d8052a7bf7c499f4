"""MMLU from a folder asks what lm-eval's own MMLU asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from tests.evaluate.conftest import Table
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import harness, mmlu

QUESTIONS = [
    ["What is {{ 1 + 1 }}? ", "one", 'two, or "2"', "three\nor so", " four", 1],
    [" Is <b>this</b> bold?\nSay so.", "7", "No", "  ", "Maybe", 3],
    ["Which one", "a", "b", "c", "d", 0],
]


def write(folder: Path, subject: str, split: str, rows: list[list[Any]], original: bool = False) -> Path:
    path = folder / split / f"{subject}_{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=["question", "choice0", "choice1", "choice2", "choice3", "answer"])
    if original:
        table["answer"] = table["answer"].map("ABCD".__getitem__)
    table.to_csv(path, index=False, header=not original)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "high_school_physics", "dev", QUESTIONS[::-1])
    write(tmp_path, "high_school_physics", "test", QUESTIONS)
    write(tmp_path, "anatomy", "dev", QUESTIONS, original=True)
    write(tmp_path, "anatomy", "test", QUESTIONS[:2], original=True)
    write(tmp_path, "only_dev", "dev", QUESTIONS)
    return tmp_path


def test_the_config_is_lm_evals() -> None:
    import lm_eval.tasks

    theirs = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    template = yaml.safe_load((theirs / "_default_template_yaml").read_text())
    anatomy = yaml.safe_load((theirs / "mmlu_anatomy.yaml").read_text())
    config = mmlu.shipped("mmlu")
    assert {key: config[key] for key in template if key != "dataset_path"} == {
        key: value for key, value in template.items() if key != "dataset_path"
    }
    assert config["description"].replace("{subject}", "anatomy") == anatomy["description"]


def test_prompts_are_lm_evals(folder: Path, bpe: Any, table: Table) -> None:
    """Rendered by lm-eval from its own file, the data put in its data set's place."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    found = harness.run(table, bpe, mmlu.tasks(folder, fewshot=2)).samples
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / "mmlu" / "default" / "mmlu_high_school_physics.yaml")
    rows = [{"question": q, "choices": c, "answer": a} for q, *c, a in QUESTIONS]
    data = {"test": Dataset.from_list(rows), "dev": Dataset.from_list(rows[::-1])}
    task = ConfigurableTask(config={**theirs, "custom_dataset": lambda **_: data})
    expected = [task.fewshot_context(row, num_fewshot=2) for row in data["test"]]
    asked = found[(found["task"] == "mmlu_high_school_physics") & (found["metric"] == "acc")]
    assert asked["prompt"].tolist() == expected
    assert expected[0].startswith(
        "The following are multiple choice questions (with answers) about high school physics"
    )
    assert expected[0].count("Answer:") == 3
    assert "What is {{ 1 + 1 }}?\n" in expected[0]
    assert asked["target"].tolist() == ["1", "3", "0"]


def test_a_model_that_always_says_b(folder: Path, bpe: Any) -> None:
    logits = torch.zeros(len(bpe), len(bpe))
    logits[:, bpe("Answer: B")["input_ids"][-1]] = 5.0
    found = harness.run(Table(logits, length=1024), bpe, mmlu.tasks(folder, fewshot=1))
    scores = found.scores[found.scores["metric"] == "acc"].set_index("task")
    assert scores["value"].to_dict() == pytest.approx(
        {"mmlu_anatomy": 1 / 2, "mmlu_high_school_physics": 1 / 3, "mmlu": 2 / 5}
    )
    assert scores["n"].to_dict() == {"mmlu_anatomy": 2, "mmlu_high_school_physics": 3, "mmlu": 5}
    assert all(task["cut"] == 0 for task in found.tasks.values())


def test_prompts_longer_than_the_model_are_counted(folder: Path, bpe: Any, table: Table) -> None:
    found = harness.run(table, bpe, mmlu.tasks(folder, fewshot=2))
    assert found.tasks["mmlu_high_school_physics"]["cut"] == 3


def test_layouts_agree(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    for subject, path in (("anatomy", "anatomy"), ("all", "high_school_physics")):
        for split in ("dev", "test"):
            header = None if path == "anatomy" else 0
            table = pd.read_csv(folder / split / f"{path}_{split}.csv", header=header, keep_default_na=False, dtype=str)
            rows = [
                {"question": q, "subject": path, "choices": c, "answer": "ABCD".find(a) if a in "ABCD" else int(a)}
                for q, *c, a in table.itertuples(index=False)
            ]
            (hub / subject).mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_parquet(hub / subject / f"{split}-00000-of-00001.parquet")
    assert mmlu.tasks(hub, fewshot=2) == mmlu.tasks(folder, fewshot=2)[:1]
    subjects = [task.name for task in mmlu.tasks(folder, fewshot=0)]
    assert subjects == ["mmlu_anatomy", "mmlu_high_school_physics"]
    rows = [task.documents["test"] for task in mmlu.tasks(folder, fewshot=0)]
    assert [row["choices"] for row in rows[0]] == [row["choices"] for row in rows[1][:2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,a,b,c,d,A\nq,a,b,c,A\n", r"anatomy_test.csv row 2 has 5 cells"),
        ("q,a,b,c,d,E\n", r"anatomy_test.csv row 1: the answer 'E' is none of"),
        ("q,a,b,c,d,4\n", r"row 1: the answer '4'"),
        (" ,a,b,c,d,1\n", r"row 1 has no question"),
        ('q,a,b,c,d,A\n"cut off', r"anatomy_test.csv row 2 has 1 cells"),
        ("", r"anatomy_test.csv holds no question"),
        ("\xff", r"anatomy_test.csv is damaged"),
    ],
)
def test_damage_names_file_and_row(folder: Path, text: str, message: str) -> None:
    (folder / "test" / "anatomy_test.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(BenchError, match=message):
        mmlu.tasks(folder, fewshot=1)


def test_missing_parts_are_one_line(folder: Path) -> None:
    with pytest.raises(BenchError, match="anatomy has 3 examples in dev, 5 were asked for"):
        mmlu.tasks(folder)
    with pytest.raises(BenchError, match=r"holds no test/\*_test.csv"):
        mmlu.tasks(folder / "dev")
    with pytest.raises(BenchError, match="No folder"):
        mmlu.tasks(folder / "nowhere")
