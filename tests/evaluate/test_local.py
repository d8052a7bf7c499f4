"""The tasks made from held-out documents: what is asked, that it fits, and numbers against our own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.evaluate.conftest import HOSTILE, LENGTH, Table
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import harness, local
from tinyonn_lib.lm.judge import bits_per_byte

SIZES = {"length": LENGTH, "documents": 20, "questions": 15, "context": 24, "continuation": 10}


def count(bpe: Any, text: str) -> int:
    return len(bpe(text, add_special_tokens=False)["input_ids"])


def test_questions_part_a_document_and_borrow_from_other_sources(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> None:
    texts = texts[~texts["text"].str.contains("ü")]  # the others share their ends
    whole, cloze = local.build(texts, bpe, tmp_path, **SIZES)
    rows = cloze.documents["test"]
    assert len(rows) == 15
    for row in rows:
        full = row["context"] + " " + row["choices"][row["answer"]]
        assert any(text.startswith(full) for text in texts["text"][texts["source"] == row["source"]])
        assert len(set(row["choices"])) == 4
        for place, choice in enumerate(row["choices"]):
            owners = set(texts["source"][texts["text"].str.contains(" " + choice, regex=False)])
            assert (row["source"] in owners) == (place == row["answer"])
            assert 5 <= count(bpe, choice) <= 10
            assert len(bpe(row["context"] + " " + choice)["input_ids"]) <= LENGTH
        assert 12 <= count(bpe, row["context"]) <= 24
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    assert all(0 < count(bpe, row["text"]) < LENGTH for row in whole.documents["test"])


def test_every_source_has_its_turn_before_one_has_its_second(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> None:
    whole, _ = local.build(texts, bpe, tmp_path, **SIZES | {"documents": 12})
    assert len({row["source"] for row in whole.documents["test"]}) == 12


def test_same_seed_same_files_and_they_read_back(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> None:
    one, two, three = (
        local.build(texts, bpe, tmp_path / name, **SIZES, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "bits_per_byte.jsonl", "bits_per_byte.yaml", "cloze.jsonl", "cloze.yaml"
    ]  # fmt: skip
    assert one == two == local.tasks(tmp_path / "b")
    assert one != three


def test_only_what_is_named_is_built_and_is_the_same_alone(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> None:
    both = local.build(texts, bpe, tmp_path / "both", **SIZES)
    for name, task in zip(local.NAMES, both, strict=True):
        assert local.build(texts, bpe, tmp_path / name, ["mmlu", name], **SIZES) == [task]
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [f"{name}.jsonl", f"{name}.yaml"]
    # What only the cloze test needs is not asked of bits per byte.
    short = texts.assign(text=texts["text"].str[:20])
    [task] = local.build(short, bpe, tmp_path / "short", ["bits_per_byte"], **SIZES | {"context": LENGTH})
    assert len(task.documents["test"]) == 20


def test_bits_per_byte_is_our_own(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> None:
    from tinyonn_lib.lm.models import new_model

    torch.manual_seed(0)
    model = new_model(vocab_size=len(bpe), width=32, layers=2, ffn=32, head_dim=16, max_length=LENGTH).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    task = local.build(texts, bpe, tmp_path, **SIZES)[0]
    found = harness.run(model, bpe, [task], batch=7)
    rows = [row["text"] for row in task.documents["test"]]
    assert found.scores["value"][0] == pytest.approx(bits_per_byte(model, bpe, rows), rel=1e-5)
    assert found.samples["weight"].tolist() == [len(text.encode()) for text in rows]
    assert found.samples["value"][3] == pytest.approx(bits_per_byte(model, bpe, rows[3:4]), rel=1e-5)


def test_cloze_metrics_are_those_of_the_table(texts: pd.DataFrame, bpe: Any, table: Table, tmp_path: Path) -> None:
    task = local.build(texts, bpe, tmp_path, **SIZES)[1]
    found = harness.run(table, bpe, [task]).samples.pivot(index="doc_id", columns="metric", values="value")
    logs = table.table.detach().double().log_softmax(-1)

    def chain(ids: list[int], start: int) -> float:
        return sum(float(logs[sum(ids[:place]) % len(logs), ids[place]]) for place in range(start, len(ids)))

    for number, row in enumerate(task.documents["test"]):
        context = bpe(row["context"])["input_ids"]
        given = np.array([chain(bpe(row["context"] + " " + c)["input_ids"], len(context)) for c in row["choices"]])
        alone = np.array([chain([bpe.eos_token_id, *bpe(" " + c)["input_ids"]], 1) for c in row["choices"]])
        right = row["answer"]
        gap = given - alone
        expected = {
            "acc": float(given.argmax() == right),
            "acc_norm": float((given / [len(c) for c in row["choices"]]).argmax() == right),
            "acc_mutual_info": float(gap.argmax() == right),
            "margin": gap[right] - np.delete(gap, right).max(),
        }
        assert found.loc[number].to_dict() == pytest.approx(expected, abs=1e-4)


def test_prompts_are_the_texts_as_they_are(texts: pd.DataFrame, bpe: Any, table: Table, tmp_path: Path) -> None:
    tasks = local.build(texts, bpe, tmp_path, **SIZES | {"documents": 48, "questions": 48})
    found = harness.run(table, bpe, tasks).samples
    for task, field in zip(tasks, ("text", "context"), strict=True):
        asked = found[found["task"] == task.name].drop_duplicates("doc_id")["prompt"]
        assert asked.tolist() == [row[field] for row in task.documents["test"]]
    assert found["prompt"].str.contains(HOSTILE[:20], regex=False).any()


def test_a_tokenizer_that_adds_bos_pays_for_it_once(
    texts: pd.DataFrame, bpe: Any, table: Table, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    task = local.build(texts, bpe, tmp_path, **SIZES)[0]
    eager = copy.deepcopy(bpe)
    eager.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bpe.bos_token} $A", special_tokens=[(bpe.bos_token, bpe.bos_token_id)]
    )
    assert eager("router")["input_ids"] == [bpe.bos_token_id, *bpe("router")["input_ids"]]
    plain, same = (harness.run(table, each, [task]).samples for each in (bpe, eager))
    pd.testing.assert_frame_equal(plain, same)


def test_the_yaml_files_work_with_lm_eval_alone(
    texts: pd.DataFrame, bpe: Any, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = local.build(texts, bpe, tmp_path / "tasks", **SIZES)
    monkeypatch.chdir(tmp_path / "tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = TaskManager(include_path=".", include_defaults=False).load(list(local.NAMES))
    lm = HFLM(pretrained=table, tokenizer=bpe, batch_size=4, backend="causal")
    theirs = evaluate(lm, loaded, bootstrap_iters=0)["results"]
    ours = harness.run(table, bpe, tasks).scores
    for task, metric, value in ours[ours["metric"] != "margin"][["task", "metric", "value"]].itertuples(index=False):
        assert value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 60}, "60 \\+ 10 tokens does not fit a model of 64"),
        ({"questions": 0}, "need at least 1, 1 and 2"),
        ({"choices": 13}, "too few sources for 13 choices"),
    ],
)
def test_bad_sizes_are_one_line(
    texts: pd.DataFrame, bpe: Any, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        local.build(texts[~texts["text"].str.contains("ü")], bpe, tmp_path, **{**SIZES, **change})
    assert not list(tmp_path.iterdir())


def test_texts_too_short_for_a_question_are_told(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="No held-out document is long enough"):
        local.build(texts.assign(text=texts["text"].str[:20]), bpe, tmp_path, **SIZES)


def test_texts_without_spaces_are_cut_too(bpe: Any) -> None:
    text = "漢字ばかりの文" * 40
    cut = local._Cutter(bpe).front(text, 20)
    assert text.startswith(cut)
    assert 15 <= count(bpe, cut) <= 20


def test_damaged_files_are_named(texts: pd.DataFrame, bpe: Any, tmp_path: Path) -> None:
    local.build(texts, bpe, tmp_path, **SIZES)
    with (tmp_path / "cloze.jsonl").open("a") as file:
        file.write(json.dumps({"context": "x"})[:-1] + "\n")
    with pytest.raises(BenchError, match=r"cloze\.jsonl is damaged"):
        local.tasks(tmp_path)
    (tmp_path / "bits_per_byte.jsonl").unlink()
    with pytest.raises(BenchError, match=r"No bits_per_byte\.jsonl"):
        local.tasks(tmp_path)
