"""What is said follows from the numbers: who is better, by how much, and when nobody can tell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from kv_tables import table as swept
from kv_texts import drawn

from tinyonn_lib import evaluate
from tinyonn_lib.evaluate import Difference, Loss
from tinyonn_lib.kv import judge, outcome
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import LORA, OURS, OURS_CACHES, RIDGE, RIDGE_TRAINED, SHUFFLED, Contest, Texts
from tinyonn_lib.kv.data import Caches, teachers_of
from tinyonn_lib.kv.train import Recipe

NAN = math.nan


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> Texts:
    rows = [drawn(8), drawn(4, 1), drawn(14, 2, groups=14)]
    return Texts(*(Caches(student, {"t": teacher}, each) for each in rows))


@pytest.fixture(scope="module")
def few(texts: Texts, student: KVModel, teacher: KVModel) -> Texts:
    """Judged on three sources."""
    return Texts(texts.train, texts.validation, Caches(student, {"t": teacher}, drawn(14, 2)))


def ring(texts: Texts, level: dict[str, float], best: str = OURS) -> Contest:
    """With given losses above the student's own, nats per token."""
    made = Contest(texts, recipe=Recipe(steps=1), rates=[1e-3])
    own = made.losses[judge.OWN][0]
    made.losses[judge.ZERO] = [Loss(own.nats + own.tokens, own.tokens)]
    kinds = {RIDGE: "control", RIDGE_TRAINED: "control", "linear": "document", LORA: "another way"}
    for name, gap in level.items():
        wobble = 1e-3 * np.cos(np.arange(len(own.nats)))
        loss = Loss(own.nats + (gap + wobble) * own.tokens, own.tokens)
        made.add(name, kinds.get(name, "ours"), [loss], chosen_by=0.0 if name == best else 1.0, parameters=7, rate=0.01)
        made.layers[name] = 5
    return made


LEVEL = {RIDGE: 0.5, RIDGE_TRAINED: 0.2, "linear": 0.6, OURS_CACHES: 0.4, OURS: 0.25, LORA: -0.1}


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(-2.0, -1.0, "better"), (1.0, 2.0, "worse"), (-1.0, 1.0, "no clear difference"), (0.0, 1.0, "no clear difference"),
     (-1.0, 0.0, "no clear difference"), (NAN, NAN, "too few sources")],
)  # fmt: skip
def test_told(low: float, high: float, says: str) -> None:
    assert Difference(0.5, low, high, 3 if says == "too few sources" else 20).standing == says


def test_duels_are_ours_minus_theirs(texts: Texts) -> None:
    found = ring(texts, LEVEL)
    rows = outcome.duels(found).set_index("against")
    assert set(rows.index) == set(found.kinds) - {OURS}
    for name in (RIDGE, RIDGE_TRAINED, "linear", OURS_CACHES, LORA):
        assert rows.loc[name, "difference"] == pytest.approx(0.25 - LEVEL[name])
        assert rows.loc[name, "verdict"] == ("better" if LEVEL[name] > 0.25 else "worse")
    assert rows.loc[judge.OWN, "difference"] == pytest.approx(0.25, abs=2e-3)
    assert rows.loc[judge.OWN, ["kind", "verdict"]].tolist() == ["reference", "worse"]


def after(found: Contest) -> pd.DataFrame:
    """As if a single hand-over cost the same."""
    return outcome.single(found, {name: each[0] for name, each in found.losses.items()})


def verdict(found: Contest) -> str:
    return outcome.verdict(found, outcome.duels(found), after(found))


def test_verdict_says_worse_where_it_is(texts: Texts) -> None:
    found = ring(texts, LEVEL)
    said = verdict(found)
    for name, kind, word in ((RIDGE, "control", "better"), (RIDGE_TRAINED, "control", "worse"),
                             ("linear", "document", "better"), (LORA, "another way", "worse")):  # fmt: skip
        assert f"- against `{name}` ({kind}, 7 parameters): **{word}**, {0.25 - LEVEL[name]:+.4f} [" in said
    assert f"- against `{judge.OWN}` (reference): **worse**, +0.25" in said
    own = found.losses[judge.OWN][0].mean
    assert f"**{found.losses[OURS][0].mean:.3f}** nats per token with `{OURS}`, {own:.3f} with its own cache" in said
    assert "**75.0%** [7" in said
    assert "ridge alone closes 50.0%" in said
    *_, once = said.split("Handed over once")
    assert f"- against `{RIDGE}`: **better**, -0.2500 [" in once
    assert f"- against `{RIDGE_TRAINED}`: **worse**, +0.0500 [" in once


def test_verdict_says_what_was_not_tried(texts: Texts) -> None:
    found = ring(texts, LEVEL)
    assert "trained at one learning rate here" in verdict(found)
    found.rates_tried, found.edges = [1e-3, 2e-3, 3e-3], {"b", "a"}
    said = verdict(found)
    assert "trained at one learning rate" not in said
    assert "Best at an end of the rates tried: `a`, `b`." in said
    assert "beyond a closed form" not in said
    found.layers[RIDGE] = 2
    assert f"`{RIDGE}` reads 2 of 5 layers" in verdict(found)


def test_the_best_by_validation_even_where_it_is_not_the_best_after_all(texts: Texts) -> None:
    found = ring(texts, LEVEL, best=OURS_CACHES)
    assert f"nats per token with `{OURS_CACHES}`" in verdict(found)
    assert outcome.headline(found)[1] == "60%"
    numbers = outcome.metrics(found, outcome.duels(found), after(found))
    assert (numbers["closed"], numbers["parameters"]) == (pytest.approx(0.6, abs=2e-3), 7)
    assert numbers[f"best minus {OURS}"] == pytest.approx(0.15)
    assert numbers[f"one hand-over, best minus {OURS}"] == pytest.approx(0.15)
    assert numbers[f"nll: {RIDGE}"] == pytest.approx(found.losses[RIDGE][0].mean)


def test_too_few_sources_give_no_interval(few: Texts) -> None:
    found = ring(few, LEVEL)
    assert set(outcome.duels(found)["verdict"]) == set(after(found)["verdict"]) == {"too few sources"}
    said = verdict(found)
    assert "nan" not in said.lower()
    assert "** of the gap is closed" in said
    assert f"- against `{RIDGE}` (control, 7 parameters): **too few sources**, -0.2500\n" in said


def test_without_fine_tuning_nothing_is_said_of_it(texts: Texts) -> None:
    said = verdict(ring(texts, {name: gap for name, gap in LEVEL.items() if name != LORA}))
    assert LORA not in said
    assert said.count("- against `linear`") == 1  # the document's best, too, and said once


def test_single_leaves_out_texts_that_ended_before(texts: Texts) -> None:
    found = ring(texts, LEVEL)
    ended = {}
    for name in (OURS, RIDGE, judge.OWN):
        loss = found.losses[name][0]
        nats, tokens = loss.nats.copy(), loss.tokens.copy()
        nats[:4], tokens[:4] = 0, 0
        ended[name] = Loss(nats, tokens)
    rows = outcome.single(found, ended).set_index("against")
    assert list(rows.index) == [RIDGE, judge.OWN]
    assert rows.loc[RIDGE, "difference"] == pytest.approx(-0.25)
    assert rows.loc[RIDGE, "verdict"] == "better"
    left = found.texts.heldout.source[4:]
    cut = [Loss(each.nats[4:], each.tokens[4:]) for each in (ended[OURS], ended[judge.OWN])]
    gap = evaluate.paired([cut[0]], cut[1], left)
    assert rows.loc[judge.OWN, ["difference", "low", "high"]].tolist() == [gap.mean, gap.low, gap.high]


def test_short_is_sorted_and_has_no_rate_of_nothing(texts: Texts) -> None:
    table = outcome.short(ring(texts, LEVEL)).set_index("cache")
    assert table["nll"].is_monotonic_increasing
    assert table.index[0] in (LORA, "mean cache", judge.OTHER, "no cache")
    assert math.isnan(table.loc[judge.OWN, "lr"])
    assert table.loc[OURS, "lr"] == 0.01


def test_sources_begin_with_its_own(texts: Texts) -> None:
    found = Contest(texts, recipe=Recipe(steps=1), rates=[1e-3])
    kinds = {RIDGE: "control", RIDGE_TRAINED: "control", "linear": "document", OURS: "ours", OURS_CACHES: "ours"}
    for seed, (label, kind) in enumerate(kinds.items()):
        found.projectors[label] = found.fresh({}, seed)
        found.add(label, kind, found.losses[judge.OWN], chosen_by=1.0)
    found.shuffle(OURS)
    sources = outcome.sources(found)
    assert list(sources) == [judge.OWN, OURS, OURS_CACHES, RIDGE, RIDGE_TRAINED, "linear", judge.ZERO, SHUFFLED]
    batch = texts.heldout[torch.arange(3)]
    expected = found.projectors[RIDGE].project_multi_teacher_kv(teachers_of(batch, ["t"]))
    said = sources[RIDGE](batch)
    assert said is not None
    torch.testing.assert_close(said.keys, expected.keys)


def test_facts(texts: Texts, student: KVModel, teacher: KVModel) -> None:
    found = outcome.facts({"teacher": teacher, "student": student}, texts)
    assert found["cache of the teacher"] == "5 layers × 4 KV heads × 8 = 32 wide"
    assert found["cache of the student"] == "3 layers × 2 KV heads × 8 = 16 wide"
    assert found["texts to learn from"] == f"8 of {sum(map(len, drawn(8)['ids']))} tokens"


# Of the sweep


def test_beside_takes_each_ratio_s_best_by_validation() -> None:
    measured = swept()
    poor = measured.index[(measured["mlp_ratio"] == 1.0) & (measured["init"] == "kaiming")][0]
    measured.loc[poor, "validation"] = 0.0  # chosen, although the worst on held-out text
    measured = measured.sample(frac=1.0, random_state=0)
    found = outcome.beside(measured).set_index("document")
    assert list(found.index) == ["Linear", "MLP 0.5x", "MLP 1.0x", "MLP 2.0x"]
    assert found.loc["MLP 1.0x", "measured"] == measured.loc[poor, "configuration"]
    assert found.loc["MLP 1.0x", "its loss, held-out"] == measured.loc[poor, "heldout"] > 0.5
    assert found.loc["Linear", ["parameters", "its parameters", "loss"]].tolist() == [7.9e6, 8000, 6.09]
    least = measured[measured["mlp_ratio"] == 2.0].sort_values("validation").iloc[0]
    assert found.loc["MLP 2.0x", ["its loss, held-out", "nats per token"]].tolist() == [least["heldout"], least["nll"]]


def test_costs_say_where_a_rate_is_at_an_edge() -> None:
    measured = swept()
    measured.loc[measured["mlp_ratio"] == 0.5, "lr_at_edge"] = True
    found = outcome.costs(measured)
    assert found["at an edge of those tried"].tolist() == ["no", "yes", "no", "no"]
    assert found["the document's"].tolist() == [1.0, 1.2, 1.5, 2.0]
    assert found["memory to train, kB"].tolist() == [4.0] * 4


def test_the_rule_is_judged_by_what_was_measured(teacher: KVModel) -> None:
    said = outcome.rule(swept(), teacher)
    assert all(line.startswith("- ") for line in said.splitlines())
    assert "- The rule's 2× is borne out." in said
    assert "- The document's 0.5× is not borne out: it costs 0.0700 nats per token." in said


# Words about a student that moves, and about two teachers


def moved(**change: Any) -> pd.DataFrame:
    row = {"lr_student": 1e-3, "kv_error": 0.25, "spread": 0.5, "own": 4.0, "projected": 4.2, "own_change": 0.125,
           "low": 0.1, "high": 0.15, "harmed": True, "collapsed": True}  # fmt: skip
    return pd.DataFrame(
        [row | {"lr_student": 0.0, "harmed": False, "collapsed": False, "own_change": 0.0}, row | change]
    )


def test_collapse_is_named_where_it_happened() -> None:
    *_, frozen, along = outcome.collapse(moved()).splitlines()
    assert frozen.startswith("- Frozen: error of the caches 0.250 of their variance")
    assert "**" not in frozen
    assert along == (
        "- Trained along at 0.001: error of the caches 0.250 of their variance, the student's own loss 4.000 "
        "(+0.125 [+0.100, +0.150]), spread of its cache × 0.50: **collapsed, harmed**"
    )
    last = outcome.collapse(moved(low=NAN, high=NAN, harmed=False)).splitlines()[-1]
    assert "own loss 4.000 (+0.125), spread" in last
    assert last.endswith(": **collapsed**")


@pytest.mark.parametrize(
    ("both", "says"), [(4.0, "4.0000 nats per token, less than"), (4.1, "no less than"), (4.3, "no less than")]
)
def test_two_teachers_against_the_better_one(both: float, says: str) -> None:
    pair = pd.DataFrame({"cache": ["a", "b", "a and b", judge.OWN], "nll": [4.2, 4.1, both, 3.9]})
    said = outcome.together(pair, ["a", "b"])
    assert f"{says} the better of them alone (`b`, 4.1000)" in said
