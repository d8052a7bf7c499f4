"""Base against tuned on the same questions, with intervals, and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate.losses import MIN_GROUPS, Loss, paired
from tinyonn_lib.evaluate.outcome import Outcome

VERDICTS = ("better", "worse", "no clear difference", "too few groups")
_SAME = ["task", "parent", "doc_id", "metric", "weight", "group", "better", "prompt", "target"]
_PACKAGES = ("lm_eval", "datasets", "torch", "transformers")


def compare(base: Outcome, tuned: Outcome, seed: int = 0) -> pd.DataFrame:
    """What tuning changed, by a paired bootstrap over groups of documents.

    Args:
        base: the model as it was.
        tuned: the changed one, asked exactly the same.
        seed: of the bootstrap.

    Returns:
        One row per task and metric, then per benchmark of several tasks (such as mmlu, every question alike): `task,
        metric, base, tuned, difference` (tuned minus base), its 95 % interval `low, high` (NaN with fewer than eight
        groups), `groups, n, better` ("higher" or "lower") and `verdict`, one of `VERDICTS`, about the tuned one.

    Raises:
        BenchError: the two were not asked the same.
    """
    one, two = base.samples, tuned.samples
    if not one[_SAME].equals(two[_SAME]):
        raise BenchError("Base and tuned were not asked the same questions: run both with the same tasks and limit.")
    rows = []
    for level in ("task", "parent"):
        for (name, metric), each in one[one[level] != ""].groupby([level, "metric"], sort=False):
            weight = each["weight"].to_numpy()
            before, after = (Loss(side["value"][each.index].to_numpy() * weight, weight) for side in (one, two))
            gap = paired([after], before, each["group"].tolist(), seed=seed)
            up = each["better"].iloc[0] == "higher"
            if gap.groups < MIN_GROUPS:
                verdict = "too few groups"
            elif gap.low > 0 or gap.high < 0:
                verdict = "better" if (gap.mean > 0) == up else "worse"
            else:
                verdict = "no clear difference"
            rows.append({"task": name, "metric": metric, "base": before.mean, "tuned": after.mean,
                         "difference": gap.mean, "low": gap.low, "high": gap.high, "groups": gap.groups,
                         "n": len(each), "better": each["better"].iloc[0], "verdict": verdict})  # fmt: skip
    return pd.DataFrame(rows)


def write(folder: str | Path, outcomes: Mapping[str, Outcome], comparison: pd.DataFrame | None = None) -> list[Path]:
    """Write results.json (numbers, versions, hashes of the tasks) and samples.parquet (every answer).

    The same numbers give the same bytes: no clock and no path is in them.

    Args:
        outcomes: a name, such as "base" or "tuned", to what that model scored.
        comparison: of `compare`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "versions": {name: version(name) for name in _PACKAGES},
        "tasks": {name: outcome.tasks for name, outcome in outcomes.items()},
        "scores": {name: _records(outcome.scores) for name, outcome in outcomes.items()},
        "comparison": [] if comparison is None else _records(comparison),
    }
    results, samples = folder / "results.json", folder / "samples.parquet"
    results.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    every = [outcome.samples.assign(model=name) for name, outcome in outcomes.items()]
    pd.concat(every, ignore_index=True).to_parquet(samples, index=False)
    return [results, samples]


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()}
        for row in table.to_dict("records")
    ]
