"""Figures say in words what they show, and stay small however many neurons there are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from tinyonn_lib import plots
from tinyonn_lib.experts import score

LIBRARY = Path(plots.__file__).parents[1]

PAGE = 15_000_000 - 5_000_000
"""Bytes a report may have beside plotly.js."""


@pytest.fixture(scope="module")
def neurons() -> pd.DataFrame:
    """As many as Qwen1.5-4B has."""
    rng = np.random.default_rng(0)
    layer = np.repeat(np.arange(40), 6912)
    table = pd.DataFrame({"layer": layer, "neuron": np.tile(np.arange(6912), 40)})
    loud = rng.normal(size=len(table))
    table["act"] = np.exp(loud)
    table["grad"] = np.exp(0.97 * loud + 0.24 * rng.normal(size=len(table)))
    table["freq"], table["saliency"] = rng.beta(1, 19, len(table)), table["act"] * table["grad"]
    return table


@pytest.fixture(scope="module")
def scores(neurons: pd.DataFrame) -> pd.DataFrame:
    table = score.score_table(neurons)
    table["delta_sc"] = score.delta_sc(table)
    rng = np.random.default_rng(1)
    table["cluster"] = rng.integers(-1, 100, len(table))
    table[["x", "y"]] = rng.normal(size=(len(table), 2))
    return table


def size(*figures: go.Figure) -> int:
    return sum(len(figure.to_json().encode()) for figure in figures)


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_nothing_but_plots_knows_plotly() -> None:
    files = {file.relative_to(LIBRARY).as_posix() for file in LIBRARY.rglob("*.py") if "plotly" in imported(file)}
    outside = {file for file in files if not file.startswith("plots/")}
    assert outside <= {"workbench/page.py"}  # which copies plotly.js into the page and draws nothing
    assert "plots/base.py" in files


def test_the_command_starts_without_plotly() -> None:
    code = "import sys, tinyonn_lib.workbench.cli as cli; assert cli.main and 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pages_of_a_quarter_million_neurons_fit(neurons: pd.DataFrame, scores: pd.DataFrame) -> None:
    cluster = (
        plots.ranking(scores),
        plots.correlations(scores[["sp", "z_act", "z_grad"]]),
        plots.delta_sc_map(scores),
        plots.profiles(scores, ["sp", "z_act"]),
        plots.neuron_map(scores),
        plots.neuron_map(scores, "t-SNE"),
        plots.explorer_map(scores, {name: scores["sp"].to_numpy() for name in score.PRESETS}, scores.head()),
    )
    assert size(*cluster) < PAGE
    assert size(plots.distributions(neurons), plots.activation_gradient(neurons)) < PAGE


def test_every_point_is_counted_and_the_sample_is_stratified(scores: pd.DataFrame) -> None:
    figure = plots.neuron_map(scores)
    density, *points = figure.data
    assert round(float(np.expm1(density.z.astype(float)).sum())) == pytest.approx(len(scores), rel=1e-3)
    drawn = np.asarray(points[0].customdata)[:, 0]
    assert len(drawn) == pytest.approx(plots.MAP_SAMPLE, rel=0.01)
    assert np.ptp(np.bincount(drawn)) <= 1
    assert "276,480 neurons" in figure.layout.meta["alt"]


def test_delta_sc_map_shows_each_neuron_of_a_small_layer() -> None:
    table = pd.DataFrame({"layer": [0, 0, 0, 1, 1, 1], "neuron": [0, 1, 2] * 2, "delta_sc": [1, -2, 0.5, 0, 3, -1]})
    np.testing.assert_allclose(plots.delta_sc_map(table).data[0].z, [[1, -2, 0.5], [0, 3, -1]])
    means = plots.delta_sc_map(table, columns=2).data[0].z
    np.testing.assert_allclose(means, [[-0.5, 0.5], [1.5, -1]])


def test_trial_shows_every_partition_in_each_panel() -> None:
    rows = [
        {"text": "held-out", "active": share, "share": share, "k": 2.0, "partition": name, "router": router,
         "method": f"{name}, {router} router", "mean": mean, "low": mean - 0.1, "high": mean + 0.1,
         "seeds": 3, "files": 9}
        for share in (0.25, 0.5)
        for name, router, mean in (("sp", "oracle", 0.2), ("sp", "ridge", 0.4), ("flap_static", "oracle", 0.1))
    ]  # fmt: skip
    rows += [
        {**rows[0], "active": share, "share": share, "partition": "flap_static", "router": "static", "mean": 0.5,
         "method": "flap_static"}
        for share in (0.25, 0.5)
    ]  # fmt: skip
    figure = plots.trial(pd.DataFrame(rows), "held-out")
    assert [list(trace.y) for trace in figure.data[:3]] == [["sp", "flap_static"], ["sp"], ["flap_static"]]
    assert list(figure.layout.yaxis.categoryarray) == ["sp", "flap_static"]  # the last is on top
    lines = [shape.x0 for shape in figure.layout.shapes]
    assert lines == [0.5, 0.5]
    assert figure.layout.meta["table"]["columns"][-2:] == ["25% active, k = 2", "50% active, k = 2"]


def usage(layers: int, experts: int, steps: int = 5) -> pd.DataFrame:
    """The higher its number the less an expert is called; the last but one dies, the last is dead."""
    rows = [
        (step * 10, layer, expert, 0.0 if expert == experts - 1 or (expert == experts - 2 and step > 2) else share)
        for step in range(1, steps + 1)
        for layer in range(layers)
        for expert, share in enumerate(np.linspace(0.9, 0.1, experts))
    ]
    table = pd.DataFrame(rows, columns=["step", "layer", "expert", "share"])
    return table.assign(dead=table["share"] < 0.001)


def test_usage_over_time_shows_the_dead_and_orders_by_the_end() -> None:
    figure = plots.usage_over_time(usage(2, 6))
    shares, dead = figure.data[0], figure.data[1]
    assert list(shares.x) == ["10", "20", "30", "40", "50"]
    assert list(shares.y) == ["5", "4", "3", "2", "1", "0"]  # the last is on top
    np.testing.assert_allclose(shares.z[1], [0.26, 0.26, 0, 0, 0], atol=1e-6)
    assert (
        np.isfinite(np.asarray(dead.z, float)).tolist()
        == [[True] * 5, [False, False, True, True, True]] + [[False] * 5] * 4
    )
    titles = [each.text for each in figure.layout.annotations]
    assert titles == ["layer 0, 2 dead", "layer 1, 2 dead"]
    assert "2 of 12 experts dead at first, 4 of 12 at the end" in figure.layout.meta["alt"]
    table = figure.layout.meta["table"]
    last = dict(zip(table["columns"], table["rows"][-1], strict=True))
    assert (last["layer"], last["step"], last["experts"], last["dead"]) == (1, 50, 6, 2)


def test_usage_of_a_deep_model_is_drawn_of_layers_spread_over_depth() -> None:
    figure = plots.usage_over_time(usage(36, 100))
    titles = [each.text for each in figure.layout.annotations]
    assert len(titles) == plots.routing.PANELS
    assert (titles[0], titles[-1]) == ("layer 0, 2 dead", "layer 35, 2 dead")
    assert "8 of 36 layers" in figure.layout.title.text
    assert "72 of 3600 at the end" in figure.layout.meta["alt"]
    assert figure.layout.height < 1500


def test_specialisation_is_a_share_of_what_a_choice_leaves_open() -> None:
    rows = [
        (2, 0, 0.5, 1.0, 0.25, "<b>x</b> 2.0× (9) · ␣y 1.5× (8)", 0.01, "z 1.1× (9)"),
        (2, 1, 0.1, 0.4, 0.3, "a 2.0× (9)", -0.02, "z 1.1× (9)"),
        (2, 2, 0.0, 0.0, 0.0, "", 0.0, ""),
        (7, 0, 0.5, 1.0, 0.5, "a 2.0× (9)", 0.0, "z 1.1× (9)"),
        (7, 1, 0.999, 0.01, 0.009, "a 2.0× (9)", 0.0, "z 1.1× (9)"),
    ]
    columns = ["layer", "expert", "share", "entropy", "bits", "tokens", "chance_bits", "chance_tokens"]
    figure = plots.specialisation(pd.DataFrame(rows, columns=columns))
    chance, experts = figure.data
    np.testing.assert_allclose(experts.y, [0.25, 0.75, 0.5], rtol=1e-6)
    np.testing.assert_allclose(chance.y, [0.01, -0.05, 0.0], rtol=1e-5)
    np.testing.assert_allclose(experts.x, [0.4, -0.4, 0.6], rtol=1e-5)  # the higher one first; the second layer at 1
    assert experts.customdata[0][-1] == "&lt;b&gt;x&lt;/b&gt; 2.0× (9)<br>␣y 1.5× (8)"
    assert list(figure.layout.xaxis.ticktext) == ["2", "7"]
    assert "Most in layer 7 (50%), least in layer 2 (39%)" in figure.layout.meta["alt"]
    assert "2 of 5 experts" in figure.layout.meta["alt"]
    assert figure.layout.meta["table"]["total"] == 5
    nothing = plots.specialisation(pd.DataFrame(rows[2:3], columns=columns))
    assert "1 of 1 experts" in nothing.layout.meta["alt"]


def speeds() -> pd.DataFrame:
    rows = [
        (model, how, active, k, stage, batch, 100.0, ratio, ratio * 0.9, ratio * 1.1, 5, 1.0, "")
        for stage in ("prefill", "decode")
        for batch in (1, 16)
        for model, how, active, k, ratio in (
            ("dense", "", 1.0, 0, 1.0), ("<b>moe</b>", "eager", 0.25, 7, 0.2),
            ("<b>moe</b>", "grouped_mm", 0.25, 7, 1.5), ("narrow", "", 0.25, 0, 2.0),
        )
    ]  # fmt: skip
    columns = ["model", "implementation", "active", "k", "stage", "batch", "tokens_per_second", "ratio", "low", "high"]
    table = pd.DataFrame(rows, columns=[*columns, "rounds", "touched", "note"])
    table.loc[1, ["tokens_per_second", "ratio", "low", "high"]] = np.nan
    table.loc[1, "note"] = "RuntimeError: <img src=x>"
    return table


def test_throughput_shows_what_is_slower_and_what_did_not_run() -> None:
    figure = plots.throughput(speeds())
    labels = ["narrow", "&lt;b&gt;moe&lt;/b&gt;, 25% active"]
    assert list(figure.layout.yaxis.ticktext) == labels
    assert [each.text for each in figure.layout.annotations] == [
        "prefill, batch 1", "prefill, batch 16", "decode, batch 1", "decode, batch 16",
    ]  # fmt: skip
    shown = {(trace.xaxis, trace.name): trace for trace in figure.data}
    assert [list(shown[axis, "eager"].x) for axis in ("x", "x2", "x3", "x4")] == [[], [0.2], [0.2], [0.2]]
    assert shown["x2", "eager"].y[0] > shown["x2", "grouped_mm"].y[0]
    assert abs(shown["x2", "eager"].y[0] - 1) < 0.5  # within the row of its label
    np.testing.assert_allclose(shown["x4", "grouped_mm"].error_x.arrayminus, [0.15])
    lost = shown["x", "no ratio"]
    assert list(lost.hovertext) == ["eager: RuntimeError: &lt;img src=x&gt;"]
    low, high = figure.layout.xaxis.range
    assert low < np.log10(0.2 * 0.9) < np.log10(2.2) < high
    assert np.log10(lost.x[0]) > low
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(legend) == ["eager", "grouped_mm", "no ratio", "without experts"]
    slower = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert [shape.x1 for shape in slower] == [1] * 4
    assert figure.layout.meta["alt"].startswith("Next to the dense model, 4 settings")
    assert figure.layout.meta["table"]["rows"][1][-1] == "RuntimeError: <img src=x>"  # a page escapes its tables


def test_intervals_cut_what_would_squeeze_the_rest_and_say_so() -> None:
    rows = [
        (f"{name} <i>", kind, share, mean, mean - 0.01, mean + 0.01)
        for share in (0.25, 0.5)
        for name, kind, mean in (("ours", "router", 0.2), ("pruning", "control", 0.3), ("oracle", "reference", 0.1))
    ]
    rows += [("random", "control", 0.25, 5.0, 4.9, 5.1)]
    figure = plots.intervals(pd.DataFrame(rows, columns=["method", "kind", "active", "mean", "low", "high"]))
    quarter, half = (trace for trace in figure.data if trace.type == "bar")
    assert list(figure.layout.yaxis.categoryarray) == [
        "random",
        *(f"{n} &lt;i&gt;" for n in ("oracle", "pruning", "ours")),
    ]
    np.testing.assert_allclose(quarter.x, [2 * 1.475, 0.1, 0.3, 0.2])
    np.testing.assert_allclose(half.x, [0.1, 0.3, 0.2])
    kinds = ["control", "reference", "control", "router"]
    assert list(quarter.marker.color) == [plots.experts.KINDS[kind] for kind in kinds]
    text = next(trace for trace in figure.data if trace.type == "scatter" and trace.mode == "text").text
    assert list(text) == [" → +5.000", " +0.100", " +0.300", " +0.200"]
    assert quarter.customdata[0].tolist() == [5.0, 4.9, 5.1]
    assert "25% active: ours <i> +0.200" in figure.layout.meta["alt"]
