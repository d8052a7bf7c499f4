"""Run a dense model as if it were divided: scale each neuron's h before `down_proj`.

An expert that is off is a group of neurons whose h is zero, and a gate is a factor on h; so any partition and any
router can be judged, and a router trained, at dense speed, before a checkpoint is written. The exported model
computes the same (tests/experts compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn_lib.experts.assemble import dense_weight
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm.models import FFN

Scale = Callable[[Tensor, Tensor], Tensor]
"""`(x, h) → factor on h`; x is the FFN's input `(…, d_model)`, h `(…, d_ffn)`, the factor broadcasts to h."""

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1) * logits.shape[-1],
    "sigmoid": lambda logits: 2 * logits.sigmoid(),
}
"""How the standard families turn router logits `(…, experts)` into factors: 1 for all when the logits are 0.

The factor (number of experts; 2) is in the exported `down_proj`, or in `routed_scaling_factor`."""


@contextmanager
def scaled(ffns: Sequence[FFN], scales: Sequence[Scale], shifts: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Within the block every FFN computes `W_down(scale(x, h) ⊙ h)`, plus a constant `shift` `(d_model,)` if given."""
    handles = []
    inputs: dict[tuple[int, int], Tensor] = {}  # by thread: training runs shards of a batch side by side

    def keep(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: inputs.__setitem__((get_ident(), index), args[0])

    def scale_h(index: int, scale: Scale) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        return lambda module, args: (args[0] * scale(inputs.pop((get_ident(), index)), args[0]),)

    def shift_y(shift: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        return lambda module, args, out: out + shift.to(out)

    try:
        for index, (ffn, scale) in enumerate(zip(ffns, scales, strict=True)):
            handles.append(ffn.module.register_forward_pre_hook(keep(index)))
            handles.append(ffn.down.register_forward_pre_hook(scale_h(index, scale)))
            if shifts is not None:
                handles.append(ffn.down.register_forward_hook(shift_y(shifts[index])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def per_neuron(partition: Partition, layer: int) -> Callable[[Tensor], Tensor]:
    """A function from factors per expert `(…, experts)` to factors per neuron `(…, d_ffn)`: shared 1, dropped 0."""
    owner = {torch.device("cpu"): partition.owner(layer)}
    whole = not len(partition.shared[layer]) and not len(partition.dropped[layer])

    def widen(factors: Tensor) -> Tensor:
        if factors.device not in owner:  # an index on another device would be copied at each call
            owner[factors.device] = owner[torch.device("cpu")].to(factors.device)
        # Negative labels count from the end: … , DROPPED, SHARED.
        ended = factors if whole else torch.cat([factors, _like(factors, 0.0), _like(factors, 1.0)], -1)
        return ended[..., owner[factors.device]]

    return widen


def _like(factors: Tensor, value: float) -> Tensor:
    return factors.new_full((*factors.shape[:-1], 1), value)


def energies(index: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
    """A function `h (…, d_ffn) → ‖W_down,e h_e‖² (…, experts)`: how much each expert adds to the output.

    `index` is `(experts, size)`, `down` `(d_model, d_ffn)`. Through each expert's Gram matrix, which is built once:
    size² multiplications per token and expert instead of size·d_model.
    """
    parts = down[:, index].permute(1, 2, 0).float()  # (experts, size, d_model)
    gram = parts @ parts.transpose(1, 2)

    def energy(h: Tensor) -> Tensor:
        grouped = h[..., index].float().movedim(-2, 0).flatten(1, -2)  # (experts, tokens, size)
        squares = ((grouped @ gram) * grouped).sum(-1).clamp(min=0)
        return squares.T.reshape(*h.shape[:-1], index.shape[0])

    return energy


def top_mask(score: Tensor, k: int) -> Tensor:
    """1 for the k highest entries of the last axis, else 0; same shape."""
    return torch.zeros_like(score).scatter_(-1, score.topk(min(k, score.shape[-1]), dim=-1).indices, 1.0)


def oracle(partition: Partition, ffns: Sequence[FFN], k: int) -> list[Scale]:
    """The oracle router of PEERS §1: per token the k experts with the largest ‖W_down,e h_e‖₂.

    No router can know these norms beforehand. A strong reference, not a bound: it looks at each expert alone, and a
    choice that looks at what the chosen ones add up to can lose less.
    """

    def layer_scale(layer: int, down: Tensor) -> Scale:
        widen, energy = per_neuron(partition, layer), energies(partition.experts[layer], down)
        return lambda x, h: widen(top_mask(energy(h), k).to(h))

    return [layer_scale(layer, dense_weight(ffn.down)) for layer, ffn in enumerate(ffns)]


def chosen(partition: Partition, scores: Sequence[Callable[[Tensor], Tensor]], k: int) -> list[Scale]:
    """Per token the k experts with the highest score, each with gate 1.

    Args:
        scores: per layer a function `x (…, d_model) → (…, experts)`, see `routers`.
    """

    def layer_scale(layer: int, score: Callable[[Tensor], Tensor]) -> Scale:
        widen = per_neuron(partition, layer)
        return lambda x, h: widen(top_mask(score(x.float()), k).to(h))

    return [layer_scale(layer, score) for layer, score in enumerate(scores)]


def static(scores: Sequence[Tensor], keep: float) -> list[Scale]:
    """Static pruning: the same top fraction `keep` of the neurons for every token."""
    masks = [top_mask(s, max(1, round(keep * s.numel()))) for s in scores]
    return [lambda x, h, mask=m: mask.to(h) for m in masks]  # type: ignore[misc]


def dropped_mean(ffns: Sequence[FFN], scores: Sequence[Tensor], means: Sequence[Tensor], keep: float) -> list[Tensor]:
    """What the pruned neurons contribute on average, per layer `(d_model,)`: FLAP's bias compensation.

    `means` holds each layer's mean h `(d_ffn,)`.
    """
    shifts = []
    for ffn, score, mean in zip(ffns, scores, means, strict=True):
        down = dense_weight(ffn.down)
        dropped = 1 - top_mask(score, max(1, round(keep * score.numel())))
        shifts.append(down @ (mean * dropped).to(down))
    return shifts
