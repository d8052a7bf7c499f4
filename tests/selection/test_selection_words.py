"""Sentences follow the numbers: turn the numbers round, and the words turn round; no interval, no victory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import Loss
from tinyonn_lib.selection import judge, outcome, verdict, worth
from tinyonn_lib.selection.contest import Contender, Contest
from tinyonn_lib.selection.cut import Cut

NAN = float("nan")
Interval = tuple[float, float, float]
GAUGE = pd.DataFrame({
    "score": ["literal", "centred", "log_mass", "contrastive", "perplexity"], "spearman": [0.2, 1.0, 0.999, 0.998, 1.0]
})  # fmt: skip
WINNING = re.compile(r"\b(beats|better than|worse than|is clearly below|outperform\w*|wins?)\b")


def aurocs(own: Interval, control: Interval, over: str = outcome.UNSEEN) -> pd.DataFrame:
    values = {
        "contrastive": own, "perplexity": control, "literal": (0.5, 0.4, 0.6), "log_mass": (0.61, 0.6, 0.62),
        "contrastive, before": (0.41, 0.31, 0.51), "combined": (0.8, 0.7, 0.9),
    }  # fmt: skip
    rows = [(name, kind, *value) for name, value in values.items() for kind in {outcome.LEARNED, over, "mean"}]
    return pd.DataFrame(rows, columns=["score", "corruption", "auroc", "low", "high"])


def gains(value: Interval, over: str = outcome.UNSEEN) -> pd.DataFrame:
    """Over perplexity as it is; with the same calibration nothing is gained."""
    kinds = dict.fromkeys(("all kinds", over))
    rows = [(judge.MEAN, name, "perplexity", *value) for name in kinds]
    rows += [(judge.MEAN, name, "perplexity_fitted", 0.0, -0.1, 0.1) for name in kinds]
    return pd.DataFrame(rows, columns=["corruption", "over", "other", "difference", "low", "high"])


CLEAR, BELOW, WIDE, NONE = (0.9, 0.85, 0.95), (0.5, 0.45, 0.55), (0.7, 0.5, 0.9), (0.99, NAN, NAN)


@pytest.mark.parametrize(
    ("own", "control", "word"),
    [
        (CLEAR, BELOW, "score beats perplexity"), (BELOW, CLEAR, "score is clearly below perplexity"),
        (CLEAR, WIDE, "not clearly apart from perplexity"), (WIDE, CLEAR, "not clearly apart from perplexity"),
        (NONE, BELOW, "not clearly apart"), (CLEAR, (0.1, NAN, NAN), "not clearly apart"),
        ((0.1, NAN, NAN), CLEAR, "not clearly apart"), (CLEAR, CLEAR, "not clearly apart"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("over", [outcome.UNSEEN, outcome.LEARNED])
def test_a_warm_up_wins_only_with_intervals_apart(own: Interval, control: Interval, word: str, over: str) -> None:
    text = outcome.warmed(aurocs(own, control, over), gains((0.0, -0.1, 0.1), over), GAUGE, (2.0, 2.5))
    first, second = text.split("\n\n")[:2]
    assert word in first
    assert bool(WINNING.search(first)) == ("not clearly" not in word)
    assert f"**{own[0]:.3f} [{own[1]:.3f}, {own[2]:.3f}]**" in first
    assert first.endswith(f"{control[0]:.3f} [{control[1]:.3f}, {control[2]:.3f}].")
    assert "before the warm-up 0.410 [0.310, 0.510]" in first
    assert ("were unseen" in first) == (over == outcome.UNSEEN)
    assert not WINNING.search(second)


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ((0.02, 0.01, 0.03), "better than"), ((-0.02, -0.03, -0.01), "worse than"),
        ((0.02, -0.01, 0.05), "not clearly apart from"), ((0.2, NAN, NAN), "not clearly apart from"),
        ((0.0, 0.0, 0.0), "not clearly apart from"),
    ],
)  # fmt: skip
def test_what_both_together_gain(gain: Interval, word: str) -> None:
    second, third = outcome.warmed(aurocs(CLEAR, BELOW), gains(gain), GAUGE, (2.0, 2.5)).split("\n\n")[1:3]
    assert f"is {word} perplexity alone" in second
    assert "is not clearly apart from perplexity with the same calibration" in third
    assert f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]" in second


def test_gauge_and_price_in_words() -> None:
    *_, gauge, price = outcome.warmed(aurocs(CLEAR, BELOW), gains(NONE), GAUGE, (2.0, 2.5)).split("\n\n")
    assert "`literal` has a Spearman correlation of 0.200" in gauge
    assert "`centred` 1.0000, `log_mass` 0.9990, `contrastive` 0.9980" in gauge
    assert price.startswith("The price")
    assert "from 2.000 to 2.500" in price
    assert "price" not in outcome.warmed(aurocs(CLEAR, BELOW), gains(NONE), GAUGE, (2.5, 2.0))


def known_rows(kinds: list[str], groups: int, turned: bool = False) -> pd.DataFrame:
    """`contrastive` knows trash for certain, perplexity not at all; or the other way round."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"corruption": np.repeat(["", *kinds], 40)})
    table["source"] = [f"f{n % groups}" for n in range(len(table))]
    sure = (table["corruption"] == "") + rng.uniform(0, 0.5, len(table))
    chance = rng.uniform(size=len(table))
    table["contrastive"], blind = (chance, sure) if turned else (sure, chance)
    table["perplexity"], table["combined"] = np.exp(-blind), (chance if turned else sure)
    table["perplexity_fitted"] = blind
    for name in ("literal", "centred", "log_mass", "random"):
        table[name] = rng.uniform(size=len(table))
    return table.assign(tokens=rng.integers(10, 60, len(table)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("groups", [20, 4])
def test_from_rows_to_words(groups: int, turned: bool) -> None:
    after = known_rows(["byte_noise", "repetition"], groups, turned)
    before = known_rows(["byte_noise", "repetition"], groups, True).drop(columns=["combined", "perplexity_fitted"])
    found, gained = outcome.aurocs(before, after, ["byte_noise"]), outcome.together(after, ["byte_noise"])
    kinds = {"byte_noise", "repetition", "learned", "unseen", "mean"}
    assert set(found["corruption"]) == kinds
    at = found.set_index(["score", "corruption"])["auroc"]
    assert at["contrastive", "learned"] == pytest.approx(at["contrastive", "byte_noise"])
    assert at["contrastive", "unseen"] == pytest.approx(at["contrastive", "repetition"])
    assert at["contrastive", "mean"] == pytest.approx(at["contrastive"][["byte_noise", "repetition"]].mean())
    assert "combined, before" not in set(found["score"])
    text = outcome.warmed(found, gained, GAUGE, (2.0, 2.5))
    if groups < 8:
        assert not WINNING.search(text)
    else:
        assert ("score is clearly below perplexity" if turned else "score beats perplexity") in text
        for how in ("alone", "with the same calibration"):
            assert f"is {'worse' if turned else 'better'} than perplexity {how}" in text
    metrics = outcome.warmed_metrics(found, gained, GAUGE, (2.0, 2.5))
    assert metrics["auroc_contrastive_unseen"] == at["contrastive", "unseen"]
    assert metrics["auroc_contrastive_before_learned"] == at["contrastive, before", "learned"]
    assert metrics["combined_minus_perplexity_all_kinds"] == pytest.approx(
        at["combined", "mean"] - at["perplexity", "mean"]
    )
    assert (metrics["nll_before"], metrics["nll_after"]) == (2.0, 2.5)
    label, value = outcome.warmed_headline(metrics)
    assert "unseen" in label
    assert value == f"{at['contrastive', 'unseen']:.2f}"


@pytest.mark.parametrize("learned", [["byte_noise", "repetition"], []])
def test_with_all_kinds_learned_or_none(learned: list[str]) -> None:
    after = known_rows(["byte_noise", "repetition"], 20)
    found, gained = outcome.aurocs(after, after, learned), outcome.together(after, learned)
    over = "learned" if learned else "unseen"
    assert {"learned", "unseen"} & set(found["corruption"]) == {over}
    metrics = outcome.warmed_metrics(found, gained, GAUGE, (2.0, 2.5))
    assert over in outcome.warmed_headline(metrics)[0]
    text = outcome.warmed(found, gained, GAUGE, (2.0, 2.5))
    assert ("none was left unseen" in text) == bool(learned)
    assert "is better than perplexity alone" in text


# --- 07_select

DONE = Cut(scored=1200, kept=300, rejected={"too long": 20, "empty": 3}, duplicates=0, nan=0, nan_kept=0)
FOLLOWS = pd.DataFrame(
    [("contrastive", w, rows, s, s - 0.1, s + 0.1)
     for w, s in (("tokens", 0.31), ("perplexity", -0.42)) for rows in ("all", "clean")],
    columns=["score", "with", "rows", "spearman", "low", "high"],
)  # fmt: skip
SHARED = judge.overlap({"selected": {1, 2, 3}, "epoch 1": {2, 3, 4}, "random": {9, 8, 7}}, 12)


@pytest.mark.parametrize("turned", [False, True])
def test_what_was_selected(turned: bool) -> None:
    table = known_rows(["byte_noise", "repetition"], 20, turned)
    text = verdict.selected(DONE, table, FOLLOWS, SHARED, "contrastive", 0.3)
    assert text.startswith("300 of 1,200 rows are kept, by `contrastive`; 23 were rejected.")
    numbers = verdict.selected_metrics(DONE, table, FOLLOWS, SHARED, "contrastive", 0.3)
    assert f"Of the kept rows **{numbers['corrupted_kept']:.1%}** are corrupted; of the pool 66.7%" in text
    cleaner = re.search(r"It is cleaner than by (.*?)\.", text)
    dirtier = re.search(r"It is dirtier than by (.*?)\.", text)
    for name in ("perplexity", "longest", "random"):
        other = numbers[f"corrupted_by_{name}"]
        assert (cleaner is not None and name in cleaner[1]) == (numbers["corrupted_kept"] < other)
        assert (dirtier is not None and name in dirtier[1]) == (numbers["corrupted_kept"] > other)
    assert (dirtier is not None and "perplexity" in dirtier[1]) == turned
    assert (numbers["corrupted_kept"] < 0.01) != turned
    assert "Among clean rows its Spearman correlation is +0.31 with length, -0.42 with perplexity." in text
    assert "Overlap (Jaccard; chance 0.14)" in text
    assert text.endswith("epoch 1 0.50, random 0.00.")
    assert (numbers["overlap_epoch_1"], numbers["overlap_random"]) == (0.5, 0.0)
    assert (numbers["spearman_tokens"], numbers["spearman_perplexity"]) == (0.31, -0.42)
    label, value = verdict.selected_headline(numbers, DONE)
    assert (label, value) == ("corrupted rows kept (pool 67%)", f"{numbers['corrupted_kept']:.1%}")


def test_rows_of_which_nothing_is_known() -> None:
    table = known_rows([], 20)
    text = verdict.selected(DONE, table, FOLLOWS, SHARED[SHARED["one"] == SHARED["other"]], "contrastive", 0.3)
    assert "corrupted" not in text
    assert "clean" not in text
    assert "Jaccard" not in text
    numbers = verdict.selected_metrics(DONE, table, FOLLOWS, SHARED, "contrastive", 0.3)
    assert verdict.selected_headline(numbers, DONE) == ("rows kept of 1,200", "300")
    assert verdict.counts(DONE) == {"rows scored": 1200, "kept": 300, "rejected, too long": 20, "rejected, empty": 3}
    plain = Cut(5, 2, {}, 4, 0, 0)
    assert verdict.counts(plain) == {
        "rows scored": 5, "kept": 2, "rejected": 0, "left out as near-duplicates": 4
    }  # fmt: skip


@pytest.mark.parametrize(("ranking", "first"), [("contrastive", "d"), ("perplexity", "a")])
def test_best_and_worst(ranking: str, first: str) -> None:
    rows = pd.DataFrame({"text": list("abcde"), "contrastive": [1.0, 2, 3, 4, NAN], "perplexity": [1.0, 2, 3, 4, NAN]})
    order = list("dcba") if first == "d" else list("abcd")
    assert list(verdict.ends(rows, ranking).values()) == order
    for count in range(4):
        assert len(verdict.ends(rows.head(count), ranking)) == count
    assert next(iter(verdict.ends(rows, ranking))).startswith("1 of 4, ")


def test_epochs_are_counted_not_sorted_as_words(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"epoch_{number}").mkdir()
    assert [verdict.epoch_folder(tmp_path, n) for n in (0, 1, 2, 10)] == ["epoch_10", "epoch_1", "epoch_2", "epoch_10"]
    for missing in (3, 11, -1):
        with pytest.raises(BenchError, match=f"^epoch={missing}: 06_selector left epoch_1, epoch_2, epoch_10; choose"):
            verdict.epoch_folder(tmp_path, missing)
    with pytest.raises(BenchError, match="left none"):
        verdict.epoch_folder(tmp_path / "nothing", 0)
    assert [verdict.epoch_of(name) for name in ("epoch_3", "a/b/epoch_12", "a/model")] == [3, 12, 0]


# --- 08_target and 09_evaluate


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
    found = worth.duels(there)
    words = dict(zip(found["against"], found["verdict"], strict=True))
    win, loss = ("better", "worse") if own < 0 else ("worse", "better")
    assert words == {"base": win, "random": win, "longest": "no clear difference", "full": loss}
    text = worth.verdict(there, found)
    for name in ("random", "longest", "full"):
        assert f"**{words[name]}**" in line(text, name)
    lowest = there.table()["label"][0]
    assert f"lowest loss is that of `{lowest}`" in text
    assert (lowest == "full") == (own < 0)
    assert f"changes by **{there.between('selected').mean:+.4f} [" in text
    label, value = worth.headline(there, found)
    assert f"minus random ({win})" in label
    assert float(value) == pytest.approx(own, abs=0.05)
    numbers = worth.metrics(there, found)
    assert numbers["selected_minus_full"] == pytest.approx(-own, abs=0.05)
    assert numbers["delta_base"] == 0
    assert numbers["base_nll"] == pytest.approx(2.0)


def test_few_groups_win_nothing() -> None:
    there = ring({"random": 0.0, "full": 3.0}, own=-3.0, groups=4)
    found = worth.duels(there)
    assert set(found["verdict"]) == {"too few sources"}
    assert found["low"].isna().all()
    text = worth.verdict(there, found)
    assert not re.search(r"\b(better|worse|beats|best)\b", text, re.IGNORECASE)
    assert "too few sources" in worth.headline(there, found)[0]


def test_headline_without_a_random_rival() -> None:
    there = ring({"longest": 0.0})
    label, value = worth.headline(there, worth.duels(there))
    assert label == "held-out loss, selected minus the untrained model (better)"
    assert value.startswith("-0.3")
    alone = ring({})
    found = worth.duels(alone)
    assert worth.headline(alone, found)[0].endswith("the untrained model (better)")
    assert "against" not in worth.verdict(alone, found)


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
    text = worth.compared(found)
    assert "- `cloze`, acc: 0.4000 → 0.5000, **better** (+0.1000 [+0.0500, +0.1500], 200 questions)" in text
    assert "- `bits_per_byte`, bpb: 2.0000 → 2.5000, **worse**" in text
    assert "**too few groups**" in text
    assert "1,200 questions" in text
    assert worth.compared_headline(found) == ("cloze, acc, tuned minus base (better)", "+0.100")
    assert worth.compared_metrics(found)["mmlu_acc_tuned"] == 0.35
    assert worth.cuts(Answered({"a": {"cut": 0}})) == "Every question fitted the model."
    assert worth.cuts(Answered({"a": {"cut": 0}, "b": {"cut": 3}})).endswith("lost their front: b 3.")


def test_the_whole_verdict() -> None:
    rows = [
        (name, "mean", *value)
        for name, value in (("contrastive", WIDE), ("literal", BELOW), ("perplexity", CLEAR), ("combined", NONE))
    ]
    known = pd.DataFrame(rows, columns=["score", "corruption", "auroc", "low", "high"])
    duels = worth.duels(ring({"random": 0.0, "full": -0.6}))
    text = worth.whole(known, gains((0.02, 0.01, 0.03)), FOLLOWS, duels)
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
        assert not WINNING.search(worth.whole(known, gains(gain), FOLLOWS, duels))
    assert "are worse than" in worth.whole(known, gains((-0.02, -0.03, -0.01)), FOLLOWS, duels)
    unknown = worth.whole(None, None, FOLLOWS, duels)
    assert "AUROC" not in unknown
    assert unknown.count("\n\n") == 1
    turned = worth.whole(None, None, FOLLOWS, worth.duels(ring({"random": 0.0, "full": -0.6}, own=0.3)))
    assert "random: worse; full: worse" in turned
    few = worth.whole(None, None, FOLLOWS, worth.duels(ring({"random": 0.0}, own=-3.0, groups=4)))
    assert "random: too few sources" in few
    assert not re.search("better|worse", few)


def test_kinds_and_sizes(olmoe: Any) -> None:
    assert worth.kinds({"random": 1, "full": 2}) == {"selected": "router", "random": "control", "full": "reference"}
    size = worth.sizes(olmoe)
    assert size["context"] + size["continuation"] < size["length"] == 64
