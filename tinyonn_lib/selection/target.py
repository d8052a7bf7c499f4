"""Phase three of document 001: LoRA on the selected texts, by the bench's own training loop.

The loss of a batch is the mean over all of its learned tokens. Each row brings along what it weighs (`scale`), so that
cut into shards, pieces and processes a batch has the same loss, however the learned tokens are spread over its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.load import Dtype, context_length, load_model
from tinyonn_lib.lm.record import HeldOut
from tinyonn_lib.lm.schedule import Precision, Schedule
from tinyonn_lib.lm.threads import default_shards, threads
from tinyonn_lib.lm.train import fit
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection.lora import Lora, adapt, merge, quiet, save_adapter
from tinyonn_lib.selection.packing import GIVEN, batches, pack, steps_for

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

__all__ = ["Lora", "Tuned", "merge", "save_adapter", "train", "train_blocks"]


@dataclass(frozen=True)
class Tuned:
    """A trained adapter.

    Attributes:
        model: with the adapter inside; `save_adapter` writes it.
        history: as `fit` returns it.
        tokens: in the blocks of the rows; learned: those of them that are not given.
        epochs: how often the blocks were seen.
    """

    model: PeftModel
    history: pd.DataFrame
    tokens: int
    learned: int
    epochs: float


def train(
    model: Any, tokenizer: Any, rows: pd.DataFrame, *, tokens: int | None = None, epochs: float = 1.0, batch: int = 8,
    length: int = 128, held_out: pd.DataFrame | None = None, dtype: Dtype = "float32", device: str = "auto",
    processes: int = 1, strategy: str = "ddp", name: str = "", **options: Any,
) -> Tuned:  # fmt: skip
    """Train a LoRA on rows.

    Args:
        model: folder or hub id of a causal language model, or the model itself, which then holds the adapter.
        rows: see `pack`.
        tokens: to train on, given ones included: steps · batch · length, the same for every selection that is given
            the same. None takes `epochs` passes over the blocks.
        batch: blocks per step.
        length: tokens of a block.
        held_out: rows that are not trained on; see `train_blocks`.
        dtype, device: of a model that is loaded; see `load_model`. "nf4" is QLoRA (Dettmers et al. 2023).
        processes: that share each batch, one per GPU; strategy: "ddp", "zero2", or "zero3" (see params/accelerate).
            The result is one process's up to rounding.
        name: of the base model in the adapter's files; empty: as it was given.
        options: of `train_blocks`.

    Raises:
        BenchError: as `pack`, `train_blocks` and `target_worker.together`.
    """
    blocks = pack(rows, tokenizer, length)
    steps = steps_for(blocks, batch, tokens, epochs)
    held = None if held_out is None else pack(held_out, tokenizer, length)
    options |= {"batch": batch, "steps": steps, "held_out": held}
    if processes > 1:
        from tinyonn_lib.selection.target_worker import together

        adapted, history = together(model, blocks, dtype, device, processes, strategy, **options)
        adapted.peft_config["default"].base_model_name_or_path = name or model
    else:
        loaded = load_model(model, dtype, device) if isinstance(model, str) else model
        name = name or (model if isinstance(model, str) else "")
        adapted, history = train_blocks(loaded, blocks, name=name, **options)
    learned = int((blocks[:, 1] != GIVEN).sum())
    return Tuned(adapted, history, blocks[:, 0].numel(), learned, len(history) * batch / len(blocks))


def train_blocks(
    model: Any,
    blocks: Tensor,
    *,
    steps: int,
    lora: Lora = Lora(),  # noqa: B008
    lr: float = 5e-4,
    schedule: Schedule = "cosine",
    warmup: float = 0.1,
    batch: int = 8,
    accumulate: int = 1,
    precision: Precision = "float32",
    seed: int = 0,
    shards: int | None = None,
    recompute: bool = False,
    held_out: Tensor | None = None,
    look_every: int = 50,
    patience: int = 3,
    checkpoint: Path | None = None,
    every_seconds: float = 10.0,
    tensorboard: Path | None = None,
    progress: Progress | None = None,
    timing: dict[str, float] | None = None,
    accelerator: Accelerator | None = None,
    name: str = "",
) -> tuple[PeftModel, pd.DataFrame]:
    """Train a fresh adapter inside the model, in place, on blocks of `pack`. The base keeps every bit.

    Args:
        lr, schedule: peak and course of AdamW's rate; warmup: share of the steps in which it rises.
        seed: of the adapter's start, the order of the blocks and dropout.
        shards: see `fit`; None takes one per core, at most four. 1 with dropout and with `recompute`.
        recompute: gradient checkpointing: keep a layer's input only, and compute the layer again for its gradient.
        held_out: blocks that are not trained on. The training ends when `patience` looks, `look_every` steps apart,
            brought no new best, and the best adapter stays.
        checkpoint, every_seconds, tensorboard, progress, timing, accelerator: see `fit`. A killed training goes on and
            ends with the same bits, with dropout, too.
        name: of the base model, for the adapter's files.

    Returns:
        The model with its adapter, in eval mode, and `fit`'s history.

    Raises:
        BenchError: as `adapt` and `fit`, or blocks that do not fit the model.
    """
    device = model.device if accelerator is None else accelerator.device
    _check(model, blocks)
    adapted = adapt(model, lora, seed, name)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    loss = _loss(adapted)
    alone = accelerator is None and not lora.dropout and not recompute  # ZeRO-3 knows no threads
    parts = (shards or default_shards(device)) if alone else 1
    look = None
    if held_out is not None:
        look = HeldOut(_look(adapted, loss, held_out, batch, device, parts), look_every, patience)
    base = resume.fingerprint({}, [w for w in adapted.parameters() if not w.requires_grad], ()) if checkpoint else ""
    adapted.eval()
    if recompute:
        with quiet():
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
    _mode(adapted, True)
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=0.0)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + (accelerator.process_index if accelerator else 0))  # dropout: each its own
            history = fit(
                adapted, loss, batches(blocks, batch, seed, device), optimizer, steps=steps, schedule=schedule,
                warmup_steps=round(warmup * steps), accumulate=accumulate, precision=precision, shards=parts,
                held_out=look, checkpoint=checkpoint, every_seconds=every_seconds, tensorboard=tensorboard,
                progress=progress, timing=timing, accelerator=accelerator, tag=f"{lora} {seed} {recompute} {base}",
            )  # fmt: skip
    except BaseException:
        if accelerator is None:
            adapted.unload()  # the caller's model as it was
        raise
    finally:
        if recompute:
            with quiet():
                model.gradient_checkpointing_disable()
    return adapted.eval(), history


def _loss(model: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(data: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=data["inputs"], use_cache=False).logits
        nats = F.cross_entropy(logits.flatten(0, 1).float(), data["targets"].flatten(), reduction="sum")
        return nats * data["scale"].mean() / len(data["scale"])

    return loss


def _look(
    model: PeftModel,
    loss: Callable[[dict[str, Tensor]], Tensor],
    blocks: Tensor,
    batch: int,
    device: torch.device,
    shards: int,
) -> Callable[[], float]:
    """Mean loss over the learned tokens of held-out blocks."""
    ones = torch.ones((), device=device)
    share = 1 / int((blocks[:, 1] != GIVEN).sum())

    @torch.no_grad()
    def part(rows: Tensor) -> float:
        inputs, targets = rows.to(device, torch.long).unbind(1)
        return float(loss({"inputs": inputs, "targets": targets, "scale": ones.expand(len(rows)) * len(rows)}))

    def look() -> float:
        _mode(model, False)
        with threads(shards) as each:
            found = sum(each(part, blocks.split(batch))) * share
        _mode(model, True)
        return found

    return look


def _mode(model: PeftModel, training: bool) -> None:
    """Only the adapter drops out: the base stays in eval mode, so that its layers draw no random numbers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for name, module in model.named_modules():
        layer = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        if ".lora_dropout." in name or layer:  # a layer is computed again only in training mode
            module.training = training  # of this module alone


def _check(model: Any, blocks: Tensor) -> None:
    config, most = model.config.get_text_config(), context_length(model)
    if most and blocks.shape[2] > most:
        raise BenchError(f"Blocks of {blocks.shape[2]} tokens exceed the model's {most}: choose a shorter length.")
    if int(blocks[:, 0].max()) >= config.vocab_size:
        raise BenchError(
            f"A row holds token {int(blocks[:, 0].max())}, the model has {config.vocab_size}: give its own tokenizer."
        )
