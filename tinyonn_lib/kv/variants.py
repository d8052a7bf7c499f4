"""The variants of the document's projector, trained together by shape and judged one by one."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from tinyonn_lib.kv import judge
from tinyonn_lib.kv.adapter import Activation, Init, dead_units
from tinyonn_lib.kv.data import Caches, own_of
from tinyonn_lib.kv.handover import nats
from tinyonn_lib.kv.projector import SIDES, KVDimensionProjector
from tinyonn_lib.kv.ridge import fit_ridge
from tinyonn_lib.kv.stack import Alone, Schedule, rows_of, seconds_per_step, train
from tinyonn_lib.lm import resume

RIDGE = "ridge"
RATIOS = (0.5, 1.0, 2.0)
MOST = {"train": 2**17, "validation": 2**10, "held": 2**13}
"""Tokens, one of each layer counting as one, that are trained on, chosen by, and searched for dead units."""

_SEEDING = threading.Lock()  # torch's random numbers are one sequence for all threads


@dataclass(frozen=True)
class Shape:
    """What the configurations that are trained together have in common."""

    kind: str = "linear"
    mlp_ratio: float = float("nan")
    layernorm: bool | None = None
    activation: str | None = None

    @property
    def inits(self) -> tuple[str, ...]:
        return get_args(Init)

    def label(self, init: str) -> str:
        if self.kind == "linear":
            return f"linear, {init}"
        return f"{self.mlp_ratio:g}×, {'' if self.layernorm else 'no '}LayerNorm, {self.activation}, {init}"


SHAPES = (
    Shape(),
    *(
        Shape("mlp", ratio, layernorm, activation)
        for ratio in RATIOS
        for layernorm in (True, False)
        for activation in get_args(Activation)
    ),
)
"""19 shapes; with three inits of each 57 configurations."""


class Task:
    """The data of one sweep, flattened once, and what is measured on it."""

    def __init__(self, caches: Caches, validation: Caches, held: Caches, plan: Schedule, texts: int) -> None:
        self.caches, self.validation, self.held, self.plan, self.texts = caches, validation, held, plan, texts
        probe = self.projector(Shape(), "xavier", 0)
        named = {"train": caches, "validation": validation, "held": held}
        self.rows = {name: rows_of(probe, each, MOST[name]) for name, each in named.items()}

    def key(self) -> str:
        """Of settings, models and data."""
        plan = {**asdict(self.plan), "texts": self.texts, "most": MOST}
        data = [t for rows in self.rows.values() for t in (rows.x, rows.y)]
        return resume.fingerprint(plan, list(self.caches.student.model.parameters()), [self.held.ids, *data])

    def projector(self, shape: Shape, init: str, seed: int) -> KVDimensionProjector:
        name, student = self.caches.names[0], self.caches.student
        teacher = self.caches.teachers[name].widths
        options: dict[str, Any] = {}
        if shape.kind == "mlp":
            options = {name: getattr(shape, name) for name in ("mlp_ratio", "layernorm", "activation")}
        with _SEEDING, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the processor alone
            made = KVDimensionProjector(
                {name: {"d_model": teacher.width, "num_layers": teacher.layers}}, student.widths.width,
                dropout=0.0, init_method=init, student_layers=student.widths.layers, kind=shape.kind, **options,
            )  # fmt: skip
        return made.to(student.device).eval()

    def measured(self, shape: Shape, target: float) -> dict[str, list[dict[str, Any]]]:
        """Train one shape from all starts at all rates; its rows of the table and its curves."""
        plan, seeds, inits = self.plan, range(self.plan.seeds), shape.inits
        starts = [[self.projector(shape, init, seed) for init in inits] for seed in seeds]
        modules = [self.adapters(p)[side] for each in starts for side in range(len(SIDES)) for p in each]
        trained, losses = train(modules, self.rows["train"], self.rows["validation"], plan)
        # (looks, rates, inits): keys plus values, mean over seeds
        curve = losses.unflatten(2, (len(seeds), len(SIDES), len(inits))).sum(3).mean(2)
        rows, curves = [], []
        for place, init in enumerate(inits):
            best = int(curve[-1, :, place].nan_to_num(nan=torch.inf).argmin())
            chosen = [each[place] for each in starts]
            for number in range(place, len(modules), len(inits)):
                modules[number].load_state_dict({name: p[best, number] for name, p in trained.items()})
            reached = [s for s, loss in zip(plan.looks, curve[:, best, place], strict=True) if loss <= target]
            rows.append(
                {"configuration": shape.label(init), **asdict(shape), "init": init, "dropout": 0.0, "steps": plan.steps,
                 "batch": plan.batch, "seeds": plan.seeds, "parameters": chosen[0].count_parameters()["total"],
                 "lr": plan.rates[best], "lr_at_edge": len(plan.rates) > 2 and best in (0, len(plan.rates) - 1),
                 "initial_loss": float(curve[0, best, place]), "validation": float(curve[-1, best, place]),
                 **_over("heldout", [judge.error(judge.projected(p), self.held)["mse"] for p in chosen]),
                 "steps_to_target": float(reached[0]) if reached else float("nan"),
                 "dead_units": float(np.mean([self.dead(p) for p in chosen])),
                 **_over("nll", [self.nll(judge.projected(p)) for p in chosen])}
            )  # fmt: skip
            curves += [
                {"configuration": shape.label(init), "lr": lr, "best": rate == best, "step": step, "validation": loss}
                for rate, lr in enumerate(plan.rates)
                for step, loss in zip(plan.looks, curve[:, rate, place].tolist(), strict=True)
            ]
        return {"rows": rows, "curves": curves}

    @torch.no_grad()
    def dead(self, projector: KVDimensionProjector) -> float:
        pairs = zip(self.adapters(projector), self.rows["held"].x, strict=True)
        return sum(dead_units(module, x) for module, x in pairs) / len(SIDES)

    def adapters(self, projector: KVDimensionProjector) -> list[nn.Module]:
        """Of keys and of values."""
        return [projector.of(self.caches.names[0], side)[0] for side in SIDES]

    @torch.no_grad()
    def nll(self, source: judge.Source) -> float:
        """As `judge.loss`, on the first texts."""
        total, count = 0.0, 0
        for places in torch.arange(self.texts).split(self.held.batch):
            batch = self.held[places]
            total += float(nats(self.held.student, source(batch), batch["ids"], batch["mask"]).double().sum())
            count += int(batch["mask"][:, 1:].sum())
        return total / count

    @torch.no_grad()
    def references(self) -> list[dict[str, Any]]:
        ridge, zero = (self.projector(Shape(), "xavier", 0) for _ in range(2))
        fit_ridge(ridge, self.caches, self.validation)
        for weight in zero.parameters():
            weight.zero_()
        found = [{"cache": judge.OWN, "validation": 0.0, "heldout": 0.0, "nll": self.nll(own_of)}]
        rows = self.rows["validation"]
        for label, projector in ((judge.ZERO, zero), (RIDGE, ridge)):
            said = torch.stack([one(x) for one, x in zip(self.adapters(projector), rows.x, strict=True)])
            found.append(
                {"cache": label, "validation": float((said - rows.y).square().mean((1, 2)).sum()),
                 "heldout": judge.error(judge.projected(projector), self.held)["mse"],
                 "nll": self.nll(judge.projected(projector))}
            )  # fmt: skip
        return found

    def alone(self) -> list[dict[str, Any]]:
        """What a step of each shape takes; the init does not matter to it."""
        each = [Alone(self.projector(shape, "xavier", 0), self.rows["train"], self.plan.batch) for shape in SHAPES]
        memory, seconds = [one.memory() for one in each], seconds_per_step(each)
        return [
            {"seconds_per_step": time, "slower": time / seconds[0], "memory": size}
            for time, size in zip(seconds, memory, strict=True)
        ]


def _over(name: str, values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    return {
        name: float(np.mean(values)),
        f"{name}_spread": float(np.std(values, ddof=1)) if len(values) > 1 else np.nan,
    }
