"""06_selector in words: turn the numbers round, and the words turn round; no interval, no victory."""

from __future__ import annotations

import pandas as pd
import pytest

from tinyonn_lib.selection import judge, outcome_selector

from .outcomes import BELOW, CLEAR, NAN, NONE, WIDE, WINNING, Interval, gains, known_rows

GAUGE = pd.DataFrame({
    "score": ["literal", "centred", "log_mass", "contrastive", "perplexity"], "spearman": [0.2, 1.0, 0.999, 0.998, 1.0]
})  # fmt: skip


def aurocs(own: Interval, control: Interval, over: str = judge.UNSEEN) -> pd.DataFrame:
    values = {
        "contrastive": own, "perplexity": control, "literal": (0.5, 0.4, 0.6), "log_mass": (0.61, 0.6, 0.62),
        "contrastive, before": (0.41, 0.31, 0.51), "combined": (0.8, 0.7, 0.9),
    }  # fmt: skip
    rows = [(name, kind, *value) for name, value in values.items() for kind in {outcome_selector.LEARNED, over, "mean"}]
    return pd.DataFrame(rows, columns=["score", "corruption", "auroc", "low", "high"])


@pytest.mark.parametrize(
    ("own", "control", "word"),
    [
        (CLEAR, BELOW, "score beats perplexity"), (BELOW, CLEAR, "score is clearly below perplexity"),
        (CLEAR, WIDE, "not clearly apart from perplexity"), (WIDE, CLEAR, "not clearly apart from perplexity"),
        (NONE, BELOW, "not clearly apart"), (CLEAR, (0.1, NAN, NAN), "not clearly apart"),
        ((0.1, NAN, NAN), CLEAR, "not clearly apart"), (CLEAR, CLEAR, "not clearly apart"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("over", [judge.UNSEEN, outcome_selector.LEARNED])
def test_a_warm_up_wins_only_with_intervals_apart(own: Interval, control: Interval, word: str, over: str) -> None:
    text = outcome_selector.warmed(aurocs(own, control, over), gains((0.0, -0.1, 0.1), over), GAUGE, (2.0, 2.5))
    first, second = text.split("\n\n")[:2]
    assert word in first
    assert bool(WINNING.search(first)) == ("not clearly" not in word)
    assert f"**{own[0]:.3f} [{own[1]:.3f}, {own[2]:.3f}]**" in first
    assert first.endswith(f"{control[0]:.3f} [{control[1]:.3f}, {control[2]:.3f}].")
    assert "before the warm-up 0.410 [0.310, 0.510]" in first
    assert ("were unseen" in first) == (over == judge.UNSEEN)
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
    second, third = outcome_selector.warmed(aurocs(CLEAR, BELOW), gains(gain), GAUGE, (2.0, 2.5)).split("\n\n")[1:3]
    assert f"is {word} perplexity alone" in second
    assert "is not clearly apart from perplexity with the same calibration" in third
    assert f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]" in second


def test_gauge_and_price_in_words() -> None:
    *_, gauge, price = outcome_selector.warmed(aurocs(CLEAR, BELOW), gains(NONE), GAUGE, (2.0, 2.5)).split("\n\n")
    assert "`literal` has a Spearman correlation of 0.200" in gauge
    assert "`centred` 1.0000, `log_mass` 0.9990, `contrastive` 0.9980" in gauge
    assert price.startswith("The price")
    assert "from 2.000 to 2.500" in price
    assert "price" not in outcome_selector.warmed(aurocs(CLEAR, BELOW), gains(NONE), GAUGE, (2.5, 2.0))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("groups", [20, 4])
def test_from_rows_to_words(groups: int, turned: bool) -> None:
    after = known_rows(["byte_noise", "repetition"], groups, turned)
    before = known_rows(["byte_noise", "repetition"], groups, True).drop(columns=["combined", "perplexity_fitted"])
    found, gained = outcome_selector.aurocs(before, after, ["byte_noise"]), judge.together(after, ["byte_noise"])
    kinds = {"byte_noise", "repetition", "learned", "unseen", "mean"}
    assert set(found["corruption"]) == kinds
    at = found.set_index(["score", "corruption"])["auroc"]
    assert at["contrastive", "learned"] == pytest.approx(at["contrastive", "byte_noise"])
    assert at["contrastive", "unseen"] == pytest.approx(at["contrastive", "repetition"])
    assert at["contrastive", "mean"] == pytest.approx(at["contrastive"][["byte_noise", "repetition"]].mean())
    assert "combined, before" not in set(found["score"])
    text = outcome_selector.warmed(found, gained, GAUGE, (2.0, 2.5))
    if groups < 8:
        assert not WINNING.search(text)
    else:
        assert ("score is clearly below perplexity" if turned else "score beats perplexity") in text
        for how in ("alone", "with the same calibration"):
            assert f"is {'worse' if turned else 'better'} than perplexity {how}" in text
    metrics = outcome_selector.warmed_metrics(found, gained, GAUGE, (2.0, 2.5))
    assert metrics["auroc_contrastive_unseen"] == at["contrastive", "unseen"]
    assert metrics["auroc_contrastive_before_learned"] == at["contrastive, before", "learned"]
    assert metrics["combined_minus_perplexity_all_kinds"] == pytest.approx(
        at["combined", "mean"] - at["perplexity", "mean"]
    )
    assert (metrics["nll_before"], metrics["nll_after"]) == (2.0, 2.5)
    label, value = outcome_selector.warmed_headline(metrics)
    assert "unseen" in label
    assert value == f"{at['contrastive', 'unseen']:.2f}"


@pytest.mark.parametrize("learned", [["byte_noise", "repetition"], []])
def test_with_all_kinds_learned_or_none(learned: list[str]) -> None:
    after = known_rows(["byte_noise", "repetition"], 20)
    found, gained = outcome_selector.aurocs(after, after, learned), judge.together(after, learned)
    over = "learned" if learned else "unseen"
    assert {"learned", "unseen"} & set(found["corruption"]) == {over}
    metrics = outcome_selector.warmed_metrics(found, gained, GAUGE, (2.0, 2.5))
    assert over in outcome_selector.warmed_headline(metrics)[0]
    text = outcome_selector.warmed(found, gained, GAUGE, (2.0, 2.5))
    assert ("none was left unseen" in text) == bool(learned)
    assert "is better than perplexity alone" in text
