"""ΔNLL tables: every partition and router next to what it must beat, on the same held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib import evaluate
from tinyonn_lib.experts.assemble import dense_weight
from tinyonn_lib.experts.controls import fluctuation
from tinyonn_lib.experts.evidence import check
from tinyonn_lib.experts.methods import Divided
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.routing import Scale, chosen, dropped_mean, oracle, scaled, static
from tinyonn_lib.lm.models import FFN
from tinyonn_lib.lm.models import ffns as ffns_of

Losses = dict[str, list[evaluate.Loss]]
"""Method and router → one loss per seed, all on the same samples."""

ORACLE = "oracle"


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
        check(neurons, ffns)
        self.model, self.ffns, self.batch = model, ffns, batch
        self.ids, self.groups = samples["ids"].tolist(), samples["source"].tolist()
        self.dense = evaluate.loss(model, self.ids, batch)
        layers = [rows for _, rows in neurons.sort_values(["layer", "neuron"]).groupby("layer")]
        self.means = [torch.tensor(rows["act_mean"].to_numpy(), dtype=torch.float32) for rows in layers]
        squares = [dense_weight(ffn.down).detach().cpu().double().square().sum(0).numpy() for ffn in ffns]
        self.flap = [torch.from_numpy(fluctuation(rows, each)) for rows, each in zip(layers, squares, strict=True)]

    def loss(self, scales: Sequence[Scale], shifts: Sequence[Tensor] | None = None, model: Any = None) -> evaluate.Loss:
        """Loss of the divided model, or of another one divided alike, such as one whose experts were trained."""
        ffns = self.ffns if model is None else ffns_of(model)
        with scaled(ffns, scales, shifts):
            return evaluate.loss(self.model if model is None else model, self.ids, self.batch)

    def static(self, active: float) -> Losses:
        """FLAP's static pruning to the share `active`, without and with the mean of what it dropped.

        The second's bias cannot be stored in a standard checkpoint. Which of the two is stronger depends on the share.
        """
        scales = static(self.flap, active)
        shifts = dropped_mean(self.ffns, self.flap, self.means, active)
        return {"flap_static": [self.loss(scales)], "flap_static + bias": [self.loss(scales, shifts)]}

    def divided(self, name: str, each: Divided, active: float) -> Iterator[tuple[str, evaluate.Loss]]:
        """One partition at about the share `active`, by the oracle router, the ridge router and its method's own.

        The oracle separates the partition from the router: it chooses as well as a strong router could, for each alike.

        Yields:
            A label such as `"sp, oracle router"` or `"cmoe, representative router"`, and the loss. FLAP's own way,
            the same neurons for every token, is called as in `static`, and comes with its bias.
        """
        part = each.partition
        k = part.k(active)
        yield f"{name}, {ORACLE} router", self.loss(oracle(part, self.ffns, k))
        for router, scores in each.scores.items():
            if name == "flap_static" and router == "static":
                for label, losses in self.static(part.share(k)).items():
                    yield label, losses[0]
            else:
                yield f"{name}, {router} router", self.loss(chosen(part, scores, k))

    def all_on(self, partition: Partition) -> float:
        """ΔNLL with every expert on: 0, unless neurons were dropped."""
        return self.loss(oracle(partition, self.ffns, partition.count)).mean - self.dense.mean

    def table(self, losses: Losses, active: float) -> pd.DataFrame:
        """ΔNLL to the dense model, nats per token: `method, active, mean, low, high, seeds, spread, files`.

        The interval is over texts, for the mean of the seeds; `spread` is the standard deviation between seeds, NaN
        with one.
        """
        gaps = {method: evaluate.paired(each, self.dense, self.groups) for method, each in losses.items()}
        return pd.DataFrame(
            [
                {
                    "method": method, "active": active, "mean": gap.mean, "low": gap.low, "high": gap.high,
                    "seeds": len(losses[method]), "spread": pd.Series([loss.mean for loss in losses[method]]).std(),
                    "files": gap.groups,
                }
                for method, gap in gaps.items()
            ]
        )  # fmt: skip

    def between(self, losses: Losses, method: str, other: str) -> evaluate.Difference:
        """Loss of one method minus another's, paired."""
        return evaluate.paired(losses[method], losses[other], self.groups)

    def best_static(self, losses: Losses) -> str:
        """The static control with the lower loss."""
        return min(
            (name for name in losses if name.startswith("flap_static") and "router" not in name), key=mean(losses)
        )


def mean(losses: Losses) -> Callable[[str], float]:
    """A function from a method's name to its loss, mean over seeds, nats per token."""
    return lambda name: float(np.mean([loss.mean for loss in losses[name]]))
