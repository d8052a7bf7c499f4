"""The experiment log of document 003, written for every configuration from what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tinyonn_lib.errors import BenchError

FACTORS = ("mlp_ratio", "layernorm", "activation", "init")


def write_logs(folder: Path, table: pd.DataFrame, *, teacher: str, student: str, date: str | None = None) -> list[Path]:
    """One YAML file per row of a table of `sweep`, with the document's keys (003, §Experiment log template).

    Numbers are numbers, and null where there is none: `params` is 34100000, not "34.1M", `reduction` 0.993, not
    "99.3%". Step times are left out, so that two runs write the same.

    Args:
        teacher, student: names; date: day of the experiment.

    Returns:
        The files.

    Raises:
        BenchError: the folder cannot be written.
    """
    paths = []
    for row in table.to_dict("records"):
        name = _name(row)
        experiment = {"name": name} | ({"date": date} if date else {})
        content = {"experiment": experiment, "model": {"teacher": teacher, "student": student}, **_measured(row)}
        text = yaml.safe_dump(content | {"notes": notes(table, row)}, sort_keys=False, allow_unicode=True, width=120)
        paths.append(Path(folder) / f"{name}.yaml")
        try:
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            paths[-1].write_text(text, encoding="utf-8")
        except OSError as error:
            raise BenchError(
                f"Cannot write {paths[-1]}: {error.strerror}. Free space or choose another folder."
            ) from error
    return paths


def notes(table: pd.DataFrame, row: dict[str, Any]) -> list[str]:
    """What the measurements say of one configuration: beside linear, and beside those that differ in one thing."""
    found = []
    linear = table[table["kind"] == "linear"]
    if row["kind"] != "linear" and len(linear):
        other = linear.loc[linear["validation"].idxmin()]
        found.append(
            f"Held-out loss {row['heldout']:.4g} against {other['heldout']:.4g} of linear, "
            f"{row['parameters'] / other['parameters']:.2g} times its parameters; the student's loss {row['nll']:.4f} "
            f"against {other['nll']:.4f} nats."
        )
    for factor in FACTORS if row["kind"] != "linear" else ():
        same = table[table["kind"] == row["kind"]]
        for fixed in FACTORS:
            same = same[same[fixed] == row[fixed]] if fixed != factor else same
        if len(same) > 1:
            losses = ", ".join(f"{_word(factor, one[factor])} {one['heldout']:.4g}" for _, one in same.iterrows())
            found.append(f"All else equal: {losses}{_against_spread(same)}.")
    if row["lr_at_edge"]:
        found.append(
            f"The best learning rate, {row['lr']:g}, is at the edge of those tried: a better one may lie beyond."
        )
    if math.isnan(row["steps_to_target"]):
        found.append(f"Did not reach the target loss in {row['steps']} steps.")
    if row["dead_units"] > 0:
        found.append(f"{row['dead_units']:.1%} of the hidden units are never on.")
    return found


def _against_spread(same: pd.DataFrame) -> str:
    spread = float(same["heldout_spread"].max())
    if math.isnan(spread):
        return " (one seed)"
    within = same["heldout"].max() - same["heldout"].min() <= 2 * spread
    return f" ({'within' if within else 'beyond'} twice the spread over seeds, {spread:.2g})"


def _word(factor: str, value: Any) -> str:
    if factor == "mlp_ratio":
        return f"{value:g}×"
    return ("LayerNorm" if value else "no LayerNorm") if factor == "layernorm" else str(value)


def _name(row: dict[str, Any]) -> str:
    if row["kind"] == "linear":
        return f"linear_{row['init']}"
    norm = "layernorm" if row["layernorm"] else "no_layernorm"
    return f"{row['kind']}_{row['mlp_ratio']:g}x_{norm}_{row['activation']}_{row['init']}"


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, dict[str, str]] = {
        "projector": {
            "kind": "kind", "mlp_ratio": "mlp_ratio", "dropout": "dropout", "init_method": "init",
            "layernorm": "layernorm", "activation": "activation", "params": "parameters",
        },
        "training": {"learning_rate": "lr", "batch_size": "batch", "steps": "steps", "seeds": "seeds"},
        "results": {
            "initial_loss": "initial_loss", "final_loss": "validation", "reduction": "reduction",
            "convergence_step": "steps_to_target", "heldout_loss": "heldout", "heldout_spread": "heldout_spread",
            "student_nll": "nll", "dead_units": "dead_units", "memory_bytes": "memory",
        },
    }  # fmt: skip
    reached = None if math.isnan(row["steps_to_target"]) else int(row["steps_to_target"])
    row = row | {"reduction": 1 - row["validation"] / row["initial_loss"], "steps_to_target": reached}
    return {part: {key: _plain(row[column]) for key, column in each.items()} for part, each in keys.items()}


def _plain(value: Any) -> Any:
    """As YAML knows it; six digits of a number."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value
