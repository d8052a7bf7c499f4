"""Figures say in words what they show, and stay small however many neurons there are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from tinyonn_lib import plots
from tinyonn_lib.experts import score

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
