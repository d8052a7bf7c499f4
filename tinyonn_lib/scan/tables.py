"""Totals in, tables out: the one place where sums become means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tinyonn_lib.scan.statistics import ACTIVITY, COUNTERS, KINDS, Totals

COLUMNS: tuple[str, ...] = (
    "layer", "neuron", "tokens", "samples", "act", "act_mean", "act_sq", "freq",
    "grad_gate", "grad_up", "grad_down", "grad", "saliency",
)  # fmt: skip


def neurons_table(totals: Totals) -> pd.DataFrame:
    """One row per FFN neuron, columns exactly `COLUMNS`.

    Returns:
        `layer, neuron` (int64), `tokens, samples` (int64, of that layer), `act` mean |h|, `act_mean` mean h,
        `act_sq` mean h^2 (each per token), `freq` share of tokens on which the neuron is in the layer's top
        rho, `grad_gate, grad_up, grad_down` mean per sample of the norms of the neuron's gate row, up row and
        down column of the weight gradient, `grad` mean per sample of their joint norm, `saliency` mean per
        token of |h * dL/dh|. Where nothing was counted the mean is NaN, never a silent zero.
    """
    per = {
        "act": ("abs_h", "tokens"),
        "act_mean": ("h", "tokens"),
        "act_sq": ("h_sq", "tokens"),
        "freq": ("top", "tokens"),
        "grad_gate": ("grad_gate", "grad_samples"),
        "grad_up": ("grad_up", "grad_samples"),
        "grad_down": ("grad_down", "grad_samples"),
        "grad": ("grad", "grad_samples"),
        "saliency": ("saliency", "grad_tokens"),
    }
    frames = []
    for number, target in enumerate(totals.layout.targets):
        if target.kind == "neurons":
            columns = _identity(totals, number, "neuron")
            columns |= {name: _mean(totals, number, *what) for name, what in per.items()}
            frames.append(columns)
    return _frame(frames, COLUMNS)


def halves_table(halves: Sequence[Totals]) -> pd.DataFrame:
    """`neurons_table` of each half of the samples (`Store.halves`), `half` 0 and 1; no rows when there are none."""
    frames = [neurons_table(totals).assign(half=number) for number, totals in enumerate(halves)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*COLUMNS, "half"])


def units_table(totals: Totals) -> pd.DataFrame:
    """One row per unit of every target that keeps rows: neurons, outputs of a linear, token ids, experts.

    Returns:
        `target, kind, layer, row, tokens, samples`, `act` (mean per token of |h| or |y|; of occurrences for a token
        id; of the routing weight for an expert), `freq` (share of tokens on which the unit is in its target's top rho;
        is read; is routed to), `grad` (mean per sample of the norm of the unit's weight gradient). NaN where nothing
        was counted.
    """
    frames = []
    for number, target in enumerate(totals.layout.targets):
        act, freq, grad = ACTIVITY[target.kind]
        columns: dict[str, Any] = {"target": np.full(target.rows, target.name, dtype=object)}
        columns |= {"kind": np.full(target.rows, target.kind, dtype=object)} | _identity(totals, number, "row")
        columns |= {"act": _mean(totals, number, act, "tokens"), "freq": _mean(totals, number, freq, "tokens")}
        frames.append(columns | {"grad": _mean(totals, number, grad, "grad_samples")})
    return _frame(frames, ("target", "kind", "layer", "row", "tokens", "samples", "act", "freq", "grad"))


def tensors_table(totals: Totals) -> pd.DataFrame:
    """One row per target, norms of whole tensors.

    Returns:
        `target, module` (last part of the name), `kind, layer, tokens, samples, grad_samples`, `act_norm` (mean per
        sample of the Frobenius norm of the module's input; for an embedding of the one-hot input), `grad_norm` (mean
        per sample of the norm of the gradient of all its weights). NaN where nothing was counted.
    """
    rows = []
    for target, counts, norms in zip(totals.layout.targets, totals.counts, totals.norms, strict=True):
        count = dict(zip(COUNTERS, counts, strict=True))
        rows.append(
            {
                "target": target.name, "module": target.name.rpartition(".")[2], "kind": target.kind,
                "layer": target.layer, "tokens": int(count["tokens"]), "samples": int(count["samples"]),
                "grad_samples": int(count["grad_samples"]),
                "act_norm": norms[0] / count["samples"] if count["samples"] else math.nan,
                "grad_norm": norms[1] / count["grad_samples"] if count["grad_samples"] else math.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def layer_ranks(neurons: pd.DataFrame, one: str, other: str) -> pd.Series:
    """Spearman correlation of two columns within each layer; pooled, differences between layers would hide it."""
    return pd.Series({layer: rows[one].corr(rows[other], "spearman") for layer, rows in neurons.groupby("layer")})


def _identity(totals: Totals, number: int, row: str) -> dict[str, np.ndarray]:
    target, counts = totals.layout.targets[number], totals.counts[number]
    return {
        "layer": np.full(target.rows, target.layer, dtype=np.int64),
        row: np.arange(target.rows, dtype=np.int64),
        "tokens": np.full(target.rows, int(counts[0]), dtype=np.int64),
        "samples": np.full(target.rows, int(counts[1]), dtype=np.int64),
    }


def _mean(totals: Totals, number: int, statistic: str, counter: str) -> np.ndarray:
    target = totals.layout.targets[number]
    count = totals.counts[number, COUNTERS.index(counter)]
    values = totals.sums[number][KINDS[target.kind].index(statistic)]
    return np.asarray(values / count) if count else np.full(target.rows, math.nan)


def _frame(parts: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame({name: np.concatenate([part[name] for part in parts]) if parts else [] for name in columns})
