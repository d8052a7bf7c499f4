"""The training loop of the bench: language models, routers and adapters all go through `fit`.

Deterministic (a batch is a function of its step), resumable to the bit, and fast on a few CPU cores: shards of a
batch run in Python threads of one OpenMP thread each, 1.5 times faster than OpenMP for small models (PEERS.md §7).
With an `accelerate.Accelerator` the same loop runs in several processes, with DeepSpeed ZeRO-2 and ZeRO-3, too
(`worker.train_worker` makes one, `launch.launch` starts the processes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.engine import Engine, Local, LossFn
from tinyonn_lib.lm.record import HeldOut, Record
from tinyonn_lib.lm.schedule import Precision, Schedule, autocast, lr_factor
from tinyonn_lib.lm.threads import threads
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

_FLUSH = 20  # steps between looks at the losses: each look waits for a GPU


def fit(
    model: nn.Module | Sequence[nn.Parameter],
    loss_fn: LossFn,
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
    accumulate: int = 1,
    precision: Precision = "float32",
    held_out: HeldOut | None = None,
    tensorboard: Path | None = None,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    tag: str = "",
    progress: Progress | None = None,
    timing: dict[str, float] | None = None,
    accelerator: Accelerator | None = None,
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
            optimizers then step side by side. Taken as 1 on a GPU and with several processes.
        accumulate: equal pieces of the batch, one after the other, for a batch that does not fit the memory.
        precision: of the computation of the loss; see `schedule.autocast`. The weights stay as they are.
        held_out: looks at held-out loss in between, ends early when it no longer falls, and leaves the best values.
        tensorboard: folder for a log that tensorboard shows.
        checkpoint: private file for resuming, written every `every_seconds` and at the end; delete it when the
            result is safe. It is used only if settings, starting values, first batch and `tag` are the same. With
            DeepSpeed a folder `<checkpoint>.zero` beside it holds the parts (pickles: not for foreign hands).
        progress: called with (steps done, steps, note), at most five times a second and at the end, and once before
            the first step with a note "going on …" when a checkpoint was found.
        timing: filled with seconds, tokens_per_second (of this call) and resumed_from (step). Apart from the
            history, because artefacts must not differ between two runs.
        accelerator: of a process that `accelerate launch` started. Every process calls `fit` alike, with the same
            weights and the whole batch, takes its rows of it and returns the same history. DeepSpeed takes one
            optimizer that works element by element, and keeps it: make a new one for the next `fit`.

    Returns:
        One row per step: step (from 1), tokens (so far; elements of the batch's first tensor), loss, lr (of the first
        optimizer), grad_norm (before clipping), held_out (if asked for; NaN between the looks), spike (bool). The
        trained values are in the parameters of `model` in every process; ZeRO-3 leaves all of them in main memory.

    Raises:
        BenchError: loss or gradient not finite (names the step), nothing to train, impossible settings, the
            checkpoint cannot be written, or processes that did not start alike.
    """
    module = model if isinstance(model, nn.Module) else None
    source = list(module.parameters()) if module is not None else list(model)  # type: ignore[arg-type]
    params = [param for param in source if param.requires_grad]
    opts = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    _check(params, opts, steps, schedule, shards, accumulate)
    if accelerator is not None and accelerator.distributed_type == "NO":
        accelerator = None  # a single process: alone it is faster
    shards = shards if params[0].device.type == "cpu" and accelerator is None else 1
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    loss_fn = _computed(loss_fn, precision, params[0].device if accelerator is None else accelerator.device)
    record = Record(spike_factor, held_out)
    first, key = batch(0) if checkpoint is not None or accelerator is not None else None, ""
    if first is not None:
        plan = {
            "steps": steps, "schedule": schedule, "warmup": warmup_steps, "decay": decay_share, "final": final_lr,
            "clip": clip, "shards": shards, "accumulate": accumulate, "precision": precision, "tag": tag,
            "peaks": peaks, "held_out": held_out and (held_out.every, held_out.patience),
        }  # fmt: skip
        key = resume.fingerprint(plan, params, first)
    with threads(shards) as each:
        engine: Engine
        if accelerator is None:
            engine = Local(loss_fn, params, module, opts, clip=clip, accumulate=accumulate, shards=shards, each=each)
        else:
            from tinyonn_lib.lm.parallel import Accelerated

            engine = Accelerated(accelerator, key, loss_fn, params, module, opts, first, clip, accumulate)
        found = None if checkpoint is None else engine.restore(checkpoint, key)
        start, best = (found.step, found.best) if found else (0, [])
        progress = progress if engine.main else None
        if found:
            record.go_on(found.history)
            if progress is not None:
                progress(start, steps, "going on from the last checkpoint")
        if tensorboard is not None and engine.main and start < steps:
            record.log_to(tensorboard)
        tokens_before = tokens = int(record.rows["tokens"][-1]) if start else 0
        began = saved = shown = time.monotonic()
        for step in range(start, steps):
            if record.exhausted():
                break
            factor = lr_factor(step, steps, schedule, warmup_steps, decay_share, final_lr)
            for opt, own in zip(opts, peaks, strict=True):
                for group, peak in zip(opt.param_groups, own, strict=True):
                    group["lr"] = peak * factor
            data = batch(step)
            loss, norm = engine.step(data)
            tokens += resume.tensors_in(data)[0].numel()
            waiting = record.add(step + 1, tokens, loss, peaks[0][0] * factor, norm)
            now, last = time.monotonic(), step + 1 == steps
            look = held_out is not None and (last or (step + 1) % held_out.every == 0)
            due = checkpoint is not None and (last or engine.agree(float(now - saved >= every_seconds)) > 0)
            if due or last or look or waiting >= _FLUSH:
                record.flush()
            if look and held_out is not None:
                if record.look(engine.look(held_out)):
                    best = [value.detach().clone() for value in engine.values()]
                last = last or record.exhausted()
            if checkpoint is not None and (due or last):
                engine.save(checkpoint, key, step + 1, record.rows, best)
                saved = now
            if progress is not None and (last or now - shown >= 0.2):
                progress(step + 1, steps, record.note())
                shown = now
        with torch.no_grad():
            for value, kept in zip(engine.values(), best, strict=False):
                value.copy_(kept)
        engine.finish()
    record.close()
    if timing is not None:
        seconds = time.monotonic() - began
        rate = (tokens - tokens_before) / seconds if seconds > 0 else 0.0
        timing.update(seconds=seconds, tokens_per_second=rate, resumed_from=float(start))
    return record.table()


def _computed(loss_fn: LossFn, precision: Precision, device: torch.device) -> LossFn:
    context = autocast(precision, device)

    def computed(data: Any) -> Tensor:
        with context():
            return loss_fn(data)

    return computed


def _check(
    params: Sequence[Tensor],
    opts: Sequence[torch.optim.Optimizer],
    steps: int,
    schedule: str,
    shards: int,
    accumulate: int,
) -> None:
    if not params:
        raise BenchError("Nothing to train: no parameter requires a gradient.")
    if not opts:
        raise BenchError("Nothing to train with: give at least one optimizer.")
    if min(steps, shards, accumulate) < 1:
        raise BenchError(f"steps={steps}, shards={shards} and accumulate={accumulate} must be at least 1.")
    if schedule not in get_args(Schedule):
        raise BenchError(f"Unknown schedule '{schedule}': choose one of {', '.join(get_args(Schedule))}.")
    held = [id(param) for opt in opts for group in opt.param_groups for param in group["params"]]
    if len(held) != len(set(held)):
        raise BenchError("Two optimizers hold the same parameter: give each its own.")
