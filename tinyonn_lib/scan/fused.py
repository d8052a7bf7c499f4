"""The hooks of one module of fused experts, as transformers 5 holds them: 3-D parameters, no linear to hook.

Routing is read from the module's arguments. The gradient of each expert comes from `.grad` where there is one; else
the module's own forward is taken again on the detached inputs with a graph to its weights, so that any family's
activation and layout come out exactly: one forward and backward of the module more, one layer's gradient in memory.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.calls import Call, flat
from tinyonn_lib.scan.rownorms import full_precision, row_squares_grad
from tinyonn_lib.scan.watch import Watch
from tinyonn_lib.scan.weight import graph_task

PARTS = ("gate_up_proj", "down_proj")


class _Bare(nn.Module):
    """Experts without any hook on them: neither ours nor the user's see the forward that is taken again."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = self.experts.forward(*args)
        return output


class Experts:
    """Hooks and host-side bookkeeping of one module of fused experts; the same outside as `weight.Weight`."""

    def __init__(self, name: str, module: nn.Module, rows: Tensor, total: Tensor, act: Tensor, watch: Watch) -> None:
        """
        Args:
            name: of the module.
            module: with parameters `gate_up_proj` and `down_proj`, first axis the expert.
            rows: (4, experts) scratch: tokens, routing weights, squares of the two gradients.
            total: 0-dim, squared norm of both gradients.
            act: 0-dim, squared norm of the input.
            watch: what all share.
        """
        self.name, self.module, self.watch = name, module, watch
        self.modules = {name: module}
        self.rows, self.total, self.act = rows, total, act
        self.parameter: Any = getattr(module, PARTS[0])
        self.parameters: list[nn.Parameter] = [getattr(module, part) for part in PARTS]
        self.method = "none"
        self._signature = inspect.signature(module.forward)
        self._alive: weakref.WeakSet[Call] = weakref.WeakSet()
        self.read_grad = False
        self.reset()

    def attach(self) -> list[RemovableHandle]:
        """Install all hooks; the caller removes the handles."""
        handles: list[RemovableHandle] = [
            self.module.register_forward_hook(self._forward, with_kwargs=True, prepend=True)
        ]
        trainable = all(parameter.requires_grad for parameter in self.parameters)
        self.read_grad = trainable and self.watch.gradients and self.watch.method in ("auto", "grad")
        if self.read_grad:
            for place, parameter in enumerate(self.parameters):
                handles.append(parameter.register_post_accumulate_grad_hook(partial(self._accumulated, place)))
        return handles

    def reset(self) -> None:
        """Forget the sample in progress (host side; the bank clears the scratch). Its hooks fire no more."""
        self.release()
        self.tokens: list[int | Tensor] = []
        self.fired: Counter[str] = Counter()
        self.arrived: Counter[str] = Counter()
        self.method = "none"
        self._held: list[Call] = []
        self._first = False
        self._from_grad: bool | None = None

    def release(self) -> None:
        """Remove the tensor hooks of every call whose graph is still alive."""
        for call in list(self._alive):
            call.release()

    def pending(self) -> bool:
        """Whether anything of a sample in progress is held."""
        return bool(self.fired)

    def complete(self, calls: int) -> bool:
        """Whether every gradient of the sample in progress has arrived, each once per call."""
        if self._from_grad:
            return self.arrived["weight"] == calls * len(self.parameters)
        return self.arrived["outputs"] == calls

    def finish(self) -> None:
        """Take the norms of what has arrived, should that not have happened yet."""
        if self._held:
            self._take()

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not self.watch.on:
            self.watch.leaf(output)
            return
        x, index, weights = self._arguments(args, kwargs)
        recomputing = graph_task() != -1
        if not recomputing:
            mask, tokens = self.watch.mask(x.shape[:-1], x.device, self.name)
            self.fired[self.name] += 1
            self.tokens.append(tokens)
            self._count(x, index, weights, mask)
        if not self.watch.gradients or not torch.is_grad_enabled():
            return
        self.watch.leaf(output)
        if recomputing and self._first:
            return
        if self._from_grad is None:
            self._from_grad = self.read_grad and all(p.grad is None and p.requires_grad for p in self.parameters)
        if self._from_grad:
            return
        self._first = self._first or not recomputing
        call = Call(self.name)
        call.extra = (x.detach(), index, weights.detach())
        call.waiting = 1
        call.handles.append(output.register_hook(partial(self._arrived, call)))
        self._alive.add(call)

    def _arguments(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        values = list(self._signature.bind(*args, **kwargs).arguments.values())
        if len(values) < 3 or not all(isinstance(value, Tensor) for value in values[:3]):
            raise BenchError(
                f"{self.name}: these fused experts do not take (hidden states, expert index, routing weights) and "
                "cannot be observed; leave them out of the targets"
            )
        return values[0], values[1], values[2]

    def _count(self, x: Tensor, index: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        experts = self.rows.shape[1]
        values = flat(x)
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
        keep = norms.new_ones(norms.shape) if mask is None else mask.to(norms)
        self.act += (norms * keep).square_().sum()
        # One slot more: routers mark "nobody" by the number of experts.
        into = self.rows.new_zeros(2, experts + 1)
        chosen = index.reshape(-1)
        keep = keep.to(into).repeat_interleave(index.shape[-1])
        into[0].index_add_(0, chosen, keep)
        into[1].index_add_(0, chosen, weights.detach().reshape(-1).to(into) * keep)
        self.rows[:2] += into[:, :experts]

    def _arrived(self, call: Call, grad: Tensor) -> None:
        if not call.waiting:
            self.arrived["outputs"] += 1  # a second backward: more than expected
            return
        call.waiting -= 1
        call.g = grad.detach()
        self._held.append(call)
        self.arrived["outputs"] += 1
        if len(self._held) == self.watch.calls:
            self._take()

    def _take(self) -> None:
        """The module's own forward again, each parameter a fresh leaf; gradients of several calls add up."""
        held, self._held = self._held, []
        leaves = {f"experts.{name}": getattr(self.module, name).detach().requires_grad_() for name in PARTS}
        others = {f"experts.{name}": p.detach() for name, p in self.module.named_parameters() if name not in PARTS}
        bare = _Bare(self.module)
        sums: list[Tensor] = []
        for call in held:
            with torch.enable_grad(), full_precision(call.extra[0].device):
                output = torch.func.functional_call(bare, {**leaves, **others}, call.extra)
                grads = torch.autograd.grad(output, list(leaves.values()), call.g)
            sums = list(grads) if not sums else [a + b for a, b in zip(sums, grads, strict=True)]
            call.clear()
        for place, grad in enumerate(sums):
            squares = row_squares_grad(grad)
            self.rows[2 + place] += squares
            self.total += squares.sum()
        self.method = "again"
        self.watch.used["again"] += 1

    def _accumulated(self, place: int, weight: nn.Parameter) -> None:
        """`.grad` of one parameter is complete: read it now, before clipping or the optimiser change it."""
        if not self._from_grad or weight.grad is None:
            return
        self.rows[2 + place].copy_(row_squares_grad(weight.grad))
        self.arrived["weight"] += 1
        if self.arrived["weight"] % len(self.parameters) == 0:
            self.total.copy_(self.rows[2:4].sum())
            self.watch.used["grad"] += 1
        self.method = "grad"
