"""Train a fresh router over frozen experts (document 000 §3).

Two stages over the same loop: layer-local distillation, in which each layer's router learns which experts matter for
the token it sees, from the dense layer itself; then the language-model loss through the whole divided model. Because
the divided model runs as the dense one with scaled neurons, the output of experts that were *not* chosen is at hand,
too, and the loss can say whether choosing them would have helped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.experts.assemble import dense_weight
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.routing import GATES, Scale, energies, per_neuron, scaled, top_mask
from tinyonn_lib.lm.models import FFN
from tinyonn_lib.lm.train import fit


def fresh(
    partition: Partition, width: int, seed: int, spread: float = 0.02, device: torch.device | None = None
) -> list[nn.Parameter]:
    """A randomly initialised router: per layer `(experts, width)`, normal with standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts alike
    drawn = [torch.randn(partition.count, width, generator=generator) * spread for _ in partition.experts]
    return [nn.Parameter(weight.to(device)) for weight in drawn]


def distil(
    model: Any,
    ffns: Sequence[FFN],
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
    ‖W_down,e h_e‖₂) and the loss binary cross-entropy per expert, weighted by that norm, because to miss a loud expert
    costs more. Trains `routers` in place.

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
            norms = energy[layer](h).sqrt()
            weight = norms / norms.mean(-1, keepdim=True).clamp(min=1e-30)
            with torch.enable_grad():
                logits = x.float() @ routers[layer].T
                loss = F.binary_cross_entropy_with_logits(logits, top_mask(norms, k), weight)
            found[get_ident()].append(loss)
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


def soften(routers: Sequence[Tensor], spread: float) -> list[Tensor]:
    """Each router scaled to a standard deviation of `spread`: the same choices, softmax gates close to 1.

    After stage one the logits are sure of themselves; as they stand they would silence all but one expert.
    """
    return [(w * temper).detach() for w, temper in zip(routers, _tempers(routers, spread), strict=True)]


def _tempers(routers: Sequence[Tensor], spread: float) -> list[float]:
    return [spread / float(w.detach().std()) for w in routers]


def train(
    model: Any,
    ffns: Sequence[FFN],
    partition: Partition,
    routers: Sequence[nn.Parameter],
    batch: Callable[[int], Tensor],
    *,
    k: int,
    steps: int,
    lr: float,
    gates: str = "softmax",
    gate_spread: float = 0.01,
    temperature: float = 0.2,
    **options: Any,
) -> pd.DataFrame:
    """Stage two: next-token loss through the whole divided model, experts and everything else frozen.

    Forward as the exported checkpoint computes it: the k largest logits, gates as its family has them, such as
    `experts · softmax(temper · logits)`.
    Backward also through the choice: straight through a sigmoid of the distance to the k-th logit (Bengio et al. 2013,
    arXiv:1308.3432), for chosen and unchosen experts alike.

    Args:
        gates: a key of `routing.GATES`.
        gate_spread: standard deviation to which the router is scaled for its gates; see `soften`.
        temperature: width of that sigmoid, in logits.

    Returns:
        The history of `fit`; `loss` is nats per token. `routers` hold the scaled weights, ready for export.
    """
    model.requires_grad_(False)
    tempers = _tempers(routers, gate_spread)

    def layer_scale(layer: int) -> Scale:
        weight, temper, widen = routers[layer], tempers[layer], per_neuron(partition, layer)

        def scale(x: Tensor, h: Tensor) -> Tensor:
            logits = x.float() @ weight.T
            top = logits.detach().topk(min(k + 1, weight.shape[0]), dim=-1).values
            border = top[..., k - 1 : k + 1].mean(-1, keepdim=True)
            soft = torch.sigmoid((logits - border) / temperature)
            hard = top_mask(logits.detach(), k) * GATES[gates](temper * logits)
            return widen((hard + soft - soft.detach()).to(h))

        return scale

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    optimizer = torch.optim.AdamW(routers, lr=lr, weight_decay=0.0)
    scales = [layer_scale(layer) for layer in range(len(routers))]
    with scaled(ffns, scales):
        history = fit(list(routers), loss, batch, optimizer, steps=steps, **options)
    with torch.no_grad():
        for weight, temper in zip(routers, tempers, strict=True):
            weight.mul_(temper)
    return history


@torch.no_grad()
def usage(model: Any, ffns: Sequence[FFN], scales: Sequence[Scale], partition: Partition, ids: Tensor) -> Tensor:
    """Share of tokens on which each expert is on, `(layers, experts)`; `ids` `(B, T)`."""
    shares: list[Tensor] = []

    def count(index: Tensor, scale: Scale) -> Scale:
        def counted(x: Tensor, h: Tensor) -> Tensor:
            factor = scale(x, h)
            shares.append((factor[..., index[:, 0]] != 0).float().flatten(0, -2).mean(0))
            return factor

        return counted

    with scaled(ffns, [count(i, s) for i, s in zip(partition.experts, scales, strict=True)]):
        model(input_ids=ids.to(model.device), use_cache=False)
    return torch.stack(shares).cpu()
