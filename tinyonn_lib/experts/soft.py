"""A choice of k experts that can be differentiated, and hardens while a router learns.

The hard choice has no gradient. Letting it pass straight through (Bengio et al. 2013, arXiv:1308.3432) is biased: to
first order an expert that is on seems not worth its place, for its own share of the loss is of second order, and one
that is off seems worth too much. So training relaxes the choice instead: each expert is on by σ((logit − θ)/T), θ such
that exactly k are on in sum, and T falls until little is left of the difference to the hard choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

START, END = 0.4, 0.03
"""Temperatures, in units of the logits' spread over a token's experts."""

SOFT = 0.8
"""Share of the steps over which the temperature falls; the rest trains at the last one."""

_HALVINGS, _NEWTON = 24, 3


def temperature(step: int, steps: int) -> float:
    """T at `step` (from 0) of `steps`: falls geometrically from `START` to `END`, then stays."""
    return START * (END / START) ** min(1.0, step / max(1.0, SOFT * steps))


def soft_top_k(logits: Tensor, k: Tensor | float, temperature: Tensor | float) -> Tensor:
    """How far each entry is on, in (0, 1), k of them in sum over the last axis; same shape.

    Differentiable in the logits and in k: the threshold's derivative follows from the sum, which stays k.

    Args:
        logits: `(…, n)`, finite.
        k: 0 < k < n, one for all or `(…, 1)`.
        temperature: width of the border between on and off, one for all or `(…, 1)`.
    """
    soft = torch.sigmoid((logits - threshold(logits, k, temperature)) / temperature)
    slope = (soft * (1 - soft)).detach() / temperature
    total = slope.sum(-1, keepdim=True).clamp(min=1e-12)
    # 0, but its derivative is that of the threshold: dθ = Σ slope·dlogit / Σ slope − dk / Σ slope.
    moved = ((logits - logits.detach()) * slope).sum(-1, keepdim=True) / total
    if isinstance(k, Tensor):
        moved = moved - (k - k.detach()) / total
    return soft - slope * moved


@torch.no_grad()
def threshold(logits: Tensor, k: Tensor | float, temperature: Tensor | float) -> Tensor:
    """θ with Σ σ((logit − θ)/T) = k over the last axis, `(…, 1)`, by bisection and then Newton's method."""
    reach = 20.0 * temperature
    low, high = logits.amin(-1, keepdim=True) - reach, logits.amax(-1, keepdim=True) + reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = torch.sigmoid((logits - middle) / temperature).sum(-1, keepdim=True) > k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    found = (low + high) / 2
    for _ in range(_NEWTON):
        soft = torch.sigmoid((logits - found) / temperature)
        slope = (soft * (1 - soft)).sum(-1, keepdim=True).clamp(min=1e-12) / temperature
        found = torch.clamp(found + (soft.sum(-1, keepdim=True) - k) / slope, low, high)
    return found
