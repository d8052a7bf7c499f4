"""What tests of training share: how one begins, is interrupted, and is compared with another."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.experts import analytic, router
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.routing import scaled
from tinyonn_lib.experts.student import adapted
from tinyonn_lib.experts.training import Recipe, Trained, train
from tinyonn_lib.lm import models

from .conftest import Batch, Tiny, written

RECIPES = {
    "kl": Recipe(lr=0.02, revive=True),
    "layer": Recipe(goal="layer", lr=0.02, revive=True),
    "variable": Recipe(lr=0.02, variable=True, revive=True),
    "experts": Recipe(lr=0.02, lr_experts=2e-3, unfreeze=0.4, revive=True),
}
STEPS = 20


def begin(tiny: Tiny, part: Partition, seed: int = 0, gates: str = "sigmoid", init: str = "random") -> Any:
    return router.build(tiny.evidence, part, init, gates, seed, torch.device("cpu"))


def dead(tiny: Tiny, part: Partition) -> Any:
    """Expert 1 of layer 0 is never chosen."""
    made = begin(tiny, part)
    with torch.no_grad():
        made[0].bias[1] -= 50
    return made


def pruning(tiny: Tiny) -> tuple[list[Tensor], list[Tensor]]:
    """The weaker half of each layer's neurons off, and their mean as a bias."""
    keep, bias = [], []
    for layer in tiny.evidence:
        score = layer.h.var(0) * layer.contribution.square()
        off = score < score.median()
        keep.append((~off).float())
        bias.append(layer.down @ (layer.h.mean(0) * off))
    return keep, bias


def nats(model: Any, dense: Any, layers: Any, ids: Tensor, goal: str) -> float:
    """The finished model's loss, with hard choices: for "layer" the mean relative error, else nats per token."""
    errors: list[float] = []

    def watching(ffn: models.FFN, layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            down = ffn.down.weight
            errors.append(float((((layer.scale(x, h) - 1) * h) @ down.T).square().sum() / (h @ down.T).square().sum()))
            return h.new_ones(())

        return scale

    ffns = models.ffns(model)
    scales = [watching(f, each) if goal == "layer" else each.scale for f, each in zip(ffns, layers, strict=True)]
    with torch.no_grad():
        target = dense(ids).logits.double().log_softmax(-1)
        with adapted(layers, ffns), scaled(ffns, scales):
            ours = model(ids).logits.double().log_softmax(-1)
    if goal == "layer":
        return sum(errors) / len(errors)
    if goal == "kl":
        return float((target.exp() * (target - ours)).sum(-1).mean())
    return float(F.nll_loss(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def shares_of(usage: pd.DataFrame, layer: int, expert: int) -> list[float]:
    return usage[(usage["layer"] == layer) & (usage["expert"] == expert)]["share"].tolist()


def same(one: Trained, two: Trained, *, exactly: bool = True) -> None:
    pd.testing.assert_frame_equal(one.usage, two.usage, check_exact=exactly, rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(one.history, two.history, check_exact=exactly, rtol=1e-5, atol=1e-6)
    for name in ("model", "layers"):
        first, second = (
            torch.nn.ModuleList(vars(each)[name]) if name == "layers" else each.model for each in (one, two)
        )
        for key, value in first.state_dict().items():
            atol = 0.0 if exactly else 1e-6
            torch.testing.assert_close(value, second.state_dict()[key], rtol=0, atol=atol, equal_nan=True)


class Stop(Exception):
    pass


def until(batch: Batch, stop: int, calls: int = 1) -> Batch:
    """The same batches, and an end when this step is asked for the n-th time (each `fit` asks for its first twice)."""
    asked = [0]

    def stopping(step: int) -> Tensor:
        asked[0] += step == stop
        if asked[0] == calls:
            raise Stop
        return batch(step)

    return stopping


def job(kind: str, file: Path | None, stop: int = -1) -> Trained:
    """A training that depends on nothing but its arguments; with `stop` it kills its own process at that step."""
    torch.manual_seed(0)
    model = models.new_model(
        vocab_size=60, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=32, max_length=16, seed=1
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
    model.eval()
    texts = written(model, 60, 10, seed=2)
    part = Partition("any", tuple(torch.randperm(32).view(4, 8).sort(-1).values for _ in range(2)))
    x = torch.randn(200, 16)
    made = [Router(analytic.Linear(torch.randn(4, 16), torch.zeros(4)), x, "sigmoid") for _ in range(2)]
    with torch.no_grad():
        for each in made:
            assert each.bias is not None
            each.bias[2] -= 50

    def batch(step: int) -> Tensor:
        if step == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return texts[20:][torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(step))]

    recipe = RECIPES[kind]
    return train(
        model, part, made, batch, texts[:20], k=2, steps=STEPS, recipe=recipe, checkpoint=file, every_seconds=0.0
    )
