"""The explorer: exact scores, callbacks, a choice that the command line accepts, escaped text, no widget in batch."""

from __future__ import annotations

import base64
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from tinyonn_lib import plots
from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import score
from tinyonn_lib.workbench import explorer, params
from tinyonn_lib.workbench.phases import PHASES, ROOT

HOSTILE = "<img src=x onerror=alert(1)>"
PARAMS = SimpleNamespace(w_act=1.0, w_grad=1.0, w_freq=1.0, scope="layer", log=True, run="default")
RIGHT = [[0.5, -1.0], [2.0, -1.0], [2.0, 2.0], [0.5, 2.0]]


def neurons(layers: int = 2, each: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    size = layers * each
    frame = pd.DataFrame(rng.lognormal(size=(size, 4)), columns=list(explorer.STATISTICS))
    frame[["x", "y"]] = rng.normal(size=(size, 2))
    frame["cluster"], frame["chosen"] = rng.integers(0, 3, size), False
    return frame.assign(layer=np.repeat(np.arange(layers), each), neuron=np.tile(np.arange(each), layers))


def examples(table: pd.DataFrame) -> pd.DataFrame:
    """Two tokens of each neuron, the first hostile for those on the right; in no order, and with a stranger."""
    rows = table.loc[table.index.repeat(2), ["layer", "neuron", "x"]].reset_index(drop=True)
    rows["rank"] = np.tile([0, 1], len(table))
    middle = (table["x"].min() + table["x"].max()) / 2
    rows["token"] = np.where(rows["rank"] == 1, "␣the", np.where(rows["x"] > middle, HOSTILE, "plain"))
    rows = rows.assign(sample=rows.index, position=3).drop(columns="x")
    stranger = pd.DataFrame([{"layer": 99, "neuron": 0, "rank": 0, "token": "no", "sample": 0, "position": 0}])
    return pd.concat([stranger, rows.sample(frac=1, random_state=0)]).astype({"token": "category"})


def passage(sample: int, position: int) -> tuple[str, str, str]:
    return f"before {HOSTILE} {sample} ", HOSTILE, f" after {position}"


def data(table: pd.DataFrame | None = None) -> explorer.Data:
    table = neurons() if table is None else table
    return explorer.Data(table, score.feature_table, examples(table))


@pytest.fixture
def made() -> explorer.Explorer:
    return explorer.Explorer(data(), passage, score.PRESETS, PARAMS)


def drawn_values(made: explorer.Explorer) -> np.ndarray:
    return np.frombuffer(made.map.values, np.float32)


@pytest.mark.parametrize("name", score.PRESETS)
def test_scores_are_exactly_sp(name: str) -> None:
    table, each = neurons(), score.PRESETS[name]
    expected = score.sp(score.feature_table(table, each.scope, each.log), each.act, each.grad, each.freq)
    found = data(table).scores((each.act, each.grad, each.freq), each.scope, each.log)
    np.testing.assert_array_equal(found, expected)


def test_slider_scores_and_colours_anew(made: explorer.Explorer) -> None:
    made.sliders[1].value = -0.5
    expected = score.sp(score.feature_table(neurons()), 1.0, -0.5, 1.0).to_numpy()
    np.testing.assert_array_equal(made.scores, expected)
    np.testing.assert_allclose(drawn_values(made), expected, rtol=1e-6)
    assert made.map.span == pytest.approx(np.quantile(np.abs(expected), 0.98))
    assert made.preset.value == explorer.OWN
    assert f"{expected.max():+.2f}" in made.panel.value
    made.scope.value = "global"
    np.testing.assert_array_equal(made.scores, score.sp(score.feature_table(neurons(), "global"), 1.0, -0.5, 1.0))


def test_preset_sets_every_input_and_scores_once(made: explorer.Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made.preset.value == "sp"  # the parameters are this definition
    shown: list[str] = []
    made.panel.observe(lambda change: shown.append(change["new"]), "value")
    made.preset.value = "ancestor"
    assert [s.value for s in made.sliders] == [1.0, 1.0, 0.0]
    assert (made.scope.value, made.log.value, made.preset.value) == ("layer", False, "ancestor")
    np.testing.assert_array_equal(made.scores, score.sp(score.feature_table(neurons(), log=False), w_freq=0.0))
    assert len(shown) == 1
    made.sliders[0].value = 0.3
    made.sliders[0].value = 1.0
    assert made.preset.value == "ancestor"  # the weights have their name again


def test_polygon_is_that_of_the_even_odd_rule() -> None:
    x, y = np.random.default_rng(0).uniform(-1, 5, size=(2, 4000))
    frame = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0], [1, 1], [1, 3], [3, 3], [3, 1], [1, 1]]  # a square with a hole
    outer = (x > 0) & (x < 4) & (y > 0) & (y < 4)
    hole = (x > 1) & (x < 3) & (y > 1) & (y < 3)
    np.testing.assert_array_equal(explorer.inside(x, y, frame), outer & ~hole)
    np.testing.assert_array_equal(explorer.inside(x, y, [[0, 0], [4, 4], [0, 4]]), outer & (x < y))


def test_region_chooses_also_what_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MAP_SAMPLE", 20)
    made = explorer.Explorer(data(), passage, score.PRESETS, PARAMS)
    assert len(drawn_values(made)) == 20
    assert len(made.map.points) == 20 * 2 * 4
    assert len(made.map.density) == 120 * 120
    made.map.regions = [RIGHT]
    x = neurons()["x"].to_numpy()
    right = x > (x.min() + x.max()) / 2
    np.testing.assert_array_equal(made.chosen, right)
    assert f"{right.sum()} of 60 neurons chosen" in made.panel.value
    made.map.regions = [RIGHT, [[-1, -1], [0.5, -1], [0.5, 2], [-1, 2]]]
    assert made.chosen.all()
    made.map.regions = [RIGHT]
    np.testing.assert_array_equal(np.frombuffer(made.map.chosen, np.uint8), right[made.drawn])
    made.map.regions = []
    assert made.map.chosen == b""
    assert not made.chosen.any()
    assert "No neuron chosen" in made.panel.value


def test_choice_of_the_parameters_is_there_at_the_start() -> None:
    table = neurons()
    x = table["x"].to_numpy()
    right, start = x > (x.min() + x.max()) / 2, np.arange(60) % 7 == 0
    made = explorer.Explorer(data(table.assign(chosen=start)), passage, score.PRESETS, PARAMS)
    assert "9 of 60 neurons chosen" in made.panel.value
    np.testing.assert_array_equal(np.frombuffer(made.map.chosen, np.uint8), start[made.drawn])
    made.map.regions = [*made.map.regions, RIGHT]  # with Shift
    np.testing.assert_array_equal(made.chosen, start | right)
    made.map.regions = [RIGHT]
    np.testing.assert_array_equal(made.chosen, right)
    made = explorer.Explorer(data(table.assign(chosen=start)), passage, score.PRESETS, PARAMS)
    made.map.regions = []  # a double click
    assert not made.chosen.any()


def test_panel_shows_statistics_tokens_and_texts_escaped(made: explorer.Explorer) -> None:
    made.map.regions = [RIGHT]
    page = made.panel.value
    best = made.data.neurons.assign(sp=made.scores)[made.chosen].nlargest(1, "sp").iloc[0]
    first_row = re.findall(r"<td>(.*?)</td>", page)[:8]
    statistics = [f"{best[name]:.3g}" for name in explorer.STATISTICS]
    assert first_row == [
        f"{best.layer:.0f}",
        f"{best.neuron:.0f}",
        f"{best.sp:+.2f}",
        *statistics,
        f"{best.cluster:.0f}",
    ]
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 5
    common = page[page.index("Frequent among") :]
    assert common.index(f"×{made.chosen.sum()}") < common.index("before")  # every chosen neuron has the hostile token
    assert "plain" not in page  # the tokens of the others
    assert "<mark>&lt;img" in page
    assert page.count("<blockquote>") == explorer.QUOTED


def test_save_is_what_the_command_line_composes(
    made: explorer.Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (ROOT / "params").glob("*.yaml"):
        (tmp_path / "params").mkdir(exist_ok=True)
        (tmp_path / "params" / file.name).write_text(file.read_text("utf-8"), "utf-8")
    local = tmp_path / "params" / "local"
    monkeypatch.setattr(params, "ROOT", tmp_path)
    monkeypatch.setattr(explorer, "LOCAL", local)
    made.preset.value = "document"
    made.sliders[1].value = -0.35
    made.map.regions = [RIGHT]
    made.save.click()
    values = params.compose(PHASES["cluster"], profile="local")
    assert (values["w_act"], values["w_grad"], values["scope"], values["log"]) == (1.0, -0.35, "global", False)
    saved = pd.read_parquet(values["choice"])
    expected = neurons().loc[made.chosen, ["layer", "neuron"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(saved, expected)
    assert "tinyonn cluster run=default profile=local" in made.said.value
    assert str(local) in made.said.value
    assert sorted(p.name for p in local.iterdir()) == ["choice.parquet", "cluster.yaml"]
    # Other parameters of the overlay stay, those of the explorer are replaced; without neurons no choice is named.
    (local / "cluster.yaml").write_text("clusters: 5  # mine\n" + (local / "cluster.yaml").read_text("utf-8"), "utf-8")
    made.map.regions = []
    made.preset.value = "ancestor"
    made.save.click()
    values = params.compose(PHASES["cluster"], profile="local")
    assert (values["clusters"], values["w_freq"], values["scope"], values["choice"]) == (5, 0.0, "layer", "")
    # Where a run ended, the explorer starts.
    again = explorer.Explorer(data(), passage, score.PRESETS, SimpleNamespace(**values))
    assert again.preset.value == "ancestor"
    np.testing.assert_array_equal(again.scores, made.scores)
    assert params.lint([local / "cluster.yaml"]) == []


def test_failed_save_says_so_and_leaves_what_was(
    made: explorer.Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "LOCAL", tmp_path)
    overlay = tmp_path / "cluster.yaml"
    for text, said in (("clusters: [5\n", "not a flat YAML"), ("clusters: 1\n", "cluster.clusters = 1")):
        overlay.write_text(text)
        made.save.click()
        assert "Not saved" in made.said.value
        assert said in made.said.value
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("cluster.yaml", text)]
    overlay.unlink()

    def full(self: Path, *args: Any) -> None:
        raise OSError(28, f"No space left on device {HOSTILE}")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        made.save.click()
    assert "No space left" in made.said.value
    assert "<img" not in made.said.value
    assert list(tmp_path.iterdir()) == []


def test_batch_gives_a_figure_and_no_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    table = neurons()
    own = SimpleNamespace(**{**vars(PARAMS), "w_act": 0.5})
    arguments = (table, score.feature_table, examples(table), passage, score.PRESETS, own)
    monkeypatch.setattr(explorer, "live", lambda: True)
    assert isinstance(explorer.explore(*arguments), ipywidgets.VBox)
    monkeypatch.setattr(explorer, "Explorer", None)  # nothing of the widget is made
    monkeypatch.setattr(explorer, "live", lambda: False)
    figure = explorer.explore(*arguments)
    assert type(figure) is go.Figure
    buttons = {b.label: b.args[0] for b in figure.layout.updatemenus[0].buttons}
    assert list(buttons) == ["this run", *score.PRESETS]
    each = score.PRESETS["document"]
    expected = score.sp(score.feature_table(table, each.scope, each.log), each.act, each.grad, each.freq)
    packed = base64.b64decode(buttons["document"]["marker.color"][0]["bdata"])
    np.testing.assert_allclose(np.frombuffer(packed, np.float32), expected, rtol=1e-6)
    np.testing.assert_allclose(figure.data[0].marker.color, data(table).scores((0.5, 1, 1), "layer", True), rtol=1e-6)
    meta = figure.layout.meta
    assert "60 neurons" in meta["alt"]
    assert meta["table"]["columns"] == ["S_p by", "layer", "neuron", "S_p", "fires on"]
    first = data(table).scores((0.5, 1, 1), "layer", True).argmax()
    assert meta["table"]["rows"][0][1:3] == table.loc[first, ["layer", "neuron"]].astype(int).tolist()
    assert "␣the" in meta["table"]["rows"][0][4]
    # Where the parameters are a definition that has a name, it stands there once.
    for own in (PARAMS, SimpleNamespace(**{**vars(PARAMS), "scope": "global", "log": False})):
        figure = explorer.explore(*arguments[:-1], own)
        assert [b.label for b in figure.layout.updatemenus[0].buttons] == list(score.PRESETS)


def test_rescoring_costs_a_small_part_of_new_z_scores() -> None:
    table = neurons(40, 6912)
    some = examples(table.iloc[:10])
    made = explorer.Data(table, score.feature_table, some)

    def fastest(call: Any) -> float:
        seconds = []
        for _ in range(3):
            began = time.process_time()
            call()
            seconds.append(time.process_time() - began)
        return min(seconds)

    again = fastest(lambda: score.feature_table(table))
    assert fastest(lambda: made.scores((0.5, 1.0, 2.0), "layer", True)) < again / 5


def test_features_of_other_neurons_are_refused() -> None:
    table = neurons()
    with pytest.raises(BenchError, match="59 z-scores .* 60 neurons"):
        explorer.Data(table, lambda t, scope, log: score.feature_table(t.iloc[1:], scope, log), examples(table))
