"""The hooks of one weight: join X and G of the modules that own it, in whatever order they come."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.audit import own_forward
from tinyonn_lib.scan.bank import forward_sums, saliency_sums
from tinyonn_lib.scan.calls import Call, Input, first_input, flat, joined, version
from tinyonn_lib.scan.rownorms import (
    choose,
    column_squares_grad,
    embedding_squares,
    full_precision,
    gram,
    row_squares_grad,
    row_squares_gram,
    row_squares_tiles,
)
from tinyonn_lib.scan.watch import Watch

# -1 outside a backward. Under gradient checkpointing the forward runs again inside one.
graph_task = torch._C._current_graph_task_id


@dataclass
class Sinks:
    """Where the sums of one weight go: views into a bank's scratch.

    Attributes:
        total: 0-dim, squared norm of the whole gradient.
        act: 0-dim, squared norm of the input; None where only neurons are watched.
        rows: (d_out,) each, squared row norms; several when the weight serves several targets.
        columns: (d_in,), squared column norms (down of an FFN).
        outputs: (>= 2, d_out), |y| and top; for an embedding (1, vocabulary), occurrences.
        top: how many outputs of a token are its top.
        neurons: (>= 5, d_in), the forward sums and saliency of the neurons that this weight reads.
        neurons_top: how many neurons of a token are its top.
        neurons_act: 0-dim, squared norm of the neurons.
    """

    total: Tensor
    act: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    columns: Tensor | None = None
    outputs: Tensor | None = None
    top: int = 0
    neurons: Tensor | None = None
    neurons_top: int = 0
    neurons_act: Tensor | None = None


class Weight:
    """Hooks and host-side bookkeeping of one weight.

    Attributes:
        name: of its first module.
        modules: all modules that own this very parameter, by name.
        tokens, grad_tokens: counts of the sample in progress (ints, and tensors where a mask decides).
        fired: how often each module ran in the sample.
        method: how the sample's norms were taken.
    """

    def __init__(self, modules: dict[str, nn.Module], sinks: Sinks, watch: Watch) -> None:
        self.name, self.modules, self.sinks, self.watch = next(iter(modules)), modules, sinks, watch
        first: Any = next(iter(modules.values()))
        self.parameter: Any = getattr(first, "weight", None)
        self.read_grad = False
        self._alive: weakref.WeakSet[Call] = weakref.WeakSet()
        self.reset()

    def attach(self) -> list[RemovableHandle]:
        """Install all hooks; the caller removes the handles."""
        handles: list[RemovableHandle] = []
        for name, module in self.modules.items():
            hook = self._embedding if isinstance(module, nn.Embedding) else self._linear
            # First of all: a hook of the user's that changes the output changes what its gradient belongs to.
            handles.append(module.register_forward_hook(partial(hook, name), with_kwargs=True, prepend=True))
        trainable = isinstance(self.parameter, nn.Parameter) and self.parameter.requires_grad
        self.read_grad = trainable and self.watch.gradients and self.watch.method in ("auto", "grad")
        if self.read_grad:
            handles.append(self.parameter.register_post_accumulate_grad_hook(self._accumulated))
        return handles

    def reset(self) -> None:
        """Forget the sample in progress (host side; the bank clears the scratch). Its hooks fire no more."""
        self.release()
        self.tokens: list[int | Tensor] = []
        self.fired: Counter[str] = Counter()
        self.arrived: Counter[str] = Counter()  # gradients of outputs, of the neurons, of the weight itself
        self.method = "none"
        self._held: list[Call] = []
        self._first: set[str] = set()  # modules whose hooks sit on the outputs of the first pass
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
        if self.sinks.neurons is not None and self.arrived["neurons"] != calls:
            return False
        if self._from_grad:
            return self.arrived["weight"] == calls
        return self.arrived["outputs"] == calls * len(self.modules)

    def finish(self) -> None:
        """Take the norms of what has arrived, should that not have happened yet."""
        if self._held:
            self._take()

    def _linear(self, member: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not self.watch.on:
            self.watch.leaf(output)
            return
        x = first_input(args, kwargs)
        if x is None:
            raise BenchError(f"{member} was called without a tensor: it cannot be observed")
        read = self.watch.input(x, output.dtype)
        mask: Tensor | None = None
        recomputing = graph_task() != -1
        if not recomputing or self.sinks.neurons is not None:
            mask, tokens = self.watch.mask(x.shape[:-1], x.device, member)
        if not recomputing:
            self._count(member, tokens)
            if self.sinks.act is not None and member == self.name:
                self.sinks.act += read.square(mask)
            if self.sinks.outputs is not None and member == self.name:
                forward_sums(flat(output), self.sinks.top, mask, self.sinks.outputs, moments=False)
            if self.sinks.neurons is not None:
                square = forward_sums(flat(x), self.sinks.neurons_top, mask, self.sinks.neurons)
                if self.sinks.neurons_act is not None and square is not None:
                    self.sinks.neurons_act += square
        call = self._open(member, output, recomputing)
        if call is None:
            return
        if self.sinks.neurons is not None:
            if recomputing and mask is not None and self.fired[member] - self.arrived["neurons"] > 1:
                raise BenchError(
                    f"{member}: two forwards with padding or ignored labels wait for one backward under reentrant "
                    "checkpointing, and which mask belongs to which cannot be told; set use_reentrant=False"
                )
            call.h, call.mask, call.version = flat(x), mask, version(x)
            self._expect(call, "neurons", x)
        if not self._from_grad:
            call.input = read
            read.readers += 1
            self._expect(call, "outputs", output)

    def _embedding(self, member: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not self.watch.on:
            self.watch.leaf(output)
            return
        ids = first_input(args, kwargs)
        if ids is None:
            raise BenchError(f"{member} was called without token ids: it cannot be observed")
        recomputing = graph_task() != -1
        if not recomputing:
            mask, tokens = self.watch.mask(ids.shape, ids.device, member)
            self._count(member, tokens)
            if self.sinks.act is not None:
                self.sinks.act += tokens  # the input is one-hot
            if self.sinks.outputs is not None:
                seen = self.sinks.outputs.new_ones(ids.numel()) if mask is None else mask.to(self.sinks.outputs)
                self.sinks.outputs[0].index_add_(0, ids.reshape(-1), seen)
        call = self._open(member, output, recomputing)
        if call is not None and not self._from_grad:
            call.ids, call.version = ids.reshape(-1), version(ids)
            padding = getattr(module, "padding_idx", None)
            call.mask = None if padding is None else call.ids != padding  # autograd gives this row no gradient
            self._expect(call, "outputs", output)

    def _count(self, member: str, tokens: int | Tensor) -> None:
        self.fired[member] += 1
        # Activations are those of the first module: where a head is tied to it, the embedding's.
        if member == self.name:
            self.tokens.append(tokens)

    def _open(self, member: str, output: Tensor, recomputing: bool) -> Call | None:
        """A call that waits for gradients; None when none are to come, or when the first pass waits already."""
        if not self.watch.gradients or not torch.is_grad_enabled():
            return None
        self.watch.leaf(output)
        if recomputing and member in self._first:
            return None  # non-reentrant checkpointing: hooks on outputs of the first pass are the ones that fire
        if self._from_grad is None:
            # A gradient left from before would be added to; then only X and G know this sample's own.
            self._from_grad = self.read_grad and self.parameter.requires_grad and self.parameter.grad is None
        if not self._from_grad and own_forward(self.modules[member]):
            raise BenchError(
                f"{member}: {type(self.modules[member]).__name__} has a forward of its own, so only a fresh .grad has "
                "its norms: call zero_grad(set_to_none=True) before the forward, and leave method at auto"
            )
        if self._from_grad and self.sinks.neurons is None:
            return None
        if not recomputing:
            self._first.add(member)
        call = Call(member)
        self._alive.add(call)
        return call

    def _expect(self, call: Call, what: str, tensor: Tensor) -> None:
        call.waiting += 1
        call.handles.append(tensor.register_hook(partial(self._arrived, call, what)))

    def _arrived(self, call: Call, what: str, grad: Tensor) -> None:
        if not call.waiting:
            self.arrived["neurons" if what == "neurons" else "outputs"] += 1  # a second backward: more than expected
            return
        call.waiting -= 1
        if what == "outputs":
            call.g = flat(grad)
        elif call.h is not None and self.sinks.neurons is not None:
            self._unchanged(version(call.h) != call.version)
            saliency_sums(call.h, flat(grad), call.mask, self.sinks.neurons[4])
            self.arrived["neurons"] += 1
            call.h = None
        if call.waiting == 0 and not self._from_grad:
            self._held.append(call)
            self.arrived["outputs"] += 1
            if len(self._held) == self.watch.calls * len(self.modules):
                self._take()

    def _take(self) -> None:
        """Squared norms of the gradient *summed* over the calls held (accumulation, tied modules)."""
        held, self._held = self._held, []
        self._unchanged(any(c.input is not None and c.input.changed for c in held))
        self._unchanged(any(c.ids is not None and version(c.ids) != c.version for c in held))
        with full_precision(self.sinks.total.device), torch.no_grad():
            rows, columns = self._squares(held)
        self._add(rows, columns)
        self.watch.used[self.method] += 1
        for call in held:
            call.clear()

    def _unchanged(self, changed: bool) -> None:
        if changed:
            raise BenchError(
                f"{self.name}: its input was changed in place between forward and backward, so the gradient of its "
                "frozen weight cannot be told; leave it out of the targets, or make it trainable"
            )

    def _squares(self, held: Sequence[Call]) -> tuple[Tensor | None, Tensor | None]:
        rows: Tensor | None = None
        columns: Tensor | None = None
        linear = [call for call in held if call.input is not None]
        embedded = [call for call in held if call.ids is not None]
        if linear:
            x, g = joined([call.input for call in linear if call.input is not None]), _outputs(linear)
            if self.sinks.columns is not None:
                # A neuron is a column of down: input and output gradient change places.
                self.method = self._choose(g, x.x, 1)
                columns = row_squares_gram(gram(g), g, x.x) if self.method == "gram" else row_squares_tiles(g, x.x)
            if self.sinks.rows or columns is None:
                before = self.method if columns is not None else ""
                rows = self._row_squares(x, g)
                self.method = self.method if before in ("", self.method) else "mixed"
        if embedded:
            ids = torch.cat([call.ids for call in embedded if call.ids is not None])
            parts = [(call.g, call.mask) for call in embedded if call.g is not None]
            g_in = torch.cat([g if mask is None else g.masked_fill(~mask[:, None], 0.0) for g, mask in parts])
            head = (x.x, g, rows) if linear and rows is not None else None
            rows = embedding_squares(ids, g_in, int(self.parameter.shape[0]), head)
            self.method = self.method if linear else "tiles"
        return rows, columns

    def _row_squares(self, x: Input, g: Tensor) -> Tensor:
        self.method = self._choose(x.x, g, math.inf if x.has_gram else max(1, x.readers))
        return row_squares_gram(x.gram(), x.x, g) if self.method == "gram" else row_squares_tiles(x.x, g)

    def _choose(self, x: Tensor, g: Tensor, sharing: float) -> str:
        if self.watch.method in ("gram", "tiles"):
            return self.watch.method
        return choose(x.shape[0], x.shape[1], g.shape[1], sharing)

    def _accumulated(self, weight: nn.Parameter) -> None:
        """`.grad` is complete: read it now, before clipping or the optimiser change it."""
        if not self._from_grad or weight.grad is None:
            return
        columns = None if self.sinks.columns is None else column_squares_grad(weight.grad)
        rows = row_squares_grad(weight.grad) if self.sinks.rows or columns is None else None
        if self.arrived["weight"]:  # accumulated further: what was read before is part of it
            self._clear()
        self._add(rows, columns)
        self.arrived["weight"] += 1
        self.method = "grad"
        self.watch.used["grad"] += 1

    def _add(self, rows: Tensor | None, columns: Tensor | None) -> None:
        best = columns if rows is None else rows
        if rows is not None:
            for into in self.sinks.rows:
                into += rows
        if columns is not None and self.sinks.columns is not None:
            self.sinks.columns += columns
        if best is not None:
            self.sinks.total += best.sum()

    def _clear(self) -> None:
        sums = [*self.sinks.rows, self.sinks.total]
        for into in sums if self.sinks.columns is None else [*sums, self.sinks.columns]:
            into.zero_()


def _outputs(calls: Sequence[Call]) -> Tensor:
    parts = [call.g for call in calls if call.g is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
