"""The hooks of one FFN layer: join X, h and the gradients of its three linears, in whatever order they come."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.bank import SALIENCY, SQUARES, forward_sums, saliency_sums
from tinyonn_lib.scan.calls import WEIGHTS, Call, first_input, flat, operand, squares_from_inputs
from tinyonn_lib.scan.rownorms import column_squares_grad, row_squares_grad

# -1 outside a backward. Under gradient checkpointing the forward runs again inside one.
_graph_task = torch._C._current_graph_task_id


class FFNLike(Protocol):
    """A gated FFN as the scanner needs it; `tinyonn_lib.lm.models.FFN` is one."""

    @property
    def layer(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def gate(self) -> nn.Module: ...
    @property
    def up(self) -> nn.Module: ...
    @property
    def down(self) -> nn.Module: ...


@dataclass
class Watch:
    """What all layers of one observer share.

    Attributes:
        enabled: False makes every hook return at once.
        gradients: whether samples have a backward.
        method: `auto`, `grad`, `gram` or `tiles`.
        calls: forward/backward pairs that make one sample.
        attention, labels: (batch, positions) of the forward in progress, or None.
        used: how often each method was used.
    """

    enabled: bool = True
    gradients: bool = True
    method: str = "auto"
    calls: int = 1
    attention: Tensor | None = None
    labels: Tensor | None = None
    used: Counter[str] = field(default_factory=Counter)
    _masks: dict[tuple[int, torch.device], tuple[Tensor | None, int | Tensor]] = field(default_factory=dict)

    def begin(self, attention: Tensor | None, labels: Tensor | None) -> None:
        """A new forward of the model starts, with these masks."""
        self.attention, self.labels = attention, labels
        self._masks.clear()

    def mask(self, h: Tensor, name: str) -> tuple[Tensor | None, int | Tensor]:
        """Which of the layer's tokens count, and how many: (bool (tokens,) or None for all, count)."""
        tokens = h.shape[:-1].numel()
        if self.attention is None and self.labels is None:
            return None, tokens
        key = (tokens, h.device)
        if key not in self._masks:
            self._masks[key] = self._build(tokens, h.device, name)
        return self._masks[key]

    def _build(self, tokens: int, device: torch.device, name: str) -> tuple[Tensor | None, int | Tensor]:
        keep: Tensor | None = None
        for source, ignored in ((self.attention, 0), (self.labels, -100)):
            if source is None:
                continue
            positions = tokens // source.shape[0]
            if positions * source.shape[0] != tokens or positions > source.shape[1]:
                raise BenchError(
                    f"{name} saw {tokens} tokens, the model's mask is {tuple(source.shape)}: this layer does not "
                    "see every position once and cannot be counted per token; leave it out of the targets"
                )
            # While generating with a cache the mask covers the past too: the newest positions are the last.
            part = (source[:, source.shape[1] - positions :] != ignored).reshape(-1).to(device)
            keep = part if keep is None else keep & part
        if keep is None or (device.type == "cpu" and bool(keep.all())):
            return None, tokens  # only on the CPU: asking the device would stall the step
        return keep, keep.sum()


class Layer:
    """Hooks and host-side bookkeeping of one FFN.

    Attributes:
        rows: this layer's scratch, (8, neurons), a view into the bank.
        tokens, grad_tokens: counts of the sample in progress (ints, and tensors where a mask decides).
    """

    def __init__(self, ffn: FFNLike, rows: Tensor, top: int, watch: Watch) -> None:
        self.ffn, self.rows, self.top, self.watch = ffn, rows, top, watch
        self.modules: dict[str, Any] = {"gate": ffn.gate, "up": ffn.up, "down": ffn.down}
        self.weights: dict[str, Any] = {name: getattr(m, "weight", None) for name, m in self.modules.items()}
        self.read_grad = False
        self.alive: weakref.WeakSet[Call] = weakref.WeakSet()
        self.current: Call | None = None
        self.reset()

    def attach(self) -> list[RemovableHandle]:
        """Install all hooks of this layer; the caller removes the handles."""
        handles: list[RemovableHandle] = []
        for name in ("gate", "up"):
            hook = partial(self._projection, name)
            handles.append(self.modules[name].register_forward_hook(hook, with_kwargs=True))
        handles.append(self.modules["down"].register_forward_hook(self._down, with_kwargs=True))
        trainable = all(isinstance(w, nn.Parameter) and w.requires_grad for w in self.weights.values())
        self.read_grad = trainable and self.watch.gradients and self.watch.method in ("auto", "grad")
        if self.read_grad:
            for name in WEIGHTS:
                hook = partial(self._accumulated, name)
                handles.append(self.weights[name].register_post_accumulate_grad_hook(hook))
        return handles

    def reset(self) -> None:
        """Forget the sample in progress (host side; the bank clears the scratch)."""
        self.tokens: list[int | Tensor] = []
        self.grad_tokens: list[int | Tensor] = []
        self.fired: Counter[str] = Counter()
        self.held: list[Call] = []
        self.from_grad: bool | None = None

    def release(self) -> None:
        """Remove the tensor hooks of every call whose graph is still alive."""
        for call in list(self.alive):
            call.release()
        self.current = None

    def complete(self) -> bool:
        """Whether every gradient of the sample in progress has arrived, each once per call."""
        fired, calls = self.fired, self.watch.calls
        names = [f"grad of {name}" for name in WEIGHTS] if self.from_grad else ["gradients"]
        return fired["dh"] == calls and all(fired[name] == calls for name in names)

    def _projection(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        watch = self.watch
        if not watch.enabled:
            return
        recomputing = _graph_task() != -1
        if not recomputing:
            self.fired[name] += 1
        if not watch.gradients or not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            # Frozen weights: make this output a leaf. The backward then goes down to the lowest layer that is
            # watched and no further, and no value changes.
            output.requires_grad_(True)
        call = self._open(name, recomputing)
        if call is None:
            return
        x = first_input(args, kwargs)
        if x is None:
            raise BenchError(f"{self.ffn.name}.{name} was called without a tensor: it cannot be observed")
        # Gate and up usually read the very same tensor; then they share one X, and one Gram matrix.
        twin = next((other for other, source in call.sources.items() if source == id(x)), None)
        call.sources[name] = id(x)
        if not self.from_grad:
            call.x[name] = call.x[twin] if twin else operand(x, output)
            self._expect(call, name, output)

    def _open(self, name: str, recomputing: bool) -> Call | None:
        """The call that an output of gate or up belongs to; None in a recomputation that is not ours."""
        call = self.current
        if call is not None and name not in call.sources:
            return call
        if recomputing and any(other.waiting for other in self.alive):
            return None  # non-reentrant checkpointing: the first pass already holds X and its hooks
        if self.from_grad is None:
            # A gradient left from before would be added to; then only X and G know this sample's own.
            self.from_grad = self.read_grad and all(w.grad is None for w in self.weights.values())
        self.current = call = Call()
        self.alive.add(call)
        return call

    def _down(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        watch = self.watch
        if not watch.enabled:
            return
        x = first_input(args, kwargs)
        if x is None:
            raise BenchError(f"{self.ffn.name}.down was called without a tensor: it cannot be observed")
        h = flat(x)
        mask, tokens = watch.mask(x, self.ffn.name)
        if _graph_task() == -1:
            self.fired["down"] += 1
            self.tokens.append(tokens)
            forward_sums(h, self.top, mask, self.rows)
        call, self.current = self.current, None
        if call is None or not watch.gradients or not torch.is_grad_enabled():
            return
        if len(call.sources) != 2:
            raise BenchError(f"{self.ffn.name}: down ran before gate and up; this is not a gated FFN we can observe")
        call.h, call.mask, call.tokens = h, mask, tokens
        self._expect(call, "dh", x)
        if not self.from_grad:
            call.x["down"] = operand(x, output)
            self._expect(call, "down", output)

    def _expect(self, call: Call, name: str, tensor: Tensor) -> None:
        call.waiting += 1
        call.handles.append(tensor.register_hook(partial(self._arrived, call, name)))

    def _arrived(self, call: Call, name: str, grad: Tensor) -> None:
        if not call.waiting:
            return  # a second backward through a retained graph
        if name == "dh":
            assert call.h is not None
            saliency_sums(call.h, flat(grad), call.mask, self.rows[SALIENCY])
            self.fired["dh"] += 1
            self.grad_tokens.append(call.tokens)
        else:
            call.g[name] = flat(grad)
        call.waiting -= 1
        if call.waiting == 0 and not self.from_grad:
            self._finish(call)

    def _finish(self, call: Call) -> None:
        self.held.append(call)
        if len(self.held) < self.watch.calls:
            return
        squares, used = squares_from_inputs(self.held, self.watch.method)
        for name, values in squares.items():
            self.rows[SQUARES[name]] += values
            self.watch.used[used[name]] += 1
        self.fired["gradients"] += len(self.held)
        for done in self.held:
            done.clear()
        self.held = []

    def _accumulated(self, name: str, weight: nn.Parameter) -> None:
        """`.grad` of one weight is complete: read it now, before clipping or the optimiser change it."""
        if not self.from_grad or weight.grad is None:
            return
        norms = column_squares_grad if name == "down" else row_squares_grad
        self.rows[SQUARES[name]].copy_(norms(weight.grad))
        self.fired[f"grad of {name}"] += 1
        self.watch.used["grad"] += 1
