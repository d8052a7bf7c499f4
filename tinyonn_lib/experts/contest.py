"""The contest: trained routers next to what they must beat, all with the same text, loss, share and judge."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import analytic, families, routing, training
from tinyonn_lib.experts.evidence import Evidence
from tinyonn_lib.experts.judge import Judge, Losses, mean
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import build
from tinyonn_lib.experts.student import Routed, adapted
from tinyonn_lib.experts.together import Batches, Together
from tinyonn_lib.experts.training import Recipe, Trained
from tinyonn_lib.lm.load import Dtype
from tinyonn_lib.lm.models import ffns
from tinyonn_lib.progress import Progress

VALIDATION = 1 / 16
"""Share of the calibration blocks that is not trained on: usage, thresholds and early stop are measured on it."""

PRUNED_LR = 4.0
"""Learning rate of the pruning control, in multiples of the router's: of 0.5, 2, 4 and 8 the best for the control at 25
and 50 % active, or as good as the best."""


class Contest:
    """One model, one share of active parameters, one budget of training text; whoever takes part gets the same.

    Attributes:
        losses: label → one held-out loss per run.
        trained: label → the last run.
        kind: label → "router", "control" (what must be beaten) or "reference" (what needs no training).
        k: label → experts on per held-out token in each layer, of trained routers.
        share: label → share of the FFN parameters that was on, on the held-out text.
    """

    def __init__(
        self,
        court: Judge,
        evidence: Evidence,
        blocks: Tensor,
        *,
        active: float,
        tokens: int,
        batch: int,
        recipe: Recipe,
        warm_tokens: int = 0,
        seed: int = 0,
        path: str = "",
        dtype: Dtype = "float32",
        processes: int = 1,
        strategy: str = "ddp",
        resume: Path | None = None,
        progress: Callable[[str, str], Progress] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            evidence: of calibration tokens, for initial routers.
            blocks: calibration text `(N, length)`.
            active: share of FFN parameters, shared neurons included.
            tokens: training text of each run; what it has before that for layer-local distillation is `warm_tokens`.
            path, dtype: of the dense model, which each of several processes loads.
            processes, strategy: how many train, and how they share the work; see `together`.
            resume: private folder for checkpoints.
            progress: (what, unit) → reporter.
            options: for `training.train`.

        Raises:
            BenchError: too little text for a step and a validation block.
        """
        self.court, self.evidence, self.active, self.recipe, self.seed = court, evidence, active, recipe, seed
        held = max(1, min(32, round(len(blocks) * VALIDATION)))
        if len(blocks) <= held:
            raise BenchError(f"{len(blocks)} blocks of calibration text are too few to train on: scan more tokens.")
        device = court.model.device
        self.validation = blocks[-held:].to(device)
        self.epochs = (warm_tokens + tokens) / blocks[:-held].numel()
        self.steps, self.warm_steps = (
            max(n > 0, n // (batch * blocks.shape[1])) for n in (max(tokens, 1), warm_tokens)
        )
        self._batch = Batches(blocks[:-held], batch, seed, device)
        self._by: Any = training if processes == 1 else Together(path, processes, strategy, dtype)
        self._resume, self._progress, self._options = resume, progress, options
        self.losses: Losses = {}
        self.trained: dict[str, Trained] = {}
        self.kind: dict[str, str] = {}
        self.k: dict[str, list[float]] = {}
        self.share: dict[str, float] = {}
        self._starts: dict[tuple[Partition, str], Any] = {}

    def route(
        self, label: str, partition: Partition, *, init: str = "analytic", kind: str = "router", **changes: Any
    ) -> Trained:
        """Build a router, train it, judge it.

        Args:
            kind: "control" if it is there to be beaten.
            changes: to the recipe, such as `variable=True`.
        """
        begun = self._begin(partition, init)
        k, recipe = partition.k(self.active), replace(self.recipe, **changes)
        if self.warm_steps:
            local = replace(recipe, goal="layer", lr_experts=0.0)
            self._fit(self._by.train, f"{label}, local", partition, begun, k=k, steps=self.warm_steps, recipe=local)
        found = self._fit(self._by.train, label, partition, begun, k=k, steps=self.steps, recipe=recipe)
        self.k[label] = mean_k(self.court.ids, found, self.court.batch)
        self._judge(label, kind, found, _share(partition, self.k[label]))
        return found

    def prune(self, label: str, partition: Partition) -> Trained:
        """FLAP's static pruning, the remaining neurons' scales and biases trained on the same text.

        It keeps as many weights as a routed model has on, the rows of the router over `partition` included.
        """
        widths = [len(score) for score in self.court.flap]
        share = self.active + sum(len(index) for index in partition.experts) / (3 * sum(widths))
        keep = [routing.top_mask(score.float(), max(1, round(share * score.numel()))) for score in self.court.flap]
        bias = routing.dropped_mean(self.court.ffns, self.court.flap, self.court.means, share)
        recipe = replace(self.recipe, lr=self.recipe.lr * PRUNED_LR)
        steps = self.steps + self.warm_steps
        found = self._fit(self._by.train_pruned, label, keep, bias, steps=steps, recipe=recipe)
        self._judge(label, "control", found, share)
        return found

    def references(self, label: str, partition: Partition) -> None:
        """What needs no training: the analytic router (ridge regression) over a partition, and the oracle."""
        k, index = partition.k(self.active), partition.experts
        ridge = [analytic.ridge(layer, own, self.seed) for layer, own in zip(self.evidence, index, strict=True)]
        choices = {
            "analytic": routing.chosen(partition, ridge, k),
            "oracle": routing.oracle(partition, self.court.ffns, k),
        }
        for name, scales in choices.items():
            self._add(f"{label}, {name}", "reference", self.court.loss(scales), partition.share(k))

    def static(self) -> None:
        """FLAP's static pruning as it is, without and with the mean of what it dropped."""
        for label, (loss,) in self.court.static(self.active).items():
            self._add(label, "control", loss, self.active)

    def mean(self, label: str) -> float:
        """ΔNLL, nats per token."""
        return mean(self.losses)(label) - self.court.dense.mean

    def table(self) -> pd.DataFrame:
        """ΔNLL of all with 95 % paired intervals, as `Judge.table`; `share` that was on, and `kind` of method."""
        table = self.court.table(self.losses, self.active)
        return table.assign(share=table["method"].map(self.share), kind=table["method"].map(self.kind))

    def histories(self) -> pd.DataFrame:
        """The training histories of the last runs below each other, with a column `model`: the label."""
        return pd.concat([found.history.assign(model=label) for label, found in self.trained.items()])

    def between(self, one: str, other: str) -> evaluate.Difference:
        """Loss of one minus another's, paired."""
        return self.court.between(self.losses, one, other)

    def _begin(self, partition: Partition, init: str) -> Any:
        """Routers as they begin, for training in place; found once for all who begin alike."""
        if (partition, init) not in self._starts:
            gates = families.trainable(self.court.model.config, partition).gates
            self._starts[partition, init] = build(
                self.evidence, partition, init, gates, self.seed, self.court.model.device
            )
        return copy.deepcopy(self._starts[partition, init])

    def _judge(self, label: str, kind: str, found: Trained, share: float) -> None:
        scales = [layer.scale for layer in found.layers]
        with torch.no_grad(), adapted(found.layers, ffns(found.model)):
            loss = self.court.loss(scales, model=found.model)
        self.trained[label] = found
        self._add(label, kind, loss, share)

    def _add(self, label: str, kind: str, loss: evaluate.Loss, share: float) -> None:
        self.losses.setdefault(label, []).append(loss)
        self.kind[label], self.share[label] = kind, share

    def _fit(self, how: Callable[..., Trained], label: str, *what: Any, **more: Any) -> Trained:
        file = re.sub(r"\W+", "_", label) + ".pt"
        if self._resume:
            more["checkpoint"] = self._resume / file
        if self._progress:
            more["progress"] = self._progress(label, "steps")
        return how(self.court.model, *what, self._batch, self.validation, **more, **self._options)


@torch.no_grad()
def mean_k(samples: Sequence[Sequence[int]], found: Trained, batch: int) -> list[float]:
    """Experts that are on per token of these samples (token ids) in each layer, `batch` samples at a time."""
    if not found.layers[0].variable:
        return [float(layer.k) for layer in found.layers]
    on: list[list[Tensor]] = [[] for _ in found.layers]

    def counting(place: int, layer: Routed) -> routing.Scale:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            on[place].append(layer.hard(x)[0].sum(-1).flatten())
            return layer.scale(x, h)

        return scale

    with routing.scaled(ffns(found.model), [counting(place, layer) for place, layer in enumerate(found.layers)]):
        for _, alike in groupby(sorted(samples, key=len), len):  # padding would count
            for ids in torch.tensor(list(alike), device=found.model.device).split(batch):
                found.model.model(input_ids=ids, use_cache=False)
    return [float(torch.cat(each).mean()) for each in on]


def _share(partition: Partition, on: Sequence[float]) -> float:
    """Share of the FFN parameters with so many experts on in each layer."""
    routed = sum(mean * index.shape[1] for mean, index in zip(on, partition.experts, strict=True))
    return (routed + sum(len(part) for part in partition.shared)) / partition.neurons
