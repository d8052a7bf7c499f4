from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.rownorms import (
    choose,
    column_squares_grad,
    cost,
    row_norms,
    row_squares_grad,
    row_squares_tiles,
)


def pair(tokens: int, d_in: int, d_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    return x, torch.randn(tokens, d_out, generator=generator, dtype=torch.float64) * 1e-4


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    d_in=st.integers(1, 20),
    d_out=st.integers(1, 30),
    seed=st.integers(0, 99),
    method=st.sampled_from(["gram", "tiles", "auto"]),
)
def test_equal_to_autograd(tokens: int, d_in: int, d_out: int, seed: int, method: str) -> None:
    x, g = pair(tokens, d_in, d_out, seed)
    weight = torch.zeros(d_out, d_in, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(x, weight).backward(g)
    assert weight.grad is not None
    exact, single = weight.grad.norm(dim=1), row_norms(x.float(), g.float(), method).double()
    # fp32 cannot know a sum better than its terms.
    assert ((single - exact).abs() <= 1e-4 * exact + 1e-6 * g.norm(dim=0) * x.norm()).all()
    torch.testing.assert_close(row_norms(x, g, method), weight.grad.norm(dim=1), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(row_norms(g, x, method), weight.grad.norm(dim=0), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(row_squares_grad(weight.grad).sqrt(), weight.grad.norm(dim=1))
    torch.testing.assert_close(column_squares_grad(weight.grad).sqrt(), weight.grad.norm(dim=0))


def test_narrow_inputs_are_widened_before_any_product() -> None:
    x, g = (t.bfloat16() for t in pair(200, 64, 96, 0))
    exact = (g.double().t() @ x.double()).norm(dim=1)
    for method in ("gram", "tiles"):
        torch.testing.assert_close(row_norms(x, g, method).double(), exact, rtol=1e-5, atol=0)


def test_gram_keeps_its_digits_where_a_gradient_cancels() -> None:
    x, g = pair(64, 32, 128, 5)
    x = x + 10.0  # a large common part, as in the residual stream of real models
    g[:, ::2] -= g[:, ::2].mean(0)  # which these neurons' gradients are orthogonal to
    exact = (g.t() @ x).norm(dim=1)
    torch.testing.assert_close(row_norms(x.float(), g.float(), "gram").double(), exact, rtol=1e-5, atol=0)


def test_tiles_do_not_change_the_result() -> None:
    x, g = pair(17, 8, 50, 3)
    torch.testing.assert_close(row_squares_tiles(x, g, tile_values=24), row_squares_tiles(x, g), rtol=1e-12, atol=0)


def test_a_neuron_without_gradient_has_norm_zero_not_nan() -> None:
    x, g = pair(30, 8, 6, 1)
    g[:, 2] = 0
    for method in ("gram", "tiles"):
        norms = row_norms(x, g, method)
        assert norms[2] == 0
        assert torch.isfinite(norms).all()


def test_choice_follows_the_cost() -> None:
    crossing = 2560 * 6912 / (2560 + 6912)
    assert choose(int(crossing) - 1, 2560, 6912) == "gram"
    assert choose(int(crossing) + 1, 2560, 6912) == "tiles"
    assert cost(100, 64, 128, sharing=2).gram < cost(100, 64, 128).gram


def test_bad_input_is_one_line() -> None:
    x, g = pair(3, 4, 5, 0)
    with pytest.raises(BenchError, match="method='exact'"):
        row_norms(x, g, "exact")
    with pytest.raises(BenchError, match="3 tokens"):
        row_norms(x, g[:2])
