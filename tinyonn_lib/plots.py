"""Tables in, plotly figures out. The only file that imports plotly.

Every figure carries in `layout.meta` what a report needs beside the picture: `alt` (one sentence that says what is to
be seen), `table` (the numbers behind it) and `thumbnail` (whether it stands for its phase on the index page).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import NDArray

from tinyonn_lib.scan.tables import layer_ranks

ACCENT, INK, QUIET = "#0b6e6e", "#22313f", "#8a97a3"
PALETTE = ("#0b6e6e", "#d1682e", "#5b5ea6", "#3b8f4c", "#b23a6f", "#7a6a53", "#2f7fbf", "#c2a11f")
DIVERGING = "RdBu_r"
SEQUENTIAL = "Viridis"
TABLE_ROWS = 80
MAP_SAMPLE = 20_000
CURVE_POINTS = 257

_AXIS = {
    "gridcolor": "#e8ecef",
    "zerolinecolor": "#c9d1d8",
    "ticks": "outside",
    "tickcolor": "#c9d1d8",
    "automargin": True,
}
pio.templates["tinyonn"] = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "colorway": PALETTE,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 64, "r": 24, "t": 56, "b": 52},
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 15}},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "y": -0.2, "x": 0},
        "height": 420,
    }
)


def describe(figure: go.Figure, alt: str, table: pd.DataFrame, *, thumbnail: bool = False) -> go.Figure:
    """Give a figure its alt text and its table (first rows; the total is kept)."""
    shown = table.head(TABLE_ROWS)
    rows = [[_plain(v) for v in row] for row in shown.itertuples(index=False)]
    figure.update_layout(
        template="tinyonn",
        meta={
            "alt": alt,
            "table": {"columns": [str(c) for c in shown.columns], "rows": rows, "total": len(table)},
            "thumbnail": thumbnail,
        },
    )
    return figure


def _plain(value: Any) -> str | float | int:
    if isinstance(value, (np.integer, int)):
        return int(value)
    if isinstance(value, (np.floating, float)):
        return float(f"{value:.4g}")
    return str(value)


def loss_curves(
    history: pd.DataFrame, *, unit: str = "nats per token", smooth: int = 20, thumbnail: bool = False
) -> go.Figure:
    """Training loss over tokens, one line per `model`; `history` has `model, tokens, loss`."""
    figure = go.Figure()
    said, ends = [], []
    for name, rows in history.groupby("model", sort=False):
        line = rows["loss"].rolling(smooth, min_periods=1).mean()
        figure.add_scatter(x=rows["tokens"], y=line, mode="lines", name=html.escape(str(name)))
        said.append(f"{name} from {rows['loss'].iloc[0]:.2f} to {line.iloc[-1]:.2f}")
        ends.append(rows.iloc[[0, -1]])
    figure.update_layout(title=f"Training loss, mean of {smooth} steps", showlegend=True)
    figure.update_xaxes(title="tokens seen")
    figure.update_yaxes(title=unit)
    alt = f"Training loss over tokens seen: {', '.join(said)} {unit}."
    return describe(figure, alt, pd.concat(ends), thumbnail=thumbnail)


def _heat(
    table: pd.DataFrame, *, title: str, unit: str, alt: str, scale: str, span: float | None = None, digits: str = ".3g"
) -> go.Figure:
    """Heat map of a frame whose index is the row axis and whose columns are the column axis."""
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[html.escape(str(c)) for c in table.columns],
            y=[html.escape(str(i)) for i in table.index],
            colorscale=scale,
            zmin=None if span is None else -span,
            zmax=span,
            colorbar={"title": {"text": unit}},
            texttemplate=f"%{{z:{digits}}}" if table.size <= 120 else None,
        )
    )
    figure.update_layout(title=title)
    figure.update_yaxes(autorange="reversed", type="category", title=table.index.name)
    figure.update_xaxes(type="category", title=table.columns.name)
    return describe(figure, alt, table.reset_index())


def module_heat(tensors: pd.DataFrame) -> go.Figure:
    """Norms of inputs and of weight gradients, layer by module, log10.

    Args:
        tensors: `scan.tables.tensors_table`; linears are shown.
    """
    from plotly.subplots import make_subplots

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
    from plotly.subplots import make_subplots

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
        _density(figure, np.log10(points["act"]), np.log10(points["grad"]), 80)
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


def _density(figure: go.Figure, x: pd.Series, y: pd.Series, bins: int) -> None:
    """A grey picture of how many points are where, counted here: the page need not carry the points."""
    counts, xs, ys = np.histogram2d(x, y, bins=bins)
    figure.add_heatmap(
        z=np.log1p(counts.T).astype(np.float32),
        x=(xs[:-1] + xs[1:]) / 2,
        y=(ys[:-1] + ys[1:]) / 2,
        colorscale="Greys",
        showscale=False,
        hoverinfo="skip",
    )


def stratified(table: pd.DataFrame, size: int, by: str = "layer", seed: int = 0) -> pd.DataFrame:
    """At most `size` rows, the same share of every group."""
    if len(table) <= size:
        return table
    return table.groupby(by).sample(frac=size / len(table), random_state=seed)


def neuron_map(points: pd.DataFrame, name: str = "UMAP", *, thumbnail: bool = True) -> go.Figure:
    """The neurons at `x, y`, coloured by S_p, ΔSC, cluster or layer (buttons switch).

    `points` has `layer, neuron, sp, cluster, x, y` and, if ΔSC is wanted, `delta_sc`.

    All points as a density picture underneath when there are more than 20,000, a stratified WebGL sample on top.

    Args:
        name: what made the map.
    """
    picked = stratified(points, MAP_SAMPLE)
    colours: dict[str, dict[str, Any]] = {"S_p": _diverging(picked["sp"])}
    if "delta_sc" in picked.columns:
        colours["ΔSC"] = _diverging(picked["delta_sc"])
    lowest = int(picked["cluster"].min())  # HDBSCAN's -1: noise
    colours["cluster"] = {
        "color": picked["cluster"], "cmin": lowest - 0.5, "cmax": picked["cluster"].max() + 0.5,
        "colorscale": _steps(int(picked["cluster"].max()) + 1 - lowest),
    }  # fmt: skip
    colours["layer"] = {"color": picked["layer"], "colorscale": _steps(int(picked["layer"].max()) + 1)}
    figure = go.Figure()
    under = len(points) > len(picked)
    if under:
        _density(figure, points["x"], points["y"], 160)
    x, y = picked["x"].to_numpy(np.float32), picked["y"].to_numpy(np.float32)
    facts = np.stack([picked["layer"], picked["neuron"], picked["cluster"]], 1).astype(np.int32)
    for colour, marker in colours.items():
        figure.add_scattergl(
            x=x,
            y=y,
            mode="markers",
            name=colour,
            visible=colour == "S_p",
            marker={"size": 5, "opacity": 0.85, "colorbar": {"title": {"text": colour}}, **marker},
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
        showlegend=False,
        updatemenus=[
            {"type": "buttons", "direction": "right", "x": 1, "xanchor": "right", "y": 1.1, "buttons": buttons}
        ],
    )
    figure.update_xaxes(showticklabels=False, title=f"{name} 1")
    figure.update_yaxes(showticklabels=False, title=f"{name} 2")
    alt = (
        f"{name} map of {len(points):,} neurons by their features, coloured by S_p; buttons switch to "
        f"{'ΔSC, ' if 'ΔSC' in colours else ''}the {points['cluster'].nunique()} clusters or the "
        f"{points['layer'].nunique()} layers."
    )
    return describe(figure, alt, points[["layer", "neuron", "sp", "cluster", "x", "y"]], thumbnail=thumbnail)


def _diverging(values: pd.Series) -> dict[str, Any]:
    """Marker colours for values around 0; the extreme 2 % share the end colours."""
    span = float(np.abs(values).quantile(0.98)) or 1.0
    return {"color": values.astype(np.float32), "colorscale": DIVERGING, "cmin": -span, "cmax": span}


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


def _steps(count: int) -> list[tuple[float, str]]:
    """A colour scale of `count` flat steps from the palette."""
    edges = np.linspace(0, 1, count + 1)
    return [(float(e), PALETTE[i % len(PALETTE)]) for i in range(count) for e in edges[i : i + 2]]


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
    return _heat(corr, title="Rank correlation", unit="ρ", alt=alt, scale=DIVERGING, span=1.0, digits=".2f")


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
    return _heat(
        table, title="What the clusters have in common", unit="z", alt=alt, scale=DIVERGING, span=span, digits=".2f"
    )


def expert_usage(shares: NDArray[np.float64]) -> go.Figure:
    """Share of tokens on which each expert is on, `(layers, experts)`."""
    dead = int((shares == 0).sum())
    alt = f"Share of tokens per expert and layer, {shares.min():.0%} to {shares.max():.0%}; {dead} are never used."
    table = pd.DataFrame(shares).rename_axis(index="layer", columns="expert")
    return _heat(table, title="Who is called: share of tokens", unit="share", alt=alt, scale=SEQUENTIAL, digits=".2f")


def trial(table: pd.DataFrame, text: str, *, thumbnail: bool = True) -> go.Figure:
    """ΔNLL of all partitions by the oracle router, the ridge router and their own, one panel per active share.

    Args:
        table: `experts.trial.Trial.table`.
        text: which kind of text.
    """
    from plotly.subplots import make_subplots

    rows = table[table["text"] == text]
    kind = rows["router"].where(rows["router"].isin(["oracle", "ridge"]), "its own")
    shares = sorted(rows["active"].unique())
    middle = rows[(kind == "oracle") & (rows["active"] == shares[len(shares) // 2])]
    order = middle.sort_values("mean", ascending=False)["partition"].tolist()  # the best on top
    titles = [f"{share:.0%} active" for share in shares]
    figure = make_subplots(1, len(shares), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    looks = {"oracle": (QUIET, "circle-open"), "ridge": (ACCENT, "circle"), "its own": (PALETTE[1], "diamond")}
    for column, share in enumerate(shares, 1):
        for name, (colour, symbol) in looks.items():
            here = rows[(rows["active"] == share) & (kind == name)]
            spans = {"array": here["high"] - here["mean"], "arrayminus": here["mean"] - here["low"], "thickness": 1}
            figure.add_scatter(
                x=here["mean"],
                y=here["partition"].map(html.escape),
                error_x=spans,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=f"{name} router",
                legendgroup=name,
                showlegend=column == 1,
                customdata=here["router"],
                hovertemplate="%{y}, %{customdata} router<br>ΔNLL %{x:.3f}<extra></extra>",
                row=1,
                col=column,
            )
        static = rows[(rows["active"] == share) & rows["method"].isin(["flap_static", "flap_static + bias"])]
        pruned = static["mean"].min()
        figure.add_vline(x=pruned, line={"color": PALETTE[1], "dash": "dot", "width": 1}, row=1, col=column)
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    figure.update_xaxes(title="ΔNLL, nats per token", rangemode="tozero")
    figure.update_layout(
        title=f"What is lost on {html.escape(text)} text, 95 % intervals; dotted: FLAP's static pruning",
        margin={"t": 90},
        height=160 + 32 * len(order),
    )
    figure.update_annotations(font_size=13)
    best = rows.loc[rows.groupby([rows["active"], kind == "oracle"])["mean"].idxmin()]
    alt = f"ΔNLL on {text} text by partition and active share. Least lost: " + ", ".join(
        f"{row.method} at {row.active:.0%} ({row.mean:+.3f})" for row in best.itertuples()
    )
    value = [f"{row.mean:+.4f} [{row.low:+.4f}, {row.high:+.4f}]" for row in rows.itertuples()]
    share = [f"{row.share:.0%} active, k = {row.k:g}" for row in rows.itertuples()]
    wide = rows.assign(value=value, share=share).pivot_table(
        index=["partition", "router", "seeds", "files"], columns="share", values="value", aggfunc="first", sort=False
    )
    return describe(figure, html.escape(alt) + ".", wide.reset_index(), thumbnail=thumbnail)


def projection(table: pd.DataFrame) -> go.Figure:
    """ΔNLL of the small model before and after alignment, one bar per init; `experts.projection.compare`."""
    from plotly.subplots import make_subplots

    rows = table[~table["init"].str.startswith("large")]
    moments = ("before", "after")
    titles = [f"{moment} alignment" for moment in moments]
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    for column, moment in enumerate(moments, 1):
        here = rows[rows["moment"] == moment].rename(columns={"init": "method", "delta_nll": "mean"})
        _add_interval_bars(figure, here, row=1, col=column)
    figure.update_layout(title="Small model minus large: ΔNLL, 95 % intervals", showlegend=False, margin={"t": 90})
    figure.update_annotations(font_size=13)
    after = rows[rows["moment"] == "after"]
    alt = "ΔNLL of the small model after alignment, by init: " + ", ".join(
        f"{row.init} {row.delta_nll:+.3f}" for row in after.itertuples()
    )
    return describe(figure, alt + ".", table.round(4))


def intervals(table: pd.DataFrame) -> go.Figure:
    """ΔNLL of several methods at one active share, bars with 95 % intervals; `method, active, mean, low, high`."""
    figure = go.Figure()
    _add_interval_bars(figure, table)
    share = f"{table['active'].iloc[0]:.0%} of the FFN parameters active"
    figure.update_layout(title=f"{share}: ΔNLL in nats per token, 95 % intervals", showlegend=False)
    alt = "ΔNLL, nats per token: " + ", ".join(f"{r.method} {r.mean:+.3f}" for r in table.itertuples()) + "."
    return describe(figure, alt, table, thumbnail=True)


def _add_interval_bars(figure: go.Figure, table: pd.DataFrame, **place: int) -> None:
    """Horizontal bars in the table's order, top first, their value behind the interval; routers in accent colour."""
    rows = table.iloc[::-1]
    names = rows["method"].map(lambda v: html.escape(str(v)))
    figure.add_bar(
        x=rows["mean"],
        y=names,
        orientation="h",
        marker_color=[ACCENT if "router" in name or "gradient" in name else QUIET for name in rows["method"]],
        error_x={"array": rows["high"] - rows["mean"], "arrayminus": rows["mean"] - rows["low"], "thickness": 1},
        **place,
    )
    ends = rows["high"].fillna(rows["mean"])
    text = [f" {mean:+.3f}" for mean in rows["mean"]]
    figure.add_scatter(x=ends, y=names, mode="text", text=text, textposition="middle right", hoverinfo="skip", **place)
    span = [min(0.0, float(rows["low"].fillna(0).min()) * 1.1), float(ends.max()) * 1.3 or 1.0]
    figure.update_xaxes(range=span, **place)


def corpus_sizes(texts: pd.DataFrame) -> go.Figure:
    """Kilobytes of text per package and split; `texts` has `text, source, split`."""
    size = texts["text"].str.encode("utf-8").str.len() / 1000
    package = texts["source"].str.split(r"[/:]", regex=True).str[0]
    table = size.groupby([package, texts["split"]]).sum().rename("kB").reset_index()
    top = table.groupby("source")["kB"].sum().nlargest(8).index
    table = table[table["source"].isin(top)]
    total = size.groupby(texts["split"]).sum()
    figure = go.Figure()
    for name in ("train", "calibration", "heldout"):
        rows = table[table["split"] == name]
        figure.add_bar(y=rows["source"].map(html.escape), x=rows["kB"], name=name, orientation="h")
    figure.update_layout(title="Corpus", barmode="stack", height=320)
    figure.update_xaxes(title="kB of text")
    alt = ", ".join(f"{name} {total.get(name, 0):,.0f} kB" for name in ("train", "calibration", "heldout"))
    return describe(figure, f"Size of the corpus by package and split: {alt} in {len(texts):,} texts.", table)


def bits_per_byte(bits: Mapping[str, float]) -> go.Figure:
    """One bar per model: bits per byte on held-out text."""
    table = pd.DataFrame({"model": list(bits), "bits per byte": list(bits.values())})
    figure = go.Figure(
        go.Bar(
            x=[html.escape(name) for name in bits],
            y=list(bits.values()),
            text=[f"{value:.3f}" for value in bits.values()],
            textposition="outside",
            cliponaxis=False,
            marker_color=[QUIET if "gram" in name else ACCENT for name in bits],
        )
    )
    figure.update_layout(title="Held-out text, lower is better")
    figure.update_yaxes(title="bits per byte")
    alt = "Bits per byte on held-out text: " + ", ".join(f"{name} {value:.3f}" for name, value in bits.items()) + "."
    return describe(figure, alt, table)


def expert_means(partition: pd.DataFrame, scores: pd.DataFrame) -> go.Figure:
    """Mean S_p of every expert, one row per layer; `layer, expert, neuron` and `layer, neuron, sp`."""
    joined = partition.merge(scores[["layer", "neuron", "sp"]], on=["layer", "neuron"])
    table = joined.groupby(["layer", "expert"])["sp"].mean().unstack().rename(columns={-1: "shared", -2: "dropped"})
    span = float(np.abs(table.to_numpy()).max()) or 1.0
    experts = partition.loc[partition["expert"] >= 0, "expert"].nunique()
    alt = f"Mean S_p of {experts} experts in each of {table.shape[0]} layers, within ±{span:.2f}."
    return _heat(table, title="Mean S_p of each expert", unit="S_p", alt=alt, scale=DIVERGING, span=span, digits=".1f")


def explorer_map(points: pd.DataFrame, scores: Mapping[str, NDArray[np.float64]], best: pd.DataFrame) -> go.Figure:
    """The neurons at `x, y` coloured by S_p, with a button for each named set of weights.

    Args:
        points: `layer, neuron, cluster, x, y`, numbered from 0.
        scores: Name of a set of weights → S_p of every neuron; the first is shown.
        best: The figure's table, such as the best neurons and what they fire on.
    """
    picked = stratified(points, MAP_SAMPLE)
    colours = {name: score_colours(values[picked.index]) for name, values in scores.items()}
    figure = go.Figure()
    if len(points) > len(picked):
        _density(figure, points["x"], points["y"], 160)
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
        showlegend=False,
        updatemenus=[menu] if len(buttons) > 1 else [],
    )
    figure.update_xaxes(showticklabels=False, title="UMAP 1")
    figure.update_yaxes(showticklabels=False, title="UMAP 2")
    named = ", ".join(scores)
    alt = f"Map of {len(points):,} neurons coloured by S_p; buttons switch between sets of weights: {named}."
    return describe(figure, html.escape(alt), best)


def score_colours(values: NDArray[np.float64]) -> dict[str, Any]:
    """The marker's `color, cmin, cmax` for scores around 0: the scale is symmetric, its ends the 98 % quantile."""
    span = float(np.quantile(np.abs(values), 0.98)) or 1.0
    return {"color": values.astype(np.float32), "cmin": -span, "cmax": span}


def _packed(values: NDArray[np.float32]) -> dict[str, str]:
    """An array as plotly.js unpacks it, for where plotly would write a list: a button's arguments."""
    return {"dtype": "f4", "bdata": base64.b64encode(values.astype("<f4").tobytes()).decode()}


def palette(count: int) -> list[str]:
    """The diverging colour scale in `count` steps, for a map that plotly does not draw."""
    from plotly.colors import sample_colorscale

    return list(sample_colorscale(DIVERGING, [i / (count - 1) for i in range(count)]))
