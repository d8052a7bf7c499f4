"""Figures of pretraining: recipes next to each other, the document's lessons, tokenizers."""

from __future__ import annotations

import html
import math

import pandas as pd
import plotly.graph_objects as go

from tinyonn_lib.plots.base import ABOVE, ACCENT, QUIET, describe

_BUDGETS = {"time": "equal time", "tokens": "equal tokens"}


def recipes(table: pd.DataFrame) -> go.Figure:
    """Bits per byte of every recipe minus the default's, at equal time and at equal tokens.

    `table` is `Contest.table()`: recipe, budget, bits_per_byte, difference, low, high, seeds, speed.
    """
    rows = table[table["recipe"] != "default"]
    order = rows[rows["budget"] == "time"].sort_values("difference")["recipe"].tolist()
    figure = go.Figure()
    for budget, colour in (("tokens", QUIET), ("time", ACCENT)):
        part = rows[rows["budget"] == budget].set_index("recipe").reindex(order).reset_index()
        figure.add_scatter(
            y=[html.escape(name) for name in part["recipe"]],
            x=part["difference"],
            error_x={"array": part["high"] - part["difference"], "arrayminus": part["difference"] - part["low"]},
            mode="markers",
            name=_BUDGETS[budget],
            marker={"color": colour, "size": 9},
            customdata=part[["bits_per_byte", "seeds", "speed"]],
            hovertemplate="%{y}: %{customdata[0]:.4f} bits per byte, %{customdata[1]} seeds, "
            "%{customdata[2]:.2f} × the default's speed<extra></extra>",
        )
    figure.add_vline(x=0, line_dash="dot", line_color=QUIET)
    height = 90 + 34 * len(order)
    figure.update_layout(title="Recipes against the default, held-out text", height=height)
    figure.update_layout(showlegend=True, legend=ABOVE)
    figure.update_xaxes(title="bits per byte more than the default (left of 0: better)")
    figure.update_yaxes(autorange="reversed")
    said = ", ".join(
        f"{row.recipe} {row.difference:+.3f}" + (f" [{row.low:+.3f}, {row.high:+.3f}]" if pd.notna(row.low) else "")
        for row in rows[rows["budget"] == "time"].itertuples()
    )
    return describe(figure, f"Bits per byte more than the default recipe at equal time: {said}.", table)


def lessons(table: pd.DataFrame) -> go.Figure:
    """Bits per byte of every setting of document 002's two lessons; a dot per seed, the setting's mean in words.

    `table` has `lesson, setting, lr, seed, best, bits_per_byte`, one row per training.
    """
    chosen = table[table["best"].astype(bool)]
    figure = go.Figure()
    for (lesson, setting), rows in chosen.groupby(["lesson", "setting"], sort=False):
        own = "batch 16" if lesson == "batch size" else "packed"
        figure.add_scatter(
            x=rows["bits_per_byte"],
            y=[f"{lesson}: {setting}"] * len(rows),
            mode="markers",
            marker={"color": ACCENT if setting == own else QUIET, "size": 10},
            hovertemplate="%{y}: %{x:.4f}, learning rate × %{customdata:g}<extra></extra>",
            customdata=rows["lr"],
        )
    count = chosen.groupby(["lesson", "setting"]).ngroups
    figure.update_layout(title="Batch size 1, and rows longer than texts", showlegend=False, height=110 + 34 * count)
    figure.update_xaxes(title="bits per byte on held-out text")
    figure.update_yaxes(autorange="reversed")
    whole = chosen.fillna({"bits_per_byte": math.inf})  # a training that did not converge; null in a file
    means = whole.groupby(["lesson", "setting"], sort=False)["bits_per_byte"].mean()
    said = ", ".join(
        f"{setting} {value:.3f}" if math.isfinite(value) else f"{setting} does not converge"
        for (_, setting), value in means.items()
    )
    return describe(figure, f"Mean bits per byte: {said}.", table)


def tokenizers(table: pd.DataFrame) -> go.Figure:
    """What a vocabulary saves in tokens and costs in parameters, a dot per tokenizer.

    `table` has `tokenizer, vocabulary, bytes_per_token, embedding_share` and, if they were trained, `bits_per_byte`.
    """
    means = table.groupby("tokenizer", sort=False).mean(numeric_only=True).reset_index()
    trained = "bits_per_byte" in means
    figure = go.Figure(
        go.Scatter(
            x=means["embedding_share"],
            y=means["bytes_per_token"],
            mode="markers+text",
            text=[
                html.escape(row.tokenizer)
                + (f"<br>{row.bits_per_byte:.3f} bits per byte" if trained and row.bits_per_byte > 0 else "")
                for row in means.itertuples()
            ],
            textposition="bottom center",
            marker={"color": ACCENT, "size": 11},
            cliponaxis=False,
        )
    )
    figure.update_layout(title="Tokenizers side by side" + (", trained for equal time" if trained else ""), height=360)
    figure.update_xaxes(title="share of all parameters that the embedding takes", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="bytes per token, held-out", rangemode="tozero")
    said = ", ".join(
        f"{row.tokenizer} {row.bytes_per_token:.2f} bytes per token at {row.embedding_share:.0%} of the parameters"
        + (f" and {row.bits_per_byte:.3f} bits per byte" if trained and row.bits_per_byte > 0 else "")
        for row in means.itertuples()
    )
    return describe(figure, f"Tokenizers: {said}.", table)
