"""Train a fresh router over frozen experts (document 000 §3).

Two stages over the same loop: layer-local distillation, in which each layer's router learns which experts matter for
the token it sees, from the dense layer itself; then the language-model loss through the whole divided model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.experts.assemble import GatedFFN, dense_weight
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.routing import Scale, energies, linear_router, scaled, top_mask

Fit = Callable[..., pd.DataFrame]
"""`lm.train.fit`, handed in: this package knows no training loop of its own."""


def fresh(partition: Partition, width: int, seed: int, spread: float = 0.02) -> list[nn.Parameter]:
    """A randomly initialised router: per layer `(experts, width)`, normal with standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(partition.count, width, generator=generator) * spread) for _ in partition.experts]


def distil(
    fit: Fit,
    model: Any,
    ffns: Sequence[GatedFFN],
    partition: Partition,
    routers: Sequence[nn.Parameter],
    batch: Callable[[int], Tensor],
    *,
    k: int,
    steps: int,
    lr: float,
    **options: Any,
) -> pd.DataFrame:
    """Stage one, layer-local: each router learns to name the k experts that add most to the dense layer's output.

    The dense model runs unchanged; per layer and token the target is the oracle's choice (the k largest
    ‖W_down,e h_e‖₂) and the loss binary cross-entropy per expert. Trains `routers` in place.

    Args:
        batch: step → token ids `(B, T)`.
        options: passed to `fit` (checkpoint, progress, shards …).

    Returns:
        The history of `fit`; `loss` is nats per expert and token, mean over layers.
    """
    energy = [energies(i, dense_weight(f.down)) for i, f in zip(partition.experts, ffns, strict=True)]
    found: dict[int, list[Tensor]] = {}

    def watch(layer: int) -> Scale:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            target = top_mask(energy[layer](h), k)
            with torch.enable_grad():
                logits = x.float() @ routers[layer].T
                found[get_ident()].append(F.binary_cross_entropy_with_logits(logits, target))
            return h.new_ones(())

        return scale

    def loss(ids: Tensor) -> Tensor:
        found[get_ident()] = []
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
        return torch.stack(found.pop(get_ident())).mean()

    optimizer = torch.optim.AdamW(routers, lr=lr, weight_decay=0.0)
    with scaled(ffns, [watch(layer) for layer in range(len(routers))]):
        return fit(list(routers), loss, batch, optimizer, steps=steps, **options)


@torch.no_grad()
def soften(routers: Sequence[nn.Parameter], spread: float) -> None:
    """Shrink each router so that its rows have standard deviation `spread`: same choices, gates close to 1.

    After stage one the logits are sure of themselves; as softmax gates they would silence all but one expert.
    """
    for weight in routers:
        weight.sub_(weight.mean(0)).mul_(spread / weight.std())


def train(
    fit: Fit,
    model: Any,
    ffns: Sequence[GatedFFN],
    partition: Partition,
    routers: Sequence[nn.Parameter],
    batch: Callable[[int], Tensor],
    *,
    k: int,
    steps: int,
    lr: float,
    **options: Any,
) -> pd.DataFrame:
    """Stage two: next-token loss through the whole divided model, experts and everything else frozen.

    The gates are those of the exported checkpoint, so choosing an expert and weighing it are learned together.
    Arguments and result as in `distil`; `loss` is nats per token.
    """
    model.requires_grad_(False)

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    optimizer = torch.optim.AdamW(routers, lr=lr, weight_decay=0.0)
    with scaled(ffns, linear_router(routers, partition, k)):
        return fit(list(routers), loss, batch, optimizer, steps=steps, **options)


@torch.no_grad()
def usage(model: Any, ffns: Sequence[GatedFFN], scales: Sequence[Scale], partition: Partition, ids: Tensor) -> Tensor:
    """Share of tokens on which each expert is on, `(layers, experts)`; `ids` `(B, T)`."""
    shares: list[Tensor] = []

    def count(index: Tensor, scale: Scale) -> Scale:
        def counted(x: Tensor, h: Tensor) -> Tensor:
            factor = scale(x, h)
            shares.append((factor[..., index[:, 0]] != 0).float().flatten(0, -2).mean(0))
            return factor

        return counted

    with scaled(ffns, [count(i, s) for i, s in zip(partition.experts, scales, strict=True)]):
        model(input_ids=ids, use_cache=False)
    return torch.stack(shares)
