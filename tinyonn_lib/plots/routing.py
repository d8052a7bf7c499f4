"""Figures of routers: whom they call over time, what for, and what it does to speed."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tinyonn_lib.experts.specialise import SEPARATOR
from tinyonn_lib.experts.speed import DENSE, verdict
from tinyonn_lib.plots.base import INK, PALETTE, QUIET, SEQUENTIAL, describe

PANELS = 8
"""Layers that are drawn one by one."""

RARE = 0.005
"""Share of tokens below which too little is seen of an expert to say what it is called for."""

HOVER = 4
"""Tokens that are named of an expert when pointed at; its figure's table has all."""

DEAD = PALETTE[1]
_BELOW = {"y": 0, "yref": "container", "yanchor": "bottom"}


def usage_over_time(usage: pd.DataFrame) -> go.Figure:
    """Share of tokens of every expert at each look, one panel per layer, at most `PANELS` of them spread over depth.

    Args:
        usage: `step, layer, expert, share, dead`, as in `experts.training.Trained.usage`.
    """
    layers = sorted(usage["layer"].unique())
    drawn = [
        layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(len(layers), PANELS)).round().astype(int))
    ]
    columns = min(4, len(drawn))
    lines = -(-len(drawn) // columns)
    count = usage.groupby("layer")["expert"].nunique().max()
    last = usage[usage["step"] == usage["step"].max()]
    dead = last.groupby("layer")["dead"].sum()
    tall = count * 14 if count <= 30 else min(480, count * 5)
    height = lines * (tall + 62) + 122
    figure = make_subplots(
        lines, columns, horizontal_spacing=0.06, vertical_spacing=0.0 if lines == 1 else 62 / (height - 184),
        subplot_titles=[f"layer {layer}" + (f", {dead[layer]} dead" if dead[layer] else "") for layer in drawn],
    )  # fmt: skip
    for place, layer in enumerate(drawn):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        here = usage[usage["layer"] == layer]
        share = here.pivot(index="expert", columns="step", values="share")
        order = share.assign(mean=share.mean(axis=1)).sort_values([share.columns[-1], "mean"]).index
        share = share.loc[order]
        gone = here.pivot(index="expert", columns="step", values="dead").loc[order].to_numpy(bool)
        axes = {"x": [str(step) for step in share.columns], "y": [str(expert) for expert in share.index]}
        said = "expert %{y}, step %{x}: %{z:.2%} of tokens<extra>layer " + str(layer) + "</extra>"
        figure.add_heatmap(z=share.to_numpy(np.float32), **axes, coloraxis="coloraxis", hovertemplate=said, **where)
        figure.add_heatmap(
            z=np.where(gone, 1.0, np.nan).astype(np.float32), **axes, colorscale=[(0, DEAD), (1, DEAD)],
            showscale=False, hoverinfo="skip", **where,
        )  # fmt: skip
    square = {"color": DEAD, "symbol": "square", "size": 11}
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=square, name="dead: hardly any token calls it")
    figure.update_xaxes(type="category", showgrid=False, nticks=6)
    figure.update_xaxes(title="step", row=lines)
    figure.update_yaxes(
        type="category", showticklabels=bool(count <= 30), ticks="", showgrid=False, tickfont_size=10, dtick=1
    )
    figure.update_yaxes(title="expert, most called on top", col=1)
    bar = {"title": {"text": "share of<br>tokens"}, "tickformat": ".0%", "lenmode": "pixels", "len": 260}
    chosen = "" if len(drawn) == len(layers) else f" ({len(drawn)} of {len(layers)} layers)"
    figure.update_layout(
        title=f"Who is called while the router learns{chosen}",
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "colorbar": bar},
        height=height,
        margin={"t": 84, "b": 100},
        showlegend=True,
        legend=_BELOW,
    )
    figure.update_annotations(font_size=13)
    first = usage[usage["step"] == usage["step"].min()]
    alt = (
        f"Share of tokens on which each expert is on, from step {first['step'].iloc[0]} to {last['step'].iloc[0]}: "
        f"{first['dead'].sum()} of {len(first)} experts dead at first, {dead.sum()} of {len(last)} at the end"
        + (f", most in layer {dead.idxmax()} ({dead.max()})." if dead.sum() else ".")
    )
    each = usage.groupby(["layer", "step"])["share"]
    table = each.agg(experts="size", lowest="min", median="median", highest="max").round(4)
    table["dead"] = usage.groupby(["layer", "step"])["dead"].sum()
    ends = [usage["step"].min(), usage["step"].max()]
    return describe(figure, alt, table.loc[(slice(None), ends), :].reset_index())


def specialisation(table: pd.DataFrame) -> go.Figure:
    """How far each expert's choice follows from the token's identity: a row of points per layer, next to chance.

    Drawn is the mutual information as a share of the entropy of on or off, within a layer in falling order; grey are
    the same choices moved along to other tokens. Experts that are on for less than `RARE` or almost always are not.

    Args:
        table: of `experts.specialise.table`.
    """
    layers = sorted(table["layer"].unique())
    room = table["entropy"].where(table["share"].between(RARE, 1 - RARE))
    rows = table.assign(place=table["layer"].map({layer: place for place, layer in enumerate(layers)}))
    rows = rows.assign(expert_part=table["bits"] / room, chance_part=table["chance_bits"] / room).dropna()
    share = rows["share"].astype(np.float32)
    looks: dict[str, dict[str, Any]] = {
        "chance": {"name": "chance: choices moved to other tokens", "marker": {"color": QUIET, "size": 4}},
        "expert": {"name": "expert", "marker": {"color": share, "coloraxis": "coloraxis", "size": 6}},
    }
    figure = go.Figure()
    for kind, look in looks.items():
        part = rows[f"{kind}_part"]
        rank = part.groupby(rows["layer"]).rank(ascending=False, method="first") - 1
        across = rank / part.groupby(rows["layer"]).transform("size").sub(1).clip(lower=1)
        bits, tokens = ("bits", "tokens") if kind == "expert" else ("chance_bits", "chance_tokens")
        named = rows[tokens].map(lambda text: "<br>".join(html.escape(text).split(SEPARATOR)[:HOVER]))
        figure.add_scatter(
            x=(rows["place"] + 0.8 * across - 0.4).astype(np.float32),
            y=part.astype(np.float32),
            mode="markers",
            customdata=np.stack([rows["layer"], rows["expert"], rows["share"], rows[bits], rows["entropy"], named], 1),
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}, on for %{customdata[2]:.1%} of tokens<br>"
            "%{customdata[3]:.3f} of %{customdata[4]:.3f} bits<br>%{customdata[5]}<extra></extra>",
            **look,
        )
    every = -(-len(layers) // 14)
    figure.update_xaxes(
        title="layer; in each, experts in falling order", tickvals=list(range(0, len(layers), every)),
        ticktext=[str(layer) for layer in layers[::every]], showgrid=False, zeroline=False,
        range=[-0.6, len(layers) - 0.4],
    )  # fmt: skip
    figure.update_yaxes(title="share of the choice's entropy", tickformat=".0%", range=[-0.12, 1.04])
    bar = {"title": {"text": "on for<br>tokens"}, "tickformat": ".0%"}
    figure.update_layout(
        title=f"How far an expert's choice follows from the token itself ({len(rows):,} of {len(table):,} experts)",
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "colorbar": bar},
        margin={"b": 92},
        legend=_BELOW,
    )
    sums = rows.groupby("layer")[["bits", "chance_bits", "entropy"]].sum()
    told, chance = sums["bits"] / sums["entropy"], sums["chance_bits"] / sums["entropy"]
    alt = (
        f"Share of the entropy of each expert's choice that the token's identity explains, {len(layers)} layers; "
        f"{len(table) - len(rows)} of {len(table)} experts are on hardly ever or almost always and left out."
    )
    if len(rows):
        alt += (
            f" Most in layer {told.idxmax()} ({told.max():.0%}), least in layer {told.idxmin()} ({told.min():.0%}); "
            f"by chance at most {chance.abs().max():.1%}."
        )
    columns = ["layer", "expert", "share", "entropy", "bits", "tokens", "chance_bits", "chance_tokens"]
    return describe(figure, alt, table.sort_values("bits", ascending=False)[columns])


def throughput(table: pd.DataFrame) -> go.Figure:
    """Tokens/s of divided models as a multiple of the dense model's, one panel per stage and batch, log axis.

    Args:
        table: of `experts.speed.throughput`; what has no ratio is named in the figure's table alone.
    """
    other = table[table["model"] != DENSE]
    label = [
        f"{html.escape(row.model)}, {row.active:.0%} active" if row.k else html.escape(row.model)
        for row in other.itertuples()
    ]
    rows = other.assign(label=label, how=other["implementation"].replace("", "without experts"))
    labels, names = list(dict.fromkeys(label))[::-1], list(dict.fromkeys(rows["how"]))
    panels = list(dict.fromkeys(zip(table["stage"], table["batch"], strict=True)))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height = lines * (len(labels) * 34 + 60) + 130
    figure = make_subplots(
        lines, columns, shared_yaxes=True, shared_xaxes=True, horizontal_spacing=0.03, vertical_spacing=60 / height,
        subplot_titles=[f"{stage}, batch {batch}" for stage, batch in panels],
    )  # fmt: skip
    routed = [name for name in names if name != "without experts"]
    colours = dict(zip(routed, [each for each in PALETTE if each != DEAD], strict=False)) | {"without experts": QUIET}
    measured = rows.dropna(subset=["ratio"])
    ends = np.log10([min(0.8, measured["low"].min()), max(1.25, measured["high"].max())])
    low, high = float(ends[0]) - 0.1, float(ends[1]) + 0.1
    for place, (stage, batch) in enumerate(panels):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        panel = rows[(rows["stage"] == stage) & (rows["batch"] == batch)]
        for name in names:
            here = panel[(panel["how"] == name) & panel["ratio"].notna()]
            shift = 0.0 if name not in routed else 0.6 * ((routed.index(name) + 0.5) / len(routed) - 0.5)
            figure.add_scatter(
                x=here["ratio"],
                y=[labels.index(each) - shift for each in here["label"]],
                error_x={"array": here["high"] - here["ratio"], "arrayminus": here["ratio"] - here["low"]},
                mode="markers",
                marker={"color": colours[name], "size": 8},
                name=html.escape(name),
                legendgroup=name,
                showlegend=measured.loc[measured["how"] == name, ["stage", "batch"]].head(1).values.tolist()
                == [[stage, batch]],
                customdata=here[["label", "tokens_per_second"]],
                hovertemplate="%{customdata[0]}<br>%{x:.2f} × dense, %{customdata[1]:,.0f} tokens/s",
                **where,
            )
        lost = panel[panel["ratio"].isna()]
        figure.add_scatter(
            x=[10**low * 1.05] * len(lost),
            y=[labels.index(each) for each in lost["label"]],
            mode="markers",
            marker={"color": INK, "size": 8, "symbol": "x-thin-open"},
            hovertext=[html.escape(f"{row.how}: {row.note}") for row in lost.itertuples()],
            hoverinfo="text",
            name="no ratio",
            legendgroup="no ratio",
            showlegend=rows.loc[rows["ratio"].isna(), ["stage", "batch"]].head(1).values.tolist() == [[stage, batch]],
            **where,
        )
    figure.add_vrect(x0=10**low, x1=1, fillcolor=DEAD, opacity=0.12, line_width=0, layer="below", row="all", col="all")
    figure.add_vline(x=1, line={"color": INK, "width": 1.5}, row="all", col="all")
    wide = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
    ticks = wide if high - low > 1.5 else (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)
    figure.update_xaxes(
        type="log", range=[low, high], tickvals=ticks, ticktext=[f"{each:g} ×" for each in ticks], tickangle=0
    )
    figure.update_xaxes(title="tokens/s, dense model = 1", row=lines)
    figure.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=labels, range=[-0.6, len(labels) - 0.4], zeroline=False
    )
    figure.update_layout(
        title="Speed next to the dense model, quartiles of the rounds; shaded: slower than dense",
        height=height,
        margin={"t": 84, "b": 104},
        showlegend=True,
        legend=_BELOW,
    )
    figure.update_annotations(font_size=13)
    columns_shown = [
        "model",
        "implementation",
        "active",
        "stage",
        "batch",
        "ratio",
        "low",
        "high",
        "tokens_per_second",
        "note",
    ]
    return describe(figure, verdict(table).replace("**", ""), table[columns_shown])
