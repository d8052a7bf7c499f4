"""What a selection depends on: the same rows chosen by other seeds, epochs and trash experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tinyonn_lib.progress import Progress
from tinyonn_lib.selection import judge
from tinyonn_lib.selection.ranking import wanted
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.scores import SCORES
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import load_selector

CONTRASTIVE = "contrastive"


def others(folder: Path, epoch: int) -> dict[str, Path]:
    """Selectors that 06_selector left beside the one of an epoch: label → folder.

    Args:
        folder: of the phase.
        epoch: the one that selects.
    """
    found = {f"epoch {path.name.removeprefix('epoch_')}": path for path in sorted(folder.glob("epoch_*"))}
    for path in sorted(folder.glob(f"seed_*/epoch_{epoch}")):
        found[f"seed {path.parent.name.removeprefix('seed_')}"] = path
    return {label: path for label, path in found.items() if label != f"epoch {epoch}"}


def selections(
    table: pd.DataFrame,
    texts: Sequence[str],
    ranking: str,
    share: float,
    *,
    main: Path,
    selectors: Mapping[str, Path],
    options: Mapping[str, Any],
    load: Mapping[str, Any],
    against: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, set[int]]:
    """Which of some rows would be kept: by the selector, with another trash set, by other selectors and rankings.

    Args:
        table: scores of the rows by the selector.
        texts: of the same rows.
        ranking: what decides. Selectors are compared by it if it is a router's score; a combination with perplexity
            would hide how they differ, so then by `CONTRASTIVE`.
        main: the selector's folder.
        selectors: label → folder of others.
        options: of `Scorer`, as the selector was used.
        load: of `load_selector`.
        against: other rankings, by the scores in `table`.

    Returns:
        Label → places of the kept rows.
    """
    count = wanted(share, len(table))

    def best(scored: pd.DataFrame, name: str) -> set[int]:
        order = pd.Series(judge.quality(scored, name), scored.index)
        order = order.sort_values(ascending=False, kind="stable", na_position="last")
        return set(order.index[:count].tolist())

    rows = [Row("some", place, text) for place, text in enumerate(texts)]
    table = table.reset_index(drop=True)
    found, own = {"selected": best(table, ranking)}, ranking if ranking in SCORES else CONTRASTIVE
    if ranking not in (*SCORES, "combined"):
        selectors, more = {}, {}  # it does not look at routers
    else:
        more = {"trash " + ("calibrated" if options["trash"] == "last" else "last"): main}
        found[own] = best(table, own)
    for number, (label, folder) in enumerate((more | dict(selectors)).items(), start=1):
        trash = label.removeprefix("trash ") if label in more else options["trash"]
        scored, _ = Scorer(load_selector(folder, **load), **{**options, "trash": trash}, baselines=False)(rows)
        found[label] = best(scored.set_index("source_index"), own)  # a row may be left out
        if progress is not None:
            progress(number, len(more) + len(selectors), label)
    return found | {name: best(table, name) for name in against if name not in (*found, ranking)}
