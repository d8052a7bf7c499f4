"""Nats per token from the last hidden states, without ever holding the logits of a whole batch.

Logits are most of a small model's memory traffic. A tile of them, some positions by part of the vocabulary, is made,
reduced to one number per position and forgotten while it is in the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE = {"cpu": (512, 512), "cuda": (8192, 8192)}
"""Positions and words of a tile: 1 MB, one core's cache; on a GPU as few launches as memory allows."""


@dataclass(frozen=True)
class Head:
    """A model's output matrix. For use without gradients.

    Attributes:
        body: what gives the hidden states, `last_hidden_state`.
        weight: `(vocabulary, d_model)`.
        bias: `(vocabulary,)`, or None.
        scale: factor on the logits, such as Granite's.
    """

    body: nn.Module
    weight: Tensor
    bias: Tensor | None
    scale: float

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """−log p of each target, float32.

        Args:
            hidden: `(N, d_model)`.
            targets: `(N,)`.
        """
        if not len(hidden):
            return hidden.new_zeros(0, dtype=torch.float32)
        rows = TILE.get(hidden.device.type, TILE["cuda"])[0]
        found = []
        for part, chosen in zip(hidden.split(rows), targets.split(rows), strict=True):
            picked = (part.float() * self.weight[chosen].float()).sum(-1)
            if self.bias is not None:
                picked = picked + self.bias[chosen].float()
            # Rounded as a tile is: in bfloat16 a certain word must not come out likelier than all words together.
            found.append(self._log_total(part) - picked.to(hidden.dtype).float() * self.scale)
        return torch.cat(found)

    def _log_total(self, hidden: Tensor) -> Tensor:
        """Log of the sum of e^logit over all words, `(N,)`."""
        words = TILE.get(hidden.device.type, TILE["cuda"])[1]
        weights = self.weight.split(words)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(words)
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            # 2^x is four times as fast as e^x, and the greatest logit is a pass of its own that only extremes need.
            # One buffer for all tiles: beside the main thread, memory that is given back is faulted in again.
            factor, buffer = self.scale / math.log(2), hidden.new_empty(len(hidden) * words)
            scaled, total = hidden * factor, hidden.new_zeros(len(hidden))
            for weight, bias in zip(weights, biases, strict=True):
                tile = buffer[: len(hidden) * len(weight)].view(len(hidden), -1)
                torch.mm(scaled, weight.T, out=tile)
                if bias is not None:
                    tile += bias * factor
                total += tile.exp2_().sum(-1)
            if bool(((total > 1e-30) & (total < 1e38)).all()):
                return total.log()
        parts = [
            (F.linear(hidden, weight, bias).float() * self.scale).logsumexp(-1)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return torch.stack(parts).logsumexp(0)


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """The model's head, if hidden states, one matrix and a factor are all there is to its logits; else None.

    Found out on two short texts, one of them padded: soft-capped logits, a head that is no plain matrix, and a model
    that looks at padding behind a text all give None.
    """
    body, head = model.base_model, model.get_output_embeddings()
    if body is model or not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return None
    ids = torch.randint(len(head.weight), (2, 8), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0][1].shape != logits.shape:
        return None
    hidden, raw = seen[0][0].double(), seen[0][1].double()
    scale = float((logits * raw).sum() / raw.square().sum())
    own = body(input_ids=ids, use_cache=False).last_hidden_state.double()
    eps = torch.finfo(head.weight.dtype).eps
    straight = (logits - scale * raw).abs().max() <= 4 * eps * logits.abs().max()
    causal = (own - hidden)[mask.bool()].norm() <= min(64 * eps**0.75, 0.05) * hidden[mask.bool()].norm()
    if not (straight and causal):
        return None
    return Head(body, head.weight, head.bias, 1.0 if abs(scale - 1) < 4 * eps else scale)
