"""Figures of caches: how they differ, what a projector makes of them, and what the student makes of that."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tinyonn_lib.plots.base import ACCENT, INK, PALETTE, QUIET, SEQUENTIAL, describe, heat
from tinyonn_lib.plots.selection import BELOW, beside, dots, labels, places

KINDS = {
    "ours": ACCENT, "control": PALETTE[1], "document": PALETTE[2], "another way": PALETTE[5], "floor": QUIET,
    "reference": INK,
}  # fmt: skip
"""What a cache of `kv_contest` may be, and its colour."""

_FACTORS = {"mlp_ratio": "hidden width ÷ input", "layernorm": "LayerNorm", "activation": "activation", "init": "init"}


def kv_distributions(table: pd.DataFrame) -> go.Figure:
    """Keys and values of each model, layer by layer: mean, standard deviation (thick), 99.8 % of all (thin).

    Args:
        table: of `kv.profile.distributions`.
    """
    sides, models = list(dict.fromkeys(table["side"])), list(dict.fromkeys(table["model"]))
    figure = make_subplots(1, len(sides), subplot_titles=sides, horizontal_spacing=0.08)
    for column, side in enumerate(sides, 1):
        for number, model in enumerate(models):
            rows = table[(table["side"] == side) & (table["model"] == model)]
            x = rows["layer"] + (number - (len(models) - 1) / 2) * 0.16
            colour = PALETTE[number % len(PALETTE)]
            for low, high, width in (
                (rows["low"], rows["high"], 1.2),
                (rows["mean"] - rows["std"], rows["mean"] + rows["std"], 5),
            ):
                error = {"array": high - rows["mean"], "arrayminus": rows["mean"] - low, "thickness": width, "width": 0}
                figure.add_scatter(
                    x=x, y=rows["mean"], mode="markers", marker={"color": colour, "size": 5}, error_y=error,
                    name=html.escape(model), legendgroup=model, showlegend=column == 1 and width > 2,
                    hovertemplate="layer %{customdata[0]}: mean %{y:.3g}, std %{customdata[1]:.3g}<extra></extra>",
                    customdata=rows[["layer", "std"]], row=1, col=column,
                )  # fmt: skip
    figure.update_xaxes(title="layer", dtick=1)
    figure.update_yaxes(title="entries of the cache", col=1)
    figure.update_layout(
        title="Keys (before their rotation) and values: mean, ± one standard deviation, 99.8 %", legend=BELOW,
        margin={"t": 86, "b": 92},
    )  # fmt: skip
    spread = table.groupby(["model", "side"], sort=False)["std"].agg(["min", "max"]).reset_index()
    said = ", ".join(f"{row.model} {row.side} {row.min:.2g} to {row.max:.2g}" for row in spread.itertuples())
    return describe(figure, f"Standard deviations over the layers: {said}.", table)


def kv_similarity(table: pd.DataFrame, chosen: Sequence[Sequence[int]]) -> go.Figure:
    """Likeness of each student layer's cache with each teacher layer's, the layers that it reads framed.

    Args:
        table: of `kv.profile.similarity`.
        chosen: per student layer the teacher layers that it reads.
    """
    best = ", ".join(f"{name} with {row.idxmax()} ({row.max():.2f})" for name, row in table.iterrows())
    figure = heat(
        table, title="Likeness of caches (CKA, 0 to 1); framed: what each student layer reads", unit="CKA",
        alt=f"Most alike: {best}.", scale=SEQUENTIAL,
    )  # fmt: skip
    for row, layers in enumerate(chosen):
        for layer in layers:
            frame = {"color": PALETTE[1], "width": 3}
            figure.add_shape(type="rect", x0=layer - 0.46, x1=layer + 0.46, y0=row - 0.44, y1=row + 0.44, line=frame)
    figure.update_layout(height=200 + 70 * len(table))
    return figure


def kv_factors(table: pd.DataFrame, value: str = "nll", unit: str = "nats per token") -> go.Figure:
    """All measured configurations, once for each choice: what a choice does is how far its columns lie apart.

    Args:
        table: of `kv.sweep.sweep`; linear ones are a line across.
        value: column on the vertical axis; less is better.
    """
    mlps, linear = table[table["kind"] != "linear"], table[table["kind"] == "linear"][value]
    figure = make_subplots(1, len(_FACTORS), shared_yaxes=True, subplot_titles=list(_FACTORS.values()),
                           horizontal_spacing=0.02)  # fmt: skip
    said = []
    for column, factor in enumerate(_FACTORS, 1):
        levels = list(dict.fromkeys(mlps[factor]))
        names = [f"{level:g}×" if factor == "mlp_ratio" else html.escape(str(level)) for level in levels]
        names = [{"True": "with", "False": "without"}.get(name, name) for name in names]
        for number, (level, name) in enumerate(zip(levels, names, strict=True)):
            rows = mlps[mlps[factor] == level]
            jitter = np.linspace(-0.22, 0.22, len(rows))
            told = [f"{r.mlp_ratio:g}×, LayerNorm {r.layernorm}, {r.activation}, {r.init}" for r in rows.itertuples()]
            figure.add_scatter(
                x=number + jitter, y=rows[value], mode="markers", marker={"color": ACCENT, "size": 6, "opacity": 0.6},
                customdata=[html.escape(text) for text in told],
                hovertemplate="%{customdata}: %{y:.4f}<extra></extra>", showlegend=False, row=1, col=column,
            )  # fmt: skip
            middle = float(rows[value].median())
            line = {"color": INK, "width": 2}
            figure.add_shape(type="line", x0=number - 0.3, x1=number + 0.3, y0=middle, y1=middle, line=line,
                             row=1, col=column)  # fmt: skip
            said.append(f"{_FACTORS[factor]} {name} {middle:.3f}")
        figure.update_xaxes(tickvals=list(range(len(levels))), ticktext=names, row=1, col=column)
        for height in linear:
            dotted = {"color": PALETTE[1], "dash": "dot", "width": 1}
            figure.add_hline(y=height, line=dotted, row=1, col=column)
    figure.update_yaxes(title=unit, col=1)
    figure.update_layout(
        title=f"{len(table)} configurations, each at its best learning rate; bar: median, dotted: linear",
        margin={"t": 86}, showlegend=False,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    return describe(figure, f"Medians: {', '.join(said)}.", table)


def kv_contest(table: pd.DataFrame, *, thumbnail: bool = True) -> go.Figure:
    """How much of the way from a zero cache to its own each cache brings the student, with 95 % intervals.

    Args:
        table: of `kv.contest.Contest.table`, or of `kv.judge.table`.
    """
    table = table if "kind" in table else table.assign(kind="ours")
    rows = table.assign(label=table["cache"], low=table["closed_low"], high=table["closed_high"])
    rows = rows.sort_values("closed").reset_index(drop=True)
    figure = go.Figure()
    for kind in [kind for kind in KINDS if kind in set(rows["kind"])]:
        here = rows[rows["kind"] == kind]
        dots(figure, here, "closed", places(here["label"], rows["label"]), KINDS[kind], kind, True)
    for place in (0, 1):
        figure.add_vline(x=place, line={"color": INK, "dash": "dot", "width": 1})
    labels(figure, rows["label"])
    beside(figure, range(len(rows)), [f"{nll:.3f}" for nll in rows["nll"]])
    figure.update_xaxes(title="share of the gap between the zero cache (0) and the student's own (1)", tickformat=".0%")
    figure.update_layout(
        title="What the student makes of each cache; at the right its loss, nats per token",
        height=170 + 28 * len(rows), margin={"r": 84, "b": 96}, legend=BELOW,
    )  # fmt: skip
    said = ", ".join(f"{row.cache} {row.nll:.3f}" for row in rows.iloc[::-1].itertuples())
    return describe(figure, f"Loss, nats per token: {said}.", table, thumbnail=thumbnail)


def kv_after(table: pd.DataFrame, names: Mapping[str, str] | None = None) -> go.Figure:
    """Loss of the tokens after one hand-over, minus the student's with its own cache.

    Args:
        table: of `kv.profile.by_distance`; the first cache in it is the reference.
        names: cache → kind (key of `KINDS`), for the colours.
    """
    reference = table["cache"].iloc[0]
    wide = table.pivot(index="after", columns="cache", values="nll")
    figure = go.Figure()
    lines: dict[str, int] = {}
    for number, label in enumerate(dict.fromkeys(table["cache"])):
        colour = KINDS.get((names or {}).get(label, ""), PALETTE[number % len(PALETTE)])
        lines[colour] = lines.get(colour, 0) + 1  # two of one kind are told apart by their dashes
        figure.add_scatter(
            x=wide.index, y=wide[label] - wide[reference], mode="lines+markers", name=html.escape(label),
            line_color=colour, line_dash="dot" if label == reference else ("solid", "dash")[(lines[colour] - 1) % 2],
        )  # fmt: skip
    figure.update_xaxes(title="tokens the student has read by itself since the hand-over", type="log",
                        tickvals=list(wide.index), ticktext=[str(n) for n in wide.index])  # fmt: skip
    figure.update_yaxes(title="loss minus that with its own cache, nats")
    figure.update_layout(title="After one hand-over", showlegend=True, legend=BELOW, margin={"b": 110})
    first = wide.iloc[0] - wide.iloc[0][reference]
    said = ", ".join(f"{label} {gap:+.3f}" for label, gap in first.items())
    return describe(figure, f"Right after the hand-over, loss minus that with its own cache: {said}.", table)
