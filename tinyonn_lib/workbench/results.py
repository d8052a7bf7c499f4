"""What the benchmarks of the README measured, as tables: for reports that do not measure it again."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench.phases import ROOT


def published(benchmark: str) -> dict[str, pd.DataFrame]:
    """The rows of `benchmarks/results/<benchmark>.json` by their `kind`; null is NaN.

    Raises:
        BenchError: there is no such result.
    """
    path = ROOT / "benchmarks" / "results" / f"{benchmark}.json"
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in json.loads(path.read_text("utf-8"))["rows"]:
            rows = found.setdefault(row["kind"], [])
            rows.append({name: math.nan if value is None else value for name, value in row.items() if name != "kind"})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"{path} cannot be read ({error}): run python benchmarks/{benchmark}.py --json {path}"
        ) from None
    return {kind: pd.DataFrame(rows) for kind, rows in found.items()}
