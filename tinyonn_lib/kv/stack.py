"""Many small adapters of one shape trained at once, each as it would be alone; and what one costs alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.data import NOT_FINITE, Caches, own_of, teachers_of
from tinyonn_lib.kv.projector import SIDES, KVDimensionProjector
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.schedule import lr_factor

_ROUNDS, _TIMED = 15, 3
"""How often each configuration has its turn, and how many steps of it are then timed, after one that is not."""


@dataclass(frozen=True)
class Schedule:
    """How every configuration of a comparison learns: AdamW without weight decay, linear warm-up, linear decay.

    Attributes:
        rates: peak learning rates tried, ascending.
        seeds: how many; a seed stands for the starting weights and the order of the tokens.
        steps: optimiser steps; batch: tokens per step, a token of one layer counting as one; warmup: steps.
        every: steps between looks at the validation loss.
    """

    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    seeds: int = 1
    steps: int = 150
    batch: int = 256
    warmup: int = 20
    every: int = 10

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < low < high for low, high in pairwise((*self.rates, float("inf")))):
            raise BenchError(f"rates are {self.rates}: give learning rates above 0 in ascending order.")
        for name in ("seeds", "steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name} is {getattr(self, name)}: give a whole number from 1.")

    @property
    def looks(self) -> list[int]:
        """Steps after which the validation loss is looked at; 0 and the last among them."""
        return [*range(0, self.steps, self.every), self.steps]


@dataclass(frozen=True)
class Rows:
    """What adapters of keys (first) and of values read, `x (2, n, width)`, and should give, `y (2, n, student's)`."""

    x: Tensor
    y: Tensor


@torch.no_grad()
def rows_of(projector: KVDimensionProjector, caches: Caches, most: int) -> Rows:
    """The real tokens of all layers, in float32 on the student's device; beyond `most` an even share of each batch.

    Raises:
        BenchError: caches that are not finite.
    """
    (name,) = projector.teachers
    share = min(1.0, most / (int(caches.mask.sum()) * projector.student_layers))
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, Tensor]] = []
    for batch in caches.batches():
        own, real = own_of(batch), batch["mask"]
        kv, depth = teachers_of(batch, [name])[name], range(projector.student_layers)
        read = {side: [projector.reads(name, kv, side, layer) for layer in depth] for side in SIDES}
        x = torch.stack([torch.stack(read[side], 1).transpose(1, 2)[real].flatten(0, 1) for side in SIDES])
        y = torch.stack([getattr(own, side).transpose(1, 2)[real].flatten(0, 1) for side in SIDES])
        picked = torch.randperm(x.shape[1], generator=generator)[: max(1, round(share * x.shape[1]))].to(x.device)
        found.append((x[:, picked].float(), y[:, picked].float()))
    rows = Rows(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))
    if not (torch.isfinite(rows.x).all() and torch.isfinite(rows.y).all()):
        raise BenchError(NOT_FINITE)
    return rows


def train(
    modules: Sequence[nn.Module], rows: Rows, validation: Rows, plan: Schedule
) -> tuple[dict[str, Tensor], Tensor]:
    """Train every module at every learning rate on the mean squared error, all of them in one batched computation.

    Nothing joins them (no clipping, no dropout), so each ends as plain `torch.optim.AdamW` would leave it alone.

    Args:
        modules: of one shape, as they begin; left alone. First those of seed 0 for keys, then as many of seed 0 for
            values, then those of seed 1. A seed's modules all see the same tokens in the same order.

    Returns:
        Parameter → `(rates, modules, …)`, trained; and validation losses `(looks, rates, modules)`.
    """
    device, rates, sides = rows.x.device, len(plan.rates), len(SIDES)
    base = copy.deepcopy(modules[0]).to("meta").eval()

    def one(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, params, (x,))

    # Over rates, seeds and sides, and starts. Only the middle one has an input of its own: what depends on nothing
    # else (the normalised input) is computed once for all.
    call = vmap(vmap(vmap(one, in_dims=(0, None))), in_dims=(0, None))
    start, _ = stack_module_state(list(modules))
    sizes = (rates, plan.seeds * sides, len(modules) // (plan.seeds * sides))
    params = {
        name: p.detach().to(device).repeat(rates, *[1] * (p.ndim - 1)).unflatten(0, sizes).requires_grad_()
        for name, p in start.items()
    }
    # Each rate has its own group of slices, which share the memory of `params`.
    groups = [{"params": [p.detach()[i] for p in params.values()], "lr": rate} for i, rate in enumerate(plan.rates)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    places = torch.arange(rows.x.shape[1], device=device)[:, None]
    orders = [shuffled(places, plan.batch, seed) for seed in range(plan.seeds)]
    curves, looks = [], set(plan.looks)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return (call(params, x) - y[:, None]).square().mean((-2, -1))

    for step in range(plan.steps + 1):
        if step in looks:
            with torch.no_grad():
                found = losses(validation.x.repeat(plan.seeds, 1, 1), validation.y.repeat(plan.seeds, 1, 1))
            curves.append(found.flatten(1).cpu())
        if step == plan.steps:
            break
        picked = [order(step)[:, 0] for order in orders]
        x, y = (torch.cat([t[:, places] for places in picked]) for t in (rows.x, rows.y))
        gradients = torch.autograd.grad(losses(x, y).sum(), list(params.values()))
        factor = lr_factor(step, plan.steps, "trapezoidal", plan.warmup, 0.5, 0.0)
        for number, (group, rate) in enumerate(zip(optimizer.param_groups, plan.rates, strict=True)):
            group["lr"] = rate * factor
            for part, gradient in zip(group["params"], gradients, strict=True):
                # The fused step reads memory in order; a batched product leaves gradients transposed.
                part.grad = gradient[number].contiguous()
        optimizer.step()
    return {name: p.detach().flatten(1, 2) for name, p in params.items()}, torch.stack(curves)


class Alone:
    """One projector trained by itself, as a user would: what a step of it takes."""

    def __init__(self, projector: KVDimensionProjector, rows: Rows, batch: int) -> None:
        (name,) = projector.teachers
        self.adapters = [projector.of(name, side)[0] for side in SIDES]
        self.x, self.y = rows.x[:, :batch].contiguous(), rows.y[:, :batch].contiguous()
        self.optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
        self.parameters = list(projector.parameters())

    def step(self) -> None:
        self.optimizer.zero_grad()
        self._loss().backward()
        self.optimizer.step()

    def _loss(self) -> Tensor:
        said = [adapter(x) for adapter, x in zip(self.adapters, self.x, strict=True)]
        return torch.stack([(one - y).square().mean() for one, y in zip(said, self.y, strict=True)]).sum()

    def memory(self) -> int:
        """Bytes that training needs: weights, gradients, AdamW's moments and what is saved for the backward pass."""
        saved: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.parameters}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self._loss()
        loss.backward()
        self.optimizer.step()
        moments: list[Any] = [t for state in self.optimizer.state.values() for t in state.values()]
        grown = [*self.parameters, *(p.grad for p in self.parameters if p.grad is not None)]
        return sum(t.nbytes for t in [*grown, *(t for t in moments if t.ndim)]) + sum(saved.values())


def seconds_per_step(alone: Sequence[Alone]) -> list[float]:
    """Median over steps; in turns, so that a busy moment of the machine falls on all of them."""
    times: list[list[float]] = [[] for _ in alone]
    for _ in range(_ROUNDS):
        for found, one in zip(times, alone, strict=True):
            found += [_timed(one) for _ in range(1 + _TIMED)][1:]
    return [median(found) for found in times]


def _timed(one: Alone) -> float:
    cuda = one.x.device.type == "cuda"
    began = time.perf_counter()
    one.step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
