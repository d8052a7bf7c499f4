"""Routing by scaled h equals routing written out expert by expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tinyonn_lib.experts import assemble, partition, routing

from .conftest import Tiny
from .references import linear_router


@pytest.fixture
def part(tiny: Tiny) -> partition.Partition:
    return tiny.part()


def ffn_inputs(tiny: Tiny) -> torch.Tensor:
    return torch.randn(11, 32, generator=torch.Generator().manual_seed(1))


def run_layer(tiny: Tiny, scale: routing.Scale, x: torch.Tensor) -> torch.Tensor:
    with routing.scaled(tiny.ffns[:1], [scale]):
        out: torch.Tensor = tiny.ffns[0].module(x)
    return out


def test_experts_add_up_to_the_dense_layer(tiny: Tiny, part: partition.Partition) -> None:
    x = ffn_inputs(tiny)
    for ffn, experts in zip(tiny.ffns, assemble.assemble(tiny.ffns, part), strict=True):
        total = sum(expert(x) for expert in experts)
        torch.testing.assert_close(total, ffn.module(x), atol=1e-5, rtol=1e-5)


def test_oracle_keeps_the_experts_with_the_largest_output(tiny: Tiny, part: partition.Partition) -> None:
    x = ffn_inputs(tiny)
    outputs = torch.stack([expert(x) for expert in next(assemble.assemble(tiny.ffns, part))])  # (4, 11, 32)
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        best = outputs[:, token].norm(dim=-1).argsort(descending=True)[:2]
        expected[token] = outputs[best, token].sum(0)
    found = run_layer(tiny, routing.oracle(part, tiny.ffns, k=2)[0], x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_router_gates_as_softmax_times_experts(tiny: Tiny, part: partition.Partition) -> None:
    x, weight = ffn_inputs(tiny), torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    outputs = torch.stack([expert(x) for expert in next(assemble.assemble(tiny.ffns, part))])
    gates = (x @ weight.T).softmax(-1)
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for e in gates[token].argsort(descending=True)[:3]:
            expected[token] += 4 * gates[token, e] * outputs[e, token]
    found = run_layer(tiny, linear_router([weight, weight], part, k=3)[0], x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_zero_router_with_all_experts_is_the_dense_model(tiny: Tiny, part: partition.Partition) -> None:
    expected = tiny.model(tiny.ids).logits
    with routing.scaled(tiny.ffns, linear_router([torch.zeros(4, 32)] * 2, part, k=4)):
        found = tiny.model(tiny.ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_static_keeps_the_top_and_the_bias_restores_the_mean(tiny: Tiny) -> None:
    x = ffn_inputs(tiny)
    scores = [torch.arange(32.0), torch.arange(32.0)]
    h = F.silu(tiny.ffns[0].gate(x)) * tiny.ffns[0].up(x)
    scales = routing.static(scores, keep=0.25)
    kept = h.clone()
    kept[:, :24] = 0
    torch.testing.assert_close(run_layer(tiny, scales[0], x), tiny.ffns[0].down(kept), atol=1e-6, rtol=1e-5)
    means = [h.mean(0), h.mean(0)]
    shift = routing.dropped_mean(tiny.ffns, scores, means, keep=0.25)[0]
    torch.testing.assert_close(shift, tiny.ffns[0].down(h.mean(0) - kept.mean(0)), atol=1e-6, rtol=1e-5)
    with routing.scaled(tiny.ffns[:1], scales[:1], [shift]):
        shifted = tiny.ffns[0].module(x)
    # On average over tokens nothing is missing: that is what the bias is for.
    torch.testing.assert_close(shifted.mean(0), tiny.ffns[0].module(x).mean(0), atol=1e-5, rtol=1e-4)


def test_no_hook_stays_behind(tiny: Tiny, part: partition.Partition) -> None:
    before = tiny.model(tiny.ids).logits
    with pytest.raises(RuntimeError, match="boom"), routing.scaled(tiny.ffns, routing.oracle(part, tiny.ffns, 1)):
        raise RuntimeError("boom")
    assert torch.equal(tiny.model(tiny.ids).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.model.modules())


def test_shared_neurons_are_always_on_and_dropped_ones_never(tiny: Tiny) -> None:
    labels = np.array([0, 1, partition.SHARED, partition.DROPPED] * 8)
    part = partition.Partition.of("any", [labels, labels], [2, 2])
    x, ffn = ffn_inputs(tiny), tiny.ffns[0]
    h = F.silu(ffn.gate(x)) * ffn.up(x)
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    on = (x @ weight.T).argmax(1)
    mask = torch.stack([(on == 0).float(), (on == 1).float(), torch.ones(11), torch.zeros(11)], 1).repeat(1, 8)
    found = run_layer(tiny, routing.chosen(part, [lambda x: x @ weight.T] * 2, k=1)[0], x)
    torch.testing.assert_close(found, ffn.down(h * mask), atol=1e-6, rtol=1e-5)


def test_sigmoid_gates_are_twice_the_sigmoid(tiny: Tiny) -> None:
    part, x, ffn = tiny.part(shared=0.25), ffn_inputs(tiny), tiny.ffns[0]
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    logits = x @ weight.T
    gates = 2 * torch.sigmoid(logits) * routing.top_mask(logits, 3)
    factor = torch.ones(11, 32)
    for e, neurons in enumerate(part.experts[0]):
        factor[:, neurons] = gates[:, [e]]
    found = run_layer(tiny, linear_router([weight] * 2, part, 3, "sigmoid")[0], x)
    torch.testing.assert_close(found, ffn.down(F.silu(ffn.gate(x)) * ffn.up(x) * factor), atol=1e-6, rtol=1e-5)


def test_selection_biases_choose_and_leave_the_gates_alone(tiny: Tiny, part: partition.Partition) -> None:
    x, generator = ffn_inputs(tiny), torch.Generator().manual_seed(7)
    weight, bias = torch.randn(4, 32, generator=generator), torch.randn(4, generator=generator)
    outputs = torch.stack([expert(x) for expert in next(assemble.assemble(tiny.ffns, part))])
    gates = torch.sigmoid(x @ weight.T)
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for e in (gates[token] + bias).argsort(descending=True)[:2]:
            expected[token] += 2 * gates[token, e] * outputs[e, token]
    found = run_layer(tiny, linear_router([weight] * 2, part, 2, "sigmoid", [bias] * 2)[0], x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
