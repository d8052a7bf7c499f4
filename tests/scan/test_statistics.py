from __future__ import annotations

import json

import numpy as np
import pytest
from scan_totals import LAYOUT, bits, totals

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.statistics import KINDS, Layout, Target, Totals, merge

MLP = Target("model.layers.3.mlp", "neurons", 4, 3)


def test_merge_adds_in_order_and_refuses_other_layouts() -> None:
    one, two = totals(1), totals(2)
    both = merge([one, two])
    for found, first, second in zip(both.sums, one.sums, two.sums, strict=True):
        assert (found == first + second).all()
    assert (both.counts == one.counts + two.counts).all()
    assert (both.norms == one.norms + two.norms).all()
    assert bits(merge([one])) == bits(one)
    with pytest.raises(BenchError, match="different layouts"):
        merge([one, Totals.zeros(Layout(LAYOUT.targets, 0.1))])
    with pytest.raises(BenchError, match="nothing to merge"):
        merge([])


def test_a_statistic_by_name() -> None:
    filled = totals(1)
    assert (filled.of("model.layers.0.mlp", "saliency") == filled.sums[0][KINDS["neurons"].index("saliency")]).all()
    assert (filled.of("model.embed_tokens", "grad", "embedding") == filled.sums[2][1]).all()
    for name, statistic in (("model.layers.9.mlp", "h"), ("model.layers.0.mlp", "weight")):
        with pytest.raises(BenchError, match="no target"):
            filled.of(name, statistic)


def test_a_layout_comes_back_from_json_and_no_other_version_does() -> None:
    described = json.loads(json.dumps(LAYOUT.describe()))
    assert Layout.parse(described) == LAYOUT
    assert LAYOUT.units == 15
    reordered = {**described["statistics"], "linear": ["top", "abs_y", "grad"]}
    for other in ({"version": 1}, {"statistics": reordered}, {"statistics": None}):
        with pytest.raises(BenchError, match="another version of the bench"):
            Layout.parse(described | other)


def test_layout_checks() -> None:
    assert MLP.shape == (len(KINDS["neurons"]), 4)
    assert Layout((MLP,), 0.5).top(100) == 50
    assert Layout((MLP,), 0.01).top(8) == 1
    for rho in (0.0, 1.5, float("nan")):
        with pytest.raises(BenchError, match="rho"):
            Layout((MLP,), rho)
    with pytest.raises(BenchError, match="each target once"):
        Layout((MLP, MLP), 0.5)
    with pytest.raises(BenchError, match="unknown kind of target: conv"):
        Layout((Target("x", "conv", 1, 0),), 0.5)


def test_totals_of_wrong_shape_are_refused() -> None:
    layout = Layout((MLP,), 0.5)
    good = Totals.zeros(layout)
    with pytest.raises(BenchError, match="do not fit the layout"):
        Totals(layout, (np.zeros((9, 5)),), good.counts, good.norms)
    with pytest.raises(BenchError, match="do not fit the layout"):
        Totals(layout, good.sums, np.zeros((1, 3)), good.norms)
    with pytest.raises(BenchError, match="norms of shape"):
        Totals(layout, good.sums, good.counts, np.zeros((2, 2)))
