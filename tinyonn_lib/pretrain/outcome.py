"""What a training and a contest of recipes came to, in words: for notebooks and reports."""

from __future__ import annotations

import html
import math

import pandas as pd

from tinyonn_lib.lm.record import spikes

_MOST = 5


def spike_note(history: pd.DataFrame, clip: float | None) -> str:
    """Which steps had a gradient far above the usual, and what became of it. `history` has a column `model`, too."""
    found = [(name, spikes(rows), rows) for name, rows in history.groupby("model", sort=False)]
    if not (count := sum(len(spiked) for _, spiked, _ in found)):
        longest = history["grad_norm"].max()
        return f"No gradient spike in {len(history):,} steps; the longest gradient measured {longest:.2f}."
    said = []
    for name, spiked, rows in found:
        for row in spiked.head(_MOST).itertuples():
            after = rows.loc[rows["step"].between(row.step + 1, row.step + 20), "loss"]
            then = f"→ {after.mean():.2f}" if len(after) else "and the end"
            said.append(f"{html.escape(str(name))}, step {row.step}: {row.grad_norm:.2f}, loss {row.loss:.2f} {then}")
    more = f" and {count - len(said)} more" if count > len(said) else ""
    clipped = f"and all beyond {clip:g} clipped" if clip else "not clipped (`clip` is 0)"
    return (
        f"**{count} gradient spike{'s' if count > 1 else ''}** (above four medians of the 50 steps before), {clipped}; "
        f"with the loss of that step and the mean of the 20 after it: {'; '.join(said)}{more}."
    )


def draft_note(draft_acceptance: float) -> str:
    """What `mtp.draft_acceptance` found."""
    return (
        f"The extra head drafts the token after the next: **{draft_acceptance:.1%}** of its guesses on held-out text "
        "are the model's own next choice (DeepSeek-V3 reports 85 to 90 %)."
    )


def contest_story(table: pd.DataFrame) -> str:
    """Who won the contest of recipes at equal time, and who lost clearly."""
    at_time = table[table["budget"] == "time"].set_index("recipe")
    default = at_time.loc["default"]
    others = at_time[at_time["dense"].astype(bool)].drop("default")
    better = others[others["high"] < 0]
    said = [f"The default pays {default['bits_per_byte']:.3f} bits per byte."]
    if len(better):
        names = ", ".join(f"{name} ({row['difference']:+.3f}{_alone(row)})" for name, row in better.iterrows())
        said.append(f"**Better at equal time: {names}.**")
    elif len(others):
        best = others["difference"].idxmin()
        row = others.loc[best]
        interval = "no interval" if pd.isna(row["low"]) else f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        said.append(
            f"No other recipe for the same model is clearly better at equal time; the next is *{best}* "
            f"({row['difference']:+.3f} {interval}{_alone(row)})."
        )
    different = at_time[~at_time["dense"].astype(bool)]
    if len(different):
        names = ", ".join(f"{name} {row['difference']:+.3f}" for name, row in different.iterrows())
        said.append(f"Other architectures at equal time: {names}.")
    return " ".join(said)


def _alone(row: pd.Series) -> str:
    """What an interval over files cannot tell: how much another training would differ."""
    return ", a single training" if row["seeds"] == 1 else ""


def lesson_story(table: pd.DataFrame) -> str:
    """What document 002's two lessons came to."""
    chosen = table[table["best"].astype(bool)].fillna({"bits_per_byte": math.inf})  # infinity is null in a file
    means = chosen.groupby(["lesson", "setting"], sort=False)["bits_per_byte"].mean()
    told = means.map(lambda value: f"{value:.3f}" if math.isfinite(value) else "does not converge")
    return " ".join(
        f"{lesson.capitalize()}: " + ", ".join(f"{setting} {value}" for (_, setting), value in rows.items()) + "."
        for lesson, rows in told.groupby(level=0, sort=False)
    )
