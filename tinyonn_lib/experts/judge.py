"""ΔNLL tables: every partition and router next to what it must beat, on the same held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib import evaluate
from tinyonn_lib.experts.assemble import dense_weight
from tinyonn_lib.experts.partition import Partition, flap_scores
from tinyonn_lib.experts.routing import Scale, dropped_mean, oracle, scaled, static
from tinyonn_lib.lm.models import FFN

Losses = dict[str, list[evaluate.Loss]]
"""Method → one loss per seed, all on the same samples."""


class Judge:
    """One dense model and one set of held-out samples; every method is measured against the same dense loss."""

    def __init__(
        self, model: Any, ffns: Sequence[FFN], samples: pd.DataFrame, neurons: pd.DataFrame, batch: int = 16
    ) -> None:
        """
        Args:
            samples: columns `ids` (token ids) and `source` (what the bootstrap draws together).
            neurons: the scan's statistics, for the static controls.
        """
        self.model, self.ffns, self.batch = model, ffns, batch
        self.ids, self.groups = samples["ids"].tolist(), samples["source"].tolist()
        self.dense = evaluate.loss(model, self.ids, batch)
        self.flap = flap_scores(neurons, [dense_weight(f.down) for f in ffns])
        ordered = neurons.sort_values(["layer", "neuron"]).groupby("layer")["act_mean"]
        self.means = [torch.tensor(rows.to_numpy(), dtype=torch.float32) for _, rows in ordered]

    def loss(self, scales: Sequence[Scale], shifts: Sequence[Tensor] | None = None) -> evaluate.Loss:
        """Loss of the divided model."""
        with scaled(self.ffns, scales, shifts):
            return evaluate.loss(self.model, self.ids, self.batch)

    def static(self, active: float) -> Losses:
        """FLAP's static pruning to the share `active`, without and with the mean of what it dropped.

        The bias of the second cannot be stored in a standard checkpoint; it is the stronger control.
        """
        scales = static(self.flap, active)
        shifts = dropped_mean(self.ffns, self.flap, self.means, active)
        return {"flap_static": [self.loss(scales)], "flap_static + bias": [self.loss(scales, shifts)]}

    def table(self, losses: Losses, active: float) -> pd.DataFrame:
        """ΔNLL to the dense model, nats per token: `method, active, mean, low, high, seeds, files`."""
        gaps = {method: evaluate.paired(each, self.dense, self.groups) for method, each in losses.items()}
        return pd.DataFrame(
            [
                {
                    "method": method, "active": active, "mean": gap.mean, "low": gap.low, "high": gap.high,
                    "seeds": len(losses[method]), "files": gap.groups,
                }
                for method, gap in gaps.items()
            ]
        )  # fmt: skip

    def tables(self, losses: Mapping[float, Losses]) -> pd.DataFrame:
        """`table` for several active shares, one below the other."""
        return pd.concat([self.table(each, share) for share, each in losses.items()], ignore_index=True)

    def between(self, losses: Losses, method: str, other: str) -> evaluate.Difference:
        """Loss of one method minus another's, paired."""
        return evaluate.paired(losses[method], losses[other], self.groups)

    def best_static(self, losses: Losses) -> str:
        """The static control with the lower loss."""
        return min((name for name in losses if name.startswith("flap_static")), key=lambda n: losses[n][0].mean)


def under_oracle(
    judge: Judge,
    partitions: Mapping[str, Sequence[Partition]],
    actives: Iterable[float],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[float, Losses]:
    """Losses of partitions under the oracle router, and of static pruning, at each active share.

    The oracle separates the partition from the router: it chooses as well as a strong router could, for each alike.

    Args:
        partitions: method → one partition per seed, all with the same number of experts.
        actives: wanted shares; each becomes the nearest whole number of experts, and pruning gets the same share.

    Returns:
        Realised share k / experts → method → losses.
    """
    first = next(iter(partitions.values()))[0]
    ks = sorted({first.k(active) for active in actives})
    total = len(ks) * sum(len(parts) for parts in partitions.values())
    found: dict[float, Losses] = {}
    done = 0
    for k in ks:
        share = k / first.count
        found[share] = {}
        for method, parts in partitions.items():
            losses = found[share].setdefault(f"{method}, oracle router", [])
            for part in parts:
                losses.append(judge.loss(oracle(part, judge.ffns, k)))
                done += 1
                if progress:
                    progress(done, total, f"{method} at {share:.0%}")
        found[share] |= judge.static(share)
    return found
