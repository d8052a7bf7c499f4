"""Shapes fill the layer, partitions name every neuron once, tables bring them back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import families, methods
from tinyonn_lib.experts.partition import DROPPED, SHARED, Partition, Shape

from .conftest import Tiny

EVERY = pytest.mark.parametrize("method", methods.METHODS)
SHAPES = pytest.mark.parametrize("shape", [{}, {"shared": 0.25}, {"size": 5}, {"shared": 0.3, "per_layer": True}])


@EVERY
@SHAPES
def test_each_neuron_once_and_reproducible(tiny: Tiny, method: str, shape: dict[str, float]) -> None:
    first, second = (tiny.part(method, seed=5, **shape) for _ in range(2))
    first.check([32, 32])
    shapes = methods.shapes(tiny.evidence, 4, **shape)
    for layer, want in enumerate(shapes):
        assert first.experts[layer].shape == (4, want.size)
        assert len(first.shared[layer]) == want.shared
        assert torch.equal(first.experts[layer], second.experts[layer])
        assert torch.equal(first.shared[layer], second.shared[layer])


@SHAPES
def test_what_export_would_refuse_is_refused_before_dividing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, shape: dict[str, float]
) -> None:
    shapes = methods.shapes(tiny.evidence, 4, **shape)
    asked: list[tuple[families.Layout, bool]] = []
    family = families.family

    def see(dense: Any, partition: Partition, *, bias: bool = False) -> families.Family:
        asked.append((families.Layout.of(partition), bias))
        return family(dense, partition, bias=bias)

    monkeypatch.setattr(families, "family", see)
    methods.refuse_unexportable(tiny.model.config, shapes)
    assert asked == [(families.Layout.of(tiny.part("random", **shape)), True)]
    gemma = AutoConfig.for_model("gemma", num_hidden_layers=2)
    with pytest.raises(BenchError, match="No standard MoE checkpoint continues a 'gemma' model; exportable: qwen2"):
        methods.refuse_unexportable(gemma, shapes)


@given(neurons=st.integers(1, 400), experts=st.integers(1, 60), shared=st.floats(0, 0.99))
def test_a_shape_fills_the_layer_or_says_why_not(neurons: int, experts: int, shared: float) -> None:
    if (shared == 0 and neurons % experts) or int((1 - shared) * neurons + 1e-6) < experts:
        with pytest.raises(BenchError):
            Shape.of(neurons, experts, shared=shared)
        return
    shape = Shape.of(neurons, experts, shared=shared)
    assert shape.size >= 1
    assert shape.shared >= 0
    assert shape.experts * shape.size + shape.shared == neurons
    # At least the share asked for, and less than one neuron per expert more.
    assert shared * neurons - 1e-6 <= shape.shared < shared * neurons + experts + 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"neurons": 32, "experts": 5}, "32 neurons of a layer do not divide into 5 experts; 4 would fit"),
        ({"neurons": 32, "experts": 100}, "32 neurons are too few for 100 experts"),
        ({"neurons": 32, "experts": 4, "size": 9}, "4 experts of 9 neurons need 36, a layer has 32.*4 of 8"),
        ({"neurons": 32, "experts": 4, "shared": 1.0}, "choose it in"),
        ({"neurons": 32, "experts": 4, "shared": 0.5, "size": 4}, "not both"),
        ({"neurons": 32, "experts": 20, "shared": 0.5}, r"32 neurons \(50% of them shared\) are too few for 20"),
    ],
)
def test_shapes_that_cannot_be(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(BenchError, match=says) as caught:
        Shape.of(**arguments)
    assert "\n" not in str(caught.value)


def test_documents_layout_of_qwen() -> None:
    assert Shape.of(6912, 64, size=64) == Shape(64, 64, 2816)


def test_sp_experts_are_ordered_by_score_and_share_the_best(tiny: Tiny) -> None:
    table = tiny.part("sp", shared=0.25).table().merge(tiny.scores, on=["layer", "neuron"])
    for _, rows in table.groupby("layer"):
        means = rows.groupby("expert")["sp"].mean()
        assert means.drop(SHARED).is_monotonic_decreasing
        assert rows.loc[rows["expert"] == SHARED, "sp"].min() >= rows.loc[rows["expert"] != SHARED, "sp"].max()


def test_signs_of_the_gradient_share_other_neurons(tiny: Tiny) -> None:
    one, two = tiny.part("sp", shared=0.25), tiny.part("sp_minus_gradient", shared=0.25)
    expected = tiny.scores.query("layer == 0").set_index("neuron")["sp_minus_gradient"].nlargest(8).index
    assert sorted(two.shared[0].tolist()) == sorted(expected)
    assert not torch.equal(one.shared[0], two.shared[0])


def test_random_differs_by_layer_and_seed(tiny: Tiny) -> None:
    one, two = (tiny.part("random", seed=seed) for seed in (0, 1))
    assert not torch.equal(one.experts[0], one.experts[1])
    assert not torch.equal(one.experts[0], two.experts[0])


def full(labels: list[list[int]], experts: int) -> Partition:
    return Partition.of("any", [np.array(row) for row in labels], [experts] * len(labels))


def test_table_round_trip_with_shared_and_dropped() -> None:
    made = full([[0, 1, SHARED, DROPPED, 1, 0], [SHARED, SHARED, 0, 1, 1, 0]], 2)
    table = made.table()
    assert len(table) == 12
    assert table.query("layer == 0 and neuron == 3")["expert"].item() == DROPPED
    back = Partition.from_table(table.sample(frac=1, random_state=0), "any")
    for name in ("experts", "shared", "dropped"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(made, name), getattr(back, name), strict=True))
    assert made.owner(0).tolist() == [0, 1, SHARED, DROPPED, 1, 0]


@pytest.mark.parametrize(("active", "k"), [(0.25, 1), (0.5, 2), (0.01, 1), (1.0, 4)])
def test_k_is_the_share_of_experts(tiny: Tiny, active: float, k: int) -> None:
    assert tiny.part().k(active) == k


def test_k_counts_the_shared_ones(tiny: Tiny) -> None:
    part = tiny.part(shared=0.5)  # 16 shared, 4 experts of 4
    assert [part.k(active) for active in (0.25, 0.625, 0.75, 1.0)] == [1, 1, 2, 4]
    assert [part.share(k) for k in (1, 2, 4)] == [0.625, 0.75, 1.0]


def test_unknown_method(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="no partition method 'magic'; known: sp, sp_minus_gradient"):
        tiny.part("magic")


def test_partition_of_another_model(tiny: Tiny) -> None:
    part = tiny.part()
    with pytest.raises(BenchError, match="each of layer 0's 48 neurons exactly once"):
        part.check([48, 48])
    with pytest.raises(BenchError, match="2 layers and the model 3"):
        part.check([32, 32, 32])
    with pytest.raises(BenchError, match="does not name each of layer 1's 6 neurons"):
        full([[0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 5, -7]], 2).check([6, 6])
