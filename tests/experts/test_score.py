"""S_p and its features against a few lines of numpy written from the definition."""

from __future__ import annotations

from pathlib import Path

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


def test_presets_are_their_definitions(neurons: pd.DataFrame) -> None:
    found = score.presets(neurons)
    act, grad, freq = (neurons[name].to_numpy() for name in ("act", "grad", "freq"))
    halves = [slice(0, 10), slice(10, 20)]
    ancestor = np.concatenate([z(act[rows]) - z(grad[rows]) for rows in halves])
    np.testing.assert_allclose(found["ancestor"], ancestor, atol=1e-12)
    np.testing.assert_allclose(found["document"], z(act) - z(grad) + z(freq), atol=1e-12)
    flipped = np.concatenate([z(np.log(act[r])) + z(np.log(grad[r])) + z(freq[r]) for r in halves])
    np.testing.assert_allclose(found["minus_gradient"], flipped, atol=1e-12)


def test_score_table_has_the_signs_side_by_side(neurons: pd.DataFrame) -> None:
    found = score.score_table(neurons, w_act=2.0, w_grad=0.5, w_freq=1.0)
    assert "z_weight" not in found  # no weights were given
    np.testing.assert_allclose(found["sp_minus_gradient"] - found["sp"], found["z_grad"], atol=1e-12)
    np.testing.assert_allclose(found["sp_no_gradient"] - found["sp"], 0.5 * found["z_grad"], atol=1e-12)
    weighed = score.score_table(neurons.assign(weight=neurons["act"]))
    np.testing.assert_allclose(weighed["z_weight"], weighed["z_act"])


@pytest.mark.parametrize("name", score.PRESETS)
def test_every_definition_is_a_score_table(neurons: pd.DataFrame, name: str) -> None:
    each = score.PRESETS[name]
    found = score.score_table(neurons, each.act, each.grad, each.freq, each.scope, each.log)
    np.testing.assert_array_equal(found["sp"], score.presets(neurons)[name])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_choice_marks_its_neurons_once(neurons: pd.DataFrame, tmp_path: Path, ending: str) -> None:
    table = neurons.loc[[3, 12, 3], ["neuron", "layer"]]  # in any order, and twice
    path = tmp_path / f"choice.{ending}"
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    assert np.flatnonzero(score.mark(neurons, str(path))).tolist() == [3, 12]
    assert not score.mark(neurons, "").any()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layer,neuron\n0,1\n7,7\n7,7\n", "names 1 neurons that this model has not"),
        ("layer,neuron\na,b\n0,\n", "names 2 neurons that this model has not"),
        ("layer\n0\n", "not a table of layer and neuron"),
        ("", "not a table of layer and neuron"),
        (None, "not a table of layer and neuron"),
    ],
    ids=["strange", "no numbers", "no column", "empty", "no file"],
)
@pytest.mark.filterwarnings("error")
def test_bad_choice_is_told_in_one_line(neurons: pd.DataFrame, tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "choice.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BenchError, match=said) as caught:
        score.mark(neurons, str(path))
    assert "\n" not in str(caught.value)


def test_delta_sc_is_activation_minus_gradient(neurons: pd.DataFrame) -> None:
    features = score.feature_table(neurons)
    np.testing.assert_allclose(score.delta_sc(features), features["z_act"] - features["z_grad"])


def test_formula_reads_as_people_write_it() -> None:
    assert score.Weights(1.0, 2.1, -0.1).formula == "z(log act) − 2.1·z(log grad) − 0.1·z(freq), z per layer"
    assert score.Weights(11.0, 0.0, 1.0, log=False, scope="global").formula == "11·z(act) + z(freq), z over all"
