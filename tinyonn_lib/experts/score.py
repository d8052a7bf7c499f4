"""S_p, the synergy contribution score of a neuron (document 000 §1.4), and the features beside it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError

FEATURES = ("z_act", "z_grad", "z_freq", "z_saliency")
"""Columns of the feature table, each a z-score: log activation, log gradient, frequency, log |h·∂L/∂h|."""


def zscore(values: pd.Series, groups: pd.Series | None = None) -> pd.Series:
    """(x − mean) / standard deviation, within groups when given; a constant group gives 0."""
    if groups is None:
        groups = pd.Series(0, index=values.index)
    by = values.groupby(groups)
    spread = by.transform("std", ddof=0)
    return ((values - by.transform("mean")) / spread.where(spread > 0, 1.0)).astype("float64")


def log_floor(values: pd.Series) -> pd.Series:
    """log of a non-negative statistic; zeros (dead neurons) take half of the smallest positive value."""
    positive = values[values > 0]
    return np.log(values.clip(lower=positive.min() / 2 if len(positive) else 1.0))


def feature_table(neurons: pd.DataFrame, scope: str = "layer") -> pd.DataFrame:
    """Z-scored features of every neuron.

    Args:
        neurons: One row per neuron, as `scan.statistics.neurons_table` gives it.
        scope: `"layer"` (z within the layer) or `"global"`.

    Returns:
        Frame with `layer`, `neuron` and the columns of `FEATURES`, in the order given.
    """
    used = ["act", "grad", "freq", "saliency"]
    bad = ~np.isfinite(neurons[used]).all(axis=1)
    if bad.any():
        first = neurons[bad].iloc[0]
        raise BenchError(
            f"The statistics of {int(bad.sum())} neurons are not finite, first layer {int(first.layer)} neuron "
            f"{int(first.neuron)}: scan again, with dtype=float32 if it was float16 or a damaged model."
        )
    groups = neurons["layer"] if scope == "layer" else None
    return pd.DataFrame(
        {
            "layer": neurons["layer"],
            "neuron": neurons["neuron"],
            "z_act": zscore(log_floor(neurons["act"]), groups),
            "z_grad": zscore(log_floor(neurons["grad"]), groups),
            "z_freq": zscore(neurons["freq"], groups),
            "z_saliency": zscore(log_floor(neurons["saliency"]), groups),
        }
    )


def sp(features: pd.DataFrame, w_act: float = 1.0, w_grad: float = 1.0, w_freq: float = 1.0) -> pd.Series:
    """S_p = w_act·z(log act) − w_grad·z(log grad) + w_freq·z(freq) (document 000 §1.4: high activation, low
    gradient, high frequency). A negative `w_grad` flips the sign that published gradient methods dispute."""
    return w_act * features["z_act"] - w_grad * features["z_grad"] + w_freq * features["z_freq"]
