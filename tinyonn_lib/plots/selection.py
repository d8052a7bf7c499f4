"""Figures of data selection: what scores are worth, what they follow, and what is selected."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tinyonn_lib.plots.base import ACCENT, INK, PALETTE, QUIET, SEQUENTIAL, describe, heat
from tinyonn_lib.selection.judge import MEAN, quality

BASELINES = ("random", "length", "longest", "perplexity", "perplexity_fitted", "ifd")
"""Rankings that need no router: what a router's score has to beat."""

_TITLES = {MEAN: "mean of all", "learned": "mean of those learned", "unseen": "mean of those not learned"}

KINDS = ("clean", "byte_noise", "word_shuffle", "repetition", "boilerplate", "wrong_answer")
_KIND_COLOURS = dict(zip(KINDS, (ACCENT, *PALETTE[1:6]), strict=True))
BELOW = {"y": 0, "yref": "container", "yanchor": "bottom"}


def auroc(table: pd.DataFrame, *, thumbnail: bool = True) -> go.Figure:
    """AUROC of every score with its 95 % interval, one panel per corruption, the mean over them first.

    Args:
        table: of `selection.judge.auroc`.
    """
    mean = table[table["corruption"] == MEAN].set_index("score")["auroc"].sort_values(na_position="first")
    panels = [MEAN, *_ordered(set(table["corruption"]) - {MEAN})]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    height = lines * (26 * len(mean) + 84) + 90
    titles = [_TITLES.get(kind, html.escape(kind)) for kind in panels]
    figure = make_subplots(
        lines, columns, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03,
        vertical_spacing=0 if lines == 1 else 84 / (height - 150),
    )  # fmt: skip
    for place, kind in enumerate(panels):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        rows = table[table["corruption"] == kind].set_index("score").loc[mean.index].reset_index()
        for name, part in _by_baseline(rows):
            colour = QUIET if name == "baseline" else ACCENT
            dots(figure, part, "auroc", places(part["score"], mean.index), colour, name, place == 0, **where)
        figure.add_vline(x=0.5, line={"color": PALETTE[1], "dash": "dot", "width": 1}, **where)
    labels(figure, mean.index)
    low = float(np.nanmin(table[["low", "auroc"]].to_numpy()))
    figure.update_xaxes(range=[min(0.4, low - 0.03), 1.03])
    figure.update_layout(
        title="AUROC: a clean text is ranked above a corrupted one, 95 % intervals; dotted: chance",
        height=height, margin={"t": 86, "b": 76}, legend=BELOW,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    said = ", ".join(f"{name} {value:.3f}" for name, value in mean.iloc[::-1].items())
    return describe(figure, f"AUROC, mean over all corruptions: {said}.", table, thumbnail=thumbnail)


def score_distributions(table: pd.DataFrame, name: str, bins: int = 60) -> go.Figure:
    """How a ranking's score is distributed over clean rows and over each kind of corrupted ones; the middle 99 %.

    Args:
        table: scored rows with `corruption`.
        name: key of `selection.scores.RANKINGS`.
    """
    kinds = table["corruption"].where(table["corruption"] != "", "clean")
    value = pd.Series(quality(table, name), table.index)
    found = value.groupby(kinds).describe(percentiles=[0.05, 0.5, 0.95])
    order = _ordered(found.index)[::-1]
    edges = np.linspace(value.quantile(0.005), value.quantile(0.995), bins + 1)
    middle = np.repeat(edges, 2)[1:-1]
    figure = go.Figure()
    for place, kind in enumerate(order):
        here, colour = value[kinds == kind], _colour(kind)
        counts = np.histogram(here, edges)[0].repeat(2)
        outline = (place - 0.35 + 0.8 * counts / max(1, counts.max())).astype(np.float32)
        floor = np.full(len(outline), place - 0.35, np.float32)
        shape: dict[str, Any] = {"mode": "lines", "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=middle, y=floor, line={"color": colour, "width": 0.5}, **shape)
        figure.add_scatter(x=middle, y=outline, line={"color": colour, "width": 1}, fill="tonexty", **shape)
        median = {"color": INK, "symbol": "line-ns-open", "size": 12}
        figure.add_scatter(
            x=[here.median()], y=[place - 0.35], mode="markers", marker=median, name="median",
            showlegend=place == 0, hovertemplate=f"{html.escape(kind)}: median %{{x:.4g}}<extra></extra>",
        )  # fmt: skip
    labels(figure, [f"{kind} ({int(found.loc[kind, 'count']):,})" for kind in order])
    figure.update_xaxes(title=f"{html.escape(name)}, greater is ranked higher; middle 99 % of all rows")
    figure.update_layout(
        title=f"Distribution of {html.escape(name)}", height=150 + 56 * len(order), legend=BELOW, margin={"b": 84}
    )
    said = ", ".join(f"{kind} {found.loc[kind, '50%']:.3g}" for kind in order[::-1])
    shown = found[["count", "mean", "std", "5%", "50%", "95%"]].loc[order[::-1]]
    return describe(figure, f"Median of {name}: {said}.", shown.reset_index(names="text"))


def score_correlations(table: pd.DataFrame) -> go.Figure:
    """Spearman correlation of every ranking with length and with perplexity, over all rows and over clean ones.

    Args:
        table: of `selection.judge.correlations`.
    """
    order = list(dict.fromkeys(table["score"]))[::-1]
    panels = list(dict.fromkeys(table["with"]))
    titles = [f"with {html.escape(panel)}" for panel in panels]
    figure = make_subplots(1, len(panels), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    for column, panel in enumerate(panels, 1):
        for rows, colour, shift in (("all", QUIET, 0.15), ("clean", ACCENT, -0.15)):
            here = table[(table["with"] == panel) & (table["rows"] == rows)]
            y = places(here["score"], order) + shift
            dots(figure, here, "spearman", y, colour, f"{rows} rows", column == 1, row=1, col=column)
    labels(figure, order)
    figure.update_xaxes(range=[-1.05, 1.05], zerolinewidth=2)
    figure.update_layout(
        title="Is it length or perplexity by another name? Rank correlation, 95 % intervals",
        height=180 + 30 * len(order), margin={"t": 86, "b": 76}, legend=BELOW,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    known = table.dropna(subset=["spearman"])
    strongest = known.loc[known.groupby("with", sort=False)["spearman"].apply(lambda each: each.abs().idxmax())]
    said = ", ".join(
        f"with {row[1]} {row[0]} ({row[2]:+.2f})" for row in strongest[["score", "with", "spearman"]].values
    )
    return describe(figure, f"Strongest rank correlation: {said or 'none is known'}.", table)


def selection_overlap(table: pd.DataFrame) -> go.Figure:
    """Jaccard index of every pair of selections, in brackets what chance would give.

    Args:
        table: of `selection.judge.overlap`.
    """
    order = list(dict.fromkeys(table["one"]))
    wide = table.pivot(index="one", columns="other").reindex(index=order)
    part, chance = wide["jaccard"][order], wide["chance"][order]
    pairs = table[table["chance"].notna()].sort_values("jaccard")
    alt = f"Overlap of {len(order)} selections"
    if len(pairs):
        low, high = pairs.iloc[0], pairs.iloc[-1]
        alt += (
            f": most {high['one']} and {high['other']} ({high['jaccard']:.2f}, by chance {high['chance']:.2f}), "
            f"least {low['one']} and {low['other']} ({low['jaccard']:.2f}, by chance {low['chance']:.2f})"
        )
    title = "What two selections share of their union; in brackets: by chance"
    shown = part.rename_axis(index=None, columns=None)
    figure = heat(shown, title=title, unit="Jaccard", alt=f"{alt}.", scale=SEQUENTIAL)
    text = part.map("{:.2f}".format) + chance.map(" ({:.2f})".format, na_action="ignore").fillna("")
    figure.update_traces(text=text.to_numpy(), texttemplate="%{text}", zmin=0, zmax=1)
    figure.update_layout(height=180 + 36 * len(order))
    return describe(figure, f"{alt}.", table)


def kept(table: pd.DataFrame) -> go.Figure:
    """What the top share by each ranking is made of, one stacked bar each; the pool itself as the last.

    Args:
        table: of `selection.judge.kept_share`.
    """
    pool = table[table["score"] == table["score"].iloc[0]].assign(score="the pool", share=lambda rows: rows["pool"])
    share = pd.concat([table, pool]).pivot(index="score", columns="corruption", values="share")
    best = share["clean"].drop("the pool").sort_values(kind="stable")
    share = share.loc[["the pool", *best.index]]
    figure = go.Figure()
    for kind in _ordered(share.columns):
        figure.add_bar(
            x=share[kind], y=share.index.map(html.escape), orientation="h", name=html.escape(kind),
            marker_color=_colour(kind), hovertemplate=f"%{{y}}: %{{x:.1%}} {html.escape(kind)}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=share.loc["the pool", "clean"], line={"color": INK, "dash": "dot", "width": 1})
    beside(figure, share.index, [f"{clean:.1%} clean" for clean in share["clean"]])
    figure.update_yaxes(type="category")
    figure.update_xaxes(tickformat=".0%", range=[0, 1], title="share of the rows selected")
    figure.update_layout(
        title="What is selected; dotted: share of clean rows in the pool", barmode="stack",
        height=190 + 28 * len(share), margin={"r": 100, "b": 92}, legend={**BELOW, "traceorder": "normal"},
    )  # fmt: skip
    said = ", ".join(f"{name} {clean:.1%}" for name, clean in best.iloc[::-1].items())
    alt = f"Share of clean rows among those selected: {said}; in the pool {share.loc['the pool', 'clean']:.1%}."
    return describe(figure, alt, table)


def _by_baseline(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    plain = rows["score"].isin(BASELINES)
    return [(name, part) for name, part in (("router", rows[~plain]), ("baseline", rows[plain])) if len(part)]


def _ordered(kinds: Iterable[str]) -> list[str]:
    """Means first, then known kinds in their fixed order, others behind."""
    there = set(kinds)
    known = [*(name for name in _TITLES if name != MEAN), *KINDS]
    return [*(kind for kind in known if kind in there), *sorted(there - set(known))]


def _colour(kind: str) -> str:
    return _KIND_COLOURS.get(kind, PALETTE[6])


def places(names: pd.Series, order: Sequence[str] | pd.Series | pd.Index) -> np.ndarray:
    """Height of each name: 0 is the lowest."""
    place = {name: place for place, name in enumerate(order)}
    return np.array([place[name] for name in names], np.float64)


def dots(
    figure: go.Figure, rows: pd.DataFrame, value: str, y: np.ndarray, colour: str, name: str, legend: bool, **where: int
) -> None:
    """Points with their intervals at the heights `y`."""
    label = rows["label" if "label" in rows else "score"].map(html.escape)
    figure.add_scatter(
        x=rows[value], y=y, mode="markers", marker={"color": colour, "size": 8}, name=html.escape(name),
        legendgroup=name, showlegend=legend, customdata=np.stack([label, rows["low"], rows["high"]], 1),
        error_x={"array": rows["high"] - rows[value], "arrayminus": rows[value] - rows["low"], "thickness": 1.2},
        hovertemplate="%{customdata[0]}: %{x:.4f} [%{customdata[1]:.4f}, %{customdata[2]:.4f}]<extra></extra>",
        **where,
    )  # fmt: skip


def labels(figure: go.Figure, names: Sequence[str] | pd.Series | pd.Index, **where: int) -> None:
    """Names at the heights 0, 1, …"""
    shown = [html.escape(str(name)) for name in names]
    ticks = {"tickvals": list(range(len(shown))), "ticktext": shown}
    figure.update_yaxes(range=[-0.6, len(shown) - 0.4], zeroline=False, **ticks, **where)


def beside(figure: go.Figure, y: Any, texts: Sequence[str]) -> None:
    """A text at the right end of each row."""
    for place, text in zip(y, texts, strict=True):
        figure.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=6, y=html.escape(place) if isinstance(place, str) else place,
            text=text, showarrow=False, font_size=12,
        )  # fmt: skip
