"""Muon by stacks is `torch.optim.Muon` matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain.muon import Muon, newton_schulz

SHAPES = ((12, 30), (30, 12), (16, 16), (12, 30), (1, 20), (20, 1), (30, 12))


def matrices(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give(params: Sequence[Tensor], step: int) -> None:
    """A gradient of its own for each, of very different sizes."""
    generator = torch.Generator().manual_seed(100 + step)
    for place, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (place - 3)


def steps(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Each with another rate, as a schedule gives it."""
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        give(params, step)
        optimizer.step()


@pytest.mark.parametrize(("momentum", "decay"), [(0.95, 0.0), (0.6, 3.0), (0.0, 0.1)])
def test_equals_torch_over_several_steps(momentum: float, decay: float) -> None:
    ours, theirs = matrices(SHAPES), matrices(SHAPES)
    steps(ours, Muon(ours, momentum=momentum, weight_decay=decay), 0, 6)
    steps(theirs, torch.optim.Muon(theirs, momentum=momentum, weight_decay=decay), 0, 6)
    for mine, other, start in zip(ours, theirs, matrices(SHAPES), strict=True):
        moved = (other - start).norm()
        # bfloat16: the iterations round otherwise in a batch, a per cent of a step.
        assert (mine - other).norm() < 0.02 * moved, tuple(mine.shape)
        assert moved > 0.01


def test_orthogonal_in_the_frame_of_the_gradient() -> None:
    """Against the SVD in float64: the same singular vectors, singular values near 1, whatever the gradient's size."""
    given = torch.stack([matrix.detach() * scale for matrix, scale in zip(matrices([(8, 40)] * 3), (1e-4, 1, 1e5),
                                                                          strict=True)])  # fmt: skip
    found = newton_schulz(given).double()
    left, _, right = torch.linalg.svd(given.double(), full_matrices=False)
    core = left.mT @ found @ right.mT
    diagonal = core.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.25
    assert (core - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert found.shape == given.shape
    assert newton_schulz(given).dtype == torch.float32


def test_matrices_of_one_shape_do_not_meet() -> None:
    """What one gradient is does not change what another's matrix becomes: norms are each matrix's own."""
    alone, beside = matrices([(12, 30)]), matrices([(12, 30), (12, 30), (30, 12)])
    for params in (alone, beside):
        optimizer = Muon(params)
        for param, seed in zip(params, (5, 6, 7), strict=False):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)) * 1e3 ** (seed - 5)
        optimizer.step()
    torch.testing.assert_close(alone[0], beside[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 10), (6, 20), (20, 6)])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_stack_equals_its_matrices(shape: tuple[int, int], parts: int) -> None:
    """(E, 2 m, d) with two parts: 2 E matrices of m rows, the rate of a tall one by m / d and not by 2 m / d."""
    experts = 3
    stack = matrices([(experts, parts * shape[0], shape[1])])
    apart = [nn.Parameter(piece.detach().clone()) for piece in stack[0].detach().reshape(-1, *shape)]
    one = Muon([{"params": stack, "parts": parts}], weight_decay=0.5)
    many = torch.optim.Muon(apart, lr=0.02, weight_decay=0.5)
    for step in range(4):
        give(stack, step)
        assert stack[0].grad is not None
        for piece, grad in zip(apart, stack[0].grad.reshape(-1, *shape), strict=True):
            piece.grad = grad.clone()
        one.step()
        many.step()
    torch.testing.assert_close(stack[0].detach().reshape(-1, *shape), torch.stack([p.detach() for p in apart]), rtol=0,
                               atol=2e-3)  # fmt: skip
    # The atol is a fortieth of what four steps are; another frame or factor is far above it.
    other = matrices([(experts, parts * shape[0], shape[1])])
    wrong = Muon([{"params": other, "parts": 3 - parts}], weight_decay=0.5)
    for step in range(4):
        give(other, step)
        wrong.step()
    assert (other[0] - stack[0]).abs().max() > 0.01


def test_resumed_is_the_same_to_the_bit() -> None:
    def made() -> tuple[list[nn.Parameter], Muon]:
        params = [*matrices(SHAPES), *matrices([(2, 8, 5)])]
        return params, Muon([{"params": params[:-1]}, {"params": params[-1:], "parts": 2}], momentum=0.8)

    whole, optimizer = made()
    steps(whole, optimizer, 0, 5)
    stopped, optimizer = made()
    steps(stopped, optimizer, 0, 2)
    kept: dict[str, Any] = optimizer.state_dict()
    resumed, fresh = made()
    with torch.no_grad():
        for param, value in zip(resumed, stopped, strict=True):
            param.copy_(value)
    fresh.load_state_dict(kept)
    assert [group["parts"] for group in fresh.param_groups] == [1, 2]
    steps(resumed, fresh, 2, 5)
    for mine, other in zip(resumed, whole, strict=True):
        assert torch.equal(mine, other)


def test_without_a_gradient_nothing_moves_and_with_none_at_all_it_only_decays() -> None:
    params = matrices([(4, 6), (4, 6)])
    before = [param.detach().clone() for param in params]
    params[1].grad = torch.zeros(4, 6)
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert params[0] not in optimizer.state
    torch.testing.assert_close(params[1].detach(), before[1] * (1 - 0.1 * 0.5))


def test_vectors_are_refused() -> None:
    with pytest.raises(BenchError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))])
