"""The contest of all methods, and that it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.align.small import SETTINGS
from tinyonn_lib.align import contest as module
from tinyonn_lib.align.contest import COOLER, METHODS, Budget, contest
from tinyonn_lib.align.imitate import imitate
from tinyonn_lib.align.parts import Part
from tinyonn_lib.align.tasks import prompts
from tinyonn_lib.errors import BenchError


def test_all_methods_and_again_without_training(
    half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout, tune = (prompts("arithmetic", 8, size=9, split=split) for split in ("heldout", "tune"))
    rates: dict[str, list[tuple[Part, float]]] = {name: [("gains", 1.0e-2)] for name in METHODS}
    rates["gold"] = [("all", 1.0e-9), ("all", 3.0e-3)]
    budget = Budget(**{**SETTINGS, "steps": 2})
    told: list[tuple[int, int]] = []

    def run() -> tuple[pd.DataFrame, pd.DataFrame]:
        return contest(half(), tokenizer, sums, tune, heldout, rates, budget=budget, seeds=2, folder=tmp_path,
                       progress=lambda done, total, note: told.append((done, total)))  # fmt: skip

    runs, lifts = run()
    assert runs["method"].tolist() == ["warm", *(name for name in METHODS for _ in range(2)), COOLER]
    assert runs["seed"].tolist() == [0, *[0, 1] * 5, 0]
    generated = runs.set_index("method")["tokens"]
    assert generated["warm"] == 0
    assert (generated["gold"] == 0).all()
    # As many answers for each: 64, of 1 to 6 tokens.
    assert all(64 <= count <= 64 * 6 for name in ("gspo", "grpo", "rejection", "dpo") for count in generated[name])
    mean = runs[runs["method"] == "gspo"]["sampled"].mean() - runs["sampled"].iloc[0]
    first = lifts.query("method == 'gspo' and against == 'warm' and how == 'sampled'").iloc[0]
    assert first["difference"] == pytest.approx(mean)
    against = dict.fromkeys(("grpo", "rejection", "dpo", "gold", COOLER), 2)
    assert lifts["against"].value_counts().to_dict() == {"warm": 12, **against}
    # Half the temperature, no training: the likeliest answers are the warm model's.
    cool = lifts.query("method == @COOLER").set_index("how")
    assert cool.loc["greedy", "difference"] == 0
    assert cool.loc["sampled", "tuned"] == runs["sampled"].iloc[-1]
    assert told[-1] == (11, 11)

    monkeypatch.setattr(module, "_train", None)
    for one, two in zip(run(), (runs, lifts), strict=True):
        pd.testing.assert_frame_equal(one, two)
    assert len(list(tmp_path.iterdir())) == 11


def test_the_rate_is_chosen_on_the_tuning_prompts(
    half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout, tune = (prompts("arithmetic", 8, size=9, split=split) for split in ("heldout", "tune"))
    good = {"heldout": 1.0e-3, "tune": 2.0e-3}  # the rate with which each split would look best

    def trained(model: Any, tokenizer: Any, prompts: Any, method: str, rate: Any, seed: int, plan: Any) -> int:
        model.rate = rate[1]
        return 0

    def success(model: Any, tokenizer: Any, table: pd.DataFrame, *rest: Any) -> pd.DataFrame:
        best = [good["tune" if text in set(tune["prompt"]) else "heldout"] for text in table["prompt"]]
        right = [float(getattr(model, "rate", 0.0) == rate) for rate in best]
        return table[["task", "prompt"]].assign(greedy=right, sampled=right)

    monkeypatch.setattr(module, "_train", trained)
    monkeypatch.setattr(module, "success", success)
    runs, _ = contest(half(), tokenizer, sums, tune, heldout, {"gspo": [("all", 1.0e-3), ("all", 2.0e-3)]}, seeds=1)
    assert runs["lr"].tolist() == [0.0, 2.0e-3, 0.0]


def test_imitation_learns_from_its_own_right_answers(
    half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame
) -> None:
    history = imitate(
        half(),
        tokenizer,
        sums.assign(solution=" 0"),
        rounds=3,
        prompts_per_round=10,
        steps=8,
        batch=32,
        part="all",
        lr=2.0e-3,
    )
    assert history["reward"].iloc[-1] > history["reward"].iloc[0] + 0.1  # the given solutions were wrong
    assert history["tokens"].is_monotonic_increasing
    assert (history["right"] <= 10).all()


def test_bad_contests(half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame) -> None:
    with pytest.raises(BenchError, match="Unknown method 'ppo'"):
        contest(half(), tokenizer, sums, sums, sums, {"ppo": [("all", 1.0)]})
    with pytest.raises(BenchError, match="learning rate each"):
        contest(half(), tokenizer, sums, sums, sums, {"gspo": []})
