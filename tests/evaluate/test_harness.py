"""What reaches the network, what comes out twice, and what a user is told."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.evaluate.conftest import LENGTH, Table
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import harness, local, outcome, scorer
from tinyonn_lib.evaluate.task import Task

SIZES = {"length": LENGTH, "documents": 20, "questions": 15, "context": 24, "continuation": 10}


@pytest.fixture
def tasks(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> list[Task]:
    return local.build(texts, bpe, tmp_path / "tasks", **SIZES)


def test_local_tasks_touch_neither_network_nor_home(
    tasks: list[Task], bpe: Any, table: Table, no_network: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.load_dataset", None)
    found = harness.run(table, bpe, tasks)
    assert len(found.scores) == 5
    assert not no_network
    assert not (tmp_path / "cache").exists()


def test_two_runs_agree_to_the_bit(tasks: list[Task], bpe: Any, table: Table) -> None:
    one, two = (harness.run(table, bpe, tasks) for _ in range(2))
    pd.testing.assert_frame_equal(one.scores, two.scores, check_exact=True)
    pd.testing.assert_frame_equal(one.samples, two.samples, check_exact=True)
    assert one.tasks == two.tasks


def test_threads_and_batches_change_nothing(
    tasks: list[Task], bpe: Any, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for shards, batch in ((1, 1), (3, 5)):
        monkeypatch.setattr(scorer, "default_shards", lambda device, shards=shards: shards)
        found.append(harness.run(table, bpe, tasks, batch=batch).samples)
    pd.testing.assert_frame_equal(*found, rtol=1e-5)


def test_the_hash_is_of_what_is_asked(tasks: list[Task], bpe: Any, table: Table, other: Table) -> None:
    full, again, less = (
        harness.run(model, bpe, tasks, limit=limit).tasks for model, limit in ((table, None), (other, 99), (table, 9))
    )
    assert full == again
    assert all(full[name]["hash"] != less[name]["hash"] for name in full)
    assert [each["documents"] for each in full.values()] == [20, 15]
    assert [each["documents"] for each in less.values()] == [9, 9]


def test_standard_errors_are_over_groups(tasks: list[Task], bpe: Any, table: Table) -> None:
    found = harness.run(table, bpe, tasks)
    cloze = found.samples[found.samples["metric"] == "acc"]
    assert outcome._mean(cloze.assign(group=range(len(cloze))))[1] == pytest.approx(
        cloze["value"].std(ddof=1) / math.sqrt(len(cloze))
    )
    texts = found.samples[found.samples["task"] == "bits_per_byte"]
    whole = texts.assign(cost=texts["value"] * texts["weight"]).groupby("group")[["cost", "weight"]].sum()
    rng = np.random.default_rng(0)
    drawn = whole.to_numpy()[rng.integers(len(whole), size=(20000, len(whole)))].sum(1)
    expected = (drawn[:, 0] / drawn[:, 1]).std()
    row = found.scores.set_index("metric").loc["bits_per_byte"]
    assert row["stderr"] == pytest.approx(expected, rel=0.15)  # the bootstrap lacks the factor √(G / (G − 1))


def test_progress_counts_documents_to_the_end(tasks: list[Task], bpe: Any, table: Table) -> None:
    told: list[tuple[int, int]] = []
    harness.run(table, bpe, tasks, limit=10, batch=2, progress=lambda done, total, note: told.append((done, total)))
    assert told[-1] == (20, 20)
    assert told == sorted(told)
    assert len(told) > 5
    assert len(set(told)) == len(told)  # a reporter prints the last one as a line


def test_quiet_and_leaves_logging_as_it_was(
    tasks: list[Task], bpe: Any, table: Table, capfd: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogger("lm_eval").level
    harness.run(table, bpe, tasks)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mmlu", "hf download --repo-type dataset cais/mmlu"),
        ("hellaswag", "'hellaswag' comes from the hub.*mmlu with a"),
    ],
)
def test_hub_tasks_without_a_hub_fail_before_anything_is_loaded(
    name: str, message: str, bpe: Any, table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    began = time.monotonic()
    for call in (lambda: harness.run(table, bpe, [name]), lambda: harness.named([name])):
        with pytest.raises(BenchError, match=message):
            call()
    assert time.monotonic() - began < 30  # not the minutes of retries


@pytest.mark.parametrize(
    ("names", "folder", "probed"),
    [
        (["mmlu"], "", ["cais/mmlu"]),
        (["hellaswag"], "", ["any"]),
        (["mmlu", "hellaswag"], "", ["cais/mmlu"]),
        (["mmlu", "hellaswag"], "here", ["any"]),
        (["mmlu"], "here", []),
    ],
)
def test_only_what_is_asked_of_the_hub_is_probed(
    names: list[str], folder: str, probed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hub answers, but has no MMLU."""
    asked: list[str] = []

    def status(url: str) -> int:
        asked.append("cais/mmlu" if url.endswith("/api/datasets/cais/mmlu") else "any")
        return 404 if "mmlu" in url else 200

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("tinyonn_lib.lm.hub._status", status)
    task = Task({"task": "mmlu_law"}, {})
    monkeypatch.setattr("tinyonn_lib.evaluate.mmlu.tasks", lambda folder, fewshot: [task])
    if "cais/mmlu" in probed:
        with pytest.raises(BenchError, match=r"no dataset 'cais/mmlu'.*As mmlu=FOLDER"):
            harness.named(names, mmlu_folder=folder)
    else:
        assert harness.named(names, mmlu_folder=folder) == [task if n == "mmlu" else n for n in names]
    assert asked == probed


def test_limit_and_batch_below_one_are_refused(tasks: list[Task], bpe: Any, table: Table) -> None:
    for wrong in ({"limit": 0}, {"batch": 0}):
        with pytest.raises(BenchError, match="give at least 1"):
            harness.run(table, bpe, tasks, **wrong)


def test_names_become_tasks(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_require_hub", lambda names: None)
    assert harness.named(["cloze", "mmlu", "cloze"], tasks) == [tasks[1], "mmlu"]
    monkeypatch.setattr("tinyonn_lib.evaluate.mmlu.tasks", lambda folder, fewshot: [folder, fewshot])
    assert harness.named(["mmlu"], mmlu_folder="here", fewshot=3) == ["here", 3]
    with pytest.raises(BenchError, match="bits_per_byte is made from held-out documents"):
        harness.named(["bits_per_byte"])
    with pytest.raises(BenchError, match="No task to evaluate"):
        harness.named([])


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BenchError, match=r"pip install 'tinyonn\[eval\]'"):
        harness.require(["mmlu"])


def test_metrics_that_are_no_averages_are_scored_and_not_sampled() -> None:
    """lambada's perplexity: the exponential of an average. F1: of all answers at once."""
    sample = {"filter": "none", "metrics": ["acc", "perplexity", "f1"], "acc": 1.0, "perplexity": -2.0, "f1": (1, 0),
              "doc_id": 0, "doc": {}, "arguments": [("p", " c")], "target": "c", "filtered_resps": [(-2.0, True)],
              "doc_hash": "", "prompt_hash": "", "target_hash": ""}  # fmt: skip
    numbers = {"acc,none": 1.0, "perplexity,none": 7.39, "f1,none": 0.5, "sample_len": 1, "acc_stderr,none": "N/A"}
    found = {"samples": {"lambada": [sample]}, "results": {"lambada": numbers}, "configs": {"lambada": {}},
             "higher_is_better": {"lambada": {"perplexity": False}}, "versions": {"lambada": 1},
             "n-shot": {"lambada": 0}, "n-samples": {"lambada": {"effective": 1}}, "group_subtasks": {}}  # fmt: skip
    read = outcome.read(found, {}, ())
    assert read.scores.set_index("metric")["value"].to_dict() == {"acc": 1.0, "perplexity": 7.39, "f1": 0.5}
    assert read.scores.set_index("metric")["better"]["perplexity"] == "lower"
    assert read.samples["metric"].tolist() == ["acc"]
