"""08_target and 09_evaluate in words: turn the numbers round, and the words turn round; few groups win nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tinyonn_lib.evaluate import Loss
from tinyonn_lib.selection import outcome_target
from tinyonn_lib.selection.contest import Contender, Contest

from .outcomes import BELOW, CLEAR, FOLLOWS, NAN, NONE, WIDE, WINNING, gains


def losses(gap: float, groups: int, noise: float) -> Loss:
    nats = 20 + 10 * gap + noise * np.random.default_rng(1).normal(size=4 * groups)
    return Loss(nats, np.full(4 * groups, 10))


def ring(rivals: Mapping[str, float], own: float = -0.3, groups: int = 12, noise: float = 0.1) -> Contest:
    contenders = {
        name: Contender("", 9, 100, 2.0, (losses(gap, groups, noise * (place + 1)),) * 2)
        for place, (name, gap) in enumerate({"selected": own, **rivals}.items())
    }
    names = [f"g{n % groups}" for n in range(4 * groups)]
    return Contest(losses(0, groups, 0), contenders, names, 1600, pd.DataFrame())


def line(text: str, against: str) -> str:
    return next(each for each in text.splitlines() if each.startswith(f"- against `{against}`"))


@pytest.mark.parametrize("own", [-0.3, 0.3])
def test_duels_turn_with_their_numbers(own: float) -> None:
    there = ring({"random": 0.0, "longest": own, "full": 2 * own}, own)
    found = outcome_target.duels(there)
    words = dict(zip(found["against"], found["verdict"], strict=True))
    win, loss = ("better", "worse") if own < 0 else ("worse", "better")
    assert words == {"base": win, "random": win, "longest": "no clear difference", "full": loss}
    text = outcome_target.verdict(there, found)
    for name in ("random", "longest", "full"):
        assert f"**{words[name]}**" in line(text, name)
    lowest = there.table()["label"][0]
    assert f"lowest loss is that of `{lowest}`" in text
    assert (lowest == "full") == (own < 0)
    assert f"changes by **{there.between('selected').mean:+.4f} [" in text
    label, value = outcome_target.headline(there, found)
    assert f"minus random ({win})" in label
    assert float(value) == pytest.approx(own, abs=0.05)
    numbers = outcome_target.metrics(there, found)
    assert numbers["selected_minus_full"] == pytest.approx(-own, abs=0.05)
    assert numbers["delta_base"] == 0
    assert numbers["base_nll"] == pytest.approx(2.0)


def test_few_groups_win_nothing() -> None:
    there = ring({"random": 0.0, "full": 3.0}, own=-3.0, groups=4)
    found = outcome_target.duels(there)
    assert set(found["verdict"]) == {"too few sources"}
    assert found["low"].isna().all()
    text = outcome_target.verdict(there, found)
    assert not re.search(r"\b(better|worse|beats|best)\b", text, re.IGNORECASE)
    assert "too few sources" in outcome_target.headline(there, found)[0]


def test_headline_without_a_random_rival() -> None:
    there = ring({"longest": 0.0})
    label, value = outcome_target.headline(there, outcome_target.duels(there))
    assert label == "held-out loss, selected minus the untrained model (better)"
    assert value.startswith("-0.3")
    alone = ring({})
    found = outcome_target.duels(alone)
    assert outcome_target.headline(alone, found)[0].endswith("the untrained model (better)")
    assert "against" not in outcome_target.verdict(alone, found)


@dataclass(frozen=True)
class Answered:
    tasks: dict[str, dict[str, Any]]


def test_tasks_in_words() -> None:
    rows = [
        ("cloze", "acc", 0.4, 0.5, 0.1, 0.05, 0.15, 200, "better"),
        ("bits_per_byte", "bpb", 2.0, 2.5, 0.5, 0.4, 0.6, 120, "worse"),
        ("mmlu", "acc", 0.25, 0.35, 0.1, NAN, NAN, 1200, "too few groups"),
    ]
    found = pd.DataFrame(rows, columns=["task", "metric", "base", "tuned", "difference", "low", "high", "n", "verdict"])
    text = outcome_target.compared(found)
    assert "- `cloze`, acc: 0.4000 → 0.5000, **better** (+0.1000 [+0.0500, +0.1500], 200 questions)" in text
    assert "- `bits_per_byte`, bpb: 2.0000 → 2.5000, **worse**" in text
    assert "**too few groups**" in text
    assert "1,200 questions" in text
    assert outcome_target.compared_headline(found) == ("cloze, acc, tuned minus base (better)", "+0.100")
    assert outcome_target.compared_metrics(found)["mmlu_acc_tuned"] == 0.35
    assert outcome_target.cuts(Answered({"a": {"cut": 0}})) == "Every question fitted the model."
    assert outcome_target.cuts(Answered({"a": {"cut": 0}, "b": {"cut": 3}})).endswith("lost their front: b 3.")


def test_the_whole_verdict() -> None:
    rows = [
        (name, "mean", *value)
        for name, value in (("contrastive", WIDE), ("literal", BELOW), ("perplexity", CLEAR), ("combined", NONE))
    ]
    known = pd.DataFrame(rows, columns=["score", "corruption", "auroc", "low", "high"])
    duels = outcome_target.duels(ring({"random": 0.0, "full": -0.6}))
    text = outcome_target.whole(known, gains((0.02, 0.01, 0.03)), FOLLOWS, duels)
    first, second, third = text.split("\n\n")
    assert "AUROC 0.700 [0.500, 0.900] by `contrastive`, 0.500 [0.450, 0.550]" in first
    assert "0.900 [0.850, 0.950] by perplexity alone" in first
    assert first.count("better than") == 1
    assert "are better than perplexity as it is: +0.020 [+0.010, +0.030]" in first
    assert "are not clearly apart from perplexity with the same calibration: +0.000" in first
    assert not WINNING.search(second)
    assert "correlates +0.31 with length, -0.42 with perplexity." in second
    assert "random: better; full: worse" in third
    for gain in ((0.02, NAN, NAN), (0.02, -0.01, 0.05)):
        assert not WINNING.search(outcome_target.whole(known, gains(gain), FOLLOWS, duels))
    assert "are worse than" in outcome_target.whole(known, gains((-0.02, -0.03, -0.01)), FOLLOWS, duels)
    unknown = outcome_target.whole(None, None, FOLLOWS, duels)
    assert "AUROC" not in unknown
    assert unknown.count("\n\n") == 1
    turned = outcome_target.whole(
        None, None, FOLLOWS, outcome_target.duels(ring({"random": 0.0, "full": -0.6}, own=0.3))
    )
    assert "random: worse; full: worse" in turned
    few = outcome_target.whole(None, None, FOLLOWS, outcome_target.duels(ring({"random": 0.0}, own=-3.0, groups=4)))
    assert "random: too few sources" in few
    assert not re.search("better|worse", few)


def test_kinds_and_sizes(olmoe: Any) -> None:
    assert outcome_target.kinds({"random": 1, "full": 2}) == {
        "selected": "router",
        "random": "control",
        "full": "reference",
    }
    size = outcome_target.sizes(olmoe)
    assert size["context"] + size["continuation"] < size["length"] == 64
