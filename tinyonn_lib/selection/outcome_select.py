"""What 07_select found, in tables and words that follow from the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import judge
from tinyonn_lib.selection.cut import Cut
from tinyonn_lib.selection.scores import RANKINGS, SCORES
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import Selector

PLAIN = ("perplexity", "perplexity_fitted", "length", "longest", "random")
"""Rankings that need no router."""

FULL = 50_000
"""Rows at most, in random order, of the selection that stands for all data."""

MOST = 20_000
"""Rows that are judged at most: a fair sample of them says as much as all."""


def epoch_folder(folder: Path, epoch: int) -> str:
    """The name of 06_selector's folder of an epoch; 0: of its last one.

    Raises:
        BenchError: no such epoch.
    """
    found = sorted((path.name for path in folder.glob("epoch_*")), key=epoch_of)
    if not found or (epoch and f"epoch_{epoch}" not in found):
        raise BenchError(
            f"epoch={epoch}: 06_selector left {', '.join(found) or 'none'}; choose one, or 0 for the last."
        )
    return f"epoch_{epoch}" if epoch else found[-1]


def usable(selector: Selector, ranking: str, options: Mapping[str, Any]) -> Scorer:
    """What scores with this selector and these options, if that gives the ranking.

    Raises:
        BenchError: as `Scorer`, or it was calibrated with another share of trash experts, or not at all.
    """
    scorer = Scorer(selector, **options)
    ratio = options["ratio"]
    if ranking == "combined" and not (selector.combined and selector.about.get("ratio") == ratio):
        raise BenchError(
            f"score=combined needs a selector that was warmed up with trash_expert_ratio={ratio} (this one: "
            f"{selector.about.get('ratio', 'not warmed up')}): choose that ratio, or score=contrastive."
        )
    return scorer


def epoch_of(name: str) -> int:
    """The number of an epoch's folder; 0 if it is none."""
    number = Path(name).name.removeprefix("epoch_")
    return int(number) if number.isdigit() else 0


def with_truth(scores: Path, truth: pd.DataFrame | None) -> pd.DataFrame:
    """Scored rows, at most `MOST`: with `source`, what a bootstrap draws together, and `corruption`, "" if unknown.

    Args:
        scores: as `select.cut` leaves them.
        truth: the pool, in the order of its file.
    """
    table = pd.read_parquet(scores)
    table = table.sample(min(MOST, len(table)), random_state=0).sort_index().reset_index(drop=True)
    if truth is None:
        return table.assign(source=table["source_dataset"] + ":" + table["source_index"].astype(str), corruption="")
    known = truth.iloc[table["source_index"].to_numpy()]
    return table.assign(source=known["source"].to_numpy(), corruption=known["corruption"].to_numpy())


def rankings(table: pd.DataFrame) -> list[str]:
    """Those whose columns are there and hold numbers."""
    return [name for name, (column, _) in RANKINGS.items() if column in table and table[column].notna().any()]


def some(path: Path, count: int) -> pd.DataFrame:
    """The first rows of a selection; of one in random order a fair sample, whatever its size."""
    batches = pq.ParquetFile(path).iter_batches(batch_size=count)
    return next(batches).to_pandas()


def ends(rows: pd.DataFrame, ranking: str) -> dict[str, str]:
    """The two best and the two worst of some rows: place and score → text."""
    column, sign = RANKINGS[ranking]
    ordered = rows.dropna(subset=[column]).sort_values(column, ascending=sign < 0, kind="stable")
    ordered = ordered[["text", column]].reset_index(drop=True)
    places = [*range(min(2, len(ordered))), *range(max(2, len(ordered) - 2), len(ordered))]
    return {
        f"{place + 1} of {len(ordered)}, {ordered[column][place]:.3f}: ": ordered["text"][place] for place in places
    }


def full(done: Cut) -> float:
    """Share of the rows that stands for all of them: all, or as many as no training here will see twice."""
    return min(1.0, FULL / done.scored)


def counts(done: Cut) -> dict[str, Any]:
    """What became of the rows."""
    found: dict[str, Any] = {"rows scored": done.scored, "kept": done.kept}
    found |= {f"rejected, {reason}": number for reason, number in done.rejected.items()} or {"rejected": 0}
    if done.duplicates:
        found["left out as near-duplicates"] = done.duplicates
    return found


def selected(
    done: Cut, table: pd.DataFrame, follows: pd.DataFrame, shared: pd.DataFrame, ranking: str, share: float
) -> str:
    """What was learned.

    Args:
        done: of `select.cut`.
        table: of `with_truth`.
        follows: of `judge.correlations`.
        shared: of `judge.overlap`, with "selected" among the labels.
        ranking, share: what decided, and how much was kept.
    """
    lines = [
        f"{done.kept:,} of {done.scored:,} rows are kept, by `{ranking}`; "
        f"{sum(done.rejected.values()):,} were rejected."
    ]
    if (table["corruption"] != "").any():
        dirt = _dirt(table, share, ranking)
        plain = [name for name in PLAIN if name != ranking and name in dirt]
        beaten = [name for name in plain if dirt[ranking] < dirt[name]]
        better = [name for name in plain if dirt[ranking] > dirt[name]]
        lines.append(
            f"Of the kept rows **{dirt[ranking]:.1%}** are corrupted; of the pool "
            f"{(table['corruption'] != '').mean():.1%}. By other rankings: "
            + ", ".join(f"`{name}` {share:.1%}" for name, share in dirt.items() if name != ranking)
            + ". "
            + (
                f"It is cleaner than by {' and '.join(beaten)}."
                if beaten
                else "No ranking without a router is dirtier."
            )
            + (f" It is dirtier than by {' and '.join(better)}." if better else "")
        )
    about = follows[(follows["score"] == ranking) & (follows["rows"] == "clean")]
    told = ", ".join(
        f"{row['spearman']:+.2f} with {'length' if row['with'] == 'tokens' else 'perplexity'}"
        for _, row in about.iterrows()
    )
    if told:
        lines.append(
            f"Among {'clean ' if (table['corruption'] != '').any() else ''}rows its Spearman correlation is {told}."
        )
    pairs = _overlaps(shared)
    if len(pairs):
        each = ", ".join(f"{row.other} {row.jaccard:.2f}" for row in pairs.itertuples())
        lines.append(
            f"Overlap (Jaccard; chance {pairs['chance'].mean():.2f}) with other rankings, and of what "
            f"`{_base(shared)}` keeps with what other warm-ups and trash experts would: {each}."
        )
    return "\n\n".join(lines)


def selected_metrics(
    done: Cut, table: pd.DataFrame, follows: pd.DataFrame, shared: pd.DataFrame, ranking: str, share: float
) -> dict[str, float]:
    """The numbers of `selected`."""
    found: dict[str, float] = {"scored": done.scored, "kept": done.kept, "rejected": sum(done.rejected.values())}
    found["duplicates"] = done.duplicates
    if (table["corruption"] != "").any():
        found["corrupted_in_pool"] = float((table["corruption"] != "").mean())
        found |= {f"corrupted_by_{name}": value for name, value in _dirt(table, share, ranking).items()}
        found["corrupted_kept"] = found.pop(f"corrupted_by_{ranking}")
    about = follows[(follows["score"] == ranking) & (follows["rows"] == "clean")]
    found |= {f"spearman_{row['with']}": float(row["spearman"]) for _, row in about.iterrows()}
    return found | {
        f"overlap_{row.other.replace(' ', '_')}": float(row.jaccard) for row in _overlaps(shared).itertuples()
    }


def selected_headline(metrics: dict[str, float], done: Cut) -> tuple[str, str]:
    """For the report's index."""
    if "corrupted_kept" in metrics:
        return f"corrupted rows kept (pool {metrics['corrupted_in_pool']:.0%})", f"{metrics['corrupted_kept']:.1%}"
    return f"rows kept of {done.scored:,}", f"{done.kept:,}"


def _base(shared: pd.DataFrame) -> str:
    """By what other selectors are compared; see `stability.selections`."""
    return next((name for name in shared["one"].unique() if name in SCORES), "selected")


def _overlaps(shared: pd.DataFrame) -> pd.DataFrame:
    """Rankings next to the selection, other selectors next to what this one keeps by the same score."""
    base = _base(shared)
    one = shared["other"].map(lambda name: "selected" if name in RANKINGS else base)
    return shared[(shared["one"] == one) & (shared["other"] != shared["one"]) & (shared["other"] != "selected")]


def _dirt(table: pd.DataFrame, share: float, ranking: str) -> dict[str, float]:
    """Ranking → share of corrupted rows among the best."""
    names = [name for name in dict.fromkeys([ranking, *SCORES, *PLAIN]) if RANKINGS[name][0] in table]
    kept = judge.kept_share(table, names, share)
    clean = kept[kept["corruption"] == "clean"].set_index("score")["share"]
    return {name: float(1 - clean[name]) for name in names}
