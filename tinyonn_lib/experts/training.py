"""Train routers over frozen experts, and the control with the same means (document 000 §3).

The choice begins soft and hardens (`soft`); the loss is layer-local, or that of the whole model (`student.Goal`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.routing import Scale, scaled
from tinyonn_lib.experts.soft import END, temperature
from tinyonn_lib.experts.student import Pruned, Routed, Student, adapted, budgets, divergence, next_token
from tinyonn_lib.lm import models, resume
from tinyonn_lib.lm.models import FFN
from tinyonn_lib.lm.record import HeldOut
from tinyonn_lib.lm.threads import threads
from tinyonn_lib.lm.train import fit

LOOKS = 10
"""How often in a training usage and validation loss are measured."""

MORE = 8
"""Training batches on which, besides the validation text, final thresholds are set."""

REVIVING = 4096
"""Validation tokens by which a dead expert finds its new start."""

DEAD = 0.001
"""Share of tokens below which an expert counts as dead."""

KEPT = 2**26
"""Logits of the teacher on the validation text that are kept from one look to the next, if they are no more."""


@dataclass(frozen=True)
class Recipe:
    """How a router learns.

    Attributes:
        goal: see `student.Goal`.
        lr: AdamW's peak rate for routers, in units of their spread; also of the control's factors and bias.
        variable: choose as many experts as a threshold lets through, k in the mean, instead of k.
        balance, z_loss: weights of these losses; see `student.Student`.
        revive: move dead experts so that they are chosen again, at each look but the last three; its loss is the one
            after that.
        lr_experts: AdamW's peak rate for the experts' own weights; 0: frozen.
        unfreeze: share of the steps, at the end, in which they train, too.
        patience: looks without a better validation loss after which training ends.
    """

    goal: str = "kl"
    lr: float = 5e-3
    variable: bool = False
    balance: float = 0.0
    z_loss: float = 0.0
    revive: bool = False
    lr_experts: float = 0.0
    unfreeze: float = 0.25
    patience: int = LOOKS


def recipe(values: Mapping[str, Any]) -> Recipe:
    """From a phase's parameters; those with other names are left alone, and `variable` is said for each training."""
    names = {field.name for field in fields(Recipe)} - {"variable"}
    return Recipe(**{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes:
        model: the dense model whose neurons the router schedules: the one given, or with unfrozen experts a copy.
        layers: per FFN a `Routed` (with its `router`) or a `Pruned`.
        history: of `fit`, with a column `stage`.
        usage: share of validation tokens on which each expert is on, at each look: `step, layer, expert, share, dead`.
    """

    model: Any
    layers: Sequence[Any]
    history: pd.DataFrame
    usage: pd.DataFrame

    @property
    def routers(self) -> list[Router]:
        return [layer.router for layer in self.layers]


def train(
    model: Any,
    partition: Partition,
    routers: Iterable[Any],
    batch: Callable[[int], Tensor],
    validation: Tensor,
    *,
    k: int,
    steps: int,
    recipe: Recipe = Recipe(),
    checkpoint: Path | None = None,
    **options: Any,
) -> Trained:
    """Train routers in place over the experts of a dense model, which is frozen from then on.

    Args:
        routers: from `router.build`.
        batch: step → token ids `(B, T)`.
        validation: token ids `(N, T)` of calibration text that is not trained on: usage, early stop, and the
            threshold of a variable number of experts are measured on it.
        k: experts on per layer and token; their mean with `recipe.variable`.
        checkpoint: private file for resuming; a stage with unfrozen experts has its own beside it.
        options: passed to `fit` (progress, shards, tensorboard, accelerator …).
    """
    if not 1 <= k <= partition.count:
        raise BenchError(f"k={k} active experts: choose 1 to {partition.count}.")
    if recipe.lr_experts and recipe.goal == "layer":
        raise BenchError("Experts can train with goal=kl or lm: the layer-local loss is that of the choice alone.")
    if recipe.lr_experts and not models.ffns(model)[0].gate.weight.is_floating_point():
        raise BenchError("Quantised experts cannot train: load the model in bfloat16, or set lr_experts=0.")
    layers = [Routed(r, partition, i, k, variable=recipe.variable) for i, r in enumerate(routers)]
    model.requires_grad_(False)
    owners = [partition.owner(layer) for layer in range(len(layers))]
    tag = resume.fingerprint({"recipe": recipe, "k": k}, owners, None)
    late = max(1, round(steps * recipe.unfreeze)) if recipe.lr_experts else 0
    pieces = options.get("accumulate", 1)
    tables, usages = [], []
    if steps > late:
        course = _Course(model, layers, validation, recipe, steps - late, batch, soft=True, accumulate=pieces)
        tables.append(course.run(checkpoint, tag, **options).assign(stage="router"))
        usages.append(course.usage())
    if late:
        student = copy.deepcopy(model)
        for ffn in models.ffns(student):
            for linear in (ffn.gate, ffn.up, ffn.down):
                linear.weight.requires_grad_(True)
        joint = _Course(
            student, layers, validation, recipe, late, batch, first=sum(map(len, tables)), teacher=model, soft=False,
            accumulate=pieces,
        )  # fmt: skip
        own = checkpoint and checkpoint.with_name(f"{checkpoint.name}.experts")
        tables.append(joint.run(own, tag, **options).assign(stage="router and experts"))
        usages.append(joint.usage())
        model = student.requires_grad_(False)
    if recipe.variable:
        more = [batch(step).to(validation.device) for step in range(min(MORE, steps))]
        calibrate(model, models.ffns(model), layers, torch.cat([validation, *more]))
    return Trained(model, layers, _joined(tables), pd.concat(usages, ignore_index=True))


def train_pruned(
    model: Any,
    keep: Sequence[Tensor],
    bias: Sequence[Tensor],
    batch: Callable[[int], Tensor],
    validation: Tensor,
    *,
    steps: int,
    recipe: Recipe = Recipe(),
    checkpoint: Path | None = None,
    **options: Any,
) -> Trained:
    """The control: static pruning that learns every remaining neuron's scales and biases, from as much text.

    Args:
        keep: per layer 1 for neurons that stay, else 0, `(d_ffn,)`.
        bias: per layer what the output's bias begins with, `(d_model,)`.
        batch, validation, steps, checkpoint, options: as in `train`.
    """
    model.requires_grad_(False)
    device = next(model.parameters()).device
    layers = [Pruned(mask.to(device), start.to(device)) for mask, start in zip(keep, bias, strict=True)]
    pieces = options.get("accumulate", 1)
    course = _Course(model, layers, validation, recipe, steps, batch, soft=False, accumulate=pieces)
    tag = resume.fingerprint({"recipe": recipe}, keep, None)
    history = course.run(checkpoint, tag, **options).assign(stage="pruned")
    return Trained(model, layers, history, course.usage())


class _Course(nn.Module):
    """One `fit`: a student, and what is looked at on the way. The looks are a buffer, so that a checkpoint has them."""

    looks: Tensor
    count: Tensor

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        validation: Tensor,
        recipe: Recipe,
        steps: int,
        batch: Callable[[int], Tensor],
        *,
        soft: bool,
        accumulate: int = 1,
        first: int = 0,
        teacher: Any = None,
    ) -> None:
        super().__init__()
        self._ffns = models.ffns(model)
        weights = {"balance": recipe.balance, "z_loss": recipe.z_loss}
        self.student = Student(model, self._ffns, layers, goal=recipe.goal, teacher=teacher, **weights)
        self._recipe, self._steps, self._first, self._soft = recipe, steps, first, soft
        self._validation, self._batch, self._shards = validation, batch, 1
        self._kept: dict[int, Tensor] = {}
        self._every = max(1, -(-steps // LOOKS))
        self._rows = max(1, len(batch(0)) // accumulate)  # what fits the memory in training fits it here
        routed = [layer.experts for layer in layers if isinstance(layer, Routed)]
        self.register_buffer("looks", torch.full((LOOKS, len(routed), max(routed, default=0)), torch.nan))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def run(self, checkpoint: Path | None, tag: str, **options: Any) -> pd.DataFrame:
        """`tag` tells trainings apart that begin alike."""
        slow = [p for p in self.student.model.parameters() if p.requires_grad]
        fast = [p for p in self.student.layers.parameters() if p.requires_grad]
        groups = [{"params": fast, "lr": self._recipe.lr}]
        groups += [{"params": slow, "lr": self._recipe.lr_experts}] if slow else []
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        held_out = HeldOut(self.look, self._every, self._recipe.patience)
        options = {"warmup_steps": min(10, self._steps // 4)} | options
        if self._validation.device.type == "cpu" and options.get("accelerator") is None:
            self._shards = options.get("shards", 1)
        with self.student.running():
            return fit(
                self, self.student.loss, self.data, optimizer,
                steps=self._steps, held_out=held_out, checkpoint=checkpoint, tag=tag, **options,
            )  # fmt: skip

    def data(self, step: int) -> dict[str, Tensor]:
        """A batch and the temperature of its step."""
        ids = self._batch(self._first + step)
        warmth = temperature(step, self._steps) if self._soft else END
        return {"ids": ids, "temperature": torch.full((len(ids),), warmth, device=ids.device)}

    @torch.no_grad()
    def look(self) -> float:
        """Validation loss with the hard choice, nats per token; notes usage and revives the dead."""
        loss, seen = self._measure()
        number = int(self.count)
        self.count += 1
        for place, each in enumerate(seen):
            if isinstance(each.layer, Routed):
                self.looks[number, place, : each.layer.experts] = each.shares
        if self._recipe.revive and number < -(-self._steps // self._every) - 3 and self._revive(seen):
            loss, _ = self._measure()  # what is kept as the best is what was measured
        return loss

    def _revive(self, seen: Sequence[_Seen]) -> bool:
        dead = [(each, expert) for each in seen for expert in (each.shares < DEAD).nonzero().flatten().tolist()]
        for each, expert in dead:
            each.layer.router.revive(expert, each.x, each.layer.k)
        return bool(dead)

    def _measure(self) -> tuple[float, list[_Seen]]:
        layers: Any = self.student.layers
        if self._recipe.variable:
            calibrate(self.student.model, self._ffns, layers, self._validation)
        blocks = self._validation.split(max(1, self._rows // self._shards))
        here = threading.local()  # blocks run side by side

        def watching(layer: Any) -> Scale:
            def scale(x: Tensor, h: Tensor) -> Tensor:
                tokens = x.flatten(0, -2)
                on = layer.hard(tokens)[0].sum(0) if isinstance(layer, Routed) else tokens.new_empty(0)
                here.calls.append((tokens[: here.inputs].clone(), on))
                factor: Tensor = layer.scale(x, h)
                return factor

            return scale

        @torch.no_grad()  # it holds for one thread
        def measure(given: tuple[int, Tensor | None]) -> tuple[float, list[tuple[Tensor, Tensor]]]:
            number, target = given
            ids, here.calls = blocks[number], []
            here.inputs = max(0, REVIVING * self._recipe.revive - number * blocks[0].numel())
            logits = self.student.model(input_ids=ids, use_cache=False).logits
            loss = next_token(logits, ids) if target is None else divergence(logits, target)
            return float(loss) * len(ids), here.calls

        found = []
        with threads(self._shards) as each:
            for first in range(0, len(blocks), self._shards):  # no more targets at once than threads
                some = range(len(blocks))[first : first + self._shards]
                targets = each(lambda number: self._target(number, blocks[number]), some)
                with adapted(layers, self._ffns), scaled(self._ffns, [watching(layer) for layer in layers]):
                    found += each(measure, list(zip(some, targets, strict=True)))
        seen = []
        for layer, calls in zip(layers, zip(*(calls for _, calls in found), strict=True), strict=True):
            shares = torch.stack([on for _, on in calls]).sum(0) / self._validation.numel()
            seen.append(_Seen(layer, torch.cat([x for x, _ in calls]), shares))
        return sum(loss for loss, _ in found) / len(self._validation), seen

    @torch.no_grad()
    def _target(self, number: int, ids: Tensor) -> Tensor | None:
        """The teacher's logits on a block of the validation text."""
        if self._recipe.goal == "lm":
            return None
        if number in self._kept:
            return self._kept[number]
        logits: Tensor = self.student.teacher(input_ids=ids, use_cache=False).logits
        if self._validation.numel() * logits.shape[-1] <= KEPT:
            self._kept[number] = logits
        return logits

    def usage(self) -> pd.DataFrame:
        """See `Trained.usage`."""
        rows = []
        for number in range(int(self.count)):
            step = self._first + min(self._steps, (number + 1) * self._every)
            for layer, shares in enumerate(self.looks[number].tolist()):
                rows += [(step, layer, expert, share) for expert, share in enumerate(shares) if share == share]
        table = pd.DataFrame(rows, columns=["step", "layer", "expert", "share"])
        return table.assign(dead=table["share"] < DEAD)


@dataclass(frozen=True)
class _Seen:
    """A layer on the validation text.

    Attributes:
        x: what it sees of the first tokens, `(tokens, d_model)`, for reviving.
        shares: of the tokens on which each expert is on, `(experts,)`.
    """

    layer: Any
    x: Tensor
    shares: Tensor


@torch.no_grad()
def calibrate(model: Any, ffns: Sequence[FFN], layers: Sequence[Routed], ids: Tensor) -> None:
    """Set the thresholds so that on these token ids `(N, T)` the layers have their budgets on, k in the mean."""
    scales = [layer.calibrate(float(k)) for layer, k in zip(layers, budgets(layers), strict=True)]
    with scaled(ffns, scales):
        model.model(input_ids=ids, use_cache=False)


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Histories of consecutive stages as one: steps and tokens go on."""
    joined = list(tables[:1])
    for table in tables[1:]:
        before = joined[-1].iloc[-1]
        joined.append(table.assign(step=table["step"] + before["step"], tokens=table["tokens"] + before["tokens"]))
    return pd.concat(joined, ignore_index=True)
