"""How the learning rate goes over a training, and in which precision it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from tinyonn_lib.errors import BenchError

Schedule = Literal["trapezoidal", "cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]


def lr_factor(step: int, steps: int, schedule: Schedule, warmup_steps: int, decay_share: float, final: float) -> float:
    """Share of the learning rate at `step` (from 0) of `steps`.

    "trapezoidal": linear warm-up, flat, linear decay to `final` over the last `decay_share` of the steps; "cosine":
    warm-up, then half a cosine to `final`; "constant": warm-up, then flat.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return warm
    if schedule == "cosine":
        done = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
        return warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    left = min(1.0, (steps - step) / max(1.0, decay_share * steps))
    return min(warm, final + (1 - final) * left)


def autocast(precision: Precision, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Makes the context to compute a loss in; the weights stay as they are.

    Args:
        precision: "auto" is bfloat16 where the processor computes in it.

    Raises:
        BenchError: unknown precision.
    """
    if precision not in get_args(Precision):
        raise BenchError(f"Unknown precision '{precision}': choose one of {', '.join(get_args(Precision))}.")
    fast = precision == "bfloat16"
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:  # emulated bfloat16 is slower than float32; torch has no public question for it
            fast = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    # No cache: it is shared between threads.
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False) if fast else nullcontext()
