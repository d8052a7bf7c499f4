"""Figures of data selection show the numbers of their tables, each where it belongs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from tinyonn_lib import plots
from tinyonn_lib.selection import judge
from tinyonn_lib.selection.judge import MEAN

KINDS = ["repetition", "byte_noise", "wrong_answer"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    kind = np.array([*[""] * 90, *np.repeat(KINDS, 20)])
    level = rng.normal(size=150) + 3 * (kind == "")
    columns = {"contrastive": level, "random": rng.random(150), "tokens": rng.integers(5, 90, 150)}
    return pd.DataFrame({"corruption": kind, **columns, "perplexity": np.exp(rng.normal(size=150))})


def by_panel(figure: go.Figure) -> dict[str, list[go.Scatter]]:
    """Title → traces, for panels that were made line by line."""
    titles = [note.text for note in figure.layout.annotations]
    axes = ["x", *(f"x{place}" for place in range(2, len(titles) + 1))]
    return {
        title: [trace for trace in figure.data if trace.xaxis == axis]
        for title, axis in zip(titles, axes, strict=True)
    }  # fmt: skip


def test_auroc_shows_each_score_in_the_order_of_the_mean(table: pd.DataFrame) -> None:
    found = judge.auroc(table, ["random", "contrastive", "length"], groups=range(150), draws=40)
    figure = plots.auroc(found)
    panels = by_panel(figure)
    assert list(panels) == ["mean of all", "byte_noise", "repetition", "wrong_answer"]
    order = list(figure.layout.yaxis.ticktext)
    assert order[-1] == "contrastive"  # the best on top
    rows = found.set_index(["corruption", "score"])
    for kind, traces in zip([MEAN, "byte_noise", "repetition", "wrong_answer"], panels.values(), strict=True):
        assert [trace.name for trace in traces] == ["router", "baseline"]
        for trace in traces:
            for x, y, up, down in zip(trace.x, trace.y, trace.error_x.array, trace.error_x.arrayminus, strict=True):
                row = rows.loc[(kind, order[int(y)])]
                assert (x, x + up, x - down) == pytest.approx((row["auroc"], row["high"], row["low"]))
    assert [shape.x0 for shape in figure.layout.shapes] == [0.5] * 4
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2
    assert figure.layout.meta["alt"].startswith("AUROC, mean over all corruptions: contrastive 0.9")


def test_distributions_count_the_rows_of_each_kind(table: pd.DataFrame) -> None:
    figure = plots.score_distributions(table, "perplexity", bins=10)
    order = [text.split(" ")[0] for text in figure.layout.yaxis.ticktext]
    assert order == ["wrong_answer", "repetition", "byte_noise", "clean"]  # clean on top
    medians = [trace for trace in figure.data if trace.mode == "markers"]
    for place, kind in enumerate(order):
        here = -table.loc[table["corruption"] == kind.replace("clean", ""), "perplexity"]  # less is better
        assert medians[place].x[0] == pytest.approx(here.median())
        assert f"({len(here)})" in figure.layout.yaxis.ticktext[place]
        filled = [trace for trace in figure.data if trace.fill == "tonexty"][place]
        assert max(filled.y) == pytest.approx(place + 0.45)
        assert min(filled.y) >= place - 0.35 - 1e-6
    edges = np.quantile(-table["perplexity"], [0.005, 0.995])
    assert (figure.data[1].x[0], figure.data[1].x[-1]) == pytest.approx(tuple(edges))


def test_correlations_stand_beside_each_other(table: pd.DataFrame) -> None:
    names = ["contrastive", "length"]
    found = judge.correlations(table, names, groups=range(150), draws=20)
    figure = plots.score_correlations(found)
    assert list(figure.layout.yaxis.ticktext) == names[::-1]
    panels = by_panel(figure)
    tokens, perplexity = panels["with tokens"], panels["with perplexity"]
    assert [list(trace.y) for trace in tokens] == [[1.15], [0.85]]  # length is not compared with itself
    assert [list(trace.y) for trace in perplexity] == [[1.15, 0.15], [0.85, -0.15]]
    rows = found.set_index(["with", "rows", "score"])["spearman"].sort_index()
    np.testing.assert_allclose(perplexity[1].x, rows.loc[("perplexity", "clean")].loc[names])


def test_overlap_names_the_strongest_pair_and_chance() -> None:
    found = judge.overlap({"<b>": {1, 2, 3}, "x": {2, 3, 4}, "y": {9}}, pool=9)
    figure = plots.selection_overlap(found)
    np.testing.assert_allclose(figure.data[0].z, [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    assert list(figure.data[0].x) == list(figure.data[0].y) == ["&lt;b&gt;", "x", "y"]
    assert figure.data[0].text[0].tolist() == ["1.00", "0.50 (0.20)", "0.00 (0.09)"]
    assert "most " in figure.layout.meta["alt"]
    assert "(0.50, by chance 0.20)" in figure.layout.meta["alt"]
    alone = plots.selection_overlap(judge.overlap({"x": {1}}, pool=9))
    assert alone.layout.meta["alt"] == "Overlap of 1 selections."


def test_kept_stacks_to_one_beside_the_pool(table: pd.DataFrame) -> None:
    figure = plots.kept(judge.kept_share(table, ["random", "contrastive"], 0.2))
    assert [trace.name for trace in figure.data] == ["clean", "byte_noise", "repetition", "wrong_answer"]
    assert list(figure.data[0].y) == ["the pool", "random", "contrastive"]
    np.testing.assert_allclose(np.sum([trace.x for trace in figure.data], 0), 1)
    assert figure.data[0].x[0] == figure.layout.shapes[0].x0 == 0.6
    notes = {note.y: note.text for note in figure.layout.annotations}
    assert notes["the pool"] == "60.0% clean"
    assert notes["contrastive"] == f"{figure.data[0].x[2]:.1%} clean"


def test_target_loss_is_sorted_and_coloured_by_kind() -> None:
    rows = [("base", 0.0, np.nan, "base"), ("<i>ours", -0.3, -0.35, "router"), ("random", -0.2, -0.21, "control")]
    table = pd.DataFrame(rows, columns=["label", "delta", "low", "kind"]).assign(high=lambda each: each["delta"] + 0.02)
    figure = plots.target_loss(table)
    assert list(figure.layout.yaxis.ticktext) == ["base", "random", "&lt;i&gt;ours"]
    shown = {trace.name: (list(trace.x), list(trace.y), trace.marker.color) for trace in figure.data}
    assert shown["router"] == ([-0.3], [2.0], plots.ACCENT)
    assert shown["base"] == ([0.0], [0.0], plots.QUIET)
    assert shown["control"][2] not in {plots.ACCENT, plots.QUIET}
    assert [note.text for note in figure.layout.annotations] == ["+0.0000", "-0.2000", "-0.3000"]
    assert "<i>ours -0.3000, random -0.2000, base +0.0000" in figure.layout.meta["alt"]


def test_warmup_goes_on_counting_through_the_epochs() -> None:
    history = pd.DataFrame({"step": [1, 2, 3] * 2, "loss": [6.0, 4, 2, 3, 2, 1], "epoch": [1] * 3 + [2] * 3})
    figure = plots.warmup(history, smooth=2)
    steps, line = figure.data
    assert list(steps.x) == [1, 2, 3, 4, 5, 6]
    assert list(line.y) == [6, 5, 3, 2.5, 2.5, 1.5]
    assert [shape.x0 for shape in figure.layout.shapes] == [3, 6]
    assert figure.layout.meta["alt"] == "Loss of the warm-up over 6 steps: 6 at first, 1.5 at the end."
    assert figure.layout.meta["table"]["rows"][1] == [2, 3, 3.0, 2.0, 1.0]


def test_benchmarks_show_both_models_and_the_paired_difference() -> None:
    rows = [
        ("mmlu", "acc", 0.3, 0.4, 0.05, 0.15, "higher", "better"),
        ("<b>docs", "acc", 0.5, 0.49, -0.03, 0.01, "higher", "no clear difference"),
        ("mmlu", "margin", -1.0, -1.5, -0.7, -0.3, "higher", "worse"),
    ]
    table = pd.DataFrame(rows, columns=["task", "metric", "base", "tuned", "low", "high", "better", "verdict"])
    figure = plots.benchmarks(table.assign(difference=table["tuned"] - table["base"]))
    panels = by_panel(figure)
    assert next(iter(panels)) == "acc (higher is better): base and tuned"
    base, tuned = panels["acc (higher is better): base and tuned"]
    assert (list(base.x), list(tuned.x)) == ([0.5, 0.3], [0.49, 0.4])
    assert list(figure.layout.yaxis.ticktext) == ["&lt;b&gt;docs", "mmlu"]  # the first on top
    assert list(figure.layout.yaxis3.ticktext) == ["mmlu"]
    gaps = {trace.name: trace for trace in panels["acc (higher is better): tuned minus base"]}
    assert list(gaps["better"].y) == [1]
    np.testing.assert_allclose(gaps["better"].error_x.array, [0.05])
    (worse,) = panels["margin (higher is better): tuned minus base"]
    assert (worse.name, worse.showlegend, list(worse.x)) == ("worse", True, [-0.5])
    assert "mmlu margin -1 to -1.5, worse" in figure.layout.meta["alt"]
