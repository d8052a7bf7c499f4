"""What a forward leaves behind until its gradients have arrived, and the inputs that several linears share."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.scan.rownorms import gram


class Input:
    """An input X of linears, with what is computed from it once for all that read it (gate and up; q, k and v).

    Attributes:
        x: (tokens, d_in), detached, in the type in which the product was taken.
        readers: how many linears read it.
    """

    __slots__ = ("__weakref__", "_gram", "_joined", "_key", "_source", "_square", "_version", "readers", "x")

    def __init__(self, source: Tensor, dtype: torch.dtype) -> None:
        # Detached: a hook that held a tensor with its graph would keep the graph alive through a cycle.
        self._source = source.detach()
        self._key = _identity(source, dtype)
        self._version = version(source)
        x = flat(source)
        # Autocast rounds the input to the output's type, and the gradient follows that.
        self.x = x if x.dtype == dtype else x.to(dtype)
        self.readers = 0
        self._gram: Tensor | None = None
        self._square: Tensor | None = None
        self._joined: tuple[list[weakref.ref[Input]], Input] | None = None

    def same(self, source: Tensor, dtype: torch.dtype) -> bool:
        """Whether this is that tensor. We hold its memory, so equal addresses mean equal data."""
        return self._key == _identity(source, dtype)

    @property
    def changed(self) -> bool:
        """Whether somebody has written into it since."""
        return version(self._source) != self._version

    @property
    def has_gram(self) -> bool:
        """Whether the Gram matrix is there already."""
        return self._gram is not None

    def gram(self) -> Tensor:
        """X X^T, computed once."""
        if self._gram is None:
            self._gram = gram(self.x)
        return self._gram

    def square(self, mask: Tensor | None) -> Tensor:
        """Squared Frobenius norm of the tokens that count, 0-dim, computed once."""
        if self._square is None:
            x = flat(self._source)
            wide = torch.promote_types(x.dtype, torch.float32)
            if mask is None:
                self._square = torch.linalg.vector_norm(x, dtype=wide).square_()
            else:
                norms = torch.linalg.vector_norm(x, dim=1, dtype=wide)
                self._square = norms.masked_fill_(~mask, 0.0).square_().sum()
        return self._square


def joined(inputs: Sequence[Input]) -> Input:
    """Inputs of several calls as one, tokens after tokens: the norm of a sum of gradients needs all of them together.

    Linears that shared their inputs share the result, too.
    """
    first = inputs[0]
    if len(inputs) == 1:
        return first
    if first._joined is not None:
        known, result = first._joined
        if len(known) == len(inputs) and all(ref() is each for ref, each in zip(known, inputs, strict=True)):
            return result
    x = torch.cat([each.x for each in inputs])
    result = Input(x, x.dtype)
    result.readers = first.readers
    first._joined = ([weakref.ref(each) for each in inputs], result)
    return result


class Call:
    """One forward of one module.

    Attributes:
        member: which module of the weight ran.
        input: X of a linear.
        ids: (tokens,) token ids of an embedding.
        g: gradient of the output, (tokens, d_out).
        h: the neurons as the model has them, (tokens, neurons), where they are a target.
        mask: bool (tokens,) or None.
        version: of `h` or `ids` when they were read.
        waiting: gradients still to come.
    """

    __slots__ = ("__weakref__", "extra", "g", "h", "handles", "ids", "input", "mask", "member", "version", "waiting")

    def __init__(self, member: str) -> None:
        self.member = member
        self.input: Input | None = None
        self.ids: Tensor | None = None
        self.g: Tensor | None = None
        self.h: Tensor | None = None
        self.mask: Tensor | None = None
        self.version = 0
        self.extra: tuple[Tensor, ...] = ()
        self.waiting = 0
        self.handles: list[RemovableHandle] = []

    def clear(self) -> None:
        """Let go of the tensors: everything has been counted."""
        self.input = self.ids = self.g = self.h = None
        self.extra = ()

    def release(self) -> None:
        """The observer leaves: no hook of ours stays on a tensor, even if the graph lives on."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.waiting = 0
        self.clear()


def version(t: Tensor) -> int:
    """How often the tensor, or any that shares its memory, was written into."""
    return 0 if t.is_inference() else t._version


def flat(t: Tensor) -> Tensor:
    """(..., d) -> (tokens, d), without its graph."""
    t = t.detach()
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a layer, passed by position or by name; None when there is none to see."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    return value if isinstance(value, Tensor) else None


def _identity(t: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return t.data_ptr(), t.shape, t.stride(), t.dtype, version(t), dtype
