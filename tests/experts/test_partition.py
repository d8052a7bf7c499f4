"""Partitions name every neuron once, and controls follow their description."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import partition

from .conftest import Tiny


@pytest.mark.parametrize("method", partition.METHODS)
def test_each_neuron_once_and_reproducible(tiny: Tiny, method: str) -> None:
    first, second = (partition.partition(method, tiny.scores, 4, seed=5) for _ in range(2))
    for one, two in zip(first.experts, second.experts, strict=True):
        assert one.shape == (4, 8)
        assert torch.equal(one, two)
        assert torch.equal(one.flatten().sort().values, torch.arange(32))


def test_sp_experts_are_ordered_by_score(tiny: Tiny) -> None:
    table = partition.partition("sp", tiny.scores, 4).table().merge(tiny.scores, on=["layer", "neuron"])
    for _, means in table.groupby(["layer", "expert"])["sp"].mean().groupby("layer"):
        assert means.is_monotonic_decreasing


def test_random_differs_by_layer_and_seed(tiny: Tiny) -> None:
    one, two = (partition.partition("random", tiny.scores, 4, seed) for seed in (0, 1))
    assert not torch.equal(one.experts[0], one.experts[1])
    assert not torch.equal(one.experts[0], two.experts[0])


def test_table_round_trip(tiny: Tiny) -> None:
    made = partition.partition("random", tiny.scores, 8)
    back = partition.Partition.from_table(made.table().sample(frac=1, random_state=0), "random")
    assert all(torch.equal(a, b) for a, b in zip(made.experts, back.experts, strict=True))


@pytest.mark.parametrize(("experts", "near"), [(5, "4 would fit"), (100, "32 would fit")])
def test_count_that_does_not_divide(tiny: Tiny, experts: int, near: str) -> None:
    with pytest.raises(BenchError, match=f"32 neurons of layer 0 do not divide into {experts} experts; {near}"):
        partition.partition("random", tiny.scores, experts)


def test_unknown_method(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="no partition method 'magic'; known: sp, random"):
        partition.partition("magic", tiny.scores, 4)


@pytest.mark.parametrize(("active", "k"), [(0.25, 1), (0.5, 2), (0.01, 1), (1.0, 4)])
def test_k_is_the_share_of_experts(tiny: Tiny, active: float, k: int) -> None:
    assert partition.partition("random", tiny.scores, 4).k(active) == k


def test_flap_is_variance_times_squared_column_norm(tiny: Tiny) -> None:
    found = partition.flap_scores(tiny.neurons, [f.down.weight for f in tiny.ffns])
    for layer, rows in tiny.neurons.groupby("layer"):
        weight = tiny.ffns[int(layer)].down.weight.double().numpy()
        expected = [
            (r.act_sq - r.act_mean**2) * np.linalg.norm(weight[:, int(r.neuron)]) ** 2 for r in rows.itertuples()
        ]
        np.testing.assert_allclose(found[int(layer)], expected, rtol=1e-6)


def test_statistics_of_another_model(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="belong to another model"):
        partition.flap_scores(tiny.neurons[tiny.neurons["neuron"] < 10], [f.down.weight for f in tiny.ffns])
