"""One forward of one FFN, from its inputs to the squared norms of its weight gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.scan.rownorms import choose, gram, row_squares_gram, row_squares_tiles

WEIGHTS = ("gate", "up", "down")


class Call:
    """What one forward of one FFN leaves behind until its gradients have arrived.

    Everything kept here is detached: a hook that held a tensor with its graph would keep the graph alive
    through a cycle the garbage collector cannot see.

    Attributes:
        x: inputs by weight name, (tokens, d_in) each; gate and up share one tensor where they read the same one.
        g: gradients of the outputs by weight name, (tokens, d_out).
        h: input of down as the model has it, (tokens, neurons).
        mask: bool (tokens,) or None.
        tokens: how many tokens count (an int, or a 0-dim tensor when a mask decides).
        waiting: gradients still to come.
        sources: identity of the input by name of gate and up (valid within the forward).
    """

    __slots__ = ("__weakref__", "g", "h", "handles", "mask", "sources", "tokens", "waiting", "x")

    def __init__(self) -> None:
        self.x: dict[str, Tensor] = {}
        self.g: dict[str, Tensor] = {}
        self.h: Tensor | None = None
        self.mask: Tensor | None = None
        self.tokens: int | Tensor = 0
        self.waiting = 0
        self.sources: dict[str, int] = {}
        self.handles: list[RemovableHandle] = []

    def clear(self) -> None:
        """Let go of the tensors: everything has been counted."""
        self.x.clear()
        self.g.clear()
        self.h = None

    def release(self) -> None:
        """The observer leaves: no hook of ours stays on a tensor, even if the graph lives on."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.waiting = 0
        self.clear()


def flat(t: Tensor) -> Tensor:
    """(..., d) -> (tokens, d), without its graph."""
    t = t.detach()
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def operand(x: Tensor, output: Tensor) -> Tensor:
    """X as the matmul saw it: autocast rounds the input to the output's type, and the gradient follows that."""
    x = flat(x)
    return x if x.dtype == output.dtype else x.to(output.dtype)


def squares_from_inputs(calls: Sequence[Call], method: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Squared norms of gate rows, up rows and down columns of the gradient *summed* over `calls`.

    Several calls are one sample under gradient accumulation: the norm of a sum needs all X and G together.

    Returns:
        ({"gate", "up", "down"} -> (neurons,) squares in fp32, or fp64 for fp64 models; the same keys -> method used).
    """
    one = len(calls) == 1

    def joined(kind: str, name: str) -> Tensor:
        parts = [getattr(call, kind)[name] for call in calls]
        return parts[0] if one else torch.cat(parts)

    x_gate = joined("x", "gate")
    shared = all(call.x["gate"] is call.x["up"] for call in calls)
    device = x_gate.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        used: dict[str, str] = {}
        squares: dict[str, Tensor] = {}
        k: Tensor | None = None
        for name in ("gate", "up"):
            x, g = x_gate if shared else joined("x", name), joined("g", name)
            used[name] = _pick(method, x, g, 2 if shared else 1)
            if used[name] == "gram":
                k = k if shared and k is not None else gram(x)
                squares[name] = row_squares_gram(k, x, g)
            else:
                squares[name] = row_squares_tiles(x, g)
        # A neuron is a column of down: input and output gradient change places.
        a, g = joined("x", "down"), joined("g", "down")
        used["down"] = _pick(method, g, a, 1)
        squares["down"] = row_squares_gram(gram(g), g, a) if used["down"] == "gram" else row_squares_tiles(g, a)
    return squares, used


def _pick(method: str, x: Tensor, g: Tensor, sharing: int) -> str:
    if method in ("gram", "tiles"):
        return method
    return choose(x.shape[0], x.shape[1], g.shape[1], sharing)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a linear layer, passed by position or by name; None when there is none to see."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    return value if isinstance(value, Tensor) else None
