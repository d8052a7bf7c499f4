"""ΔSC from the rows of an `.mscan` file: how active a step was against how hard it pulled at the weights.

Definition (ERRATA 004, last row): ΔSC is the S_p of a step, `z(log activation norm) - z(log gradient norm)`, and ∫ΔSC
its sum over the steps of a sequence. z is taken per target over the steps of the table: norms of different weights
have different scales, and only a comparison of a weight with itself says something about the step.

Input norms grow with the square root of the tokens. Where steps differ much in length ΔSC sees mostly that; compare per
token then: `delta_sc(table.assign(act=table["act"] / table["tokens"] ** 0.5))`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.lognorm import RELATIVE_ERROR


def delta_sc(table: pd.DataFrame) -> pd.DataFrame:
    """ΔSC of every step and target.

    Args:
        table: rows as `mscan.read` gives them.

    Returns:
        `step, sequence, tokens, target, kind, layer, z_act, z_grad, delta_sc`, rows as in `table`. NaN where either
        norm is 0 or was not measured (its logarithm says nothing), and for targets with fewer than two measured steps;
        those rows take no part in the means either. A norm that varies over the steps by less than the coding's error
        has z = 0, as a constant feature has in S_p.
    """
    table = table.reset_index(drop=True)
    measured = table[(table["act"] > 0) & (table["grad"] > 0)]
    which = measured.groupby(["target", "kind"], observed=True).ngroup()
    result = table[["step", "sequence", "tokens", "target", "kind", "layer"]].copy()
    for norm in ("act", "grad"):
        result[f"z_{norm}"] = _zscore(np.log(measured[norm]), which).reindex(table.index)
    return result.assign(delta_sc=result["z_act"] - result["z_grad"])


def running(delta: pd.DataFrame) -> pd.DataFrame:
    """ΔSC of every step, and ∫ΔSC up to it.

    Args:
        delta: rows as `delta_sc` gives them.

    Returns:
        One row per sequence and step, in that order: `sequence, step, tokens, targets` (with a ΔSC in this step),
        `delta_sc` (mean over these targets, NaN if there are none), `integral` (sum over the sequence so far; NaN in
        a step without ΔSC, which adds nothing).
    """
    if "delta_sc" not in delta:
        raise BenchError("this table has no column delta_sc: pass what delta_sc(table) returns")
    by = delta.groupby(["sequence", "step"], as_index=False)
    steps = by.agg(tokens=("tokens", "first"), targets=("delta_sc", "count"), delta_sc=("delta_sc", "mean"))
    return steps.assign(integral=steps.groupby("sequence")["delta_sc"].cumsum())


def integral(delta: pd.DataFrame) -> pd.DataFrame:
    """∫ΔSC of every sequence.

    Args:
        delta: rows as `delta_sc` gives them.

    Returns:
        One row per sequence: `sequence, steps, measured` (steps with a ΔSC), `tokens, integral` (sum over its steps of
        the mean over targets; NaN when no step has one).
    """
    by = running(delta).groupby("sequence")
    found = by.agg(steps=("step", "size"), measured=("delta_sc", "count"), tokens=("tokens", "sum"))
    return found.assign(integral=by["delta_sc"].sum(min_count=1)).reset_index()


def _zscore(values: pd.Series, which: pd.Series) -> pd.Series:
    by = values.groupby(which)
    spread = by.transform("std", ddof=0)
    z = ((values - by.transform("mean")) / spread).mask(spread < RELATIVE_ERROR, 0.0)
    return z.mask(by.transform("size") < 2)
