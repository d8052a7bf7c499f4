"""Figures of what comes after pretraining: distillation, the difficulty filter, rewards, and what was gained."""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go

from tinyonn_lib.plots.base import ABOVE, ACCENT, PALETTE, QUIET, describe

_VERDICTS = {"all wrong": QUIET, "kept": ACCENT, "all right": PALETTE[1]}


def distilled(table: pd.DataFrame) -> go.Figure:
    """What a teacher brings over the text alone, at equal tokens and at equal time.

    `table` is that of `distil_compare.compare`: method, budget, difference, low, high (bits per byte).
    """
    rows = table[table["difference"].notna()]
    figure = go.Figure()
    for budget, colour in (("tokens", QUIET), ("time", ACCENT)):
        part = rows[rows["budget"] == budget]
        figure.add_scatter(
            y=[html.escape(name) for name in part["method"]],
            x=part["difference"],
            error_x={"array": part["high"] - part["difference"], "arrayminus": part["difference"] - part["low"]},
            mode="markers",
            marker={"color": colour, "size": 9},
            name=f"equal {budget}",
        )
    figure.add_vline(x=0, line_dash="dot", line_color=QUIET)
    figure.update_layout(title="Taught by a larger model, against the text alone", height=320)
    figure.update_layout(showlegend=True, legend=ABOVE)
    figure.update_xaxes(title="bits per byte more than the text alone, held-out (left of 0: better)")
    figure.update_yaxes(autorange="reversed")
    said = ", ".join(f"{row.method} at equal {row.budget} {row.difference:+.3f}" for row in rows.itertuples())
    return describe(figure, f"Bits per byte more than the text alone: {said}.", table)


def filtered(counts: pd.DataFrame) -> go.Figure:
    """Prompts that are always wrong, kept, or always right, per task; `counts` is that of `filtering.keep`."""
    figure = go.Figure()
    for verdict, colour in _VERDICTS.items():
        figure.add_bar(
            y=counts["task"],
            x=counts[verdict],
            name=verdict,
            orientation="h",
            marker_color=colour,
            text=counts[verdict],
        )
    figure.update_layout(title="What there is to learn from", barmode="stack", height=150 + 50 * len(counts))
    figure.update_layout(legend=ABOVE | {"traceorder": "normal"})
    figure.update_xaxes(title="prompts")
    said = "; ".join(
        f"{row['task']}: {row['all wrong']} all wrong, {row['kept']} kept, {row['all right']} all right"
        for _, row in counts.iterrows()
    )
    return describe(figure, f"Prompts by what the model's answers are: {said}.", counts)


def rewards(history: pd.DataFrame, *, smooth: int = 5) -> go.Figure:
    """Mean reward per round of answers, one line per `method`; `history` has `method, step, reward`."""
    figure = go.Figure()
    said = []
    for method, rows in history.groupby("method", sort=False):
        line = rows["reward"].rolling(smooth, min_periods=1).mean()
        figure.add_scatter(x=rows["step"], y=line, mode="lines", name=html.escape(str(method)))
        said.append(f"{method} from {line.iloc[0]:.0%} to {line.iloc[-1]:.0%}")
    figure.update_layout(title=f"Share of right answers while learning, mean of {smooth} rounds", showlegend=True)
    figure.update_xaxes(title="round")
    figure.update_yaxes(title="right answers", tickformat=".0%", rangemode="tozero")
    return describe(figure, f"Right answers over the rounds: {', '.join(said)}.", history)


def lifts(table: pd.DataFrame, *, thumbnail: bool = False) -> go.Figure:
    """Success on held-out prompts over the warm model, per method, with intervals; greedy and sampled.

    `table` is `lifts` of `contest.Contest`: method, against, note, task, how, base, tuned, difference, low, high.
    """
    rows = table[table["against"] == "warm"]
    several = rows["task"].nunique() > 1
    figure = go.Figure()
    for how, colour in (("greedy", QUIET), ("sampled", ACCENT)):
        part = rows[rows["how"] == how]
        names = part["method"] + (", " + part["task"] if several else "") + _noted(part["note"])
        figure.add_scatter(
            y=[html.escape(name) for name in names],
            x=part["difference"],
            error_x={"array": part["high"] - part["difference"], "arrayminus": part["difference"] - part["low"]},
            mode="markers",
            marker={"color": colour, "size": 9},
            name=how,
            customdata=part[["base", "tuned"]],
            hovertemplate="%{y}: %{customdata[0]:.1%} → %{customdata[1]:.1%}<extra></extra>",
        )
    figure.add_vline(x=0, line_dash="dot", line_color=QUIET)
    height = 140 + 34 * rows.groupby(["method", "task"]).ngroups
    figure.update_layout(title="Right answers on held-out prompts, against the warm model", height=height)
    figure.update_layout(showlegend=True, legend=ABOVE)
    figure.update_xaxes(title="share of right answers more than before (right of 0: better)", tickformat="+.0%")
    figure.update_yaxes(autorange="reversed")
    said = ", ".join(
        f"{row.method}{note} {row.how} {row.base:.1%} to {row.tuned:.1%}"
        for row, note in zip(rows.itertuples(), _noted(rows["note"]), strict=True)
        if row.how == "sampled"
    )
    return describe(figure, f"Right answers on held-out prompts: {said}.", table, thumbnail=thumbnail)


def _noted(notes: pd.Series) -> pd.Series:
    return notes.map(lambda note: f" ({note})" if note else "")
