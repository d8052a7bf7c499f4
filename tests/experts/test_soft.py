"""The soft choice against bisection in float64, and its gradient against finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyonn_lib.experts.routing import top_mask
from tinyonn_lib.experts.soft import END, SOFT, START, soft_top_k, temperature, threshold


def reference(logits: Tensor, k: float, width: float) -> Tensor:
    """σ((logit − θ)/T) of one row with θ from 300 halvings; float64."""
    values = logits.double().numpy()
    low, high = values.min() - 1000 * width, values.max() + 1000 * width

    def on(middle: float) -> np.ndarray:
        return 0.5 * (1 + np.tanh((values - middle) / (2 * width)))

    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if on(middle).sum() > k else (low, middle)
    return torch.from_numpy(on((low + high) / 2))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("experts", [2, 3, 8, 64, 128])
def test_k_are_on_whatever_k_and_temperature(experts: int) -> None:
    logits = normal(200, experts).float()
    for k, width in itertools.product(range(1, experts, max(1, experts // 9)), (END, START, 1.0, 100.0)):
        soft = soft_top_k(logits, k, width)
        # float32 has 7 digits of the sum, and of a logit of 4 what is left after division by the temperature.
        blur = 2 * torch.finfo(torch.float32).eps * (k + 4 / width * min(k, experts - k))
        assert float((soft.double().sum(-1) - k).abs().max()) <= max(1e-6, blur)
        assert bool(((soft >= 0) & (soft <= 1)).all())


@pytest.mark.parametrize("width", [1e-3, END, START, 1e3])
@pytest.mark.parametrize("experts", [2, 5, 64])
def test_it_equals_bisection_in_float64(experts: int, width: float) -> None:
    logits = normal(20, experts, seed=1)
    for k in {1, experts // 2, experts - 1, 0.3, experts - 0.3}:
        found = soft_top_k(logits, k, width)
        expected = torch.stack([reference(row, k, width) for row in logits])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert float((found.sum(-1) - k).abs().max()) <= 1e-6


def test_each_k_and_temperature_of_a_batch_is_its_own() -> None:
    logits = normal(2, 3, 6)
    k = torch.tensor([[1.0], [2.5], [5.0]], dtype=torch.float64).expand(2, 3, 1)
    width = torch.tensor([[[0.05]], [[0.5]]], dtype=torch.float64)
    found = soft_top_k(logits, k, width)
    assert found.shape == (2, 3, 6)
    assert threshold(logits, k, width).shape == (2, 3, 1)
    for i, j in itertools.product(range(2), range(3)):
        expected = reference(logits[i, j], float(k[i, j]), float(width[i]))
        torch.testing.assert_close(found[i, j], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft_top_k(logits[0, 0], 1, 0.05), found[0, 0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("width", [1e-3, END, START, 1e3])
def test_ties_share(width: float) -> None:
    torch.testing.assert_close(soft_top_k(torch.full((3, 8), 7.0), 2, width), torch.full((3, 8), 0.25))
    mixed = soft_top_k(torch.tensor([0.0, 0, 0, 5, -5]), 2, min(width, END))
    torch.testing.assert_close(mixed, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, 0]), rtol=0, atol=1e-4)


def far_apart() -> Tensor:
    """Rows with logits of ±1e4 beside those that decide."""
    rows = [[1e4, 1.0, 0.5, -1e4, 0.0, -1.0], [-1e4, -1e4, -1e4, 0.3, 0.2, 0.1], [1e4, 1e4, 1e4, 0.3, 0.2, 0.1]]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("width", [1e-3, END, START])
def test_a_few_extreme_logits_leave_the_others_their_choice(width: float) -> None:
    logits = far_apart()
    for k in (1, 2, 3, 4, 5):
        found = soft_top_k(logits, k, width)
        assert float((found.sum(-1) - k).abs().max()) <= 1e-5
        expected = torch.stack([reference(row, k, width) for row in logits])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_cold_choice_is_the_hard_one() -> None:
    logits = normal(500, 16, seed=2)
    for k in (1, 4, 15):
        ranked = logits.sort(-1, descending=True).values
        clear = ranked[:, k - 1] - ranked[:, k] > 1e-2
        assert clear.float().mean() > 0.8
        soft = soft_top_k(logits, k, 1e-4)
        torch.testing.assert_close(soft[clear], top_mask(logits, k)[clear], rtol=0, atol=1e-12)
        torch.testing.assert_close(soft.round()[clear], top_mask(logits, k)[clear], rtol=0, atol=0)


def test_order_is_kept_and_a_common_constant_changes_nothing() -> None:
    logits = normal(50, 7, seed=3)
    soft = soft_top_k(logits, 3, 0.3)
    assert torch.equal(soft.argsort(-1), logits.argsort(-1))
    torch.testing.assert_close(soft_top_k(logits + 100, 3, 0.3), soft, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [0.1, START, 5.0])
def test_gradient_by_finite_differences(width: float) -> None:
    logits = normal(3, 5, seed=4).requires_grad_()
    each = torch.tensor([[1.0], [2.3], [4.0]], dtype=torch.float64, requires_grad=True)
    one = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: soft_top_k(z, 2, width), (logits,), atol=1e-6)
    assert torch.autograd.gradcheck(lambda z, k: soft_top_k(z, k, width), (logits, each), atol=1e-6)
    assert torch.autograd.gradcheck(lambda z, k: soft_top_k(z.flatten(), 3 * k, width), (logits, one), atol=1e-6)


def test_gradient_keeps_the_sum() -> None:
    logits = normal(9, 6, seed=5).requires_grad_()
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    by_logits, by_k = torch.autograd.grad(soft_top_k(logits, k, 0.2).sum(), (logits, k))
    torch.testing.assert_close(by_logits, torch.zeros_like(by_logits), rtol=0, atol=1e-12)
    assert float(by_k) == pytest.approx(9)  # one more for each of nine rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_is_nan_where_nothing_is_undecided(dtype: torch.dtype) -> None:
    cases = [far_apart().to(dtype), torch.zeros(2, 4, dtype=dtype), torch.tensor([[1e4, -1e4]], dtype=dtype)]
    for logits, width in itertools.product(cases, (1e-3, END, 1e3)):
        for k in {1, logits.shape[1] - 1}:
            number = torch.tensor(float(k), dtype=dtype, requires_grad=True)
            leaf = logits.clone().requires_grad_()
            soft = soft_top_k(leaf, number, width)
            grads = torch.autograd.grad((soft * torch.arange(logits.shape[1])).sum(), (leaf, number))
            assert all(bool(value.isfinite().all()) for value in (soft, *grads))


def test_temperature_falls_from_start_to_end_and_stays() -> None:
    steps = 100
    found = [temperature(step, steps) for step in range(steps)]
    assert found[0] == START
    assert found[round(SOFT * steps)] == pytest.approx(END, rel=1e-12)
    assert found[-1] == pytest.approx(END, rel=1e-12)
    ratios = [b / a for a, b in itertools.pairwise(found[: round(SOFT * steps) + 1])]
    assert max(ratios) < 1
    assert max(ratios) == pytest.approx(min(ratios))  # geometrically
    assert math.prod(ratios) == pytest.approx(END / START)
    for steps in (1, 2, 7):
        falling = [temperature(step, steps) for step in range(steps)]
        assert falling == sorted(falling, reverse=True)
        assert falling[0] == START
        assert min(falling) >= END * (1 - 1e-12)
