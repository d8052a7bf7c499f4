"""Students over the tiny model, and what they should compute, written out expert by expert in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.experts import analytic
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.soft import START
from tinyonn_lib.experts.student import Routed, Student
from tinyonn_lib.lm import models

from .conftest import Tiny
from .test_soft import reference

WIDTH = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers_of(
    tiny: Tiny, part: Partition, k: float, gates: str = "sigmoid", *, gain: float = 0.3, variable: bool = False
) -> list[Routed]:
    made = []
    for place, evidence in enumerate(tiny.evidence):
        experts = len(part.experts[place])
        start = analytic.Linear(normal(experts, WIDTH, seed=place), normal(experts, seed=place + 10))
        router = Router(start, evidence.x, gates, gain)
        made.append(Routed(router, part, place, k, variable=variable))  # type: ignore[arg-type]
    return made


def data(ids: Tensor, width: float = START) -> dict[str, Tensor]:
    return {"ids": ids, "temperature": torch.full((len(ids),), width)}


def value(tiny: Tiny, layers: Sequence[nn.Module], ids: Tensor, width: float = START, **options: Any) -> Tensor:
    student = Student(tiny.model, tiny.ffns, layers, **options)
    with student.running():
        return student.loss(data(ids, width))


def soft_gates(layer: Routed, x: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """How far experts are on, their gates, the logits: from the router's parameters, `(tokens, experts)`, float64."""
    router = layer.router
    score, gain = x.double() @ router.weight.detach().double().T, float(router.gain.detach().exp())
    logits = gain * score
    if router.bias is None:
        choice, gates = score, logits.softmax(-1) * logits.shape[-1]
    else:
        choice = (1 / (1 + (-logits).exp()) - 0.5) * 4 / gain + router.bias.detach().double()
        gates = 2 / (1 + (-logits).exp())
    if layer.variable:
        soft = reference(choice.flatten(), layer.k * len(choice), width).view_as(choice)
    else:
        soft = torch.stack([reference(row, layer.k, width) for row in choice])
    return soft, gates, logits


def expert_outputs(tiny: Tiny, part: Partition, place: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert's output `(experts, tokens, d_model)` and the shared neurons', float64."""
    ffn = tiny.ffns[place]
    gate, up, down = (linear.weight.detach().double() for linear in (ffn.gate, ffn.up, ffn.down))

    def of(neurons: Tensor) -> Tensor:
        return (F.silu(x.double() @ gate[neurons].T) * (x.double() @ up[neurons].T)) @ down[:, neurons].T

    return torch.stack([of(neurons) for neurons in part.experts[place]]), of(part.shared[place])


def divided_logits(
    tiny: Tiny, part: Partition, layers: Sequence[Routed], ids: Tensor, width: float
) -> tuple[Tensor, list[Tensor]]:
    """The model with its FFNs replaced by sums over experts, in float64; and what each FFN's input was."""
    model = copy.deepcopy(tiny.model).double()
    seen: list[Tensor] = []

    def forward(place: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            seen.append(flat)
            soft, gates, _ = soft_gates(layers[place], flat, width)
            each, shared = expert_outputs(tiny, part, place, flat)
            return ((soft * gates).T[..., None] * each).sum(0).add(shared).view_as(x)

        return run

    for place, ffn in enumerate(models.ffns(model)):
        ffn.module.forward = forward(place)
    with torch.no_grad():
        return model(ids).logits, seen


def dense_inputs(tiny: Tiny, ids: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        f.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))) for f in tiny.ffns
    ]
    with torch.no_grad():
        tiny.model(ids)
    for handle in handles:
        handle.remove()
    return seen
