from __future__ import annotations

import numpy as np
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.statistics import COLUMNS, STATISTICS, Layout, Totals, merge, neurons_table

LAYOUT = Layout(layers=(0, 3), widths=(4, 2), rho=0.5)


def filled(value: float) -> Totals:
    totals = Totals.zeros(LAYOUT)
    totals.sums[:] = value
    totals.counts[:] = [10, 2, 5, 1]
    return totals


def test_merge_adds_and_refuses_other_layouts() -> None:
    both = merge([filled(1.0), filled(2.0)])
    assert (both.sums == 3.0).all()
    assert both.counts[0].tolist() == [20, 4, 10, 2]
    with pytest.raises(BenchError, match="different layouts"):
        merge([filled(1.0), Totals.zeros(Layout((0, 3), (4, 2), 0.1))])
    with pytest.raises(BenchError, match="nothing to merge"):
        merge([])


def test_table_divides_by_the_right_counter() -> None:
    table = neurons_table(filled(20.0))
    assert tuple(table.columns) == COLUMNS
    assert list(zip(table["layer"], table["neuron"], strict=True)) == [(0, 0), (0, 1), (0, 2), (0, 3), (3, 0), (3, 1)]
    assert (table[["act", "act_mean", "act_sq", "freq"]] == 2.0).all(axis=None)
    assert (table[["grad_gate", "grad_up", "grad_down", "grad"]] == 20.0).all(axis=None)
    assert (table["saliency"] == 4.0).all()
    assert (table["tokens"] == 10).all()
    assert (table["samples"] == 2).all()


def test_nothing_counted_is_nan_never_zero() -> None:
    totals = filled(0.0)
    totals.counts[:, 2:] = 0
    table = neurons_table(totals)
    assert table["grad"].isna().all()
    assert table["saliency"].isna().all()
    assert (table["act"] == 0).all()


def test_layout_checks() -> None:
    assert LAYOUT.shape == (2, len(STATISTICS), 4)
    assert LAYOUT.top(100) == 50
    assert Layout((0,), (8,), 0.01).top(8) == 1
    for rho in (0.0, 1.5, float("nan")):
        with pytest.raises(BenchError, match="rho"):
            Layout((0,), (8,), rho)
    with pytest.raises(BenchError, match="shape"):
        Totals(LAYOUT, np.zeros((1, 2, 3)), np.zeros((2, 4)))
