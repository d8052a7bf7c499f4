"""Run a loaded mixture of experts with another k or implementation, see whom its routers choose, and time it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError

START = 16
"""Tokens that are in the cache, and not timed, when decoding begins."""


def routers(model: nn.Module) -> list[Any]:
    """The modules that choose experts, in order.

    Raises:
        BenchError: there are none.
    """
    found = [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "num_experts")]
    if not found:
        raise BenchError(f"{type(model).__name__} has no routers, so k cannot be set: give a mixture of experts.")
    return found


@contextmanager
def running(model: Any, k: int, implementation: str) -> Iterator[None]:
    """Let the model use k experts per token and this implementation of them; afterwards as before.

    Raises:
        BenchError: no routers, or k is not between 1 and their experts.
        ValueError: transformers does not know the implementation, or not for this model.
    """
    gates = routers(model)
    if not 1 <= k <= min(gate.num_experts for gate in gates):
        raise BenchError(f"k={k} active experts: choose 1 to {min(gate.num_experts for gate in gates)}.")
    before = [gate.top_k for gate in gates], model.config.num_experts_per_tok, model.config._experts_implementation
    try:
        model.set_experts_implementation(implementation)
        model.config.num_experts_per_tok = k
        for gate in gates:  # they read the configuration only once, when they are made
            gate.top_k = k
        yield
    finally:
        for gate, old in zip(gates, before[0], strict=True):
            gate.top_k = old
        model.config.num_experts_per_tok = before[1]
        model.set_experts_implementation(before[2])


@contextmanager
def choices(model: nn.Module) -> Iterator[list[tuple[Tensor, int]]]:
    """Collects, for each call of each router, the experts it chose, `(tokens, k)`, and how many it has."""
    found: list[tuple[Tensor, int]] = []
    handles = [
        gate.register_forward_hook(lambda gate, args, out: found.append((out[2], gate.num_experts)))
        for gate in routers(model)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Task:
    """What is timed: a stage on `ids`, `(batch, length)`."""

    stage: str
    ids: Tensor
    new_tokens: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] if self.stage == "prefill" else self.new_tokens)

    @property
    def at_once(self) -> int:
        """Tokens of one timed forward."""
        return self.ids.shape[0] * (self.ids.shape[1] if self.stage == "prefill" else 1)


@dataclass(frozen=True)
class Arm:
    """One way to run one model; with k = 0 as it is.

    Attributes:
        label: the model's name.
        implementation: of the experts; "" without k.
        active: share of the FFN parameters that k experts are.
        unlike: why this model cannot be compared with the dense one, or "".
    """

    label: str
    model: Any
    implementation: str
    k: int
    active: float
    unlike: str = ""

    def run(self, task: Task) -> float:
        """Seconds of the timed part.

        Raises:
            BenchError: no routers, or k is not between 1 and their experts.
        """
        if not self.k:
            return self._prefill(task.ids) if task.stage == "prefill" else self._decode(task, self._start(task))
        if task.stage == "prefill":
            with running(self.model, self.k, self.implementation):
                return self._prefill(task.ids)
        with running(self.model, self.k, "eager"):  # which needs neither the memory nor the kernels of the others
            start = self._start(task)
        with running(self.model, self.k, self.implementation):
            return self._decode(task, start)

    def warm(self, task: Task) -> tuple[float, float]:
        """The first run: its seconds, and the share of a layer's experts that a timed forward touches (NaN without).

        Raises:
            BenchError: the routers do not choose k.
            MemoryError: see `_check_memory`.
        """
        if not self.k:
            return self.run(task), float("nan")
        self._check_memory(task)
        with choices(self.model) as found:
            took = self.run(task)
        if wrong := {chosen.shape[-1] for chosen, _ in found} - {self.k}:
            raise BenchError(f"{self.label}: k={self.k} was set, but the routers choose {min(wrong)} experts.")
        timed = [chosen.unique().numel() / count for chosen, count in found if len(chosen) == task.at_once]
        return took, sum(timed) / len(timed)

    def _prefill(self, ids: Tensor) -> float:
        begin = _now(ids.device)
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return _now(ids.device) - begin

    def _start(self, task: Task) -> Any:
        return self.model(input_ids=task.ids[:, :START], use_cache=True, logits_to_keep=1)

    def _decode(self, task: Task, out: Any) -> float:
        begin = _now(task.ids.device)
        for _ in range(task.new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        return _now(task.ids.device) - begin

    def _check_memory(self, task: Task) -> None:
        """`batched_mm` copies the weights of each token's experts; on a CPU too much of that ends the process.

        Raises:
            MemoryError: that is a quarter of what is free, or more.
        """
        if self.implementation != "batched_mm":
            return
        sizes = [
            sum(weight[0].nbytes for weight in module.parameters(recurse=False) if weight.ndim == 3)
            for module in self.model.modules()
        ]
        needed, free = task.at_once * self.k * max(sizes), _free(task.ids.device)
        if needed >= free / 4:
            raise MemoryError(
                f"batched_mm would copy {needed / 1e9:.2g} GB of weights; {free / 1e9:.2g} GB are free, "
                "and a quarter of that is the limit"
            )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
