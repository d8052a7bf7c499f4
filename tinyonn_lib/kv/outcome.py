"""What 10_kv found, in tables and words that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tinyonn_lib import evaluate
from tinyonn_lib.evaluate import Loss
from tinyonn_lib.kv import judge, recommend
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import LORA, OURS, OURS_CACHES, RIDGE, RIDGE_TRAINED, SHUFFLED, Contest, Texts
from tinyonn_lib.kv.document import document


def facts(models: dict[str, KVModel], texts: Texts) -> dict[str, Any]:
    """Whose caches, how wide, and of how much text."""
    found: dict[str, Any] = {}
    for name, model in models.items():
        size = model.widths
        found[f"cache of the {name}"] = (
            f"{size.layers} layers × {size.heads} KV head{'s' * (size.heads > 1)} × {size.head_dim} = {size.width} wide"
        )
    for name, caches in (("learn from", texts.train), ("choose by", texts.validation), ("judge on", texts.heldout)):
        found[f"texts to {name}"] = f"{len(caches):,} of {int(caches.mask.sum()):,} tokens"
    return found


def beside(measured: pd.DataFrame) -> pd.DataFrame:
    """The document's table and ours, line by line; each ratio by its configuration with the least validation loss.

    Args:
        measured: the table of `sweep.sweep`.
    """
    said = document().dropna(subset=["parameters"]).fillna({"mlp_ratio": 0}).set_index("mlp_ratio")
    rows = [
        {"document": said.loc[ratio, "configuration"], "parameters": said.loc[ratio, "parameters"],
         "steps": said.loc[ratio, "steps_to_target"], "loss": said.loc[ratio, "loss"],
         "measured": row["configuration"], "its parameters": int(row["parameters"]),
         "its steps": row["steps_to_target"], "its loss, held-out": row["heldout"], "nats per token": row["nll"]}
        for ratio, row in _best_of_ratio(measured).iterrows()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def costs(measured: pd.DataFrame) -> pd.DataFrame:
    """What these configurations cost: a step's time alone ÷ linear's (the document's says its own), memory, dead units.

    Args:
        measured: the table of `sweep.sweep`.
    """
    said = document().dropna(subset=["parameters"]).fillna({"mlp_ratio": 0}).set_index("mlp_ratio")
    rows = [
        {"measured": row["configuration"], "step time": row["slower"], "the document's": said.loc[ratio, "slower"],
         "memory to train, kB": row["memory"] / 1000, "dead units": row["dead_units"],
         "learning rate": row["lr"], "at an edge of those tried": "yes" if row["lr_at_edge"] else "no"}
        for ratio, row in _best_of_ratio(measured).iterrows()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _best_of_ratio(measured: pd.DataFrame) -> pd.DataFrame:
    """Ratio (0: linear) → the configuration with the least validation loss."""
    rows = measured.fillna({"mlp_ratio": 0}).reset_index(drop=True)
    return rows.loc[rows.groupby("mlp_ratio")["validation"].idxmin()].set_index("mlp_ratio")


def rule(measured: pd.DataFrame, teacher: KVModel) -> str:
    """What `recommend.recommended` says of this teacher, and what was measured of it."""
    told = recommend.recommended(max(1e6, teacher.model.num_parameters()))
    ratios = {"The rule's": told.mlp_ratio, "The document's": told.document}
    lines = [told.reason, *recommend.judged(measured, ratios).splitlines()]
    return "\n".join(f"- {line}" for line in lines)


def duels(ring: Contest) -> pd.DataFrame:
    """Loss of our best minus that of everybody else: `against, kind, difference, low, high, verdict`."""
    best = ring.best(["ours"])
    rows = []
    for label, kind in ring.kinds.items():
        if label != best:
            gap = ring.duel(best, label)
            rows.append((label, kind, gap.mean, gap.low, gap.high, gap.standing))
    return pd.DataFrame(rows, columns=["against", "kind", "difference", "low", "high", "verdict"])


def short(ring: Contest) -> pd.DataFrame:
    """The contest's table for reading."""
    table = ring.table().sort_values("nll")
    table["lr"] = table["lr"].where(table["lr"] > 0)
    return table[["cache", "kind", "nll", "perplexity", "closed", "parameters", "lr", "mse", "r2_keys", "r2_values"]]


def sources(ring: Contest) -> dict[str, judge.Source]:
    """Caches worth comparing after a single hand-over, the student's own first."""
    named = [OURS, OURS_CACHES, RIDGE, RIDGE_TRAINED, ring.best(["document"])]
    floors = {name: ring.floors[name] for name in (judge.OWN, judge.ZERO, SHUFFLED)}
    first, *last = floors.items()
    return dict([first, *((name, judge.projected(ring.projectors[name])) for name in named), *last])


def single(ring: Contest, losses: Mapping[str, Loss]) -> pd.DataFrame:
    """After one hand-over, over all tokens that follow: our best minus the others, `against, difference, low, high`.

    Args:
        losses: of `profile.by_distance`.
    """
    best = ring.best(["ours"])
    read = losses[best].tokens > 0
    groups = [source for source, there in zip(ring.texts.heldout.source, read, strict=True) if there]
    cut = {label: Loss(loss.nats[read], loss.tokens[read]) for label, loss in losses.items()}
    rows = []
    for label in cut:
        if label != best:
            gap = evaluate.paired([cut[best]], cut[label], groups, seed=ring.recipe.seed)
            rows.append((label, gap.mean, gap.low, gap.high, gap.standing))
    return pd.DataFrame(rows, columns=["against", "difference", "low", "high", "verdict"])


def _interval(low: float, high: float, form: str) -> str:
    """In brackets; nothing where too few sources leave it unknown."""
    return "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"


def collapse(table: pd.DataFrame) -> str:
    """What training the student along with the projector did.

    Args:
        table: of `alternatives.co_trained`.
    """
    lines = []
    for row in table.itertuples():
        what = "Frozen" if not row.lr_student else f"Trained along at {row.lr_student:g}"
        marks = [name for name, there in (("collapsed", row.collapsed), ("harmed", row.harmed)) if there]
        lines.append(
            f"- {what}: error of the caches {row.kv_error:.3f} of their variance, the student's own loss {row.own:.3f} "
            f"({row.own_change:+.3f}{_interval(row.low, row.high, '+.3f')}), spread of its cache × {row.spread:.2f}"
            + (f": **{', '.join(marks)}**" if marks else "")
        )
    return "\n".join(["A low error of the caches is no proof of anything if the student may move, too:", "", *lines])


def together(table: pd.DataFrame, names: Sequence[str]) -> str:
    """Whether two teachers say more than one.

    Args:
        table: of `second.together`.
        names: of the teachers.
    """
    nll = table.set_index("cache")["nll"]
    both = " and ".join(names)
    alone = {name: float(nll[name]) for name in names}
    best = min(alone, key=lambda name: alone[name])
    what = "less than" if nll[both] < alone[best] else "no less than"
    return (
        f"Together they cost the student {nll[both]:.4f} nats per token, {what} the better of them alone (`{best}`, "
        f"{alone[best]:.4f}); one training each, so a difference of a few thousandths says nothing."
    )


def verdict(ring: Contest, found: pd.DataFrame, once: pd.DataFrame) -> str:
    """What was learned.

    Args:
        found: of `duels`.
        once: of `single`.
    """
    table, rows = ring.table().set_index("cache"), found.set_index("against")
    best = ring.best(["ours"])
    own, ridge = table.loc[best], table.loc[RIDGE]
    lines = [
        f"Handed over at every token, the student pays **{own['nll']:.3f}** nats per token with `{best}`, "
        f"{table.loc[judge.OWN, 'nll']:.3f} with its own cache and {table.loc[judge.ZERO, 'nll']:.3f} with zeros: "
        f"**{own['closed']:.1%}**{_interval(own['closed_low'], own['closed_high'], '.1%')} of the gap is closed; ridge "
        f"alone closes {ridge['closed']:.1%}.",
        "",
    ]
    document = ring.best(["document"])
    for name in dict.fromkeys([RIDGE_TRAINED, RIDGE, "linear", document, judge.OWN, LORA]):
        if name in rows.index:
            size = f", {table.loc[name, 'parameters']:,} parameters" if table.loc[name, "parameters"] else ""
            lines.append(f"- against `{name}` ({rows.loc[name, 'kind']}{size}): {_line(rows.loc[name])}")
    lines += ["", "Handed over once, and then left alone:", ""]
    after = once.set_index("against")
    lines += [f"- against `{name}`: {_line(after.loc[name])}" for name in (RIDGE_TRAINED, RIDGE, judge.OWN)]
    lines += ["", (
        f"`{best}` has {own['parameters']:,} parameters. What is trained on the next token also learns habits of these "
        "texts; how much of that comes from the teacher was not separated."
    )]  # fmt: skip
    if len(ring.rates_tried) == 1:
        lines += ["", "Every projector was trained at one learning rate here; the benchmark tries three."]
    elif ring.edges:
        lines += ["", f"Best at an end of the rates tried: {', '.join(f'`{n}`' for n in sorted(ring.edges))}."]
    deepest = max(model.widths.layers for model in ring.texts.train.teachers.values())
    if ring.layers[RIDGE] < deepest:
        lines += ["", f"`{RIDGE}` reads {ring.layers[RIDGE]} of {deepest} layers: more are beyond a closed form."]
    return "\n".join(lines)


def _line(row: pd.Series) -> str:
    return f"**{row['verdict']}**, {row['difference']:+.4f}{_interval(row['low'], row['high'], '+.4f')}"


def metrics(ring: Contest, found: pd.DataFrame, once: pd.DataFrame) -> dict[str, float]:
    """The numbers of `verdict`."""
    table = ring.table().set_index("cache")
    best = ring.best(["ours"])
    numbers = {f"nll: {label}": float(row["nll"]) for label, row in table.iterrows()}
    numbers |= {f"best minus {row.against}": float(row.difference) for row in found.itertuples()}
    numbers |= {f"one hand-over, best minus {row.against}": float(row.difference) for row in once.itertuples()}
    return numbers | {"closed": float(table.loc[best, "closed"]), "parameters": float(table.loc[best, "parameters"])}


def headline(ring: Contest) -> tuple[str, str]:
    """For the report's index."""
    best = ring.best(["ours"])
    row = ring.table().set_index("cache").loc[best]
    return (
        "of the gap between no memory (zeros) and the student's own is closed by its teacher's",
        f"{row['closed']:.0%}",
    )
