"""Gradient projection (document 000 §2): does ∇W of the large model help a small one to start?

The small model is the large one with every FFN replaced by one of few neurons; attention, norms, embeddings and head
are the large model's own, frozen and shared. The document adds the scaled gradient to random weights, but ∇W has the
large model's shape and +∇W climbs the loss (ERRATA 000). So the gradient is taken on selected neurons only, which gives
it the small shape, and either sign is judged next to a random start and next to the neurons' own weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.assemble import TinyONNExpert, dense_weight
from tinyonn_lib.lm import resume as checkpoints
from tinyonn_lib.lm.models import FFN
from tinyonn_lib.progress import Progress
from tinyonn_lib.scan.audit import refuse_blind_spots
from tinyonn_lib.scan.scan import device_of, frozen_eval, next_token_loss

_EPS = 1e-12
Small = Sequence[TinyONNExpert]
"""One small FFN per layer."""


class Slice(NamedTuple):
    """Weights or gradients of the selected neurons of one layer, float32 (float64 of a float64 model)."""

    gate: Tensor  # (n, d_model)
    up: Tensor  # (n, d_model)
    down: Tensor  # (d_model, n)


@dataclass(frozen=True)
class Start:
    """What an init can be made of, in one layer."""

    base: Slice  # fresh random weights
    own: Slice  # the large model's weights
    step: Slice  # β·α·∇W / (‖∇W‖ + ε) of each matrix


class Init(NamedTuple):
    """A way to start a small FFN."""

    weights: Callable[[Start], Slice]
    drawn: bool  # whether the seed matters


INITS: dict[str, Init] = {
    "random": Init(lambda at: at.base, drawn=True),
    "gradient": Init(lambda at: _moved(at.base, at.step, 1.0), drawn=True),  # as the document writes it
    "gradient_descent": Init(lambda at: _moved(at.base, at.step, -1.0), drawn=True),
    "copy": Init(lambda at: at.own, drawn=False),
    "copy + gradient": Init(lambda at: _moved(at.own, at.step, 1.0), drawn=False),
    "copy - gradient": Init(lambda at: _moved(at.own, at.step, -1.0), drawn=False),
}
"""What is compared; another init is another line."""


def top(table: pd.DataFrame, column: str, count: int) -> list[Tensor]:
    """The `count` neurons of each layer with the highest `column`, ascending; `table` has `layer, neuron`.

    Raises:
        BenchError: no such column, or a layer has fewer neurons.
    """
    if column not in table:
        raise BenchError(f"No column '{column}' to choose neurons by; there are {', '.join(map(str, table.columns))}.")
    fewest = int(table.groupby("layer").size().min())
    if not 1 <= count <= fewest:
        raise BenchError(f"Cannot choose {count} neurons per layer: give a number from 1 to {fewest}.")
    best = table.sort_values(column, ascending=False, kind="stable").groupby("layer").head(count)
    return [torch.tensor(sorted(rows)) for _, rows in best.groupby("layer")["neuron"]]


def capture(
    model: Any,
    ffns: Sequence[FFN],
    chosen: Sequence[Tensor],
    samples: Sequence[Sequence[int]],
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
) -> list[Slice]:
    """Mean gradient of the selected neurons' weights over samples, exact, for frozen and NF4 weights, too.

    Batch size 1; the loss of a sample is its mean next-token NLL. Gradients come from each linear's input X and output
    gradient G: rows `G[:, chosen]ᵀ X` of gate and up, columns `Gᵀ X[:, chosen]` of down. No other row is ever formed.

    Args:
        chosen: per layer the neurons' numbers.
        samples: token ids, at least two each.
        checkpoint: private file; a call that was killed goes on from it.

    Raises:
        BenchError: bad `chosen`; a sample too short, or with a loss or gradient that is not finite (names it); an FFN
            that hooks cannot see.
    """
    chosen = _valid(ffns, chosen)
    if not samples or min(map(len, samples)) < 2:
        raise BenchError("A next-token loss needs samples of two tokens or more: drop the shorter ones.")
    weights = [own(ffn, index) for ffn, index in zip(ffns, chosen, strict=True)]
    sums = [Slice(*map(torch.zeros_like, each)) for each in weights]
    flat = [matrix for each in sums for matrix in each]
    key, start, saved, arrived = "", 0, time.monotonic(), 0
    if checkpoint is not None:
        plan = {"samples": [[int(token) for token in ids] for ids in samples]}
        key = checkpoints.fingerprint(plan, [m for each in weights for m in each], chosen)
        found = checkpoints.restore(checkpoint, key, flat, None, [])
        start = found.step if found else 0
        if found and progress is not None:
            progress(start, len(samples), "going on from the last checkpoint")

    def watch(linear: nn.Module, total: Tensor, index: Tensor, columns: bool) -> Any:
        def add(grad: Tensor, x: Tensor) -> None:
            nonlocal arrived
            arrived += 1
            g, x = (t.flatten(0, -2) for t in (grad, x))
            g, x = (g, x[:, index]) if columns else (g[:, index], x)
            total.addmm_(g.to(total).T, x.to(total))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # everything below is frozen: the backward ends here
                output.requires_grad_(True)
            x = args[0].detach()
            output.register_hook(lambda grad: add(grad, x))

        return linear.register_forward_hook(hook)

    handles = []
    try:
        for ffn, total, index in zip(ffns, sums, chosen, strict=True):
            for name in Slice._fields:
                linear = getattr(ffn, name)
                refuse_blind_spots(model, f"{ffn.name}.{name}_proj", linear)
                handles.append(watch(linear, getattr(total, name), index, name == "down"))
        with frozen_eval(model), torch.enable_grad():
            for number in range(start, len(samples)):
                arrived = 0
                loss = next_token_loss(model, torch.tensor([list(samples[number])], device=device_of(model)))
                loss.backward()
                if arrived != len(flat):
                    raise BenchError(
                        f"{arrived} of {len(flat)} gradients arrived: a fused kernel bypasses the FFNs; switch it off."
                    )
                if not torch.stack([value.sum().to(loss.device) for value in (loss, *flat)]).isfinite().all():
                    raise BenchError(
                        f"The loss or its gradient is not finite in sample {number}: drop that text, or load the model "
                        "in float32 if it was float16 or damaged."
                    )
                last = number + 1 == len(samples)
                if checkpoint is not None and (last or time.monotonic() - saved >= every_seconds):
                    checkpoints.save(checkpoint, key, number + 1, flat, None, [], {}, [], [checkpoints.rng_state()])
                    saved = time.monotonic()
                if progress is not None:
                    progress(number + 1, len(samples), "gradient")
    finally:
        for handle in handles:
            handle.remove()
    return [Slice(*(matrix / len(samples) for matrix in each)) for each in sums]


def own(ffn: FFN, index: Tensor) -> Slice:
    """The weights of neurons `index`, 4-bit ones dequantised."""
    gate, up, down = (dense_weight(linear) for linear in (ffn.gate, ffn.up, ffn.down))
    index = index.to(gate.device)
    kind = torch.promote_types(gate.dtype, torch.float32)
    return Slice(gate[index].to(kind), up[index].to(kind), down[:, index].to(kind))


def initial(
    kind: str,
    ffns: Sequence[FFN],
    chosen: Sequence[Tensor],
    gradients: Sequence[Slice],
    seed: int,
    alpha: float = 0.8,
    beta: float = 0.3,
) -> list[TinyONNExpert]:
    """Small FFNs, trainable, that start as `INITS[kind]` says: `W_base ± β·α·∇W / (‖∇W‖ + ε)`.

    W_base is `nn.Linear`'s default, U(±1/√inputs), and depends on the seed alone. The document's ‖∇W‖₂ is taken as the
    Frobenius norm of each matrix, so a step has length α·β whatever the matrix.

    Raises:
        BenchError: unknown kind, or `chosen` or `gradients` do not fit the model.
    """
    if kind not in INITS:
        raise BenchError(f"Unknown init '{kind}': choose one of {', '.join(INITS)}.")
    chosen = _valid(ffns, chosen)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts alike
    small = []
    for ffn, index, gradient in zip(ffns, chosen, gradients, strict=True):
        weights = own(ffn, index)
        if any(w.shape != g.shape for w, g in zip(weights, gradient, strict=True)):
            raise BenchError(f"The gradients of {ffn.name} belong to other neurons: capture them for these.")
        base = Slice(*(_fresh(w, generator) for w in weights))
        step = Slice(*(beta * alpha * g / (g.norm() + _EPS) for g in gradient))
        act: Any = ffn.module.act_fn
        expert = TinyONNExpert(*INITS[kind].weights(Start(base, weights, step)), act)
        small.append(expert.requires_grad_(True))
    return small


def _fresh(like: Tensor, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(like.shape), a=5**0.5, generator=generator).to(like)


def _moved(start: Slice, step: Slice, sign: float) -> Slice:
    return Slice(*(weight + sign * by for weight, by in zip(start, step, strict=True)))


def _valid(ffns: Sequence[FFN], chosen: Sequence[Tensor]) -> list[Tensor]:
    if len(chosen) != len(ffns):
        raise BenchError(f"Neurons are chosen in {len(chosen)} layers, the model has {len(ffns)}: choose in each.")
    for ffn, index in zip(ffns, chosen, strict=True):
        numbers = index.tolist()
        if not numbers or min(numbers) < 0 or max(numbers) >= ffn.neurons or len(set(numbers)) < len(numbers):
            raise BenchError(f"{ffn.name} has neurons 0 to {ffn.neurons - 1}: choose some of them, each once.")
        if any(linear.bias is not None for linear in (ffn.gate, ffn.up, ffn.down)):
            raise BenchError(f"{ffn.name} has biases, a TinyONNExpert has none: choose a model without.")
    return [index.to(ffn.gate.weight.device) for ffn, index in zip(ffns, chosen, strict=True)]
