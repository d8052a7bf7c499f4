"""Tables about scores, against sklearn, scipy, and numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import bootstrap, judge
from tinyonn_lib.selection.judge import MEAN
from tinyonn_lib.selection.routers import routers
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.selector import of

KINDS = ("", "", "byte_noise", "repetition")


def scored(rows: int = 400, seed: int = 0, step: float = 0.25) -> pd.DataFrame:
    """Clean rows have a higher contrast; scores are rounded to `step`, so that many tie."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(KINDS, rows)
    level = pd.Series(kind).map({"": 1.0, "byte_noise": 0.0, "repetition": 0.5}).to_numpy()
    return pd.DataFrame(
        {
            "corruption": kind,
            "contrastive": np.round((level + rng.normal(size=rows)) / step) * step,
            "log_mass": -rng.exponential(size=rows),
            "perplexity": np.exp(np.round((4 - level + rng.normal(size=rows)) / step) * step),
            "tokens": rng.integers(5, 20, rows),
            "random": rng.random(rows),
            "ifd": np.where(np.arange(rows) % 3, np.nan, rng.normal(size=rows)),
        }
    )


def expected(table: pd.DataFrame, kind: str, score: pd.Series) -> float:
    here = table["corruption"].isin(["", kind]) & score.notna()
    return roc_auc_score(table.loc[here, "corruption"] == "", score[here])


def test_auroc_is_sklearns_with_ties_and_signs() -> None:
    table = scored()
    names = ["contrastive", "perplexity", "length", "longest", "ifd"]
    found = judge.auroc(table, names, groups=range(len(table)), draws=50).set_index(["score", "corruption"])
    sides = [table["contrastive"], -table["perplexity"], -table["tokens"], table["tokens"], table["ifd"]]
    for name, score in zip(names, sides, strict=True):
        each = [expected(table, kind, score) for kind in ("byte_noise", "repetition")]
        np.testing.assert_allclose(found.loc[name, "auroc"], [*each, np.mean(each)], rtol=1e-12)
    assert found.loc[("length", MEAN), "auroc"] == pytest.approx(1 - found.loc[("longest", MEAN), "auroc"])
    assert found.loc[("contrastive", MEAN), "n"] == len(table)
    assert found.loc[("ifd", "repetition"), "n"] == (table["ifd"].notna() & (table["corruption"] != "byte_noise")).sum()
    assert (found["low"] <= found["auroc"]).all()
    assert (found["auroc"] <= found["high"]).all()


def test_every_draw_is_the_auroc_of_the_rows_that_were_drawn() -> None:
    table, groups = scored(120), np.arange(120) // 5
    weights = bootstrap.Weights(groups, 30, 4)
    _, (values,), _ = judge.aurocs_by_draw(table, [judge.quality(table, "contrastive")], weights)
    for counts, found in zip(weights.counts, values, strict=True):
        drawn = table.loc[np.repeat(table.index, counts[weights.code])]
        each = [expected(drawn, kind, drawn["contrastive"]) for kind in ("byte_noise", "repetition")]
        np.testing.assert_allclose(found, [*each, np.mean(each)], rtol=1e-12)


def test_draws_in_parts_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    table = scored()
    whole = judge.auroc(table, ["contrastive"], groups=np.arange(400) // 7, draws=90)
    monkeypatch.setattr(bootstrap, "CELLS", 400 * 8)
    pd.testing.assert_frame_equal(judge.auroc(table, ["contrastive"], groups=np.arange(400) // 7, draws=90), whole)


def test_intervals_cover_and_draw_whole_groups() -> None:
    """Rows come in twins: drawn one by one they would feign twice the data."""
    truth = 0.7602499389065233  # of two normal distributions one standard deviation apart: Phi(1 / sqrt 2)
    hits, widths = 0, []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        kind = np.repeat(["", "byte_noise"], 60)
        table = pd.DataFrame({"corruption": kind, "random": rng.normal(size=120) + (kind == "")})
        twins, groups = pd.concat([table, table], ignore_index=True), np.tile(np.arange(120), 2)
        row = judge.auroc(twins, ["random"], groups=groups, draws=200).iloc[0]
        alone = judge.auroc(twins, ["random"], groups=range(240), draws=200).iloc[0]
        hits += row["low"] <= truth <= row["high"]
        widths.append((row["high"] - row["low"]) / (alone["high"] - alone["low"]))
    assert 0.88 <= hits / 120 <= 1.0
    assert np.mean(widths) == pytest.approx(2**0.5, rel=0.05)


def test_few_groups_give_no_interval() -> None:
    found = judge.auroc(scored(), ["random"], groups=np.arange(400) % 7, draws=20)
    assert found[["low", "high"]].isna().all().all()
    assert found["auroc"].notna().all()


@pytest.mark.filterwarnings("error")
def test_a_score_that_nobody_has_is_nan_and_says_of_how_many() -> None:
    table = scored().assign(ifd=np.nan)
    found = judge.auroc(table, ["ifd", "random"], groups=np.arange(400) // 2, draws=20).set_index("score")
    assert found.loc["ifd", ["auroc", "low", "high"]].isna().all().all()
    assert (found.loc["ifd", "n"] == 0).all()
    assert found.loc["random", ["auroc", "low", "high"]].notna().all().all()


def test_difference_is_paired() -> None:
    table, groups = scored(), np.arange(400) // 4
    table["log_mass"] = table["contrastive"] + 0.01 * table["random"]  # nearly the same ranking
    single = judge.auroc(table, ["contrastive", "log_mass"], groups=groups).pivot(index="corruption", columns="score")
    found = judge.auroc_difference(table, "log_mass", "contrastive", groups=groups).set_index("corruption")
    gap = single["auroc", "log_mass"] - single["auroc", "contrastive"]
    np.testing.assert_allclose(found["difference"], gap[found.index], atol=1e-12)
    width = single["high", "contrastive"] - single["low", "contrastive"]
    assert ((found["high"] - found["low"]) < 0.3 * width[found.index]).all()
    same = judge.auroc_difference(table, "random", "random", groups=groups)
    assert (same[["difference", "low", "high"]] == 0).all().all()
    assert found.index.tolist() == ["byte_noise", "repetition", MEAN]


def test_what_cannot_be_judged_is_refused() -> None:
    table = scored()
    with pytest.raises(BenchError, match="Unknown ranking 'best'"):
        judge.auroc(table, ["best"], groups=range(400))
    with pytest.raises(BenchError, match="needs the column 'combined'"):
        judge.auroc(table, ["combined"], groups=range(400))
    for part in (table[table["corruption"] == ""], table[table["corruption"] != ""]):
        with pytest.raises(BenchError, match="clean and corrupted"):
            judge.auroc(part, ["random"], groups=range(len(part)))
        with pytest.raises(BenchError, match="clean and corrupted"):
            judge.combine(part)


def test_combine_finds_planted_coefficients() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"contrastive": rng.normal(3, 0.5, 20_000), "perplexity": np.exp(rng.normal(4, 2, 20_000))})
    table["log_mass"] = -rng.exponential(0.5, 20_000)
    likely = np.log(table["perplexity"])
    odds = 4 * table["contrastive"] + 2 * table["log_mass"] + 3 * likely - 0.5 * likely**2 - 13
    table["corruption"] = np.where(rng.random(20_000) < 1 / (1 + np.exp(-odds)), "", "byte_noise")
    broken = pd.DataFrame({"contrastive": [np.nan, 1], "log_mass": [-1.0, -1.0], "perplexity": [1, np.inf]})
    found = judge.combine(pd.concat([table, broken.assign(corruption="")]))
    assert found["contrastive"] == pytest.approx(4, rel=0.05)
    assert found["log_mass"] == pytest.approx(2, rel=0.05)
    assert found["log_perplexity"] == pytest.approx(3, rel=0.05)
    assert found["log_perplexity_squared"] == pytest.approx(-0.5, rel=0.05)
    assert found["intercept"] == pytest.approx(-13, rel=0.05)
    alone = judge.combine(table, ())
    assert set(alone) == {"log_perplexity", "log_perplexity_squared", "intercept"}
    assert alone["log_perplexity_squared"] < 0  # neither too likely nor too unlikely


def test_correlations_are_scipys_over_all_and_over_clean_rows() -> None:
    table, groups = scored(), np.arange(400) // 3
    found = judge.correlations(table, ["contrastive", "length", "ifd"], groups=groups, draws=100)
    found = found.set_index(["score", "with", "rows"])
    assert ("length", "tokens", "all") not in found.index
    for rows, part in (("all", table), ("clean", table[table["corruption"] == ""])):
        for score, sign in (("contrastive", 1), ("length", -1), ("ifd", 1)):
            row = found.loc[(score, "perplexity", rows)]
            values = sign * part[{"length": "tokens"}.get(score, score)]
            assert row["spearman"] == pytest.approx(spearmanr(values, part["perplexity"], nan_policy="omit").statistic)
            assert row["low"] < row["spearman"] < row["high"]
    assert found.loc[("ifd", "tokens", "all"), "n"] == table["ifd"].notna().sum()


def test_overlap_by_hand() -> None:
    rows = [("a.jsonl", n) for n in range(10)]
    found = judge.overlap({"one": set(rows[:4]), "other": set(rows[2:7]), "none": set()}, pool=10)
    found = found.set_index(["one", "other"])
    assert found.loc[("one", "other")].tolist() == [2, pytest.approx(2 / 7), pytest.approx(2 / (4 + 5 - 2))]
    assert found.loc[("one", "other")].equals(found.loc[("other", "one")])
    assert found.loc[("one", "one"), "jaccard"] == 1
    assert np.isnan(found.loc[("one", "one"), "chance"])
    assert found.loc[("one", "none"), "jaccard"] == 0
    assert len(found) == 9


def test_kept_share_by_hand() -> None:
    table = pd.DataFrame(
        {
            "corruption": ["", "", "", "", "byte_noise", "byte_noise", "repetition", ""],
            "contrastive": [9, 8, 7, 1, 2, 3, 8.5, np.nan],
            "tokens": [5] * 8,
        }
    )
    found = judge.kept_share(table, ["contrastive", "length"], 0.5).set_index(["score", "corruption"])
    assert found.loc["contrastive", "rows"].to_dict() == {"clean": 3, "byte_noise": 0, "repetition": 1}
    assert found.loc["contrastive", "share"].to_dict() == {"clean": 0.75, "byte_noise": 0, "repetition": 0.25}
    assert found.loc["contrastive", "pool"].to_dict() == {"clean": 0.625, "byte_noise": 0.25, "repetition": 0.125}
    assert found.loc[("length", "clean"), "rows"] == 4  # all tie: the first four
    everything = judge.kept_share(table, ["contrastive"], 1.0)
    assert everything["share"].tolist() == everything["pool"].tolist()


def test_a_softmax_router_does_not_see_a_change_of_gauge_but_the_literal_score_does(
    make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    model = make_moe("olmoe", 3)
    before = [layer.weight.clone() for layer in routers(model)]
    rows = [Row("a.jsonl", place, text) for place, text in enumerate(make_texts(40))]
    options = {"ratio": 0.25, "seed": 1}
    found = judge.gauge(of(model, tokenizer), rows, seed=0, scorer_options=options).set_index("score")["spearman"]
    assert set(found.index) == {"literal", "centred", "log_mass", "contrastive", "perplexity"}
    assert (found.drop("literal") > 0.999).all()
    assert found["literal"] < 0.9
    assert all(torch.equal(old, layer.weight) for old, layer in zip(before, routers(model), strict=True))
    still = judge.gauge(of(model, tokenizer), rows, seed=0, size=0.0, scorer_options=options)
    assert (still["spearman"] > 1 - 1e-12).all()
