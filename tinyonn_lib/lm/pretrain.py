"""Train a small language model in a minute or two of CPU, and judge it: bits per byte and samples.

The recipe is that of PEERS.md §7: Muon on matrices, AdamW with its own high rate on the rest, a trapezoidal schedule.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import bits_per_byte, sample
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.schedule import Precision, Schedule
from tinyonn_lib.lm.threads import default_shards
from tinyonn_lib.lm.train import fit
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bits_per_byte", "pretrain", "sample"]


def pretrain(
    train_blocks: Tensor,
    model: PreTrainedModel,
    *,
    tokens: int = 1_000_000,
    seconds: float | None = None,
    batch: int = 16,
    lr_matrix: float = 0.02,
    lr_embedding: float = 0.05,
    weight_decay: float = 0.01,
    momentum: float = 0.85,
    warmup_steps: int = 20,
    decay_share: float = 0.5,
    schedule: Schedule = "trapezoidal",
    clip: float | None = 1.0,
    precision: Precision = "auto",
    shards: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    progress: Progress | None = None,
    timing: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Train a causal language model in place on packed blocks.

    Args:
        train_blocks: (N, length) token ids, from `texts.pack`; visited in a new random order each epoch.
        model: float32 weights; left in eval mode.
        tokens: budget, rounded to whole steps. A killed and resumed run equals an uninterrupted one to the bit.
        seconds: budget by the clock instead: the speed is measured first and `tokens` follows from it, so the result
            depends on the machine. A resumed run keeps the number of steps that was measured first.
        batch: blocks per step.
        lr_matrix: Muon's peak rate, for all matrices of the layers; lr_embedding: AdamW's, for embeddings, head, norms.
        weight_decay: of Muon; momentum: of Muon, lower than the usual 0.95 because the runs are short.
        warmup_steps, decay_share, schedule, clip: see `train.fit`.
        precision: of the computation (weights stay float32); "auto" is bfloat16 where the processor computes in it.
        shards: threads with a part of the batch each; None takes one per core, at most four, and 1 on a GPU.
        seed: order of the blocks.
        checkpoint, every_seconds, progress, timing: see `train.fit`.

    Returns:
        The history of `train.fit`: step, tokens, loss (nats per token), lr, grad_norm, spike.

    Raises:
        BenchError: a budget too small for one step, blocks that do not fit the model, or a diverging loss.
    """
    _check(train_blocks, model, tokens, seconds, batch)
    device = next(model.parameters()).device
    per_step = batch * int(train_blocks.shape[1])
    shards = shards or default_shards(device)

    def run(target: PreTrainedModel, steps: int, **more: Any) -> pd.DataFrame:
        opts = _optimizers(target, lr_matrix, lr_embedding, weight_decay, momentum, shards)
        source = shuffled(train_blocks, batch, seed, device)
        return fit(target, _loss(target), source, opts, steps=steps, warmup_steps=min(warmup_steps, steps // 4),
                   clip=clip, decay_share=decay_share, schedule=schedule, shards=shards, precision=precision,
                   **more)  # fmt: skip

    steps = max(1, round(tokens / per_step))
    attention = model.config._attn_implementation
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # on short blocks a sixth of the step faster than the fused kernel
    model.train()
    try:
        if seconds is not None:
            plan = checkpoint.with_name(checkpoint.name + ".steps") if checkpoint is not None else None
            trial = copy.deepcopy(model)
            steps = _planned_steps(lambda n: run(trial, n), seconds, plan)
            del trial
        return run(
            model, steps, checkpoint=checkpoint, every_seconds=every_seconds, progress=progress, timing=timing,
            tag=f"{seed} {weight_decay} {momentum}",
        )  # fmt: skip
    finally:
        model.eval()
        model.set_attn_implementation(attention)


def pretrain_each(
    models: Mapping[str, tuple[PreTrainedModel, int]],
    train_blocks: Tensor,
    folder: Path,
    progress: Callable[[str, str], Progress],
    *,
    device: str = "auto",
    **recipe: Any,
) -> pd.DataFrame:
    """`pretrain` several models on the same blocks, one after the other, each in place.

    Args:
        models: name → model and its budget in tokens.
        folder: where the checkpoints `<name>.pt` go.
        progress: makes a reporter from a name and a unit.
        device: "auto" takes the GPU if there is one.
        recipe: options of `pretrain`.

    Returns:
        The histories below each other, with a column `model`.
    """
    from tinyonn_lib.lm.load import pick_device

    place, histories = pick_device(device), []
    for name, (model, tokens) in models.items():
        model.to(place)  # type: ignore[arg-type]
        checkpoint, report = folder / f"{name}.pt", progress(name, "steps")
        history = pretrain(train_blocks, model, tokens=tokens, checkpoint=checkpoint, progress=report, **recipe)
        histories.append(history.assign(model=name))
    return pd.concat(histories, ignore_index=True)


def _check(blocks: Tensor, model: PreTrainedModel, tokens: int, seconds: float | None, batch: int) -> None:
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise BenchError(f"Training blocks must be (N, length ≥ 2) token ids, got shape {tuple(blocks.shape)}.")
    if batch < 1 or tokens < 1 or (seconds is not None and seconds <= 0):
        raise BenchError(f"batch={batch}, tokens={tokens} and seconds={seconds} must be positive.")
    config = model.config.get_text_config()
    if int(blocks.max()) >= config.vocab_size or int(blocks.min()) < 0:
        raise BenchError(
            f"A block holds token {int(blocks.max())}, the model has {config.vocab_size}: other tokenizer?"
        )
    if blocks.shape[1] > config.max_position_embeddings:
        raise BenchError(f"Blocks of {blocks.shape[1]} tokens exceed the model's {config.max_position_embeddings}.")


def _loss(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    def loss(blocks: Tensor) -> Tensor:
        logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].reshape(-1))

    return loss


def _optimizers(
    model: nn.Module, lr_matrix: float, lr_embedding: float, weight_decay: float, momentum: float, parts: int
) -> list[torch.optim.Optimizer]:
    """Muon over the matrices inside the layers, in `parts` of equal work for as many threads; AdamW over the rest."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = cast("Any", model).get_output_embeddings()
    tables |= {id(head.weight)} if head is not None else set()
    params = [param for param in model.parameters() if param.requires_grad]
    matrices = [param for param in params if param.ndim == 2 and id(param) not in tables]
    rest = [param for param in params if not (param.ndim == 2 and id(param) not in tables)]
    shares: list[list[nn.Parameter]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for param in sorted(matrices, key=lambda p: -p.numel() * min(p.shape)):
        lightest = loads.index(min(loads))
        shares[lightest].append(param)
        loads[lightest] += param.numel() * min(param.shape)
    opts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(share, lr=lr_matrix, momentum=momentum, weight_decay=weight_decay) for share in shares if share
    ]
    if rest:
        opts.append(torch.optim.AdamW(rest, lr=lr_embedding, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    return opts


def _planned_steps(trial: Callable[[int], object], seconds: float, plan: Path | None) -> int:
    """Steps that fit into `seconds`, measured once; remembered in `plan` so that a resumed run keeps its schedule."""
    if plan is not None and plan.exists():
        return int(json.loads(plan.read_text())["steps"])
    began = time.monotonic()
    trial(2)  # the first steps allocate and warm caches
    middle = time.monotonic()
    trial(6)
    ended = time.monotonic()
    steps = max(1, math.floor((seconds - (ended - began)) / ((ended - middle) / 6)))
    if plan is not None:
        plan.parent.mkdir(parents=True, exist_ok=True)
        temporary = plan.with_name(plan.name + ".tmp")
        temporary.write_text(json.dumps({"steps": steps}))
        temporary.replace(plan)
    return steps
