"""ΔNLL tables: every partition and router next to what it must beat, on the same held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib import evaluate
from tinyonn_lib.experts.assemble import GatedFFN, dense_weight
from tinyonn_lib.experts.partition import Partition, flap_scores
from tinyonn_lib.experts.routing import Scale, dropped_mean, oracle, scaled, static

Measure = Callable[[Sequence[Scale], Sequence[Tensor] | None], evaluate.Loss]


class Judge:
    """One dense model and one set of held-out samples; every method is measured against the same dense loss."""

    def __init__(
        self, model: Any, ffns: Sequence[GatedFFN], samples: pd.DataFrame, neurons: pd.DataFrame, batch: int = 16
    ) -> None:
        """
        Args:
            samples: columns `ids` (token ids) and `source` (what the bootstrap draws together).
            neurons: the scan's statistics, for the static controls.
        """
        self.model, self.ffns, self.batch = model, ffns, batch
        self.ids, self.groups = samples["ids"].tolist(), samples["source"].tolist()
        self.dense = evaluate.loss(model, self.ids, batch)
        down = [dense_weight(f.down) for f in ffns]
        self.flap = flap_scores(neurons, down)
        ordered = neurons.sort_values(["layer", "neuron"]).groupby("layer")["act_mean"]
        self.means = [torch.tensor(rows.to_numpy(), dtype=torch.float32) for _, rows in ordered]

    def loss(self, scales: Sequence[Scale], shifts: Sequence[Tensor] | None = None) -> evaluate.Loss:
        """Loss of the divided model."""
        with scaled(self.ffns, scales, shifts):
            return evaluate.loss(self.model, self.ids, self.batch)

    def row(self, method: str, active: float, losses: Sequence[evaluate.Loss]) -> dict[str, Any]:
        """One line of a table: ΔNLL to the dense model, nats per token, with its paired 95 % interval."""
        gap = evaluate.paired(losses, self.dense, self.groups)
        return {
            "method": method, "active": active, "mean": gap.mean, "low": gap.low, "high": gap.high,
            "seeds": len(losses),
        }  # fmt: skip

    def static(self, active: float) -> dict[str, evaluate.Loss]:
        """FLAP's static pruning at the same active parameters, without and with the mean of what it dropped.

        The bias of the second cannot be stored in a standard checkpoint; it is the stronger control.
        """
        scales = static(self.flap, active)
        shifts = dropped_mean(self.ffns, self.flap, self.means, active)
        return {"flap_static": self.loss(scales), "flap_static + bias": self.loss(scales, shifts)}


def oracle_table(
    judge: Judge,
    partitions: Mapping[str, Sequence[Partition]],
    actives: Iterable[float],
    progress: Callable[[int, int, str], None] | None = None,
) -> pd.DataFrame:
    """ΔNLL of partitions under the oracle router, and of static pruning, at each active share.

    The oracle separates the partition from the router: no router over these experts does better by choosing alone.

    Args:
        partitions: method → one partition per seed.

    Returns:
        `method, active, mean, low, high, seeds`, one row per method and share.
    """
    shares = list(actives)
    total = len(shares) * (1 + sum(len(parts) for parts in partitions.values()))
    rows, done = [], 0
    for active in shares:
        for method, parts in partitions.items():
            losses = []
            for part in parts:
                losses.append(judge.loss(oracle(part, judge.ffns, part.k(active))))
                done += 1
                if progress:
                    progress(done, total, f"{method} at {active:.0%}")
            rows.append(judge.row(f"{method}, oracle router", active, losses))
        rows += [judge.row(method, active, [loss]) for method, loss in judge.static(active).items()]
        done += 1
        if progress:
            progress(done, total, f"flap_static at {active:.0%}")
    return pd.DataFrame(rows)
