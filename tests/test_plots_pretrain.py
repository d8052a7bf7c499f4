"""Figures of pretraining show the numbers of their tables; names from outside stay words."""

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


def recipes() -> pd.DataFrame:
    rows = [
        (name, budget, 2.0 + gap + extra, gap + extra, gap + extra - 0.01, gap + extra + 0.03, seeds, speed)
        for name, gap, seeds, speed in (("default", 0.0, 3, 1.0), ("worse", 0.2, 3, 0.8), (HOSTILE, -0.1, 1, 1.5),
                                        ("middle", 0.1, 1, 1.0))
        for budget, extra in (("tokens", 0.05), ("time", 0.0))
    ]  # fmt: skip
    columns = ["recipe", "budget", "bits_per_byte", "difference", "low", "high", "seeds", "speed"]
    return pd.DataFrame(rows, columns=columns)


def lessons(best: type = bool) -> pd.DataFrame:
    rows = [
        (lesson, setting, lr, seed, lr == 1.0, level + 0.01 * seed + 0.1 * (lr - 1) ** 2)
        for lesson, setting, level in (("batch size", "batch 1", 3.0), ("batch size", "batch 16", 2.5),
                                       ("long context", "packed", 2.6), ("long context", "padded", 2.9))
        for lr in (0.3, 1.0) for seed in (0, 1)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["lesson", "setting", "lr", "seed", "best", "bits_per_byte"])
    return table.astype({"best": best})


def tokenizers(**bits: list[float]) -> pd.DataFrame:
    rows = [("bpe 1024", 1024, 2.5, 0.2), (HOSTILE, 4096, 3.5, 0.5), ("bpe 1024", 1024, 2.5, 0.2)]
    return pd.DataFrame(rows, columns=["tokenizer", "vocabulary", "bytes_per_token", "embedding_share"]).assign(**bits)


FIGURES: dict[str, tuple[go.Figure, pd.DataFrame]] = {
    "recipes": (plots.recipes(recipes()), recipes()),
    "lessons": (plots.lessons(lessons()), lessons()),
    "tokenizers": (plots.tokenizers(tokenizers()), tokenizers()),
    "trained tokenizers": (
        plots.tokenizers(tokenizers(bits_per_byte=[2.0, NAN, 2.5])),
        tokenizers(bits_per_byte=[2.0, NAN, 2.5]),
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_each_carries_words_and_numbers_and_no_markup_from_outside(name: str) -> None:
    figure, table = FIGURES[name]
    meta = figure.layout.meta
    assert meta["alt"].endswith(".")
    assert "nan" not in meta["alt"]
    assert meta["table"]["columns"] == list(table.columns)
    assert meta["table"]["total"] == len(meta["table"]["rows"]) == len(table)
    shown = figure.to_dict()
    shown["layout"].pop("meta")  # the page escapes it
    assert "<img" not in str(shown)
    assert (ESCAPED in str(shown)) == (name != "lessons")
    assert figure.layout.title.text


def test_recipes_are_in_order_with_their_intervals_at_both_budgets() -> None:
    figure, table = FIGURES["recipes"]
    assert [trace.name for trace in figure.data] == ["equal tokens", "equal time"]
    for trace, budget in zip(figure.data, ("tokens", "time"), strict=True):
        assert list(trace.y) == [ESCAPED, "middle", "worse"]  # by the difference at equal time, without the default
        rows = table[table["budget"] == budget].set_index("recipe").loc[[HOSTILE, "middle", "worse"]]
        np.testing.assert_allclose(trace.x, rows["difference"])
        np.testing.assert_allclose(trace.x + trace.error_x.array, rows["high"])
        np.testing.assert_allclose(trace.x - trace.error_x.arrayminus, rows["low"])
        np.testing.assert_allclose(trace.customdata, rows[["bits_per_byte", "seeds", "speed"]])
    assert figure.data[0].marker.color != figure.data[1].marker.color
    assert figure.layout.yaxis.autorange == "reversed"
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1) == (0, 0)
    assert "worse +0.200 [+0.190, +0.230], <img" in figure.layout.meta["alt"]


def test_recipes_without_intervals_or_at_one_budget() -> None:
    table = recipes().assign(low=NAN, high=NAN)
    figure = plots.recipes(table)
    assert "nan" not in figure.layout.meta["alt"]
    assert "worse +0.200," in figure.layout.meta["alt"]
    figure = plots.recipes(table[(table["budget"] == "time") | (table["recipe"] != "middle")])
    assert np.isnan(figure.data[0].x[1])  # no dot of another recipe in its place
    np.testing.assert_allclose(figure.data[0].x[[0, 2]], [-0.05, 0.25])


@pytest.mark.parametrize("best", [bool, object])
def test_lessons_show_every_seed_at_the_best_rate(best: Any) -> None:
    figure = plots.lessons(lessons(best))
    assert [trace.y[0] for trace in figure.data] == [
        "batch size: batch 1", "batch size: batch 16", "long context: packed", "long context: padded",
    ]  # fmt: skip
    for trace, level in zip(figure.data, (3.0, 2.5, 2.6, 2.9), strict=True):
        np.testing.assert_allclose(trace.x, [level, level + 0.01])
        assert list(trace.customdata) == [1.0, 1.0]
        assert len(trace.y) == 2
    colours = [trace.marker.color for trace in figure.data]
    assert colours[1] == colours[2] != colours[0] == colours[3]
    alt = "Mean bits per byte: batch 1 3.005, batch 16 2.505, packed 2.605, padded 2.905."
    assert figure.layout.meta["alt"] == alt


def test_tokenizers_are_a_dot_each_with_the_mean_of_their_seeds() -> None:
    figure, _ = FIGURES["trained tokenizers"]
    (dots,) = figure.data
    assert list(dots.text) == ["bpe 1024<br>2.250 bits per byte", ESCAPED]  # the second was not trained
    np.testing.assert_allclose(dots.x, [0.2, 0.5])
    np.testing.assert_allclose(dots.y, [2.5, 3.5])
    assert list(FIGURES["tokenizers"][0].data[0].text) == ["bpe 1024", ESCAPED]
    untrained = FIGURES["tokenizers"][0].layout
    first, second = "bpe 1024 2.50 bytes per token at 20% of the parameters", "3.50 bytes per token at 50%"
    assert untrained.meta["alt"].startswith(f"Tokenizers: {first}, {HOSTILE} {second}")
    assert untrained.title.text == "Tokenizers side by side"
    trained = figure.layout
    assert trained.meta["alt"].startswith(f"Tokenizers: {first} and 2.250 bits per byte, {HOSTILE} {second}")
    assert trained.title.text == "Tokenizers side by side, trained for equal time"
