"""Imitation of the model's own right answers: rounds, answers and steps as GSPO's, and it goes on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.align.small import SETTINGS, weights
from tinyonn_lib.align import imitate as module
from tinyonn_lib.align.borrow import NothingToLearn
from tinyonn_lib.align.imitate import imitate
from tinyonn_lib.align.methods import METHODS, Budget
from tinyonn_lib.align.prefer import _unmerged, pairs
from tinyonn_lib.align.warm import packed
from tinyonn_lib.errors import BenchError

Fresh = Callable[[], Any]
SMALL: dict[str, Any] = {"rounds": 4, "prompts_per_round": 6, "group": 4, "steps": 2, "batch": 8}


def test_it_learns_from_its_own_right_answers(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    history = imitate(
        half(), tokenizer, sums.assign(solution=" 0"), rounds=4, prompts_per_round=10, steps=8, batch=32, part="all",
        lr=4.0e-3,
    )  # fmt: skip
    assert history["reward"].iloc[-1] > history["reward"].iloc[0] + 0.1  # the given solutions were wrong
    assert history["tokens"].is_monotonic_increasing
    assert (history["right"] <= 10).all()


def test_a_step_is_that_of_adamw_on_the_right_answers(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    """Two rounds by hand: the optimiser's state goes over, the learning rate falls over the second half."""
    settings = {**SMALL, "rounds": 2, "batch": 64}  # more than there are right answers: some twice
    one, two = half(), half()
    history = imitate(one, tokenizer, sums, lr=1.0e-2, seed=5, **settings)
    gains = [param for param in two.parameters() if param.ndim == 1]
    optimizer = torch.optim.AdamW(gains, lr=1.0e-2, betas=(0.9, 0.95), weight_decay=0.0)
    order = module.shuffled(torch.arange(len(sums)), 6, 5)
    for number in range(2):
        asked = sums.iloc[order(number).tolist()].reset_index(drop=True)
        drawn = module.answers(two, tokenizer, asked, 4, 1.0, module.seed_of(5, number))
        good = drawn[drawn["right"]]
        assert history["reward"][number] == drawn["right"].mean()
        rows = packed(two, tokenizer, asked.iloc[good["prompt"]].assign(solution=good["completion"].to_numpy()))
        at = module.shuffled(rows, 64, module.seed_of(5, number))
        for step in range(2):
            for group in optimizer.param_groups:
                group["lr"] = 1.0e-2 * min(1.0, (4 - (2 * number + step)) / 2)
            optimizer.zero_grad()
            batch = at(step)
            logits = two(input_ids=batch[:, 0, :-1]).logits.log_softmax(-1)
            labels = batch[:, 1, 1:]
            picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            loss = -(picked * (labels >= 0)).sum() / 64
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gains, 1.0)
            optimizer.step()
    assert float((weights(one) - weights(two)).abs().max()) < 1e-5
    assert float((weights(one) - weights(half())).abs().max()) > 1e-2


def test_as_many_answers_and_steps_as_gspo(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Budget(**SETTINGS)
    asked, steps = [], []
    genuine, step = module.answers, torch.optim.AdamW.step

    def answered(model: Any, tokenizer: Any, table: pd.DataFrame, n: int, *rest: Any) -> pd.DataFrame:
        asked.append(len(table) * n)
        return genuine(model, tokenizer, table, n, *rest)

    monkeypatch.setattr(module, "answers", answered)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k))
    options: dict[str, Any] = {"part": "gains", "lr": 1.0e-2, "seed": 0}
    options |= {"checkpoint": None, "every_seconds": 1.0, "progress": None}
    mine = METHODS["rejection"].train(half(), tokenizer, sums, plan, **options)
    assert (asked, len(steps)) == ([48] * 4, 24)
    steps.clear()
    theirs = METHODS["gspo"].train(half(), tokenizer, sums, plan, **options)
    assert len(steps) == 24
    assert theirs["tokens"].iloc[-1] == pytest.approx(192 * theirs["length"].mean())
    assert mine["step"].tolist() == [1, 2, 3, 4]
    few = METHODS["rejection"].train(half(), tokenizer, sums, Budget(**{**SETTINGS, "steps": 2}), **options)
    assert few["step"].tolist() == [1, 2]


class Stop(Exception):
    pass


def test_stopped_after_every_round(half: Fresh, tokenizer: Any, sums: pd.DataFrame, tmp_path: Path) -> None:
    whole, resumed = half(), half()
    one = imitate(whole, tokenizer, sums, **SMALL)

    def until(wanted: int) -> Callable[[int, int, str], None]:
        def told(done: int, total: int, note: str) -> None:
            assert done >= wanted  # nothing done twice
            if not note.startswith("going on"):
                raise Stop

        return told

    for stop in range(1, 4):
        with pytest.raises(Stop):
            imitate(
                half(), tokenizer, sums, checkpoint=tmp_path / "c", every_seconds=0, progress=until(stop - 1), **SMALL
            )
    two = imitate(resumed, tokenizer, sums, checkpoint=tmp_path / "c", every_seconds=0, **SMALL)
    assert torch.equal(weights(whole), weights(resumed))
    pd.testing.assert_frame_equal(one, two)
    told: list[str] = []
    saved = (tmp_path / "c").read_bytes()
    for change in ({"seed": 1}, {"temperature": 0.9}, {"group": 5}, {"batch": 9}, {"lr": 1e-3}, {"rounds": 3}, {}):
        (tmp_path / "c").write_bytes(saved)
        asked = sums if change else sums.assign(prompt=sums["prompt"].iloc[::-1].to_numpy())
        imitate(half(), tokenizer, asked, checkpoint=tmp_path / "c", progress=lambda *a: told.append(a[2]),
                **{**SMALL, **change})  # fmt: skip
    assert not [note for note in told if note.startswith("going on")]


@pytest.mark.filterwarnings("error")
def test_a_round_without_a_right_answer_teaches_nothing(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    """It counts, its steps are skipped, and it is no error as long as another round has one."""
    calls = []

    def sometimes(*given: Any) -> pd.DataFrame:
        drawn = genuine(*given)
        calls.append(weights(model))
        return drawn.assign(right=drawn["right"] & (len(calls) % 2 == 0))

    genuine, model = module.answers, half()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "answers", sometimes)
        history = imitate(model, tokenizer, sums, **SMALL)
    assert torch.equal(calls[0], calls[1])
    assert torch.equal(calls[2], calls[3])  # not even by the optimiser's momentum
    assert not torch.equal(calls[1], calls[2])
    assert history["right"].eq(0).tolist() == history["loss"].isna().tolist() == [True, False, True, False]
    assert history["tokens"].diff().iloc[1:].gt(0).all()


def test_nothing_to_learn_leaves_the_model(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = module.answers
    monkeypatch.setattr(module, "answers", lambda *given: genuine(*given).assign(right=False))
    model = half()
    with pytest.raises(NothingToLearn, match="Not one right answer.*smaller size") as error:
        imitate(model, tokenizer, sums, **SMALL)
    assert error.value.tokens >= 4 * 6 * 4
    assert torch.equal(weights(model), weights(half()))


def test_the_others_with_nothing_to_learn(tokenizer: Any, model: Any, sums: pd.DataFrame) -> None:
    options: dict[str, Any] = {"part": "gains", "lr": 1.0e-2, "seed": 0}
    options |= {"checkpoint": None, "every_seconds": 1.0, "progress": None}
    plan = Budget(**{**SETTINGS, "steps": 1})
    before = weights(model)
    for name in ("gspo", "grpo", "dpo"):  # a model that was taught nothing: all wrong
        with pytest.raises(NothingToLearn) as error:
            METHODS[name].train(model, tokenizer, sums, plan, **options)
        assert error.value.tokens >= 32
        assert torch.equal(weights(model), before)
    told = [(0, " 1", True), (0, " 1", True)]
    with pytest.raises(NothingToLearn, match="both a right and a wrong"):
        pairs(sums, pd.DataFrame(told, columns=["prompt", "completion", "right"]))
    merged = sums.head(1).assign(chosen=" 1", rejected="=")
    with pytest.raises(NothingToLearn, match="merges"):  # ids that no answer leaves as they are
        _unmerged(tokenizer, merged, [[1, 2]])


def test_bad_settings_and_broken_models(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    for given in ({"rounds": 0}, {"steps": 0}, {"batch": 0}, {"prompts_per_round": 0}, {"lr": 0.0}):
        name, value = next(iter(given.items()))
        with pytest.raises(BenchError, match=f"{name}={value}"):
            imitate(half(), tokenizer, sums, **{**SMALL, **given})
    with pytest.raises(BenchError, match="not finite.*lower the learning rate"):
        imitate(half(), tokenizer, sums, **{**SMALL, "lr": 1.0e30})
