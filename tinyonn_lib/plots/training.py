"""Figures of training: losses, bits per byte, what the corpus is made of."""

from __future__ import annotations

import html
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from tinyonn_lib.plots.base import ACCENT, QUIET, describe


def loss_curves(
    history: pd.DataFrame, *, unit: str = "nats per token", smooth: int = 20, thumbnail: bool = False
) -> go.Figure:
    """Training loss over tokens, one line per `model`; `history` has `model, tokens, loss`."""
    figure = go.Figure()
    said, ends = [], []
    for name, rows in history.groupby("model", sort=False):
        line = rows["loss"].rolling(smooth, min_periods=1).mean()
        figure.add_scatter(x=rows["tokens"], y=line, mode="lines", name=html.escape(str(name)))
        said.append(f"{name} from {rows['loss'].iloc[0]:.3g} to {line.iloc[-1]:.3g}")
        ends.append(rows.iloc[[0, -1]])
    figure.update_layout(title=f"Training loss, mean of {smooth} steps", showlegend=True)
    figure.update_xaxes(title="tokens seen")
    figure.update_yaxes(title=unit)
    alt = f"Training loss over tokens seen: {', '.join(said)} {unit}."
    return describe(figure, alt, pd.concat(ends), thumbnail=thumbnail)


def refinement(energy: pd.DataFrame) -> go.Figure:
    """Share of the neurons' energy that is on, round by round; `energy` has `layer, round, share`."""
    figure = go.Figure()
    for layer, rows in energy.groupby("layer"):
        figure.add_scatter(x=rows["round"], y=rows["share"], mode="lines+markers", name=f"layer {layer}")
    figure.update_layout(title="Energy that the router keeps on, by rounds of refinement", showlegend=True)
    figure.update_xaxes(title="round (0: the partition as it came)", dtick=1)
    figure.update_yaxes(title="share of all neurons' energy", tickformat=".1%")
    ends = energy.groupby("layer")["share"].agg(["first", "max"])
    alt = "Share of energy that is on: " + ", ".join(
        f"layer {layer} from {row['first']:.1%} to {row['max']:.1%}" for layer, row in ends.iterrows()
    )
    return describe(figure, f"{alt}.", energy)


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
