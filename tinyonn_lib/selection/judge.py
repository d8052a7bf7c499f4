"""What a score is worth: tables from scored rows whose corruption is known.

Every table with intervals draws whole groups (source files), since texts of one file are not independent, and draws
the same ones for every score, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.bootstrap import Array, Weights, below, intervals, spearman
from tinyonn_lib.selection.ranking import wanted
from tinyonn_lib.selection.scores import RANKINGS, SCORES

if TYPE_CHECKING:
    from tinyonn_lib.selection.rows import Row
    from tinyonn_lib.selection.selector import Selector

COMBINED = ("contrastive", "log_mass")
"""Router scores that go together with perplexity."""

MEAN = "mean"
"""The row of a table that is the mean over its corruptions."""

UNSEEN = "unseen"
"""Corruptions that no warm-up saw."""


def quality(table: pd.DataFrame, name: str) -> Array:
    """A ranking's score of every row, greater is better.

    Raises:
        BenchError: an unknown ranking, or one whose column the table lacks.
    """
    if name not in RANKINGS:
        raise BenchError(f"Unknown ranking '{name}'. Known: {', '.join(RANKINGS)}.")
    column, sign = RANKINGS[name]
    if column not in table:
        raise BenchError(f"Ranking '{name}' needs the column '{column}', which was not scored: leave it out.")
    return sign * table[column].to_numpy(np.float64)


def auroc(
    table: pd.DataFrame, names: Sequence[str], *, groups: Sequence[Any], draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How often a clean row is ranked above a corrupted one (ties half): 1 always, 0.5 as often as by chance.

    Args:
        table: columns of the rankings and `corruption`, "" for a clean row.
        names: keys of `RANKINGS`.
        groups: what each row is drawn with, such as its source file.

    Returns:
        `score, corruption, auroc, low, high, n`: 95 % intervals, NaN for fewer than `MIN_GROUPS` groups; `n` rows that
        have the score. Last of each score is the mean over corruptions.

    Raises:
        BenchError: an unknown score; no clean or no corrupted row.
    """
    weights = Weights(groups, draws, seed)
    found = []
    for name in names:
        kinds, values, counts = aurocs_by_draw(table, [quality(table, name)], weights)
        found.append(intervals(values[0], weights, "auroc").assign(score=name, corruption=kinds, n=counts))
    return pd.concat(found, ignore_index=True)[["score", "corruption", "auroc", "low", "high", "n"]]


def auroc_difference(
    table: pd.DataFrame, one: str, other: str, *, groups: Sequence[Any], draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """AUROC of one ranking minus another's on the same rows and draws.

    Returns:
        `one, other, corruption, difference, low, high, n`; otherwise as `auroc`.
    """
    weights = Weights(groups, draws, seed)
    kinds, values, counts = aurocs_by_draw(table, [quality(table, one), quality(table, other)], weights)
    found = intervals(values[0] - values[1], weights, "difference").assign(corruption=kinds, n=counts)
    return found.assign(one=one, other=other)[["one", "other", "corruption", "difference", "low", "high", "n"]]


def together(table: pd.DataFrame, learned: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """AUROC of `combined` minus that of perplexity alone, as it is and with the same calibration: `auroc_difference`.

    Args:
        table: known rows, with the column `source`, by which they are drawn.
        learned: corruptions that the warm-up saw.

    Returns:
        With `over`: "all kinds", and "unseen" where some were not learned.
    """
    unseen = table[table["corruption"].isin(["", *(set(table["corruption"]) - set(learned))])]
    tables = {"all kinds": table} | ({UNSEEN: unseen} if (unseen["corruption"] != "").any() else {})
    return pd.concat(
        [
            auroc_difference(rows, "combined", other, groups=rows["source"], seed=seed).assign(over=name)
            for name, rows in tables.items()
            for other in ("perplexity", "perplexity_fitted")
        ],
        ignore_index=True,
    )


def combine(table: pd.DataFrame, names: Sequence[str] = COMBINED) -> dict[str, float]:
    """Log odds that a row is clean, from scores and perplexity: a logistic regression on known corruption.

    Perplexity enters with its square: text is suspect when it is too likely, too. Without `names` it is perplexity
    alone with the same calibration: what router scores have to add to. Rows without a finite value are left out.

    Args:
        table: the columns `names`, `perplexity` and `corruption`; of calibration text, never of what is judged.

    Returns:
        For raw values: a coefficient for each of `names`, `log_perplexity`, `log_perplexity_squared` and `intercept`.

    Raises:
        BenchError: clean and corrupted rows are not both there.
    """
    from sklearn.linear_model import LogisticRegression

    likely = np.log(table["perplexity"].to_numpy(np.float64))
    values = np.stack([*(table[name].to_numpy(np.float64) for name in names), likely, likely**2], 1)
    known = np.isfinite(values).all(1)
    values, clean = values[known], (table["corruption"] == "").to_numpy()[known]
    if clean.all() or not clean.any():
        raise BenchError("Combining scores needs clean and corrupted calibration rows: name corruptions.")
    centre, spread = values.mean(0), values.std(0)
    spread[spread == 0] = 1
    fit = LogisticRegression().fit((values - centre) / spread, clean)
    slope = fit.coef_[0] / spread
    told = (*names, "log_perplexity", "log_perplexity_squared", "intercept")
    return dict(zip(told, [*slope.tolist(), float(fit.intercept_[0] - slope @ centre)], strict=True))


def correlations(
    table: pd.DataFrame, names: Sequence[str], *, groups: Sequence[Any], draws: int = 400, seed: int = 0
) -> pd.DataFrame:
    """Whether a ranking is length or perplexity by another name: Spearman correlations with both.

    Returns:
        `score, with` (tokens or perplexity), `rows` (all or clean), `spearman, low, high, n`. A ranking is not
        compared with its own column.
    """
    found = []
    codes = np.asarray(pd.factorize(np.asarray(groups, dtype=str))[0])
    for rows, chosen in (("all", np.full(len(table), True)), ("clean", (table["corruption"] == "").to_numpy())):
        for name, column in product(names, ("tokens", "perplexity")):
            score, value = quality(table, name), table[column].to_numpy(np.float64)
            kept = chosen & ~np.isnan(score) & ~np.isnan(value)
            if RANKINGS[name][0] == column or not kept.any():
                continue
            weights = Weights(codes[kept], draws, seed)
            values = np.concatenate([spearman(score[kept], value[kept], each) for each in weights])
            line = intervals(values[:, None], weights, "spearman")
            found.append(line.assign(**{"score": name, "with": column, "rows": rows, "n": int(kept.sum())}))
    return pd.concat(found, ignore_index=True)[["score", "with", "rows", "spearman", "low", "high", "n"]]


def overlap(selections: Mapping[str, Set[Hashable]], pool: int) -> pd.DataFrame:
    """How much two selections share.

    Args:
        selections: label → rows, such as (source_dataset, source_index).
        pool: rows that were chosen from.

    Returns:
        `one, other, shared, jaccard, chance`, every pair in both orders: shared rows, their part of the union, and what
        that would be if as many as expected by chance, |A|·|B| / pool, were shared (NaN for a selection with itself).
    """
    rows = []
    for (one, a), (other, b) in product(selections.items(), repeat=2):
        shared, chance = len(a & b), len(a) * len(b) / pool
        rows.append(
            {
                "one": one, "other": other, "shared": shared, "jaccard": _part(shared, len(a) + len(b) - shared),
                "chance": np.nan if one == other else _part(chance, len(a) + len(b) - chance),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def kept_share(table: pd.DataFrame, names: Sequence[str], share: float) -> pd.DataFrame:
    """What the top share of the rows by each ranking is made of.

    Rows without the score come last; ties stay in the table's order.

    Returns:
        `score, corruption` ("clean" or the kind), `rows, share` of the rows chosen, `pool` (share in the whole table).
        The share of "clean" is the selection's precision.
    """
    kinds = table["corruption"].where(table["corruption"] != "", "clean")
    labels = ["clean", *sorted(set(kinds) - {"clean"})]
    whole = kinds.value_counts(normalize=True).reindex(labels, fill_value=0)
    found = []
    for name in names:
        best = np.argsort(-quality(table, name), kind="stable")[: wanted(share, len(table))]  # NaN is last
        rows = kinds.iloc[best].value_counts().reindex(labels, fill_value=0)
        line = {"score": name, "corruption": labels, "rows": rows, "share": rows / len(best), "pool": whole}
        found.append(pd.DataFrame(line))
    return pd.concat(found, ignore_index=True)


def gauge(
    selector: Selector, rows: Sequence[Row], *, seed: int, size: float = 1.0, scorer_options: Mapping[str, Any]
) -> pd.DataFrame:
    """Whether a score is a property of the model: rank correlation with itself after a change of gauge.

    One random vector is added to all rows of each router, `size` times as long as its rows are on average. Softmax
    gates do not notice; a score that does has ranked texts by something the model does not use (ERRATA 001).
    Sigmoid gates notice, and perplexity then says how much.

    Args:
        scorer_options: of `scoring.Scorer`.

    Returns:
        `score, spearman`; of perplexity, too.
    """
    import torch

    from tinyonn_lib.selection.routers import routers, shifted
    from tinyonn_lib.selection.scoring import Scorer

    scorer = Scorer(selector, **scorer_options)
    weights = [layer.weight.detach().float().cpu() for layer in routers(selector.model)]
    norms = torch.stack([weight.norm(dim=1).mean() for weight in weights])[:, None]
    vector = torch.randn(len(weights), weights[0].shape[1], generator=torch.Generator().manual_seed(seed))
    vector *= size * norms / vector.norm(dim=1, keepdim=True)
    before, _ = scorer(rows)
    with shifted(selector.model, vector):
        after, _ = scorer(rows)
    names = [name for name in (*SCORES, "combined", "perplexity") if name in before]
    return pd.DataFrame({"score": names, "spearman": [before[name].corr(after[name], "spearman") for name in names]})


def _part(shared: float, union: float) -> float:
    return shared / union if union else np.nan


def aurocs_by_draw(
    table: pd.DataFrame, scores: Sequence[Array], weights: Weights
) -> tuple[list[str], list[Array], list[int]]:
    """Kinds of corruption and at last their mean, AUROCs of every score `(1 + draws, kinds)`, rows compared of each.

    Tables whose rows have the same groups in the same order share their draws: what is averaged over them is paired.
    """
    corruption = table["corruption"].to_numpy()
    known = ~np.isnan(np.stack(scores)).any(0)
    clean, bad = known & (corruption == ""), known & (corruption != "")
    kinds = sorted(set(corruption) - {""})
    if not kinds or not (corruption == "").any():
        raise BenchError("An AUROC needs clean and corrupted rows: choose a share of corrupted rows between 0 and 1.")
    member = np.stack([corruption[bad] == kind for kind in kinds], 1).astype(np.float64)
    found: list[list[Array]] = [[] for _ in scores]
    for drawn in weights:
        of_clean, of_bad = drawn[clean], drawn[bad]
        everything = of_clean.sum(0)
        pairs = everything * (member.T @ of_bad)
        for score, parts in zip(scores, found, strict=True):
            above = everything - below(score[bad], score[clean], of_clean)
            with np.errstate(all="ignore"):  # a draw without a kind has no AUROC
                each = (member.T @ (of_bad * above) / pairs).T
            parts.append(np.concatenate([each, each.mean(1, keepdims=True)], 1))
    counts = [int(clean.sum() + each) for each in member.sum(0)]
    return [*kinds, MEAN], [np.concatenate(parts) for parts in found], [*counts, int(known.sum())]
