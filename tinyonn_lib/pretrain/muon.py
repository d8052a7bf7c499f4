"""Muon for many small matrices: the Newton–Schulz iterations of all matrices of one shape in one batch.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). `torch.optim.Muon` takes one matrix
after the other, which for a small model costs more than the gradients, and no stack of experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # drives singular values into about [0.7, 1.2] within five iterations
_ITERATIONS = 5
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. The same updates as `torch.optim.Muon` with Nesterov, batched by shape.

    Args:
        params: matrices (rows, columns), or stacks of them (..., rows, columns) as transformers keeps experts. A group
            may say `parts`: how many matrices lie one below the other in each, 2 for `gate_up_proj`.
        lr: peak rate; a matrix that is r times taller than wide gets √r of it.
        momentum: of the running mean of the gradients.
        weight_decay: decoupled, times lr.

    Raises:
        BenchError: a parameter with fewer than two dimensions.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        if any(param.ndim < 2 for group in self.param_groups for param in group["params"]):
            raise BenchError("Muon takes matrices only: give norms and biases to AdamW.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients in `.grad`; parameters without one stay."""
        alike: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor, float, float]]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(buffer, group["momentum"])
                rows, columns = param.shape[-2] // group["parts"], param.shape[-1]
                matrices = update.reshape(-1, rows, columns)
                wide = matrices if rows <= columns else matrices.transpose(1, 2)
                factor = group["lr"] * max(1.0, rows / columns) ** 0.5
                alike[(wide.shape[1], wide.shape[2])].append((param, wide, factor, group["lr"] * group["weight_decay"]))
        for found in alike.values():
            orthogonal = newton_schulz(torch.cat([wide for _, wide, _, _ in found]))
            for (param, _, factor, decay), piece in zip(
                found, orthogonal.split([len(wide) for _, wide, _, _ in found]), strict=True
            ):
                param.mul_(1 - decay)
                rows_last = piece if param.shape[-1] == piece.shape[-1] else piece.transpose(1, 2)
                param.add_(rows_last.reshape(param.shape), alpha=-factor)


def newton_schulz(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: (n, rows ≤ columns, columns), computed in bfloat16.

    Source: Jordan et al. (2024), the quintic iteration.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
