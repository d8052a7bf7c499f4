"""Figures of the scan: norms by module, ΔSC along texts, how activation and gradient are spread over neurons."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tinyonn_lib.plots.base import INK, MAP_SAMPLE, PALETTE, QUIET, SEQUENTIAL, density, describe, stratified
from tinyonn_lib.scan.tables import layer_ranks


def module_heat(tensors: pd.DataFrame) -> go.Figure:
    """Norms of inputs and of weight gradients, layer by module, log10.

    Args:
        tensors: `scan.tables.tensors_table`; linears are shown.
    """
    rows = tensors[(tensors["kind"] == "linear") & (tensors["layer"] >= 0)]
    norms = {"act_norm": "norm of the input", "grad_norm": "norm of the weight gradient"}
    figure = make_subplots(1, 2, subplot_titles=list(norms.values()), horizontal_spacing=0.16)
    for column, norm in enumerate(norms, 1):
        grid = rows.pivot_table(index="layer", columns="module", values=norm, sort=False)
        figure.add_heatmap(
            z=np.log10(grid.where(grid > 0)),
            x=[html.escape(str(name)) for name in grid.columns],
            y=[str(layer) for layer in grid.index],
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": "log10"}, "x": 0.44 if column == 1 else 1.0, "thickness": 12},
            text=[[f"{value:.3g}" for value in line] for line in grid.to_numpy()],
            texttemplate="%{text}" if grid.size <= 120 else None,
            row=1,
            col=column,
        )
    figure.update_yaxes(autorange="reversed", type="category", title="layer")
    figure.update_xaxes(type="category")
    figure.update_layout(title="Mean norm per text, layer by module", margin={"t": 80})
    low, high = rows.loc[rows["grad_norm"].idxmin()], rows.loc[rows["grad_norm"].idxmax()]
    alt = (
        f"Mean norms per text of {len(rows)} weights, layer by module. The gradient norm is largest in "
        f"{high['target']} ({high['grad_norm']:.2g}) and smallest in {low['target']} ({low['grad_norm']:.2g})."
    )
    table = rows[["layer", "module", "act_norm", "grad_norm", "samples"]]
    return describe(figure, html.escape(alt), table)


def delta_sc(steps: pd.DataFrame, pieces: Sequence[str]) -> go.Figure:
    """ΔSC of every piece of the first text as bars, and the running sum ∫ΔSC of every text as a line.

    Args:
        steps: `scan.mscan.running`, one sequence per text.
        pieces: the text of each step, for hovering.
    """
    shown = [html.escape(piece.replace("\n", " "))[:160] for piece in pieces]
    table = steps.assign(text=shown, piece=steps.groupby("sequence").cumcount())
    first = table[table["sequence"] == table["sequence"].iloc[0]]
    figure = go.Figure()
    figure.add_bar(
        x=first["piece"],
        y=first["delta_sc"],
        marker_color=[PALETTE[0] if value >= 0 else PALETTE[1] for value in first["delta_sc"].fillna(0.0)],
        name="ΔSC of one text",
        hovertext=first["text"],
        hovertemplate="%{y:.2f}<br>%{hovertext}<extra></extra>",
    )
    for sequence, rows in table.groupby("sequence"):
        own = sequence == first["sequence"].iloc[0]
        figure.add_scatter(
            x=rows["piece"],
            y=rows["integral"],
            mode="lines",
            name="∫ΔSC of this text" if own else "∫ΔSC of others",
            showlegend=bool(own or sequence == table["sequence"].iloc[-1]),
            line={"color": INK if own else QUIET, "width": 2 if own else 1},
            yaxis="y2",
            hoverinfo="y",
        )
    figure.update_layout(
        title="ΔSC along one text, ∫ΔSC along several",
        yaxis_title="ΔSC",
        yaxis2={"overlaying": "y", "side": "right", "title": "∫ΔSC", "showgrid": False, "zeroline": False},
    )
    figure.update_xaxes(title="piece of the text")
    low, high = first["delta_sc"].idxmin(), first["delta_sc"].idxmax()
    ends = ", ".join(f"{value:.1f}" for value in table.groupby("sequence")["integral"].last())
    alt = (
        f"ΔSC of {len(first)} consecutive pieces of one text, from {first['delta_sc'][low]:.2f} (piece "
        f"{first['piece'][low]}) to {first['delta_sc'][high]:.2f} (piece {first['piece'][high]}); at the end of the "
        f"texts ∫ΔSC is {ends}."
    )
    return describe(figure, alt, table[["sequence", "piece", "delta_sc", "integral", "text"]])


def distributions(neurons: pd.DataFrame) -> go.Figure:
    """Distribution over neurons of activation, gradient norm and saliency, one violin per layer, log10."""
    columns = {"act": "mean |h|", "grad": "weight-gradient norm", "saliency": "|h·∂L/∂h|"}
    drawn = stratified(neurons, MAP_SAMPLE)
    figure = make_subplots(1, 3, subplot_titles=list(columns.values()), horizontal_spacing=0.07)
    for column, name in enumerate(columns, 1):
        for layer, rows in drawn[drawn[name] > 0].groupby("layer"):
            figure.add_violin(
                y=np.log10(rows[name]).astype(np.float32),
                name=str(layer),
                showlegend=False,
                marker_color=PALETTE[int(layer) % len(PALETTE)],
                points=False,
                box_visible=True,
                row=1,
                col=column,
            )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="log10", col=1)
    figure.update_layout(
        title=f"Per-neuron distributions (n = {len(neurons):,}, {len(drawn):,} drawn)", margin={"t": 80}
    )
    summary = neurons.groupby("layer")[list(columns)].quantile([0.05, 0.5, 0.95])
    summary = summary.rename_axis(["layer", "quantile"]).reset_index()
    zero = int((neurons["grad"] == 0).sum())
    alt = f"Activation, gradient norm and saliency of the neurons, per layer, log axis; {zero} neurons have gradient 0."
    return describe(figure, alt, summary)


def activation_gradient(neurons: pd.DataFrame) -> go.Figure:
    """Mean |h| against weight-gradient norm, every neuron, log axes; a density of all under a sample."""
    points = neurons[(neurons["act"] > 0) & (neurons["grad"] > 0)]
    picked = stratified(points, MAP_SAMPLE)
    figure = go.Figure()
    if len(points) > len(picked):
        density(figure, np.log10(points["act"]), np.log10(points["grad"]), 80)
    for layer, rows in picked.groupby("layer"):
        figure.add_scattergl(
            x=np.log10(rows["act"]).astype(np.float32),
            y=np.log10(rows["grad"]).astype(np.float32),
            mode="markers",
            name=f"layer {layer}",
            marker={"size": 4, "opacity": 0.6, "color": PALETTE[int(layer) % len(PALETTE)]},
            customdata=np.stack([rows["layer"], rows["neuron"]], 1).astype(np.int32),
            hovertemplate="layer %{customdata[0]}, neuron %{customdata[1]}<extra></extra>",
        )
    ranks = layer_ranks(points, "act", "grad")
    span = f"{ranks.min():.2f} to {ranks.max():.2f}"
    figure.update_layout(title=f"Activation and gradient of every neuron (n = {len(points):,})")
    figure.update_xaxes(title="log10 mean |h|")
    figure.update_yaxes(title="log10 gradient norm")
    alt = f"Mean activation against gradient norm of {len(points):,} neurons; Spearman within a layer {span}."
    return describe(figure, alt, points[["layer", "neuron", "act", "grad"]], thumbnail=True)
