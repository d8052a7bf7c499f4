"""The parts of `scan_overhead` that its numbers rest on: what it counts as FLOP, what it pairs, what peers do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import redis
import scan_overhead
import torch
from steps import MODES, SHARING, Size, Step, build, extra_flops, shapes, step_flops
from torch.utils.flop_counter import FlopCounterMode
from turns import Blocks, Observed, in_turns

from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.rownorms import cost
from tinyonn_lib.scan.server import private_server

TINY = Size(layers=2, width=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocabulary=96)
CPU = torch.device("cpu")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    with private_server(tmp_path / "server") as server, redis.Redis.from_url(server.url) as connected:
        yield connected


def counted(step: Step, observer: Observer | None = None) -> int:
    """FLOP of the matrix products of one step, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
        if observer is not None:
            observer.end_sample()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [24, 200])  # Gram everywhere, tiles everywhere
def test_flops_are_those_that_torch_counts(mode: str, tokens: int) -> None:
    # torch does not know the FLOP of the CPU's fused attention, so count the eager one.
    step = Step(build(TINY, attn_implementation="eager"), mode, tokens)
    bare = counted(step)
    assert bare == step_flops(TINY, tokens, mode, fused=False)
    for targets in ("neurons", "linears"):
        expected, methods = extra_flops(TINY, tokens, mode, targets)
        with Observer(step.model, targets) as observer:
            extra = counted(step, observer) - bare
        assert observer.methods == methods
        # Reading `.grad` is no matrix product.
        assert extra == (expected if mode == "frozen" else 0)


def test_flops_of_the_benchmarks_own_sizes_use_one_method_per_length() -> None:
    """Otherwise the K that some of its readers use would be counted for those alone."""
    for size, plans in ((Size(), scan_overhead.FULL), (scan_overhead.SMALL, scan_overhead.QUICK)):
        for tokens in plans:
            for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                prices = [cost(tokens, *shapes(size)[name], SHARING[name]) for name in group]
                assert len({price.gram <= price.tiles for price in prices}) == 1


def test_attention_by_hand() -> None:
    size = Size(layers=1, width=2, ffn=1, heads=1, kv_heads=1, head_dim=2, vocabulary=1)
    linears = 2 * 3 * (4 * 4 + 3 * 2 + 2)
    assert step_flops(size, 3, "frozen") == 2 * linears + 7 * (2 * 3 * 3 * 2) / 2
    assert step_flops(size, 3, "trainable", fused=False) == 3 * linears + 6 * (2 * 3 * 3 * 2)


def test_naive_version_counts_what_the_observer_counts(client: Any) -> None:
    step = Step(build(TINY), "trainable", 24)
    naive = peers.Naive(step, client)
    observer = Observer(step.model, "linears", rho=0.05)
    with naive:
        naive()
        naive()
    with observer:
        for _ in range(2):
            step()
            observer.end_sample()
    totals = observer.totals()
    assert [target.name for target in totals.layout.targets] == list(naive.linears)
    for target, sums in zip(totals.layout.targets, totals.sums, strict=True):
        np.testing.assert_allclose(naive.sums(target.name), sums, rtol=1e-4)
    assert "forward" not in naive.linears[target.name].__dict__  # as it was


def test_histograms_hold_every_gradient() -> None:
    step = Step(build(TINY), "trainable", 24)
    with peers.Histograms(step) as arm:
        arm()
    assert isinstance(arm, peers.Histograms)
    named = dict(step.model.named_parameters())
    assert arm.found.keys() == named.keys()
    for name, (counts, edges) in arm.found.items():
        assert sum(counts) == named[name].numel()
        assert len(edges) == len(counts) + 1


@pytest.mark.parametrize("mode", MODES)
def test_peers_that_are_packages(mode: str) -> None:
    for name in ("nnsight", "torchlens"):
        if peers.missing(name):
            pytest.skip(peers.missing(name))
        step = Step(build(TINY), mode, 24)
        with peers.arm(name, step, None) as arm:
            arm()
        if isinstance(arm, peers.Nnsight):
            with Observer(step.model, "linears", rows=False) as observer:
                step()
                observer.end_sample()
            inputs = [float(inner) for inner, _ in arm.found.values()]
            np.testing.assert_allclose(inputs, observer.totals().norms[:, 0], rtol=1e-5)


def test_frozen_weights_get_no_gradient_and_trainable_ones_stay_as_they_are() -> None:
    model = build(TINY)
    before = [parameter.clone() for parameter in model.parameters()]
    Step(model, "trainable", 24)()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step = Step(model, "frozen", 24)
    assert step.forward().requires_grad
    step()
    assert all(parameter.grad is None for parameter in model.parameters())


class Counting(peers.Arm):
    """Knows how often it was entered and how often it ran."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name
        self._handles = []

    def __call__(self) -> None:
        self._log.append(self._name)


def test_turns_move_on_and_the_first_block_is_kept_apart() -> None:
    log: list[str] = []
    found = in_turns({name: Counting(log, name) for name in "ab"}, rounds=2, steps=2, device=CPU)
    assert "".join(log) == "aabb" + "aabb" + "bbaa"
    assert [len(blocks.seconds) for blocks in found.values()] == [2, 2]
    assert found["a"].observed == 1.0


def test_observer_is_there_during_its_own_blocks_only() -> None:
    step = Step(build(TINY), "frozen", 24)
    arm = Observed(step, "neurons", rows=True, budget=0.5)
    found = in_turns({"bare": peers.Arm(step), "neuron": arm}, rounds=2, steps=8, device=CPU)
    assert arm.observer.steps == 3 * 8
    assert 0.0 < found["neuron"].observed < 1.0
    assert not any(module._forward_hooks for name, module in step.model.named_modules() if name.endswith("_proj"))


def test_ratio_is_the_median_of_pairs() -> None:
    bare, mine = Blocks(seconds=[1.0, 10.0, 1.0]), Blocks(seconds=[1.1, 11.0, 5.0])
    assert mine.ratio(bare) == pytest.approx((1.1, 1.1, 5.0))
    bare, mine = Blocks(seconds=[1.0] * 5), Blocks(seconds=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert mine.ratio(bare) == (3.0, 2.0, 4.0)


def test_bars_name_the_worst_length() -> None:
    rows = [
        {"variant": name, "weights": mode, "tokens": tokens, "ratio": 1.0 + tokens / 1e4, "of_bound": 2.0}
        for name in scan_overhead.VARIANTS
        for mode in MODES
        for tokens in (128, 512)
    ]
    found = scan_overhead.bars(rows)
    assert len(found) == 2 * (1 + 2 + 1 + 1 + 1)
    assert {bar.value for bar in found} == {1.0512, 2.0}
    assert not any(bar.holds for bar in found)
    assert all("T = 512" in bar.name for bar in found if not math.isclose(bar.value, 2.0))
