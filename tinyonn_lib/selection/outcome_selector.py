"""What 06_selector found, in tables and words that follow from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from tinyonn_lib.selection import judge

LEARNED, UNSEEN = "learned", judge.UNSEEN
BEFORE = ", before"
"""Behind the name of a score by routers that were not warmed up."""

ROUTERS = ("literal", "centred", "log_mass", "contrastive")
AFTER = (*ROUTERS, "combined", "perplexity", "perplexity_fitted", "length", "longest", "random")


def aurocs(before: pd.DataFrame, after: pd.DataFrame, learned: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """AUROC per corruption, and the means over those that were learned and those that were not.

    Args:
        before, after: the same known rows (`known.scored`) by the routers as they were and after the warm-up.
        learned: corruptions that the warm-up saw.

    Returns:
        As `judge.auroc`, `score` marked for the rows of `before`, and with means over "learned" and "unseen" kinds
        besides the one over all; none where there is no such kind.
    """
    found = []
    for table, names, mark in (
        (before, ROUTERS, BEFORE),
        (after, [n for n in AFTER if n in after or n not in ("combined", "perplexity_fitted")], ""),
    ):
        kinds = set(table["corruption"]) - {""}
        each = judge.auroc(table, names, groups=table["source"], seed=seed)
        parts = [each]
        for name, group in ((LEARNED, kinds & set(learned)), (UNSEEN, kinds - set(learned))):
            if group:
                rows = table[table["corruption"].isin(["", *group])]
                mean = judge.auroc(rows, names, groups=rows["source"], seed=seed)
                parts.append(mean[mean["corruption"] == judge.MEAN].assign(corruption=name))
        found += [part.assign(score=part["score"] + mark) for part in parts]
    return pd.concat(found, ignore_index=True)


def warmed(found: pd.DataFrame, gained: pd.DataFrame, gauge: pd.DataFrame, losses: Sequence[float]) -> str:
    """What 06_selector learned.

    Args:
        found: of `aurocs`.
        gained: of `judge.together`.
        gauge: of `judge.gauge`.
        losses: nats per token of the MoE on clean text, before and after.
    """
    over = UNSEEN if (found["corruption"] == UNSEEN).any() else LEARNED
    told = over if over == UNSEEN else "learned (none was left unseen)"
    names = (f"contrastive{BEFORE}", "contrastive", "log_mass", "literal", "perplexity")
    start, own, mass, literal, control = (_at(found, name, over) for name in names)
    apart = "beats" if own["low"] > control["high"] else "is clearly below" if own["high"] < control["low"] else ""
    lines = [
        f"On corruptions that were {told}, the contrastive score tells clean from corrupted text with an AUROC of "
        f"**{_told(own)}**; before the warm-up {_told(start)}. `log_mass` has {_told(mass)}, the literal score "
        f"{_told(literal)}. The contrastive score {apart or 'is not clearly apart from'} perplexity, {_told(control)}."
    ]
    mean = gained[(gained["corruption"] == judge.MEAN) & (gained["over"] == (over if over == UNSEEN else "all kinds"))]
    for _, row in mean.iterrows():
        verdict = "better than" if row["low"] > 0 else "worse than" if row["high"] < 0 else "not clearly apart from"
        how = "alone" if row["other"] == "perplexity" else "with the same calibration"
        lines.append(
            f"Together with perplexity (weights from calibration text) it is {verdict} perplexity {how} there: "
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]."
        )
    same = dict(zip(gauge["score"], gauge["spearman"], strict=True))
    lines.append(
        "With one vector added to all rows of the routers, the ranking by `literal` has a Spearman correlation of "
        f"{same['literal']:.3f} with itself; `centred` {same['centred']:.4f}, `log_mass` {same['log_mass']:.4f}, "
        f"`contrastive` {same['contrastive']:.4f}."
    )
    lines.append(
        f"{'The price: the' if losses[1] > losses[0] else 'The'} model's own loss on clean text went from "
        f"{losses[0]:.3f} to {losses[1]:.3f} nats per token."
    )
    return "\n\n".join(lines)


def warmed_metrics(
    found: pd.DataFrame, gained: pd.DataFrame, gauge: pd.DataFrame, losses: Sequence[float]
) -> dict[str, float]:
    """The numbers of `warmed`."""
    metrics = {
        f"auroc_{name}_{over}".replace(BEFORE, "_before"): float(_at(found, name, over)["auroc"])
        for over in (LEARNED, UNSEEN)
        for name in (f"contrastive{BEFORE}", "literal", "log_mass", "contrastive", "combined", "perplexity")
        if ((found["score"] == name) & (found["corruption"] == over)).any()
    }
    metrics |= {f"gauge_{row.score}": float(row.spearman) for row in gauge.itertuples()}
    mean = gained[gained["corruption"] == judge.MEAN]
    metrics |= {
        f"combined_minus_{row.other}_{row.over.replace(' ', '_')}": float(row.difference) for row in mean.itertuples()
    }
    return metrics | {"nll_before": losses[0], "nll_after": losses[1]}


def warmed_headline(metrics: Mapping[str, float]) -> tuple[str, str]:
    """For the report's index."""
    over = UNSEEN if f"auroc_contrastive_{UNSEEN}" in metrics else LEARNED
    label = f"AUROC on {over} corruption (before {metrics[f'auroc_contrastive_before_{over}']:.2f})"
    return label, f"{metrics[f'auroc_contrastive_{over}']:.2f}"


def _at(found: pd.DataFrame, score: str, corruption: str) -> pd.Series:
    return found[(found["score"] == score) & (found["corruption"] == corruption)].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
