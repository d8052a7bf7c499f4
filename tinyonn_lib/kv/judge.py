"""What a cache is worth to the student: its loss on held-out texts, next to floors, controls and its own cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import MIN_GROUPS, Loss
from tinyonn_lib.kv.cache import KV
from tinyonn_lib.kv.data import Batch, Caches, own_of, teachers_of
from tinyonn_lib.kv.handover import nats
from tinyonn_lib.kv.projector import KVDimensionProjector

Source = Callable[[Batch], KV | None]
"""What the student is handed for a batch; None: nothing."""

OWN, ZERO, NONE, OTHER = "own cache", "zero cache", "no cache", "own cache of another text"


def projected(projector: KVDimensionProjector) -> Source:
    """The teachers' caches through a projector."""
    return lambda batch: projector(teachers_of(batch, list(projector.teachers)))


def shuffled(source: Source) -> Source:
    """The same, of another text of the batch: right in kind, wrong in content.

    Raises:
        BenchError: by what it returns, for a batch of one text; `loss` and `error` make none if there are two texts.
    """

    def other(batch: Batch) -> KV | None:
        kv, mask = source(batch), batch["mask"]
        if len(mask) < 2:
            raise BenchError("The cache of another text needs another text: give at least two held-out texts.")
        if kv is None:
            return None
        # A shorter text goes round and round, so that no padding is ever seen.
        lengths = mask.sum(1).roll(1)
        places = torch.arange(mask.shape[1], device=mask.device)[None] % lengths[:, None]
        turned = [t.roll(1, 0).take_along_dim(places[:, None, :, None], 2) for t in (kv.keys, kv.values)]
        return KV(*turned)

    return other


def floors(caches: Caches) -> dict[str, Source]:
    """What needs no teacher: the student's own cache, zeros, the mean of its caches on training texts, and nothing."""
    total, count = [torch.zeros(()), torch.zeros(())], 0
    for batch in caches.batches():
        real = batch["mask"].to(batch["own.keys"].dtype)[:, None, :, None]
        total = [
            t + (side * real).double().sum((0, 2)).cpu() for t, side in zip(total, _sides(own_of(batch)), strict=True)
        ]
        count += int(batch["mask"].sum())
    mean = [(t / count).float()[None, :, None] for t in total]

    def means(batch: Batch) -> KV:
        own = own_of(batch)
        return KV(*(m.to(own.keys).expand_as(own.keys) for m in mean))

    return {
        OWN: own_of,
        NONE: lambda batch: None,
        ZERO: lambda batch: KV(*(torch.zeros_like(t) for t in _sides(own_of(batch)))),
        "mean cache": means,
        OTHER: shuffled(own_of),
    }


@torch.no_grad()
def loss(source: Source, caches: Caches) -> Loss:
    """The student's next-token loss on every text, each position handed over (`handover.nats`)."""
    nats_of, tokens = [], []
    for batch in caches.batches():
        nats_of.append(nats(caches.student, source(batch), batch["ids"], batch["mask"]).double().sum(1).cpu())
        tokens.append(batch["mask"][:, 1:].sum(1).cpu())
    if not torch.isfinite(torch.cat(nats_of)).all():
        raise BenchError(
            "The student's loss is not finite with this cache: look for NaN in the caches, or use float32."
        )
    return Loss(torch.cat(nats_of).numpy(), torch.cat(tokens).numpy().astype(np.int64))


@torch.no_grad()
def error(source: Source, caches: Caches) -> dict[str, float]:
    """How near a cache is to the student's own: mean squared error and R², of keys and of values, real tokens alone.

    A diagnostic only: what the student makes of it is its loss.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in caches.batches():
        said, real = source(batch), batch["mask"]
        if said is None:
            return {"mse": float("nan"), "r2_keys": float("nan"), "r2_values": float("nan")}
        for name, own, other in zip(("keys", "values"), _sides(own_of(batch)), _sides(said), strict=True):
            one, two = (t.transpose(1, 2)[real].double() for t in (own, other))
            for key, value in ((f"{name}.error", (one - two).square()), (f"{name}.sum", one), (f"{name}.sq", one**2)):
                sums[key] = sums.get(key, torch.zeros(())) + value.sum(0).cpu()
        count += int(real.sum())
    found = {"mse": float(sum(sums[f"{name}.error"].mean() for name in ("keys", "values"))) / count}
    for name in ("keys", "values"):
        spread = sums[f"{name}.sq"].sum() - (sums[f"{name}.sum"].square() / count).sum()
        found[f"r2_{name}"] = float(1 - sums[f"{name}.error"].sum() / spread)
    return found


def closed(losses: Sequence[Loss], own: Loss, zero: Loss, groups: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Share of the gap between the zero cache and the student's own that a cache closes, with a 95 % interval.

    1: as good as its own; above: better. Bootstrap over groups (source files), means over seeds, as `evaluate.paired`.
    """
    nats_of = np.mean([each.nats for each in losses], axis=0)
    _, code = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = [np.bincount(code, side) for side in (zero.nats - nats_of, zero.nats - own.nats)]
    number = len(sums[0])
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=2000)
    share: NDArray[np.float64] = (drawn @ sums[0]) / (drawn @ sums[1])
    low, high = np.quantile(share, [0.025, 0.975]) if number >= MIN_GROUPS else (np.nan, np.nan)
    return {"closed": float(sums[0].sum() / sums[1].sum()), "closed_low": float(low), "closed_high": float(high)}


def table(losses: Mapping[str, Sequence[Loss]], groups: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """One row per cache: its loss in nats per token, its perplexity, and the share of the gap that it closes.

    Args:
        losses: label → one loss per seed; `OWN` and `ZERO` among them.
        groups: per text its source file.

    Returns:
        `cache, nll, perplexity, spread` (standard deviation over seeds; NaN with one), `seeds, closed` and
        its interval `closed_low, closed_high`.
    """
    own, zero = losses[OWN][0], losses[ZERO][0]
    rows = []
    for label, each in losses.items():
        means = [one.mean for one in each]
        rows.append(
            {"cache": label, "nll": float(np.mean(means)), "perplexity": float(np.exp(np.mean(means))),
             "spread": float(np.std(means, ddof=1)) if len(means) > 1 else np.nan, "seeds": len(each)}
            | closed(each, own, zero, groups, seed)
        )  # fmt: skip
    return pd.DataFrame(rows)


def _sides(kv: KV) -> tuple[Tensor, Tensor]:
    return kv.keys, kv.values
