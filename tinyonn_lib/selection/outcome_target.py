"""What a selection was worth: the words and numbers of 08_target and 09_evaluate, which follow from their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import context_length
from tinyonn_lib.selection.contest import BASE, Contest
from tinyonn_lib.selection.judge import MEAN
from tinyonn_lib.selection.known import MOST
from tinyonn_lib.selection.target import Tuned

OWN = "selected"
"""The label of 07's selection; its rivals go by the names of their rankings, all rows by "full"."""


def kinds(rivals: Mapping[str, Any]) -> dict[str, str]:
    """Label → kind, for the contest's table."""
    return {OWN: "router"} | {name: "reference" if name == "full" else "control" for name in rivals}


def heldout(run: Any) -> pd.DataFrame:
    """The documents that 07_select kept of the embedded pool.

    Raises:
        BenchError: it chose from rows of one's own, and kept none.
    """
    if not run.has("select", "heldout.parquet"):
        raise BenchError("07_select chose from your own texts: give text to judge on, heldout_texts=FILE_OR_HUB_ID.")
    found: pd.DataFrame = run.table("select", "heldout.parquet")
    return found


def training(tuned: Tuned, rows: int) -> dict[str, Any]:
    """What one training was."""
    trained = sum(weight.numel() for name, weight in tuned.model.named_parameters() if "lora_" in name)
    return {
        "rows": rows,
        "tokens in them": tuned.tokens,
        "of these learned": tuned.learned,
        "times through them": tuned.epochs,
        "weights of the adapter": trained,
        "steps": len(tuned.history),
    }


def duels(ring: Contest) -> pd.DataFrame:
    """The selection's held-out loss minus each rival's: `against, difference, low, high, verdict`."""
    rows = []
    for label in [BASE, *(name for name in ring.contenders if name != OWN)]:
        gap = ring.between(OWN, label)
        rows.append((label, gap.mean, gap.low, gap.high, gap.standing))
    return pd.DataFrame(rows, columns=["against", "difference", "low", "high", "verdict"])


def verdict(ring: Contest, found: pd.DataFrame) -> str:
    """What was learned.

    Args:
        found: of `duels`.
    """
    table = ring.table().set_index("label")
    best = table["loss"].idxmin()
    own = found[found["against"] == BASE].iloc[0]
    lines = [
        f"After {ring.tokens:,} tokens of the selection the loss on held-out text changes by **{_told(own)}** nats per "
        f"token. The lowest loss is that of `{best}` ({table.loc[best, 'delta']:+.4f})."
    ]
    for row in found[found["against"] != BASE].itertuples():
        epochs = table.loc[row.against, "epochs"]
        lines.append(f"- against `{row.against}` (seen {epochs:.1f} times): **{row.verdict}**, {_told(row._asdict())}")
    seeds = table["spread"].max()
    last = (
        f"Seeds of the same selection differ by up to {seeds:.4f}; the intervals are over held-out files, with the "
        "seeds averaged, and say nothing of another draw of `random`."
    )
    return "\n".join([lines[0], "", *lines[1:], "", last])


def metrics(ring: Contest, found: pd.DataFrame) -> dict[str, float]:
    """The numbers of `verdict`."""
    numbers = {f"delta_{row.label}": float(row.delta) for row in ring.table().itertuples()}
    numbers |= {f"{OWN}_minus_{row.against}": float(row.difference) for row in found.itertuples()}
    return numbers | {"base_nll": ring.base.mean}


def headline(ring: Contest, found: pd.DataFrame) -> tuple[str, str]:
    """For the report's index."""
    row = _row(found, "random") if "random" in set(found["against"]) else _row(found, BASE)
    name = "the untrained model" if row["against"] == BASE else row["against"]
    return f"held-out loss, selected minus {name} ({row['verdict']})", f"{row['difference']:+.3f}"


def sizes(model: Any) -> dict[str, int]:
    """Lengths in tokens of the questions that fit a model, for `evaluate.local.build`."""
    length = context_length(model) or MOST
    return {"length": length, "context": min(length // 2, 256), "continuation": min(length // 6, 64)}


def tasks(asked: Sequence[Any]) -> dict[str, Any]:
    """Task → documents, as far as they are known before asking."""
    return {
        task if isinstance(task, str) else task.name: "from the hub" if isinstance(task, str) else _documents(task)
        for task in asked
    }


def _documents(task: Any) -> str:
    return ", ".join(f"{len(rows):,} {split}" for split, rows in task.documents.items())


def cuts(outcome: Any) -> str:
    """Which tasks had questions that were too long for the model, and lost their front."""
    cut = {name: told["cut"] for name, told in outcome.tasks.items() if told["cut"]}
    if not cut:
        return "Every question fitted the model."
    each = ", ".join(f"{name} {number}" for name, number in cut.items())
    return f"Questions too long for the model, which lost their front: {each}."


def compared(found: pd.DataFrame) -> str:
    """What the tasks say.

    Args:
        found: of `evaluate.compare.compare`.
    """
    lines = [
        f"- `{row.task}`, {row.metric}: {row.base:.4f} → {row.tuned:.4f}, **{row.verdict}** "
        f"({row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}], {row.n:,} questions)"
        for row in found.itertuples()
    ]
    return "\n".join(["The tuned model against the one it came from:", "", *lines])


def compared_metrics(found: pd.DataFrame) -> dict[str, float]:
    """The numbers of `compared`."""
    numbers = {}
    for row in found.itertuples():
        numbers[f"{row.task}_{row.metric}_base"] = float(row.base)
        numbers[f"{row.task}_{row.metric}_tuned"] = float(row.tuned)
    return numbers


def compared_headline(found: pd.DataFrame) -> tuple[str, str]:
    """For the report's index."""
    row = found.iloc[0]
    name = row["task"] if row["task"] == row["metric"] else f"{row['task']}, {row['metric']}"
    return f"{name.replace('_', ' ')}, tuned minus base ({row['verdict']})", f"{row['difference']:+.3f}"


def whole(known: pd.DataFrame | None, gained: pd.DataFrame | None, follows: pd.DataFrame, found: pd.DataFrame) -> str:
    """The verdict on all four phases, in the order of the question.

    Args:
        known, gained: in the pool, of `judge.auroc` and of `judge.together`; None where the truth is not known.
        follows: of `judge.correlations`.
        found: of `duels`.
    """
    lines = []
    if known is not None and gained is not None:
        means = known[known["corruption"] == MEAN].set_index("score")
        own, literal, control = (_interval(means.loc[name]) for name in ("contrastive", "literal", "perplexity"))
        lines.append(
            f"**Does the router know trash?** AUROC {own} by `contrastive`, {literal} by the document's literal score, "
            f"{control} by perplexity alone (all kinds of corruption, most of which the warm-up knew; new text)."
        )
        for _, row in gained[(gained["corruption"] == MEAN) & (gained["over"] == "all kinds")].iterrows():
            clear = "better than" if row["low"] > 0 else "worse than" if row["high"] < 0 else "not clearly apart from"
            how = "as it is" if row["other"] == "perplexity" else "with the same calibration"
            lines[-1] += (
                f" Router and perplexity together are {clear} perplexity {how}: "
                f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]."
            )
    near = follows[(follows["score"] == "contrastive") & (follows["rows"] == "clean")]
    each = ", ".join(f"{row['spearman']:+.2f} with {_NAMES[row['with']]}" for _, row in near.iterrows())
    lines.append(f"**Is it something of its own?** On clean rows `contrastive` correlates {each}.")
    rivals = found[found["against"] != BASE]
    told = "; ".join(f"{row.against}: {row.verdict}" for row in rivals.itertuples())
    lines.append(f"**What is it worth?** Trained on the selection, against training on others: {told}.")
    return "\n\n".join(lines)


_NAMES = {"tokens": "length", "perplexity": "perplexity"}


def _interval(row: pd.Series) -> str:
    return f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _told(row: Any) -> str:
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def _row(found: pd.DataFrame, against: str) -> pd.Series:
    return found[found["against"] == against].iloc[0]
