"""Loss on held-out text, and paired comparison with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinyonn_lib.lm.threads import default_shards, threads

MIN_GROUPS = 8
"""Source files below which a bootstrap interval would feign certainty."""


@dataclass(frozen=True)
class Loss:
    """Negative log-likelihood per sample.

    Attributes:
        nats: Sum over the sample's predicted tokens, `(samples,)`, float64.
        tokens: Predicted tokens, `(samples,)`.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())


def loss(model: Any, samples: Sequence[Sequence[int]], batch: int = 16) -> Loss:
    """Next-token loss of every sample of token ids; padding never counts.

    Samples of similar length share a batch of at most `batch`; on a CPU the batches run in one thread per core.
    Returned in the order given.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    device = next(model.parameters()).device
    shards = default_shards(device)
    # As many batches for each thread: with three for two threads one core would wait for the other.
    count = min(len(order), shards * -(-len(order) // (shards * batch)))
    batches = [part.tolist() for part in np.array_split(order, count)] if order else []
    nats = np.zeros(len(samples))

    def measure(rows: list[int]) -> None:
        nats[rows] = _nats(model, [samples[i] for i in rows], device)

    with threads(max(1, min(shards, len(batches)))) as each:
        each(measure, batches)
    return Loss(nats, np.array([len(s) - 1 for s in samples], np.int64))


@torch.no_grad()
def _nats(model: Any, samples: Sequence[Sequence[int]], device: torch.device) -> NDArray[np.float64]:
    lengths = torch.tensor([len(sample) for sample in samples])
    ids = torch.zeros(len(samples), int(lengths.max()), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    # The last position has nothing to predict: ignoring it spares the copy of all logits that slicing it off costs.
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:].masked_fill(~real[:, 1:], -100)
    logits = model(input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.to(logits.device).flatten(), reduction="none"
    )
    found: NDArray[np.float64] = each.view(len(ids), -1).double().sum(1).cpu().numpy()
    return found


@dataclass(frozen=True)
class Difference:
    """Mean loss of one model minus another's on the same tokens, nats per token, with a 95 % interval.

    With fewer than `MIN_GROUPS` groups the interval is NaN: so few cannot tell how much others would differ.
    """

    mean: float
    low: float
    high: float
    groups: int

    @property
    def verdict(self) -> str:
        """How much the first loses against the second; "about as much as" when the interval holds 0 or is missing."""
        return "less than" if self.high < 0 else "more than" if self.low > 0 else "about as much as"

    @property
    def standing(self) -> str:
        """Of the first: "better", "worse", "no clear difference", or "too few sources" for an interval."""
        if self.groups < MIN_GROUPS:
            return "too few sources"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no clear difference"

    def __str__(self) -> str:
        if self.groups < MIN_GROUPS:
            return f"{self.mean:+.3f} (no interval: {self.groups} source files)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(
    losses: Sequence[Loss],
    reference: Sequence[Loss] | Loss,
    groups: Sequence[Any],
    draws: int = 2000,
    seed: int = 0,
    *,
    over_seeds: bool = False,
) -> Difference:
    """ΔNLL with a paired bootstrap interval (Efron & Tibshirani 1993, §6.4).

    Args:
        losses: One `Loss` per seed of the method; their nats are averaged per sample before resampling.
        reference: What they are compared with, on the same samples.
        groups: What each sample belongs to, such as its source file: samples of one group are not independent and are
            drawn together.
        over_seeds: Draw the seeds, too, so that the interval tells how much another training would differ and not only
            other samples. Where both sides have several, the same seeds are drawn for both, so they need equally many.
    """
    reference = [reference] if isinstance(reference, Loss) else reference
    tokens = losses[0].tokens
    if any(not np.array_equal(item.tokens, tokens) for item in (*losses, *reference)):
        raise ValueError("paired comparison needs the same samples on both sides")
    gap = np.mean([item.nats for item in losses], axis=0) - np.mean([item.nats for item in reference], axis=0)
    _, code = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    gap_sum, token_sum = np.bincount(code, gap), np.bincount(code, tokens)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(gap_sum), np.full(len(gap_sum), 1 / len(gap_sum)), size=draws)
    drawn = counts @ gap_sum
    if over_seeds:
        trained = max(len(losses), len(reference))
        if not {len(losses), len(reference)} <= {1, trained}:
            raise ValueError("drawing seeds needs as many on both sides, or one alone on one of them")
        one, two = (list(side) * (trained // len(side)) for side in (losses, reference))
        each = np.array([np.bincount(code, a.nats - b.nats) for a, b in zip(one, two, strict=True)])
        shares = generator.multinomial(trained, np.full(trained, 1 / trained), size=draws) / trained
        drawn = (counts @ each.T * shares).sum(1)
    means = drawn / (counts @ token_sum)
    low, high = np.quantile(means, [0.025, 0.975]) if len(gap_sum) >= MIN_GROUPS else (np.nan, np.nan)
    return Difference(float(gap.sum() / tokens.sum()), float(low), float(high), len(gap_sum))
