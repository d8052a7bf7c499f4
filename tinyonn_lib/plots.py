"""Tables in, plotly figures out. The only file that imports plotly.

Every figure carries in `layout.meta` what a report needs beside the picture: `alt` (one sentence that says what is to
be seen), `table` (the numbers behind it) and `thumbnail` (whether it stands for its phase on the index page).
"""

from __future__ import annotations

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
TABLE_ROWS = 50
MAP_SAMPLE = 20_000

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
    figure = make_subplots(1, 3, subplot_titles=list(columns.values()), horizontal_spacing=0.07)
    for column, name in enumerate(columns, 1):
        for layer, rows in neurons[neurons[name] > 0].groupby("layer"):
            figure.add_violin(
                y=np.log10(rows[name]),
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
    figure.update_layout(title=f"Per-neuron distributions (n = {len(neurons):,})", margin={"t": 80})
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
        figure.add_histogram2d(
            x=np.log10(points["act"]),
            y=np.log10(points["grad"]),
            nbinsx=80,
            nbinsy=80,
            colorscale="Greys",
            showscale=False,
        )
    for layer, rows in picked.groupby("layer"):
        figure.add_scattergl(
            x=np.log10(rows["act"]),
            y=np.log10(rows["grad"]),
            mode="markers",
            name=f"layer {layer}",
            marker={"size": 4, "opacity": 0.6, "color": PALETTE[int(layer) % len(PALETTE)]},
            customdata=np.stack([rows["layer"], rows["neuron"]], 1),
            hovertemplate="layer %{customdata[0]}, neuron %{customdata[1]}<extra></extra>",
        )
    ranks = layer_ranks(points, "act", "grad")
    span = f"{ranks.min():.2f} to {ranks.max():.2f}"
    figure.update_layout(title=f"Activation and gradient of every neuron (n = {len(points):,})")
    figure.update_xaxes(title="log10 mean |h|")
    figure.update_yaxes(title="log10 gradient norm")
    alt = f"Mean activation against gradient norm of {len(points):,} neurons; Spearman within a layer {span}."
    return describe(figure, alt, points[["layer", "neuron", "act", "grad"]], thumbnail=True)


def stratified(table: pd.DataFrame, size: int, by: str = "layer", seed: int = 0) -> pd.DataFrame:
    """At most `size` rows, the same share of every group."""
    if len(table) <= size:
        return table
    return table.groupby(by).sample(frac=size / len(table), random_state=seed)


def neuron_map(points: pd.DataFrame) -> go.Figure:
    """The neurons at `x, y`, coloured by S_p, cluster or layer (buttons switch); `layer, neuron, sp, cluster, x, y`.

    All points as a density picture underneath when there are more than 20,000, a stratified WebGL sample on top.
    """
    picked = stratified(points, MAP_SAMPLE)
    span = float(np.abs(picked["sp"]).quantile(0.98)) or 1.0
    colours: dict[str, dict[str, Any]] = {
        "S_p": {"color": picked["sp"], "colorscale": DIVERGING, "cmin": -span, "cmax": span},
        "cluster": {"color": picked["cluster"], "colorscale": _steps(int(picked["cluster"].max()) + 1)},
        "layer": {"color": picked["layer"], "colorscale": _steps(int(picked["layer"].max()) + 1)},
    }
    figure = go.Figure()
    if len(points) > len(picked):
        figure.add_histogram2d(
            x=points["x"], y=points["y"], nbinsx=120, nbinsy=120, colorscale="Greys", showscale=False
        )
    for name, marker in colours.items():
        figure.add_scattergl(
            x=picked["x"],
            y=picked["y"],
            mode="markers",
            name=name,
            visible=name == "S_p",
            marker={"size": 5, "opacity": 0.85, "colorbar": {"title": {"text": name}}, **marker},
            customdata=np.stack([picked["layer"], picked["neuron"], picked["cluster"], picked["sp"].round(3)], 1),
            hovertemplate="layer %{customdata[0]}, neuron %{customdata[1]}<br>cluster %{customdata[2]}, "
            "S_p %{customdata[3]}<extra></extra>",
        )
    under = len(points) > len(picked)
    buttons = [
        {
            "label": name,
            "method": "restyle",
            "args": [{"visible": [True] * under + [other == name for other in colours]}],
        }
        for name in colours
    ]
    figure.update_layout(
        title=f"Map of the neurons (n = {len(points):,}, {len(picked):,} drawn)",
        height=560,
        showlegend=False,
        updatemenus=[
            {"type": "buttons", "direction": "right", "x": 1, "xanchor": "right", "y": 1.1, "buttons": buttons}
        ],
    )
    figure.update_xaxes(showticklabels=False, title="UMAP 1")
    figure.update_yaxes(showticklabels=False, title="UMAP 2")
    alt = (
        f"UMAP map of {len(points):,} neurons by their features, coloured by S_p; buttons switch to the "
        f"{points['cluster'].nunique()} clusters or the {points['layer'].nunique()} layers."
    )
    return describe(figure, alt, points[["layer", "neuron", "sp", "cluster", "x", "y"]], thumbnail=True)


def _steps(count: int) -> list[tuple[float, str]]:
    """A colour scale of `count` flat steps from the palette."""
    edges = np.linspace(0, 1, count + 1)
    return [(float(e), PALETTE[i % len(PALETTE)]) for i in range(count) for e in edges[i : i + 2]]


def ranking(scores: pd.DataFrame) -> go.Figure:
    """S_p sorted within each layer: rank as a share of the layer against score."""
    figure = go.Figure()
    for layer, rows in scores.groupby("layer"):
        line = np.sort(rows["sp"].to_numpy())[::-1]
        figure.add_scatter(x=np.linspace(0, 1, len(line)), y=line, mode="lines", name=f"layer {layer}")
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


def delta_nll(table: pd.DataFrame) -> go.Figure:
    """ΔNLL by method with 95 % intervals, one panel per active share; `method, active, mean, low, high`."""
    from plotly.subplots import make_subplots

    shares = sorted(table["active"].unique())
    titles = [f"{share:.0%} of the FFN parameters active" for share in shares]
    figure = make_subplots(1, len(shares), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    for column, share in enumerate(shares, 1):
        _add_interval_bars(figure, table[table["active"] == share], row=1, col=column)
    title = "What is lost: ΔNLL in nats per token, 95 % intervals"
    figure.update_layout(title=title, showlegend=False, margin={"t": 90}, height=360)
    figure.update_annotations(font_size=13)
    best = table.loc[table.groupby("active")["mean"].idxmin()]
    alt = "Loss over active share; least lost: " + ", ".join(
        f"{row.method} at {row.active:.0%} ({row.mean:+.3f})" for row in best.itertuples()
    )
    return describe(figure, alt + ".", table, thumbnail=True)


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
        marker_color=[ACCENT if "router" in method else QUIET for method in rows["method"]],
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
    table = joined.groupby(["layer", "expert"])["sp"].mean().unstack()
    span = float(np.abs(table.to_numpy()).max()) or 1.0
    alt = f"Mean S_p of {table.shape[1]} experts in each of {table.shape[0]} layers, within ±{span:.2f}."
    return _heat(table, title="Mean S_p of each expert", unit="S_p", alt=alt, scale=DIVERGING, span=span, digits=".1f")
