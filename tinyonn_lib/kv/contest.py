"""The contest: projectors next to what they must beat, with the same texts, steps and judge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import Loss
from tinyonn_lib.kv import judge
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.data import Caches
from tinyonn_lib.kv.projector import BEST, KVDimensionProjector
from tinyonn_lib.kv.ridge import fit_ridge, linears
from tinyonn_lib.kv.train import Recipe, train
from tinyonn_lib.lm import samples
from tinyonn_lib.progress import Progress

WIDEST = 2**13
"""Inputs of "all layers": more are beyond a closed form, and large models then take their nearest layers alone."""

DOCUMENT: dict[str, Any] = {
    "kind": "mlp", "mlp_ratio": 1.0, "dropout": 0.1, "shared": True, "sources": 1, "joint": False,
}  # fmt: skip
"""The document's projector, as arguments of `from_configs`."""


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
        kind: "document", "control" (must be beaten) or "ours".
        objective: of the training; empty: none, the closed form is all.
        ridge: begins as the closed form.
        faster: by what the learning rates tried are multiplied: small adapters want larger ones.
        options: of `KVDimensionProjector.from_configs`; `sources` 0 stands for all of the teacher's layers.
    """

    label: str
    kind: str
    objective: str = ""
    ridge: bool = False
    faster: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


LINEAR_ALL: dict[str, Any] = BEST | {"kind": "linear", "sources": 0}
RIDGE, RIDGE_TRAINED = "ridge, all layers, K with V", "ridge, then next token"
OURS, OURS_CACHES = "ours, next token", "ours, own cache"
SHUFFLED, LORA = "our best, of another text", "student with LoRA"
"""See `alternatives.lora_student`."""

LINEUP = (
    Entry("ridge", "control", ridge=True, options=LINEAR_ALL | {"sources": 1, "joint": False}),
    Entry("ridge, all layers", "control", ridge=True, options=LINEAR_ALL | {"joint": False}),
    Entry(RIDGE, "control", ridge=True, options=LINEAR_ALL),
    Entry(RIDGE_TRAINED, "control", "lm", ridge=True, options=LINEAR_ALL),
    Entry("linear", "document", "mse", faster=10.0, options=DOCUMENT | {"kind": "linear"}),
    *(
        Entry(f"MLP {ratio:g}×", "document", "mse", faster=10.0, options=DOCUMENT | {"mlp_ratio": ratio})
        for ratio in (0.5, 1.0, 2.0)
    ),
    Entry("MLP 2×, no dropout", "document", "mse", faster=10.0, options=DOCUMENT | {"mlp_ratio": 2.0, "dropout": 0.0}),
    Entry("MLP 2×, next token", "document", "lm", faster=3.0, options=DOCUMENT | {"mlp_ratio": 2.0, "dropout": 0.0}),
    Entry(OURS_CACHES, "ours", "mse", ridge=True),
    Entry(OURS, "ours", "lm", ridge=True),
)


@dataclass(frozen=True)
class Texts:
    """Caches of texts to train on, to choose rates and penalties by, and to judge on."""

    train: Caches
    validation: Caches
    heldout: Caches

    @classmethod
    def draw(
        cls,
        table: pd.DataFrame,
        tokenizer: Any,
        student: KVModel,
        teachers: Mapping[str, KVModel],
        *,
        tokens: int,
        eval_tokens: int,
        length: int,
        seed: int,
        tokenizers: Mapping[str, Any] | None = None,
    ) -> Texts:
        """From texts with a `split` (`lm.samples.divided`): calibration to train and choose by, heldout to judge on.

        Whole source files go to one side or the other; a tenth of the calibration files chooses.

        Args:
            tokenizer: the student's; tokenizers: of teachers that cut texts otherwise.
            tokens: to train and choose by; eval_tokens: to judge on; length: longest text in tokens.

        Raises:
            BenchError: a single calibration source, so that nothing is left to choose by.
        """
        parts = {name: table[table["split"] == name] for name in ("calibration", "heldout")}
        drawn = samples.draw(parts["calibration"], tokenizer, tokens, length, seed)
        held = samples.draw(parts["heldout"], tokenizer, eval_tokens, length, seed)
        sources = sorted(set(drawn["source"]))
        if len(sources) < 2:
            raise BenchError("All texts to learn from have one source: give texts from several, some to choose by.")
        order = np.random.default_rng(seed).permutation(len(sources))
        aside = {sources[place] for place in order[: max(1, len(sources) // 10)]}
        chosen = drawn["source"].isin(aside)
        options = {"tokenizer": tokenizer, "tokenizers": tokenizers, "batch": max(2, 4096 // length)}
        return cls(*(Caches(student, teachers, rows, **options) for rows in (drawn[~chosen], drawn[chosen], held)))


class Contest:
    """Everybody on the same texts.

    Attributes:
        losses: label → one held-out loss per seed; validation: label → loss by which rates, and the best, are chosen.
        kinds, parameters, rates: label → what it is, how large, and at which learning rate.
        edges: labels whose best rate was the smallest or largest of three or more that were tried.
        layers: label → teacher layers that each student layer reads.
        projectors: label → that of the first seed.
    """

    def __init__(
        self,
        texts: Texts,
        *,
        recipe: Recipe,
        rates: Sequence[float],
        seeds: int = 1,
        options: Mapping[str, Any] | None = None,
        resume: Path | None = None,
        every_seconds: float = 10.0,
        progress: Callable[[str, str], Progress] | None = None,
    ) -> None:
        """
        Args:
            recipe: steps, batch and first seed of every training; its objective and rate are the entries'.
            rates: peak learning rates; each entry takes that with the least next-token loss on validation texts.
            options: of `from_configs`, for our own entries.
            resume: private folder for checkpoints, written every `every_seconds`.
            progress: (what, unit) → reporter.
        """
        self.texts, self.recipe, self.rates_tried, self.seeds = texts, recipe, sorted(rates), seeds
        self.options, self._resume, self._every, self._progress = dict(options or {}), resume, every_seconds, progress
        student = texts.train.student
        self._teachers = {name: model.model.config for name, model in texts.train.teachers.items()}
        self._student = student.model.config
        self.losses: dict[str, list[Loss]] = {}
        self.validation: dict[str, float] = {}
        self.kinds: dict[str, str] = {}
        self.parameters: dict[str, int] = {}
        self.rates: dict[str, float] = {}
        self.edges: set[str] = set()
        self.layers: dict[str, int] = {}
        self.projectors: dict[str, KVDimensionProjector] = {}
        self._solved: dict[str, list[dict[str, Any]]] = {}
        self._near: dict[str, dict[str, float]] = {}
        self.floors = judge.floors(texts.train)
        for label, source in self.floors.items():
            self.add(label, "reference" if label == judge.OWN else "floor", [judge.loss(source, texts.heldout)])

    def add(
        self,
        label: str,
        kind: str,
        losses: Sequence[Loss],
        chosen_by: float = float("nan"),
        parameters: int = 0,
        rate: float = 0.0,
        rates: Sequence[float] = (),
    ) -> None:
        """Somebody who was judged on the same texts; `chosen_by`: validation loss, `rates`: those tried, ascending."""
        self.losses[label], self.kinds[label], self.validation[label] = list(losses), kind, chosen_by
        self.parameters[label], self.rates[label] = parameters, rate
        if len(rates) > 2 and rate in (rates[0], rates[-1]):
            self.edges.add(label)

    def enter(self, entry: Entry) -> None:
        """Fit, train and judge one."""
        first = self.recipe.seed
        rates = [entry.faster * rate for rate in self.rates_tried] if entry.objective else [0.0]
        trials = {rate: self._fitted(entry, first, rate) for rate in rates}
        costs = {lr: judge.loss(judge.projected(p), self.texts.validation).mean for lr, p in trials.items()}
        rate = min(costs, key=lambda lr: costs[lr])
        more = range(first + 1, first + self.seeds) if entry.objective else ()
        found = [trials[rate], *(self._fitted(entry, seed, rate) for seed in more)]
        losses = [judge.loss(judge.projected(p), self.texts.heldout) for p in found]
        self.projectors[entry.label] = found[0]
        self.layers[entry.label] = max(len(each[0]) for each in found[0].layer_maps.values())
        self._near[entry.label] = judge.error(judge.projected(found[0]), self.texts.heldout)
        self.add(entry.label, entry.kind, losses, costs[rate], int(found[0].count_parameters()["total"]), rate, rates)

    def table(self) -> pd.DataFrame:
        """`judge.table` with `kind, parameters, lr, layers, edge`; how near caches are: `mse, r2_keys, r2_values`."""
        rows = judge.table(self.losses, self.texts.heldout.source, self.recipe.seed)
        for name, values in (
            ("kind", self.kinds),
            ("parameters", self.parameters),
            ("lr", self.rates),
            ("layers", self.layers),
        ):
            rows[name] = rows["cache"].map(values)
        rows["edge"] = rows["cache"].isin(self.edges)
        for name in ("mse", "r2_keys", "r2_values"):
            rows[name] = [self._near.get(label, {}).get(name, float("nan")) for label in rows["cache"]]
        return rows

    def duel(self, one: str, other: str) -> evaluate.Difference:
        """Loss of one minus the other's, nats per token, paired over source files."""
        return evaluate.paired(self.losses[one], self.losses[other], self.texts.heldout.source, seed=self.recipe.seed)

    def shuffle(self, label: str) -> None:
        """Enter a projector's cache of another text: what is left when only the content is wrong."""
        source = judge.shuffled(judge.projected(self.projectors[label]))
        self.floors[SHUFFLED] = source
        self.add(SHUFFLED, "floor", [judge.loss(source, self.texts.heldout)])

    def best(self, kinds: Sequence[str]) -> str:
        """The label with the least loss on validation texts among some kinds."""
        return min((name for name in self.kinds if self.kinds[name] in kinds), key=lambda name: self.validation[name])

    def _widest(self, joint: bool) -> int:
        """All of the deepest teacher's layers, or as many as `WIDEST` inputs hold."""
        sizes = [model.widths for model in self.texts.train.teachers.values()]
        return min(max(size.layers for size in sizes), max(1, WIDEST // (max(s.width for s in sizes) * (1 + joint))))

    def _begin(self, projector: KVDimensionProjector) -> None:
        """Closed-form linear layers; solved once for all entries, rates and seeds that read the same."""
        key = repr([projector.layer_maps, *(projector.options[name] for name in ("shared", "joint"))])
        if key not in self._solved:
            fit_ridge(projector, self.texts.train, self.texts.validation)
            # A copy: this very projector is trained next.
            self._solved[key] = [copy.deepcopy(linear.state_dict()) for linear in linears(projector).values()]
        for linear, solved in zip(linears(projector).values(), self._solved[key], strict=True):
            linear.load_state_dict(solved)

    def training(self, name: str) -> dict[str, Any]:
        """Where a training of that name leaves its checkpoint and reports to, as `lm.train.fit` takes it."""
        if self._resume is not None:
            self._resume.mkdir(parents=True, exist_ok=True)
        return {
            "checkpoint": self._resume and self._resume / f"{name.replace(' ', '_')}.pt",
            "every_seconds": self._every,
            "progress": self._progress and self._progress(name, "steps"),
        }

    def fresh(self, options: Mapping[str, Any], seed: int) -> KVDimensionProjector:
        """A projector between the contest's models as it begins; `sources` 0 stands for all teacher layers."""
        given = dict(options or self.options)
        given["sources"] = given.get("sources", BEST["sources"]) or self._widest(given["joint"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = KVDimensionProjector.from_configs(self._teachers, self._student, **given)
        return projector.to(self.texts.train.student.device)

    def _fitted(self, entry: Entry, seed: int, rate: float) -> KVDimensionProjector:
        projector = self.fresh(entry.options, seed)
        if entry.ridge:
            self._begin(projector)
        if entry.objective:
            learned = replace(self.recipe, objective=entry.objective, lr=rate, seed=seed)
            where = self.training(f"{entry.label}, {rate:g}, seed {seed}")
            train(projector, self.texts.train, learned, validation=self.texts.validation, **where)
        return projector.eval()
