"""What distillation and rewards came to, in words and figures: for notebooks and reports."""

from __future__ import annotations

import re
from math import isfinite
from typing import TYPE_CHECKING

import pandas as pd

from tinyonn_lib.align.answers import answers
from tinyonn_lib.align.methods import METHODS
from tinyonn_lib.evaluate.losses import MIN_GROUPS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COOLER = "the warm model at half the temperature, no training"


def examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: pd.DataFrame, count: int = 4
) -> dict[str, str]:
    """The first prompts, each with the model's likeliest answer and the program's verdict."""
    first = prompts.head(count)
    found = answers(model, tokenizer, first, 1, 0.0)
    return {
        asked: f"{asked}{said if said is not None else ' …'}   [{'right' if good else 'wrong'}]"
        for asked, said, good in zip(first["prompt"], found["completion"], found["right"], strict=True)
    }


def distilled(table: pd.DataFrame) -> str:
    """What the teacher brought; `table` is that of `distil_compare.compare`."""
    start, teacher = (table.loc[table["method"] == name, "bits_per_byte"].iloc[0] for name in ("start", "teacher"))
    alone = table[(table["method"] == "text alone")]["bits_per_byte"].iloc[0]
    said = [
        f"The student began at {start:.3f} bits per byte (the teacher: {teacher:.3f}), the text alone: {alone:.3f}."
    ]
    rows = table[table["difference"].notna()]
    for budget in ("tokens", "time"):
        part = rows[rows["budget"] == budget]
        told = ", ".join(
            f"{row.method} {row.difference:+.3f}"
            + (f" [{row.low:+.3f}, {row.high:+.3f}]" if isfinite(row.low) else " (too few texts for an interval)")
            for row in part.itertuples()
        )
        said.append(f"At equal {budget}, against it: {told}.")
    return " ".join(said)


def story(lifts: pd.DataFrame) -> str:
    """Whether GSPO helped, and whether its controls did as well; `lifts` is that of `contest.Contest`.

    What trainings did, not what the method does: of a single one no interval tells how another would turn out.
    """
    rows = lifts.set_index(["method", "against", "how"])
    seeds, note = rows.loc[("gspo", "warm", "sampled"), ["seeds", "note"]]
    said, controls = [], []
    for how in ("sampled", "greedy"):
        row = rows.loc[("gspo", "warm", how)]
        verb = {"better": "lifted", "worse": "**lowered**"}.get(row["standing"], "did not clearly change")
        said.append(
            f"GSPO {verb} the share of right answers ({how}) on {int(row['prompts'])} held-out prompts: "
            f"**{row['base']:.1%} → {row['tuned']:.1%}** ({_gap(row)})."
        )
    said += [f"Of its trainings: {note}."] if note else []
    for method in [name for name in lifts["method"].unique() if name != "gspo"]:
        own, gap = rows.loc[(method, "warm", "sampled")], rows.loc[("gspo", method, "sampled")]
        standing = {"better": "GSPO was better", "worse": "**GSPO was worse**"}.get(
            gap["standing"], "no clear difference"
        )
        name = METHODS[method].name if method in METHODS else _COOLER
        noted = f" ({own['note']})" if own["note"] else ""
        controls.append(f"{name[0].upper()}{name[1:]}: {own['tuned']:.1%}{noted}; {standing} ({_gap(gap)}).")
    scope = f"Intervals are over prompts and the {seeds} seeds."
    if seeds == 1:
        scope = "One training each: intervals are over prompts alone and do not tell how another seed would turn out."
    return "\n\n".join([" ".join(said), " ".join(controls), scope])


def metrics(lifts: pd.DataFrame, counts: pd.DataFrame, taught: pd.DataFrame) -> dict[str, float]:
    """The headline figures; none that depends on the clock."""
    found = {"prompts_kept": float(counts["kept"].sum() / counts["prompts"].sum())}
    for row in lifts[lifts["against"] == "warm"].itertuples():
        found |= {f"warm_{row.how}": row.base, f"{row.method}_{row.how}": row.tuned}
    for row in lifts[(lifts["against"] == "warm") & (lifts["method"] == "gspo") & lifts["low"].notna()].itertuples():
        found[f"gspo_{row.how}_low"] = row.low
    equal = taught[(taught["budget"] == "tokens") & taught["difference"].notna()]
    names = [re.sub(r"\W+", "_", name).lower() for name in equal["method"]]
    return found | {f"distil_{name}": gap for name, gap in zip(names, equal["difference"], strict=True)}


def headline(lifts: pd.DataFrame) -> tuple[str, str]:
    """What stands on the index page."""
    row = lifts[(lifts["method"] == "gspo") & (lifts["against"] == "warm") & (lifts["how"] == "sampled")].iloc[0]
    return (f"right answers after GSPO (before: {row['base']:.1%})", f"{row['tuned']:.1%}")


def _gap(row: pd.Series) -> str:
    gap = f"{row['difference']:+z.1%}"
    return gap if row["prompts"] < MIN_GROUPS else f"{gap} [{row['low']:+z.1%}, {row['high']:+z.1%}]"
