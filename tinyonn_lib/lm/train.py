"""The training loop of the bench: language models, routers and adapters all go through `fit`.

Deterministic (a batch is a function of its step), resumable to the bit, and fast on a few CPU cores: shards of a
batch run in Python threads of one OpenMP thread each, 1.5 times faster than OpenMP for small models (PEERS.md §7).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.threads import threads

Schedule = Literal["trapezoidal", "cosine", "constant"]
Progress = Callable[[int, int, str], None]
_FLUSH = 20  # steps between looks at the losses: each look waits for a GPU
_SPIKE_WINDOW = 50


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


def fit(
    model: nn.Module | Sequence[nn.Parameter],
    loss_fn: Callable[[Any], Tensor],
    batch: Callable[[int], Any],
    optimizers: Sequence[torch.optim.Optimizer] | torch.optim.Optimizer,
    *,
    steps: int,
    schedule: Schedule = "trapezoidal",
    warmup_steps: int = 0,
    decay_share: float = 0.5,
    final_lr: float = 0.0,
    clip: float | None = 1.0,
    spike_factor: float = 4.0,
    shards: int = 1,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    tag: str = "",
    progress: Progress | None = None,
    timing: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Train, and come back to the same place after a kill.

    Args:
        model: a module (its parameters that require gradients are trained, its buffers are kept, too), or parameters.
        loss_fn: batch → scalar loss, the mean over the batch's first dimension. With `shards` > 1 it is called from
            several threads at once and must not draw random numbers.
        batch: step (from 0) → tensor, or tuple/dict of tensors that share their first dimension. A pure function.
        optimizers: one or several over disjoint parameters; their learning rates are the peak of the schedule.
        steps: optimiser steps in all.
        schedule, warmup_steps, decay_share, final_lr: see `lr_factor`; `final_lr` is a share of the peak.
        clip: largest global gradient norm; None measures it only.
        spike_factor: a step whose gradient norm is above this many medians of the last 50 steps is marked a spike.
        shards: threads, each with its part of the batch; the gradients are averaged in a fixed order. Also the
            optimizers then step side by side. Taken as 1 on a GPU.
        checkpoint: private file for resuming, written every `every_seconds` and at the end; delete it when the
            result is safe. It is used only if settings, starting values, first batch and `tag` are the same.
        progress: called with (steps done, steps, note), at most five times a second and at the end, and once before
            the first step with a note "going on …" when a checkpoint was found.
        timing: filled with seconds, tokens_per_second (of this call) and resumed_from (step). Apart from the
            history, because artefacts must not differ between two runs.

    Returns:
        One row per step: step (from 1), tokens (so far; elements of the batch's first tensor), loss, lr (of the first
        optimizer), grad_norm (before clipping), spike (bool).

    Raises:
        BenchError: loss or gradient not finite (names the step), nothing to train, impossible settings, or the
            checkpoint cannot be written.
    """
    module = model if isinstance(model, nn.Module) else None
    source = list(module.parameters()) if module is not None else list(model)  # type: ignore[arg-type]
    params = [param for param in source if param.requires_grad]
    opts = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    _check(params, opts, steps, schedule, shards)
    shards = shards if params[0].device.type == "cpu" else 1
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    history: dict[str, list[float]] = {name: [] for name in ("step", "tokens", "loss", "lr", "grad_norm")}
    start, key = 0, ""
    if checkpoint is not None:
        plan = {
            "steps": steps, "schedule": schedule, "warmup": warmup_steps, "decay": decay_share, "final": final_lr,
            "clip": clip, "shards": shards, "tag": tag, "peaks": peaks,
        }  # fmt: skip
        key = resume.fingerprint(plan, params, batch(0))
        found = resume.restore(checkpoint, key, params, module, opts)
        if found is not None:
            start, history = found
            if progress is not None:
                progress(start, steps, "going on from the last checkpoint")
    pending: list[tuple[int, int, Tensor, float, Tensor]] = []
    tokens_before = tokens = int(history["tokens"][-1]) if start else 0
    began = saved = shown = time.monotonic()
    with threads(shards) as each:
        for step in range(start, steps):
            factor = lr_factor(step, steps, schedule, warmup_steps, decay_share, final_lr)
            for opt, own in zip(opts, peaks, strict=True):
                for group, peak in zip(opt.param_groups, own, strict=True):
                    group["lr"] = peak * factor
            data = batch(step)
            loss, grads = _gradients(loss_fn, data, params, shards, each)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            norm = nn.utils.clip_grad_norm_(params, math.inf if clip is None else clip)
            each(lambda opt: opt.step(), opts)
            tokens += resume.tensors_in(data)[0].numel()
            pending.append((step + 1, tokens, loss, peaks[0][0] * factor, norm))
            now, last = time.monotonic(), step + 1 == steps
            due = checkpoint is not None and (last or now - saved >= every_seconds)
            if due or last or len(pending) >= _FLUSH:
                _flush(pending, history)
            if due and checkpoint is not None:
                resume.save(checkpoint, key, step + 1, params, module, opts, history)
                saved = now
            if progress is not None and (last or now - shown >= 0.2):
                progress(step + 1, steps, f"loss {history['loss'][-1]:.3f}" if history["loss"] else "")
                shown = now
    for param in params:
        param.grad = None
    if timing is not None:
        seconds = time.monotonic() - began
        rate = (tokens - tokens_before) / seconds if seconds > 0 else 0.0
        timing.update(seconds=seconds, tokens_per_second=rate, resumed_from=float(start))
    return _table(history, spike_factor)


def _check(
    params: Sequence[Tensor], opts: Sequence[torch.optim.Optimizer], steps: int, schedule: str, shards: int
) -> None:
    if not params:
        raise BenchError("Nothing to train: no parameter requires a gradient.")
    if not opts:
        raise BenchError("Nothing to train with: give at least one optimizer.")
    if steps < 1 or shards < 1:
        raise BenchError(f"steps={steps} and shards={shards} must be at least 1.")
    if schedule not in get_args(Schedule):
        raise BenchError(f"Unknown schedule '{schedule}': choose one of {', '.join(get_args(Schedule))}.")
    held = [id(param) for opt in opts for group in opt.param_groups for param in group["params"]]
    if len(held) != len(set(held)):
        raise BenchError("Two optimizers hold the same parameter: give each its own.")


def _gradients(
    loss_fn: Callable[[Any], Tensor],
    data: Any,
    params: Sequence[Tensor],
    shards: int,
    each: Callable[..., list[Any]],
) -> tuple[Tensor, list[Tensor | None]]:
    """Mean loss and its gradients. Not `.backward()`: threads would race for the same `.grad`."""

    def one(part: Any) -> tuple[Tensor, list[Tensor | None]]:
        loss = loss_fn(part)
        return loss.detach(), list(torch.autograd.grad(loss, params, allow_unused=True))

    if shards == 1:
        return one(data)
    parts = [part for part in (_part(data, place, shards) for place in range(shards)) if _rows(part)]
    rows = [_rows(part) for part in parts]
    results = each(one, parts)
    total_loss, total = results[0][0] * (rows[0] / sum(rows)), results[0][1]
    total = [None if grad is None else grad * (rows[0] / sum(rows)) for grad in total]
    for (loss, grads), count in zip(results[1:], rows[1:], strict=True):
        weight = count / sum(rows)
        total_loss = total_loss + weight * loss
        for place, grad in enumerate(grads):
            old = total[place]
            if grad is not None:
                total[place] = grad * weight if old is None else old.add_(grad, alpha=weight)
    return total_loss, total


def _rows(data: Any) -> int:
    return int(resume.tensors_in(data)[0].shape[0])


def _part(data: Any, place: int, shards: int) -> Any:
    """Rows of shard `place`: contiguous, as equal as they can be."""
    if isinstance(data, Tensor):
        return data.tensor_split(shards)[place]
    if isinstance(data, Mapping):
        return {name: _part(value, place, shards) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return tuple(_part(value, place, shards) for value in data)
    return data


def _flush(pending: list[tuple[int, int, Tensor, float, Tensor]], history: dict[str, list[float]]) -> None:
    """Move finished steps into the history; stop if one of them was not finite."""
    for step, tokens, loss, lr, norm in pending:
        row = (float(step), float(tokens), float(loss), lr, float(norm))
        if not (math.isfinite(row[2]) and math.isfinite(row[4])):
            what = "loss" if not math.isfinite(row[2]) else "gradient"
            raise BenchError(
                f"The {what} is not finite at step {step} (learning rate {lr:.3g}): lower the learning rate, warm up "
                "longer, or look for broken data in that batch."
            )
        for name, value in zip(history, row, strict=True):
            history[name].append(value)
    pending.clear()


def _table(history: dict[str, list[float]], spike_factor: float) -> pd.DataFrame:
    table = pd.DataFrame(history).astype({"step": "int64", "tokens": "int64"})
    usual = table["grad_norm"].rolling(_SPIKE_WINDOW, min_periods=5).median().shift(1)
    return table.assign(spike=(table["grad_norm"] > spike_factor * usual))
