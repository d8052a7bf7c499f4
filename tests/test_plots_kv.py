"""Figures of caches show the numbers of their tables; names from outside stay words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from tinyonn_lib import plots

HOSTILE = "<img src=x onerror=alert(1)>"
ESCAPED = "&lt;img src=x onerror=alert(1)&gt;"
NAN = float("nan")


def contest(**change: Any) -> pd.DataFrame:
    rows = [
        ("own cache", "reference", 4.0, 1.0), ("zero cache", "floor", 5.0, 0.0), (f"{HOSTILE}", "ours", 4.1, 0.9),
        ("ridge", "control", 4.25, 0.75), ("MLP", "document", 5.5, -0.5), ("LoRA", "another way", 3.9, 1.1),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["cache", "kind", "nll", "closed"])
    return table.assign(closed_low=table["closed"] - 0.05, closed_high=table["closed"] + 0.02, **change)


def spreads() -> pd.DataFrame:
    rows = [
        (model, side, layer, 0.5 * layer, 1.0 + layer, -3.0, 4.0)
        for model, layers in (("student", 2), (HOSTILE, 3))
        for side in ("keys", "values")
        for layer in range(layers)
    ]
    return pd.DataFrame(rows, columns=["model", "side", "layer", "mean", "std", "low", "high"])


def factors(linear: bool = True, seeds: int = 1) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [
        {"kind": "mlp", "mlp_ratio": ratio, "layernorm": norm, "activation": activation, "init": init,
         "nll": 4.0 + ratio / 100 + 0.1 * norm + 0.001 * (init == "normal")}
        for ratio in (0.5, 2.0) for norm in (True, False) for activation in ("silu", HOSTILE)
        for init in ("xavier", "normal")
    ]  # fmt: skip
    if linear:
        rows += [{"kind": "linear", "mlp_ratio": NAN, "layernorm": False, "activation": "none", "init": init,
                  "nll": level} for init, level in (("xavier", 4.4), ("normal", 4.5))]  # fmt: skip
    return pd.DataFrame(rows).assign(seeds=seeds, nll_spread=NAN)


def after() -> pd.DataFrame:
    levels = {"own cache": 0.0, HOSTILE: 0.5, "ridge": 0.25, "zero cache": 1.0, "another text": 2.0}
    rows = [(label, n, 3.0 + gap / n, 10) for n in (1, 2, 4) for label, gap in levels.items()]
    return pd.DataFrame(rows, columns=["cache", "after", "nll", "tokens"])


def alike() -> pd.DataFrame:
    index = pd.Index(["student 0", "student 1"], name="student layer")
    values = [[0.1, 0.9, 0.2], [0.3, 0.4, 0.8]]
    return pd.DataFrame(values, index, pd.Index(range(3), name="teacher layer"))


FIGURES: dict[str, tuple[go.Figure, pd.DataFrame, bool]] = {
    "distributions": (plots.kv_distributions(spreads()), spreads(), False),
    "similarity": (plots.kv_similarity(alike(), [[1], [1, 2]]), alike().reset_index(), False),
    "factors": (plots.kv_factors(factors()), factors(), False),
    "contest": (plots.kv_contest(contest()), contest(), True),
    "after": (plots.kv_after(after(), {HOSTILE: "ours"}), after(), False),
}


@pytest.mark.parametrize("name", FIGURES)
def test_each_carries_words_and_numbers_and_no_markup_from_outside(name: str) -> None:
    figure, table, thumbnail = FIGURES[name]
    meta = figure.layout.meta
    assert meta["alt"].endswith(".")
    assert "nan" not in meta["alt"]
    assert meta["table"]["columns"] == [str(column) for column in table.columns]
    assert (meta["table"]["total"], len(meta["table"]["rows"])) == (len(table), len(table))
    assert meta["thumbnail"] is thumbnail
    shown = figure.to_dict()
    shown["layout"].pop("meta")  # the page escapes it
    for trace in shown["data"]:
        trace.pop("legendgroup", None)  # never shown
    assert "<img" not in str(shown)
    assert figure.layout.title.text
    assert (ESCAPED in str(shown)) == (name != "similarity")


def test_distributions_have_both_intervals_around_the_mean() -> None:
    figure, table, _ = FIGURES["distributions"]
    assert [note.text for note in figure.layout.annotations] == ["keys", "values"]
    assert len(figure.data) == 2 * 2 * 2
    wide, narrow = figure.data[2], figure.data[3]  # keys of the second model: 99.8 %, then ± one standard deviation
    rows = table[(table["model"] == HOSTILE) & (table["side"] == "keys")]
    np.testing.assert_allclose(wide.y + wide.error_y.array, rows["high"])
    np.testing.assert_allclose(wide.y - wide.error_y.arrayminus, rows["low"])
    np.testing.assert_allclose(narrow.y + narrow.error_y.array, rows["mean"] + rows["std"])
    np.testing.assert_allclose(narrow.y - narrow.error_y.arrayminus, rows["mean"] - rows["std"])
    np.testing.assert_allclose(wide.x, rows["layer"] + 0.08)
    assert [bool(trace.showlegend) for trace in figure.data] == [False, True, False, True] + [False] * 4
    assert "student keys 1 to 2" in figure.layout.meta["alt"]
    assert len({trace.marker.color for trace in figure.data}) == 2


def test_similarity_frames_what_is_read() -> None:
    figure, table, _ = FIGURES["similarity"]
    middles = [((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2) for s in figure.layout.shapes]
    np.testing.assert_allclose(middles, [(1, 0), (1, 1), (2, 1)])
    np.testing.assert_allclose(figure.data[0].z, table[[0, 1, 2]])
    assert figure.layout.meta["alt"] == "Most alike: student 0 with 1 (0.90), student 1 with 2 (0.80)."


@pytest.mark.parametrize("linear", [True, False])
def test_factors_show_every_configuration_in_each_panel(linear: bool) -> None:
    table = factors(linear)
    figure = plots.kv_factors(table)
    mlps = table[table["kind"] == "mlp"]
    for axis in ("x", "x2", "x3", "x4"):
        points = np.concatenate([trace.y for trace in figure.data if trace.xaxis == axis])
        np.testing.assert_allclose(sorted(points), sorted(mlps["nll"]))
    lines = [shape for shape in figure.layout.shapes if shape.line.dash == "dot"]
    assert [shape.y0 for shape in lines] == [4.4, 4.5] * 4 * linear
    bars = [shape for shape in figure.layout.shapes if shape.line.dash is None]
    assert len(bars) == 8
    assert bars[2].y0 == mlps[mlps["layernorm"]]["nll"].median()
    assert list(figure.layout.xaxis2.ticktext) == ["with", "without"]
    assert "hidden width ÷ input 0.5× 4.0" in figure.layout.meta["alt"]
    assert figure.layout.title.text.startswith(f"{len(table)} configurations")


def test_contest_is_in_order_with_its_intervals_and_losses() -> None:
    figure, table, _ = FIGURES["contest"]
    order = list(figure.layout.yaxis.ticktext)
    assert order == ["MLP", "zero cache", "ridge", ESCAPED, "own cache", "LoRA"]
    assert [trace.name for trace in figure.data] == [
        "ours", "control", "document", "another way", "floor", "reference",
    ]  # fmt: skip
    rows = table.set_index("cache")
    for trace in figure.data:
        for x, y, up, down in zip(trace.x, trace.y, trace.error_x.array, trace.error_x.arrayminus, strict=True):
            row = rows.loc[order[int(y)].replace(ESCAPED, HOSTILE)]
            assert row["kind"] == trace.name
            assert (x, x + up, x - down) == pytest.approx((row["closed"], row["closed_high"], row["closed_low"]))
    assert [note.text for note in figure.layout.annotations] == ["5.500", "5.000", "4.250", "4.100", "4.000", "3.900"]
    assert [shape.x0 for shape in figure.layout.shapes] == [0, 1]
    assert figure.layout.meta["alt"].startswith(f"Loss, nats per token: LoRA 3.900, own cache 4.000, {HOSTILE}")


def test_contest_without_intervals_or_kinds_and_off_the_index() -> None:
    few = plots.kv_contest(contest().assign(closed_low=NAN, closed_high=NAN, spread=0.0), thumbnail=False)
    assert sum(len(trace.x) for trace in few.data) == 6
    assert few.layout.meta["thumbnail"] is False
    assert "nan" not in few.layout.meta["alt"]
    plain = plots.kv_contest(contest().drop(columns="kind"))
    assert [trace.name for trace in plain.data] == ["ours"]
    assert len(plain.data[0].x) == 6


def test_after_is_the_loss_minus_the_reference_s() -> None:
    figure, _, _ = FIGURES["after"]
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines) == ["own cache", ESCAPED, "ridge", "zero cache", "another text"]
    for name, gap in (("own cache", 0.0), (ESCAPED, 0.5), ("zero cache", 1.0)):
        assert list(lines[name].x) == [1, 2, 4]
        np.testing.assert_allclose(lines[name].y, [gap, gap / 2, gap / 4], atol=1e-12)
    assert lines["own cache"].line.dash == "dot"
    assert lines[ESCAPED].line.color == plots.ACCENT
    assert figure.layout.meta["alt"].startswith("Right after the hand-over, loss minus that with its own cache: ")
    assert "zero cache +1.000" in figure.layout.meta["alt"]


def test_two_of_one_kind_are_told_apart() -> None:
    kinds = {
        "own cache": "reference",
        HOSTILE: "ours",
        "ridge": "control",
        "zero cache": "floor",
        "another text": "floor",
    }
    looks = [(trace.line.color, trace.line.dash) for trace in plots.kv_after(after(), kinds).data]
    assert len(set(looks)) == 5
    assert looks[3][0] == looks[4][0] == plots.QUIET
