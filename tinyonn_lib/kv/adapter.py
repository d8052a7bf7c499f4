"""One adapter: a teacher's keys (or values) of one token → the student's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError

Kind = Literal["mlp", "linear", "residual"]
Activation = Literal["silu", "relu", "gelu"]
Init = Literal["xavier", "kaiming", "normal"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}
NORMAL_STD = 0.02
"""Of `init_method="normal"` (document 003, §Initialisation)."""


def adapter(
    width: int,
    student_width: int,
    *,
    kind: str = "mlp",
    mlp_ratio: float = 1.0,
    dropout: float = 0.1,
    init_method: str = "xavier",
    layernorm: bool = True,
    activation: str = "silu",
) -> nn.Module:
    """The document's bottleneck (003, §Architecture), its linear predecessor, or the sum of both.

    Args:
        width: of what it reads; student_width: of what it gives.
        kind: "mlp": LayerNorm → Linear → activation → Dropout → Linear; "linear": one Linear; "residual": a Linear and
            beside it an MLP whose last layer starts at 0, so that it begins as the Linear.
        mlp_ratio: hidden width ÷ `width`, rounded, at least 1.

    Raises:
        BenchError: a name or a number that is none of these.
    """
    _check(kind, mlp_ratio, dropout, init_method, activation)
    if kind == "linear":
        return _initialised(nn.Linear(width, student_width), init_method)
    hidden = max(1, round(mlp_ratio * width))
    mlp = nn.Sequential(
        nn.LayerNorm(width) if layernorm else nn.Identity(),
        nn.Linear(width, hidden),
        ACTIVATIONS[activation](),
        nn.Dropout(dropout),
        nn.Linear(hidden, student_width),
    )
    if kind == "mlp":
        return _initialised(mlp, init_method)
    return Residual(_initialised(nn.Linear(width, student_width), init_method), _initialised(mlp, init_method))


class Residual(nn.Module):
    """linear(x) + mlp(x); the MLP says nothing at first."""

    def __init__(self, linear: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.linear, self.mlp = linear, mlp
        self.hush()

    def hush(self) -> None:
        """Set the MLP's last layer to 0."""
        last = self.mlp[-1]  # type: ignore[index]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.mlp(x)


def _initialised(module: nn.Module, init_method: str) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            if init_method == "xavier":
                nn.init.xavier_uniform_(part.weight)
            elif init_method == "kaiming":
                nn.init.kaiming_uniform_(part.weight, nonlinearity="relu")
            else:
                nn.init.normal_(part.weight, std=NORMAL_STD)
            nn.init.zeros_(part.bias)
    return module


def _check(kind: str, mlp_ratio: float, dropout: float, init_method: str, activation: str) -> None:
    for name, value, known in (
        ("kind", kind, get_args(Kind)),
        ("init_method", init_method, get_args(Init)),
        ("activation", activation, get_args(Activation)),
    ):
        if value not in known:
            raise BenchError(f"Unknown {name} '{value}': choose one of {', '.join(known)}.")
    if not 0 < mlp_ratio < float("inf"):
        raise BenchError(f"mlp_ratio is {mlp_ratio}: give a number above 0, such as 0.5, 1 or 2.")
    if not 0 <= dropout < 1:
        raise BenchError(f"dropout is {dropout}: give a share from 0 to below 1.")


def dead_units(module: nn.Module, x: Tensor) -> float:
    """Share of hidden units that are never on: their activation is within 1e-3 of 0 for every row of `x`.

    Args:
        x: `(n, width)`. A linear adapter has no hidden units: NaN.
    """
    mlp = module.mlp if isinstance(module, Residual) else module
    if not isinstance(mlp, nn.Sequential):
        return float("nan")
    with torch.no_grad():
        hidden = mlp[2](mlp[1](mlp[0](x)))
    return float((hidden.abs().flatten(0, -2).amax(0) < 1e-3).float().mean())
