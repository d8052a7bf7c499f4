"""S_p, the synergy contribution score of a neuron (document 000 §1.4), and the features beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tinyonn_lib.errors import BenchError

FEATURES = ("z_act", "z_grad", "z_freq", "z_saliency", "z_weight")
"""Columns of the feature table, each a z-score: log activation, log gradient, frequency, log |h·∂L/∂h|, log norm of
the weights."""

STATISTICS = {"z_act": "act", "z_grad": "grad", "z_freq": "freq", "z_saliency": "saliency", "z_weight": "weight"}
"""Which statistic each feature is made of."""


@dataclass(frozen=True)
class Weights:
    """S_p = act·z(activation) − grad·z(gradient) + freq·z(frequency).

    Attributes:
        log: z-scores of the logarithms of activation and gradient, which spread over orders of magnitude; else of the
            values themselves. The frequency is never logarithmic.
        scope: z-scores within the `layer`, or `global`.
    """

    act: float
    grad: float
    freq: float
    log: bool = True
    scope: str = "layer"

    @property
    def formula(self) -> str:
        """As people write it."""
        of = "log " if self.log else ""
        terms = [(self.act, f"z({of}act)"), (-self.grad, f"z({of}grad)"), (self.freq, "z(freq)")]
        factor = {weight: "" if abs(weight) == 1 else f"{abs(weight):g}·" for weight, _ in terms}
        signed = " ".join(f"{'−' if weight < 0 else '+'} {factor[weight]}{term}" for weight, term in terms if weight)
        return f"{signed.removeprefix('+ ')}, z {'per layer' if self.scope == 'layer' else 'over all'}"


PRESETS: dict[str, Weights] = {
    # The bench's own (DESIGN §4).
    "sp": Weights(1.0, 1.0, 1.0),
    # Document 000 §1.4 as it stands: high activation + low gradient + high frequency, sums of the store's averages, the
    # weights not given, all neurons ranked together.
    "document": Weights(1.0, 1.0, 1.0, log=False, scope="global"),
    # What the ancestor's code computed: z(activation) − z(gradient), per layer.
    "ancestor": Weights(1.0, 1.0, 0.0, log=False),
    # The opposite sign: published gradient methods take a large gradient for importance.
    "minus_gradient": Weights(1.0, -1.0, 1.0),
    "no_gradient": Weights(1.0, 0.0, 1.0),
}
"""Named definitions of S_p. Adding one is a line."""


def zscore(values: pd.Series, groups: pd.Series | None = None) -> pd.Series:
    """(x − mean) / standard deviation, within groups when given; a constant group gives 0."""
    if groups is None:
        groups = pd.Series(0, index=values.index)
    by = values.groupby(groups)
    spread = by.transform("std", ddof=0)
    # A group of equal values has a spread of rounding errors only.
    real = spread > 1e-12 * by.transform("max").abs()
    return ((values - by.transform("mean")) / spread.where(real, 1.0)).where(real, 0.0).astype("float64")


def log_floor(values: pd.Series) -> pd.Series:
    """log of a non-negative statistic; zeros (dead neurons) take half of the smallest positive value."""
    positive = values[values > 0]
    return np.log(values.clip(lower=positive.min() / 2 if len(positive) else 1.0))


def feature_table(neurons: pd.DataFrame, scope: str = "layer", log: bool = True) -> pd.DataFrame:
    """Z-scored features of every neuron.

    Args:
        neurons: One row per neuron, as `scan.tables.neurons_table` gives it, plus `weight` if known
            (`experts.evidence.weight_norms`).
        scope: `"layer"` (z within the layer) or `"global"`.
        log: logarithms of all but the frequency.

    Returns:
        Frame with `layer`, `neuron` and those columns of `FEATURES` that `neurons` has statistics for.

    Raises:
        BenchError: NaN or infinite statistics.
    """
    features = {z: name for z, name in STATISTICS.items() if name in neurons.columns}
    bad = ~np.isfinite(neurons[list(features.values())]).all(axis=1)
    if bad.any():
        first = neurons[bad].iloc[0]
        raise BenchError(
            f"The statistics of {int(bad.sum())} neurons are not finite, first layer {int(first.layer)} neuron "
            f"{int(first.neuron)}: scan again, with dtype=float32 if it was float16 or a damaged model."
        )
    groups = neurons["layer"] if scope == "layer" else None
    columns = {
        z: zscore(log_floor(neurons[name]) if log and name != "freq" else neurons[name], groups)
        for z, name in features.items()
    }
    return pd.DataFrame({"layer": neurons["layer"], "neuron": neurons["neuron"], **columns})


def sp(features: pd.DataFrame, w_act: float = 1.0, w_grad: float = 1.0, w_freq: float = 1.0) -> pd.Series:
    """S_p = w_act·z(act) − w_grad·z(grad) + w_freq·z(freq) (document 000 §1.4: high activation, low gradient, high
    frequency). A negative `w_grad` flips the sign that published gradient methods dispute."""
    return w_act * features["z_act"] - w_grad * features["z_grad"] + w_freq * features["z_freq"]


def score_table(
    neurons: pd.DataFrame,
    w_act: float = 1.0,
    w_grad: float = 1.0,
    w_freq: float = 1.0,
    scope: str = "layer",
    log: bool = True,
) -> pd.DataFrame:
    """Features, S_p, and S_p with the gradient's sign flipped and without it, `sp sp_minus_gradient sp_no_gradient`.

    Args:
        neurons, scope, log: as in `feature_table`.
    """
    features = feature_table(neurons, scope, log)
    signs = {"sp": w_grad, "sp_minus_gradient": -w_grad, "sp_no_gradient": 0.0}
    return features.assign(**{name: sp(features, w_act, sign, w_freq) for name, sign in signs.items()})


def presets(neurons: pd.DataFrame) -> pd.DataFrame:
    """`layer, neuron` and one column per named definition in `PRESETS`."""
    found = neurons[["layer", "neuron"]].copy()
    for name, weights in PRESETS.items():
        features = feature_table(neurons, weights.scope, weights.log)
        found[name] = sp(features, weights.act, weights.grad, weights.freq)
    return found


def delta_sc(features: pd.DataFrame) -> pd.Series:
    """ΔSC = z(activation) − z(gradient) of every neuron (ERRATA 004): S_p without its frequency."""
    return features["z_act"] - features["z_grad"]


def definitions(neurons: pd.DataFrame, halves: Sequence[pd.DataFrame] = ()) -> pd.DataFrame:
    """The named definitions side by side, by rank correlations within layers (Spearman, mean over layers).

    Args:
        halves: the statistics of two halves of the data, for telling how much of a score is the data's.

    Returns:
        `definition, formula, to sp, to saliency` (|h·∂L/∂h|), `between halves` (NaN without halves).
    """
    found = presets(neurons)
    parts = [presets(half) for half in halves]
    rows = []
    for name, weights in PRESETS.items():
        again = _within(parts[0], parts[0][name], parts[1][name]) if len(parts) == 2 else np.nan
        rows.append(
            {
                "definition": name,
                "formula": weights.formula,
                "to sp": _within(found, found[name], found["sp"]),
                "to saliency": _within(found, found[name], neurons["saliency"]),
                "between halves": again,
            }
        )
    return pd.DataFrame(rows).round(3)


def _within(table: pd.DataFrame, one: pd.Series, other: pd.Series) -> float:
    pair = pd.DataFrame({"one": one.to_numpy(), "other": other.to_numpy()})
    each = [rows["one"].corr(rows["other"], "spearman") for _, rows in pair.groupby(table["layer"].to_numpy())]
    return float(np.mean(each))


def points(scores: pd.DataFrame) -> NDArray[np.float64]:
    """The feature vectors, `(n, features)`: `FEATURES` and the co-activation profile, as far as they are there."""
    profile = [name for name in scores.columns if re.fullmatch(r"p\d+", str(name))]
    return scores[[name for name in FEATURES if name in scores.columns] + profile].to_numpy(np.float64)


def mark(scores: pd.DataFrame, choice: str) -> NDArray[np.bool_]:
    """Which neurons a table of `layer, neuron` names (.parquet or .csv); none when `choice` is empty.

    Raises:
        BenchError: no such file, not such a table, or neurons that the model has not.
    """
    if not choice:
        return np.zeros(len(scores), bool)
    try:
        table = pd.read_csv(choice) if choice.endswith(".csv") else pd.read_parquet(choice)
        wanted = pd.MultiIndex.from_frame(table[["layer", "neuron"]])
    except Exception as error:  # pandas and pyarrow raise a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BenchError(f"choice={choice} is not a table of layer and neuron (.parquet or .csv): {reason}") from error
    known = pd.MultiIndex.from_frame(scores[["layer", "neuron"]])
    if strange := len(wanted.difference(known)):
        raise BenchError(f"choice={choice} names {strange} neurons that this model has not: choose again for this run.")
    return np.asarray(known.isin(wanted))
