"""Answers, what is kept of them, and how two models are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from tinyonn_lib.align import answers as module
from tinyonn_lib.align.answers import answers, encoded, read
from tinyonn_lib.align.filtering import keep
from tinyonn_lib.align.tasks import TASKS, prompts
from tinyonn_lib.align.verify import lift, rates, success
from tinyonn_lib.align.warm import packed, teach
from tinyonn_lib.errors import BenchError


def test_greedy_answers_are_those_of_generate(half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame) -> None:
    model = half()
    found = answers(model, tokenizer, sums, 1, 0.0)
    ids, room = encoded(model, tokenizer, sums)
    for row, text in zip(ids, found["completion"], strict=True):
        made = model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row)), do_sample=False, max_new_tokens=room
        )
        assert read(tokenizer, made[0, len(row) :].tolist())[0] == text
    assert found["right"].any()


def test_sampling_follows_the_model(half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame) -> None:
    model, one = half(), sums.head(1)
    drawn = answers(model, tokenizer, one, 4000, 1.3, seed=1)["completion"].dropna()
    ids, _ = encoded(model, tokenizer, one)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor(ids)).logits[0, -1].double() / 1.3, -1)
    likely = expected.topk(3).indices.tolist()
    for token in likely:
        share = float(expected[token])
        text = tokenizer.decode([token])
        seen = drawn.str.startswith(text).sum() / 4000
        # Answers that did not end are missing in `drawn`, so the share may only be a little smaller.
        assert abs(seen - share) < 5 * np.sqrt(share * (1 - share) / 4000) + (4000 - len(drawn)) / 4000


def test_same_seed_same_answers_on_any_number_of_threads(
    half: Callable[[], Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half()
    table = pd.concat([prompts(task, 20, size=4) for task in TASKS], ignore_index=True)
    tables = []
    for shards in (1, 3):
        monkeypatch.setattr(module, "default_shards", lambda device, shards=shards: shards)
        tables.append(answers(model, tokenizer, table, 3, seed=7))
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(answers(model, tokenizer, table, 3, seed=8))
    assert tables[0]["prompt"].tolist() == [row for row in range(60) for _ in range(3)]


def test_an_answer_ends_with_the_end_token_and_hides_nothing(tokenizer: Any) -> None:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    four, two = (tokenizer(text)["input_ids"][0] for text in (" 4", " 2"))
    assert read(tokenizer, [four, two, end]) == (" 4 2", 3)
    assert read(tokenizer, [four, end, two, end]) == (" 4", 2)
    assert read(tokenizer, [four, two]) == (None, 2)
    assert read(tokenizer, [four, pad, two, end]) == (None, 4)
    assert read(tokenizer, [end]) == ("", 1)


def test_global_random_state_and_mode_stay(half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame) -> None:
    model = half().train()
    before = torch.get_rng_state()
    answers(model, tokenizer, sums, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_what_cannot_be_asked(model: Any, tokenizer: Any, sums: pd.DataFrame) -> None:
    with pytest.raises(BenchError, match="No prompts"):
        answers(model, tokenizer, sums.head(0))
    with pytest.raises(BenchError, match="temperature"):
        answers(model, tokenizer, sums, 2, 0.0)
    with pytest.raises(BenchError, match="exceed the model's 64"):
        answers(model, tokenizer, sums.assign(prompt=" 1" * 62))
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(BenchError, match="no end token"):
        answers(model, endless, sums)


def test_only_the_answer_counts_in_the_loss(model: Any, tokenizer: Any) -> None:
    table = pd.concat([prompts(task, 4) for task in TASKS], ignore_index=True)
    rows = packed(model, tokenizer, table)
    ids, _ = encoded(model, tokenizer, table)
    wide = copy.deepcopy(model).double()
    nats = []
    for prompt, solution, row in zip(ids, table["solution"], rows, strict=True):
        whole = [*prompt, *tokenizer(solution)["input_ids"], tokenizer.eos_token_id]
        assert row[0, : len(whole)].tolist() == whole
        assert [label for label in row[1].tolist() if label != -100] == whole[len(prompt) :]
        logits = wide(torch.tensor([whole])).logits[0].detach()
        target = torch.tensor(whole[len(prompt) :])
        nats.append(float(F.cross_entropy(logits[len(prompt) - 1 : -1], target, reduction="sum")))
    history = teach(model, tokenizer, table, steps=1, batch=len(table), lr=1.0e-9)
    assert history["loss"].iloc[0] == pytest.approx(np.mean(nats), rel=1e-5)


def test_gains_alone_are_trained(model: Any, tokenizer: Any, sums: pd.DataFrame) -> None:
    before = {name: value.clone() for name, value in model.named_parameters()}
    teach(model, tokenizer, sums, steps=3, batch=8, part="gains", lr=1.0e-2)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("norm.weight")}
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(BenchError, match="Unknown part"):
        teach(model, tokenizer, sums, steps=1, part="heads")  # type: ignore[arg-type]


def _samples(*rights: list[int]) -> pd.DataFrame:
    rows = [(number, bool(each)) for number, own in enumerate(rights) for each in own]
    return pd.DataFrame(rows, columns=["prompt", "right"])


def test_the_filter_drops_all_right_and_all_wrong(sums: pd.DataFrame) -> None:
    table = sums.head(5).assign(task=["a", "a", "a", "b", "b"])
    kept, counts = keep(table, _samples([0, 0], [1, 0], [1, 1], [0, 1], [1, 1]))
    assert kept["prompt"].tolist() == table["prompt"].iloc[[1, 3]].tolist()
    assert kept["success"].tolist() == [0.5, 0.5]
    assert counts.to_dict("list") == {
        "task": ["a", "b"], "prompts": [3, 2], "all wrong": [1, 0], "kept": [1, 1], "all right": [1, 1],
        "success": [0.5, 0.75],
    }  # fmt: skip


@pytest.mark.parametrize(("right", "advice"), [(0, "Warm up longer"), (1, "Warm up less")])
def test_nothing_left_says_what_to_change(sums: pd.DataFrame, right: int, advice: str) -> None:
    with pytest.raises(BenchError, match=advice):
        keep(sums.head(2), _samples([right] * 3, [right] * 3))
    with pytest.raises(BenchError, match="draw them again"):
        keep(sums.head(3), _samples([right] * 3, [right] * 3))


def _found(greedy: list[float], sampled: list[float]) -> pd.DataFrame:
    names = [f"p{number}" for number in range(len(greedy))]
    return pd.DataFrame({"task": "arithmetic", "prompt": names, "greedy": greedy, "sampled": sampled})


def test_lift_counts_successes_and_its_sign_is_up() -> None:
    base = _found([0.0] * 10, [0.25] * 10)
    first, second = _found([1.0] * 5 + [0.0] * 5, [0.5] * 10), _found([0.0] * 10, [1.0] * 10)
    table = lift([first, second], base)
    greedy, sampled = table.to_dict("records")
    assert (greedy["base"], greedy["tuned"], greedy["difference"]) == (0.0, 0.25, pytest.approx(0.25))
    assert greedy["low"] == 0  # the second seed alone
    assert 0.5 <= greedy["high"] < 1
    assert (sampled["base"], sampled["tuned"]) == (0.25, 0.75)
    # Alike for all prompts: 0.25 more with one seed, 0.75 with the other; a quarter of the draws has one of them alone.
    assert (sampled["low"], sampled["high"]) == (pytest.approx(0.25), pytest.approx(0.75))
    assert sampled["standing"] == "better"
    single = lift([first], base).to_dict("records")[1]
    assert (single["low"], single["high"]) == (pytest.approx(0.25), pytest.approx(0.25))
    assert lift(base, second)["standing"].tolist() == ["no clear difference", "worse"]
    few = lift(first.head(5), base.head(5))
    assert few["standing"].tolist() == ["too few sources"] * 2
    assert few["low"].isna().all()
    with pytest.raises(BenchError, match="not asked the same"):
        lift(first, base.assign(prompt="x"))


@pytest.mark.parametrize("paired", [False, True])
def test_lift_draws_prompts_and_seeds(paired: bool) -> None:
    """Against the whole distribution: every draw of two seeds, with that of eight prompts by convolution."""
    rng = np.random.default_rng(4)
    ours = [_found([0.0] * 8, (rng.integers(0, 5, 8) / 4).tolist()) for _ in range(2)]
    theirs = [_found([0.0] * 8, (rng.integers(0, 3, 8) / 4).tolist()) for _ in range(2 if paired else 1)]
    row = lift(ours, theirs).to_dict("records")[1]
    gaps = [one["sampled"].to_numpy() - theirs[n * paired]["sampled"].to_numpy() for n, one in enumerate(ours)]
    chance: dict[int, float] = {}  # sum of the eight gaps, in eighths
    for seeds in ((0, 0), (0, 1), (1, 0), (1, 1)):
        eighths = np.rint(8 * (gaps[seeds[0]] + gaps[seeds[1]]) / 2).astype(int)
        sums = {0: 0.25}
        for _ in range(8):
            drawn: dict[int, float] = {}
            for total, share in sums.items():
                for step in eighths:
                    drawn[total + step] = drawn.get(total + step, 0.0) + share / 8
            sums = drawn
        for total, share in sums.items():
            chance[total] = chance.get(total, 0.0) + share
    totals = np.array(sorted(chance))
    below = np.cumsum([chance[total] for total in totals])
    for bound, share in ((row["low"], 0.025), (row["high"], 0.975)):
        # 2,000 draws: the share below a quantile is off by 0.0035 (one sigma).
        low, high = (totals[np.searchsorted(below, share + off)] / 64 for off in (-0.012, 0.012))
        assert low <= bound <= high
    assert row["difference"] == pytest.approx(np.mean(gaps))
    prompts_alone = lift([ours[0].assign(sampled=np.mean([one["sampled"] for one in ours], axis=0))], theirs[:1])
    assert row["high"] - row["low"] > 1.1 * (prompts_alone["high"] - prompts_alone["low"])[1]


def test_success_is_greedy_and_sampled(half: Callable[[], Any], tokenizer: Any, sums: pd.DataFrame) -> None:
    model = half()
    found = success(model, tokenizer, sums, n=8, seed=3)
    drawn = answers(model, tokenizer, sums, 8, 1.0, 3)
    assert found["sampled"].tolist() == drawn["right"].to_numpy().reshape(-1, 8).mean(1).tolist()
    assert set(found["greedy"]) <= {0.0, 1.0}
    assert rates(found).iloc[0].to_dict() == {
        "task": "arithmetic", "prompts": 20, "greedy": found["greedy"].mean(), "sampled": found["sampled"].mean(),
    }  # fmt: skip
    assert 0.2 < found["sampled"].mean() < 0.9
