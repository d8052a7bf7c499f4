"""S_p and its features against a few lines of numpy written from the definition."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import score


@pytest.fixture
def neurons() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    table = pd.DataFrame(np.exp(rng.normal(size=(20, 4))), columns=["act", "grad", "freq", "saliency"])
    return table.assign(layer=np.repeat([0, 1], 10), neuron=np.tile(np.arange(10), 2))


def z(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sp_is_the_documents_formula(neurons: pd.DataFrame, scope: str) -> None:
    found = score.sp(score.feature_table(neurons, scope), w_act=2.0, w_grad=0.5, w_freq=3.0)
    expected = np.empty(20)
    for rows in [slice(0, 10), slice(10, 20)] if scope == "layer" else [slice(0, 20)]:
        part = neurons.iloc[rows]
        expected[rows] = (
            2 * z(np.log(part["act"].to_numpy()))
            - 0.5 * z(np.log(part["grad"].to_numpy()))
            + 3 * z(part["freq"].to_numpy())
        )
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_dead_neurons_score_finite_and_low(neurons: pd.DataFrame) -> None:
    neurons.loc[3, ["act", "freq", "saliency"]] = 0.0
    found = score.feature_table(neurons)
    assert np.isfinite(found).all(axis=None)
    assert found.loc[:9, "z_act"].idxmin() == 3


def test_constant_statistic_says_nothing(neurons: pd.DataFrame) -> None:
    assert (score.feature_table(neurons.assign(freq=0.05))["z_freq"] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_statistics_are_refused(neurons: pd.DataFrame, value: float) -> None:
    neurons.loc[12, "grad"] = value
    with pytest.raises(BenchError, match="1 neurons are not finite, first layer 1 neuron 2"):
        score.feature_table(neurons)
