from __future__ import annotations

import numpy as np
import pandas as pd
from scan_totals import LAYOUT

from tinyonn_lib.scan.statistics import Layout, Target, Totals
from tinyonn_lib.scan.tables import COLUMNS, layer_ranks, neurons_table, tensors_table, units_table

NEURONS = Layout((Target("a", "neurons", 4, 0), Target("b", "neurons", 2, 3)), rho=0.5)


def filled(layout: Layout, value: float) -> Totals:
    totals = Totals.zeros(layout)
    for part in totals.sums:
        part[:] = value
    totals.counts[:] = [10, 2, 5, 1]
    totals.norms[:] = [6.0, 4.0]
    return totals


def test_neurons_are_divided_by_the_right_counter() -> None:
    table = neurons_table(filled(NEURONS, 20.0))
    assert tuple(table.columns) == COLUMNS
    assert list(zip(table["layer"], table["neuron"], strict=True)) == [(0, 0), (0, 1), (0, 2), (0, 3), (3, 0), (3, 1)]
    assert (table[["act", "act_mean", "act_sq", "freq"]] == 2.0).all(axis=None)
    assert (table[["grad_gate", "grad_up", "grad_down", "grad"]] == 20.0).all(axis=None)
    assert (table["saliency"] == 4.0).all()
    assert (table["tokens"] == 10).all()
    assert (table["samples"] == 2).all()


def test_nothing_counted_is_nan_never_zero() -> None:
    totals = filled(NEURONS, 0.0)
    totals.counts[:, 2:] = 0
    neurons, units, tensors = neurons_table(totals), units_table(totals), tensors_table(totals)
    assert neurons[["grad", "saliency"]].isna().all(axis=None)
    assert (neurons["act"] == 0).all()
    assert units["grad"].isna().all()
    assert (units[["act", "freq"]] == 0).all(axis=None)
    assert tensors["grad_norm"].isna().all()
    assert (tensors["act_norm"] == 3.0).all()
    assert neurons_table(filled(Layout((Target("x", "linear", 2, 0),), 0.5), 1.0)).empty


def test_units_of_every_kind() -> None:
    totals = filled(LAYOUT, 0.0)
    neurons, linear, embedding, _ = totals.sums
    neurons[[0, 3, 8]] = [[10.0], [20.0], [30.0]]  # abs_h, top, grad
    linear[:] = [[10.0], [20.0], [30.0]]  # abs_y, top, grad
    embedding[:] = [[10.0], [30.0]]  # count, grad
    table = units_table(totals)
    assert len(table) == LAYOUT.units
    assert table["row"].tolist() == [*range(5), *range(3), *range(7)]
    by = table.groupby("kind", sort=False)[["act", "freq", "grad"]].mean()
    expected = {"neurons": [1.0, 2.0, 30.0], "linear": [1.0, 2.0, 30.0], "embedding": [1.0, 1.0, 30.0]}
    pd.testing.assert_frame_equal(by, pd.DataFrame(expected, index=["act", "freq", "grad"]).T, check_names=False)


def test_tensors_are_divided_by_samples() -> None:
    table = tensors_table(filled(LAYOUT, 1.0))
    assert table["module"].tolist() == ["mlp", "q_proj", "embed_tokens", "lm_head"]
    assert table["layer"].tolist() == [0, 0, -1, -1]
    assert (table["act_norm"] == 3.0).all()
    assert (table["grad_norm"] == 4.0).all()


def test_ranks_are_within_layers() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"layer": np.repeat([0, 1], 50), "act": rng.random(100)})
    table["grad"] = np.where(table["layer"] == 0, 1.0, -1.0) * table["act"] + 100.0 * table["layer"]
    assert layer_ranks(table, "act", "grad").round(12).to_dict() == {0: 1.0, 1: -1.0}
