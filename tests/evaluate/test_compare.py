"""Base against tuned: the interval is that of `paired`, and the files are the same twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.evaluate.conftest import LENGTH, Table
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import Loss, harness, local, paired
from tinyonn_lib.evaluate.compare import VERDICTS, compare, write
from tinyonn_lib.evaluate.outcome import Outcome

SIZES = {"length": LENGTH, "documents": 30, "questions": 30, "context": 24, "continuation": 10}


@pytest.fixture(scope="module")
def both(texts: pd.DataFrame, bpe: Any, table: Table, other: Table, tmp_path_factory: Any) -> tuple[Outcome, Outcome]:
    tasks = local.build(texts, bpe, tmp_path_factory.mktemp("tasks"), **SIZES)
    return harness.run(table, bpe, tasks), harness.run(other, bpe, tasks)


def fake(values: np.ndarray, better: str = "higher", parent: str = "", tasks: int = 1) -> Outcome:
    rows = pd.DataFrame(
        {"task": [f"t{n % tasks}" for n in range(len(values))], "parent": parent, "doc_id": range(len(values)),
         "metric": "acc", "value": values, "weight": 1.0, "group": [f"g{n}" for n in range(len(values))],
         "better": better, "prompt": "p", "target": "0"}
    )  # fmt: skip
    return Outcome(pd.DataFrame({"task": ["t0"], "metric": ["acc"], "value": [0.0], "stderr": [np.nan]}), rows, {})


def test_intervals_are_those_of_paired(both: tuple[Outcome, Outcome]) -> None:
    found = compare(*both, seed=3).set_index("metric")
    for metric in ("bits_per_byte", "acc_mutual_info", "margin"):
        one, two = (side.samples[side.samples["metric"] == metric] for side in both)
        expected = paired(
            [Loss((two["value"] * two["weight"]).to_numpy(), two["weight"].to_numpy())],
            Loss((one["value"] * one["weight"]).to_numpy(), one["weight"].to_numpy()),
            one["group"].tolist(),
            seed=3,
        )
        row = found.loc[metric]
        assert (row["difference"], row["low"], row["high"], row["groups"]) == (
            expected.mean, expected.low, expected.high, expected.groups
        )  # fmt: skip
        assert row["groups"] == 12
        assert row["low"] < row["difference"] < row["high"]
        scores = [side.scores.set_index("metric")["value"][metric] for side in both]
        assert [row["base"], row["tuned"]] == pytest.approx(scores)
        assert row["difference"] == pytest.approx(scores[1] - scores[0])


@pytest.mark.parametrize(
    ("shift", "better", "verdict"),
    [(1.0, "higher", "better"), (-1.0, "higher", "worse"), (1.0, "lower", "worse"), (-1.0, "lower", "better"),
     (0.0, "lower", "no clear difference")],
)  # fmt: skip
def test_verdicts_know_which_way_is_up(shift: float, better: str, verdict: str) -> None:
    noise = np.random.default_rng(0).normal(size=200)
    found = compare(fake(np.zeros(200), better), fake(noise - noise.mean() + shift, better))
    assert found["verdict"].tolist() == [verdict]
    assert verdict in VERDICTS


def test_too_few_groups_give_no_verdict() -> None:
    found = compare(fake(np.zeros(7)), fake(np.ones(7)))
    assert found["verdict"].tolist() == ["too few groups"]
    assert found[["low", "high"]].isna().all(axis=None)


def test_a_benchmark_of_several_tasks_counts_questions_alike() -> None:
    values = np.array([1.0] * 5 + [0.0] * 25)
    found = compare(fake(np.zeros(30), parent="mmlu", tasks=2), fake(values, parent="mmlu", tasks=2))
    assert found["task"].tolist() == ["t0", "t1", "mmlu"]
    assert found["tuned"].tolist() == pytest.approx([3 / 15, 2 / 15, 5 / 30])
    assert found["n"].tolist() == [15, 15, 30]


@pytest.mark.parametrize("column", ["doc_id", "prompt", "target", "weight"])
def test_other_questions_are_refused(both: tuple[Outcome, Outcome], column: str) -> None:
    samples = both[1].samples.copy()
    samples[column] = samples[column].iloc[::-1].to_numpy()
    with pytest.raises(BenchError, match="not asked the same questions"):
        compare(both[0], replace(both[1], samples=samples))
    with pytest.raises(BenchError, match="not asked the same questions"):
        compare(both[0], replace(both[1], samples=both[1].samples.iloc[:-1]))


def test_files_are_the_same_twice_and_read_back(both: tuple[Outcome, Outcome], tmp_path: Path) -> None:
    outcomes, table = dict(zip(("base", "tuned"), both, strict=True)), compare(*both)
    one, two = write(tmp_path / "a", outcomes, table), write(tmp_path / "b", outcomes, table)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    content = json.loads(one[0].read_text())
    assert set(content["versions"]) == {"lm_eval", "datasets", "torch", "transformers"}
    pd.testing.assert_frame_equal(pd.DataFrame(content["comparison"]), table)
    assert content["tasks"]["base"] == both[0].tasks == content["tasks"]["tuned"]
    assert str(tmp_path) not in one[0].read_text()
    samples = pd.read_parquet(one[1])
    assert samples["model"].value_counts().to_dict() == dict.fromkeys(outcomes, len(both[0].samples))
    pd.testing.assert_frame_equal(
        samples[samples["model"] == "tuned"].drop(columns="model").reset_index(drop=True), both[1].samples
    )


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    path, _ = write(tmp_path, {"base": fake(np.zeros(3))}, compare(fake(np.zeros(3)), fake(np.ones(3))))
    content = json.loads(path.read_text())
    assert content["comparison"][0]["low"] is None
    assert content["scores"]["base"][0]["stderr"] is None
