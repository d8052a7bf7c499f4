"""Figures of the neurons: scores, clusters, maps."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import sample_colorscale

from tinyonn_lib.plots.base import DIVERGING, MAP_SAMPLE, PALETTE, density, describe, heat, stratified

CURVE_POINTS = 257


def ranking(scores: pd.DataFrame) -> go.Figure:
    """S_p sorted within each layer: rank as a share of the layer against score."""
    figure = go.Figure()
    for layer, rows in scores.groupby("layer"):
        shares = np.linspace(0, 1, min(len(rows), CURVE_POINTS))
        line = np.quantile(rows["sp"], 1 - shares)
        figure.add_scatter(x=shares, y=line.astype(np.float32), mode="lines", name=f"layer {layer}")
    figure.update_layout(title="S_p, best neuron first")
    figure.update_xaxes(title="share of the layer's neurons", tickformat=".0%")
    figure.update_yaxes(title="S_p (z-units)")
    best = scores.sort_values("sp", ascending=False)[["layer", "neuron", "sp"]]
    alt = f"S_p sorted within each layer; it runs from {scores['sp'].max():.2f} down to {scores['sp'].min():.2f}."
    return describe(figure, alt, best)


def correlations(table: pd.DataFrame) -> go.Figure:
    """Spearman correlation between the columns of a frame."""
    corr = table.corr("spearman")
    alt = "Rank correlations: " + ", ".join(f"S_p and {c} {corr.loc['sp', c]:.2f}" for c in corr if c != "sp") + "."
    return heat(corr, title="Rank correlation", unit="ρ", alt=alt, scale=DIVERGING, span=1.0, digits=".2f")


def profiles(scores: pd.DataFrame, columns: Sequence[str]) -> go.Figure:
    """Mean feature of every cluster as a diverging heat map; clusters largest first."""
    table = scores.groupby("cluster")[list(columns)].mean().rename_axis(columns="feature")
    sizes = scores["cluster"].value_counts()
    table.index = pd.Index([f"{c} (n = {sizes[c]})" for c in table.index], name="cluster")
    top = scores.groupby("cluster")["sp"].mean()
    alt = (
        f"Mean features of {len(table)} clusters; cluster {top.idxmax()} has the highest mean S_p ({top.max():.2f}), "
        f"cluster {top.idxmin()} the lowest ({top.min():.2f})."
    )
    span = float(np.abs(table.to_numpy()).max()) or 1.0
    return heat(
        table, title="What the clusters have in common", unit="z", alt=alt, scale=DIVERGING, span=span, digits=".2f"
    )


def delta_sc_map(scores: pd.DataFrame, columns: int = 256) -> go.Figure:
    """ΔSC of every neuron, one row per layer, neurons in their order; mean of neighbours where a layer has more.

    Args:
        scores: `layer, neuron, delta_sc`.
        columns: most cells per layer.
    """
    widest = int(scores["neuron"].max()) + 1
    step = -(-widest // columns)
    grid = scores.assign(cell=scores["neuron"] // step).pivot_table(index="layer", columns="cell", values="delta_sc")
    span = float(np.nanquantile(np.abs(grid.to_numpy()), 0.99)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(np.float32),
            x=[int(cell) * step for cell in grid.columns],
            y=[str(layer) for layer in grid.index],
            colorscale=DIVERGING,
            zmin=-span,
            zmax=span,
            colorbar={"title": {"text": "ΔSC"}},
            hovertemplate="layer %{y}, neuron %{x}"
            + ("" if step == 1 else f" to +{step - 1}")
            + "<br>ΔSC %{z:.2f}<extra></extra>",
        )
    )
    each = "every neuron" if step == 1 else f"mean of {step} neighbours"
    figure.update_layout(title=f"ΔSC = z(activation) − z(gradient), {each}", height=max(260, 22 * len(grid) + 140))
    figure.update_yaxes(autorange="reversed", type="category", title="layer")
    figure.update_xaxes(title="neuron")
    spread = scores.groupby("layer")["delta_sc"].quantile([0.05, 0.5, 0.95]).rename_axis(["layer", "quantile"])
    low, high = scores["delta_sc"].min(), scores["delta_sc"].max()
    alt = f"ΔSC of {len(scores):,} neurons in {len(grid)} layers, {low:.2f} to {high:.2f}."
    return describe(figure, alt, spread.reset_index())


def neuron_map(points: pd.DataFrame, name: str = "UMAP", *, thumbnail: bool = True) -> go.Figure:
    """The neurons at `x, y`, coloured by S_p, ΔSC, cluster or layer (buttons switch).

    `points` has `layer, neuron, sp, cluster, x, y` and, if ΔSC is wanted, `delta_sc`.

    All points as a density picture underneath when there are more than 20,000, a stratified WebGL sample on top.

    Args:
        name: what made the map.
    """
    figure, picked = _canvas(points, name)
    under = len(figure.data)
    colours: dict[str, dict[str, Any]] = {"S_p": score_colours(picked["sp"].to_numpy())}
    if "delta_sc" in picked.columns:
        colours["ΔSC"] = score_colours(picked["delta_sc"].to_numpy())
    lowest = int(picked["cluster"].min())  # HDBSCAN's -1: noise
    colours["cluster"] = {
        "color": picked["cluster"], "cmin": lowest - 0.5, "cmax": picked["cluster"].max() + 0.5,
        "colorscale": _steps(int(picked["cluster"].max()) + 1 - lowest),
    }  # fmt: skip
    colours["layer"] = {"color": picked["layer"], "colorscale": _steps(int(picked["layer"].max()) + 1)}
    x, y = picked["x"].to_numpy(np.float32), picked["y"].to_numpy(np.float32)
    facts = np.stack([picked["layer"], picked["neuron"], picked["cluster"]], 1).astype(np.int32)
    for colour, marker in colours.items():
        figure.add_scattergl(
            x=x,
            y=y,
            mode="markers",
            name=colour,
            visible=colour == "S_p",
            marker={
                "size": 5,
                "opacity": 0.85,
                "colorscale": DIVERGING,
                "colorbar": {"title": {"text": colour}},
                **marker,
            },
            customdata=facts,
            hovertemplate="layer %{customdata[0]}, neuron %{customdata[1]}<br>cluster %{customdata[2]}<br>"
            + f"{colour} %{{marker.color:.3~g}}<extra></extra>",
        )
    buttons = [
        {
            "label": colour,
            "method": "restyle",
            "args": [{"visible": [True] * under + [other == colour for other in colours]}],
        }
        for colour in colours
    ]
    figure.update_layout(
        title=f"{name} of the neurons (n = {len(points):,}, {len(picked):,} drawn)",
        height=560,
        updatemenus=[
            {"type": "buttons", "direction": "right", "x": 1, "xanchor": "right", "y": 1.1, "buttons": buttons}
        ],
    )
    alt = (
        f"{name} map of {len(points):,} neurons by their features, coloured by S_p; buttons switch to "
        f"{'ΔSC, ' if 'ΔSC' in colours else ''}the {points['cluster'].nunique()} clusters or the "
        f"{points['layer'].nunique()} layers."
    )
    return describe(figure, alt, points[["layer", "neuron", "sp", "cluster", "x", "y"]], thumbnail=thumbnail)


def explorer_map(points: pd.DataFrame, scores: Mapping[str, NDArray[np.float64]], best: pd.DataFrame) -> go.Figure:
    """The neurons at `x, y` coloured by S_p, with a button for each named set of weights.

    Args:
        points: `layer, neuron, cluster, x, y`, numbered from 0.
        scores: Name of a set of weights → S_p of every neuron; the first is shown.
        best: The figure's table, such as the best neurons and what they fire on.
    """
    figure, picked = _canvas(points, "UMAP")
    colours = {name: score_colours(values[picked.index]) for name, values in scores.items()}
    figure.add_scattergl(
        x=picked["x"].to_numpy(np.float32),
        y=picked["y"].to_numpy(np.float32),
        mode="markers",
        marker={
            "size": 5 if len(picked) < MAP_SAMPLE / 2 else 3,
            "opacity": 0.85,
            "colorscale": DIVERGING,
            "colorbar": {"title": {"text": "S_p"}},
            **next(iter(colours.values())),
        },
        customdata=picked[["layer", "neuron", "cluster"]].to_numpy(np.int32),
        hovertemplate="layer %{customdata[0]}, neuron %{customdata[1]}<br>cluster %{customdata[2]}, "
        "S_p %{marker.color:.2f}<extra></extra>",
    )
    buttons = [
        {
            "label": html.escape(name),
            "method": "restyle",
            "args": [
                {
                    "marker.color": [_packed(each["color"])],
                    "marker.cmin": each["cmin"],
                    "marker.cmax": each["cmax"],
                },
                [len(figure.data) - 1],
            ],
        }
        for name, each in colours.items()
    ]
    menu = {
        "type": "buttons",
        "direction": "right",
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "buttons": buttons,
    }
    figure.update_layout(
        title=f"S_p of the neurons (n = {len(points):,}, {len(picked):,} drawn)",
        height=580,
        margin={"t": 96},
        updatemenus=[menu] if len(buttons) > 1 else [],
    )
    named = ", ".join(scores)
    alt = f"Map of {len(points):,} neurons coloured by S_p; buttons switch between sets of weights: {named}."
    return describe(figure, html.escape(alt), best)


def _canvas(points: pd.DataFrame, name: str) -> tuple[go.Figure, pd.DataFrame]:
    """A map without points, but with the density of all if they are more than `MAP_SAMPLE`; and those to draw on it."""
    picked = stratified(points, MAP_SAMPLE)
    figure = go.Figure(layout={"showlegend": False})
    if len(points) > len(picked):
        density(figure, points["x"], points["y"], 160)
    figure.update_xaxes(showticklabels=False, title=f"{name} 1")
    figure.update_yaxes(showticklabels=False, title=f"{name} 2")
    return figure, picked


def _steps(count: int) -> list[tuple[float, str]]:
    """A colour scale of `count` flat steps from the palette."""
    edges = np.linspace(0, 1, count + 1)
    return [(float(e), PALETTE[i % len(PALETTE)]) for i in range(count) for e in edges[i : i + 2]]


def _packed(values: NDArray[np.float32]) -> dict[str, str]:
    """An array as plotly.js unpacks it, for where plotly would write a list: a button's arguments."""
    return {"dtype": "f4", "bdata": base64.b64encode(values.astype("<f4").tobytes()).decode()}


def score_colours(values: NDArray[np.float64]) -> dict[str, Any]:
    """The marker's `color, cmin, cmax` for scores around 0: the scale is symmetric, its ends the 98 % quantile."""
    span = float(np.quantile(np.abs(values), 0.98)) or 1.0
    return {"color": values.astype(np.float32), "cmin": -span, "cmax": span}


def palette(count: int) -> list[str]:
    """The diverging colour scale in `count` steps, for a map that plotly does not draw."""
    return list(sample_colorscale(DIVERGING, [i / (count - 1) for i in range(count)]))
