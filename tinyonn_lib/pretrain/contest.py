"""The contest of recipes: each trained from the same texts at equal tokens and at equal time, judged in bits per byte.

Equal time does not depend on who else uses the machine meanwhile: the speeds are measured first, in turns, and each
recipe then gets the tokens that it would manage while the first recipe manages its budget.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate.losses import MIN_GROUPS, Difference, Loss, paired
from tinyonn_lib.lm import judge, resume
from tinyonn_lib.pretrain import architectures
from tinyonn_lib.pretrain.latent import Latent, attached
from tinyonn_lib.pretrain.layout import Rows, lay
from tinyonn_lib.pretrain.lineup import DEFAULT, Entry, replace_rates
from tinyonn_lib.pretrain.mtp import MTPHead
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.train import pretrain
from tinyonn_lib.pretrain.turns import in_turns
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Budget = Literal["tokens", "time"]
_SPEED_STEPS = 5
RANK = 24
"""Columns of the latent embeddings, about: they are a multiple of 2 for pairs and of the layers for the control."""


@dataclass(frozen=True)
class Contender:
    """A model with its head for the token after the next and its latent embeddings, where it has them."""

    model: PreTrainedModel
    head: MTPHead | None
    latent: Latent | None

    def train(self, rows: Rows, recipe: Recipe, **options: Any) -> None:
        """`pretrain`, the latent embeddings among the model's parameters."""
        with self.whole():
            pretrain(rows, self.model, recipe, mtp=self.head, **options)

    def whole(self) -> AbstractContextManager[None]:
        """Inside, the model computes with its latent embeddings."""
        return nullcontext() if self.latent is None else attached(self.model, self.latent)


class Contest:
    """Everybody on the same texts.

    Attributes:
        speeds: `Entry.computation` → seconds per token, as `measure_speeds` found them.
        losses: (name, budget) → one held-out `Loss` per seed, in bits and bytes.
        rates: name → learning rates taken.
        tokens: (name, budget) → tokens trained on; parameters: name → `architectures.counts`.
        dense: name → whether it is the plain Qwen3 of the other phases; seconds: name → its seconds per token.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[str]],
        sources: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        sizes: Mapping[str, Any],
        tokens: int,
        length: int,
        seeds: int = 3,
        progress: Callable[[str, str], Progress] | None = None,
    ) -> None:
        """
        Args:
            texts: "train", "validation" (rates are chosen by it) and "heldout".
            sources: file of each held-out text; texts of one file are drawn together for the intervals.
            folder: keeps what is done, a folder inside for these texts, tokenizer, sizes and length; a contest that was
                killed goes on there.
            sizes: of the models, arguments of `architectures.new`.
            tokens: budget of the first entry; length: of a row, tokens; seeds: of the headline entries.
            progress: (what, unit) → reporter.
        """
        self.texts, self.sources, self.tokenizer = texts, list(sources), tokenizer
        self.sizes, self.budget, self.length, self.seeds = dict(sizes), tokens, length, seeds
        same = [{name: list(rows) for name, rows in texts.items()}, tokenizer.get_vocab(), self.sizes, length]
        self.folder = folder / hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
        self._progress = progress
        self._ids = tokenizer(list(texts["train"]), add_special_tokens=False, verbose=False)["input_ids"]
        self._rows: dict[tuple[str, int], Rows] = {}
        self.speeds: dict[str, float] = {}
        self.losses: dict[tuple[str, Budget], list[Loss]] = {}
        self.rates: dict[str, tuple[float, float]] = {}
        self.tokens: dict[tuple[str, Budget], int] = {}
        self.parameters: dict[str, dict[str, int]] = {}
        self.dense: dict[str, bool] = {}
        self.seconds: dict[str, float] = {}

    def again(self, folder: Path, tokens: int) -> Contest:
        """Another contest on the same texts, with the speeds of this one and another budget."""
        other = Contest(
            self.texts, self.sources, self.tokenizer, folder, sizes=self.sizes, tokens=tokens, length=self.length,
            seeds=self.seeds, progress=self._progress,
        )  # fmt: skip
        other.speeds = self.speeds
        return other

    def build(self, entry: Entry, seed: int) -> Contender:
        """An untrained model of an entry, with what it trains beside it."""
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        sizes = self.sizes | {"vocab_size": len(self.tokenizer), "max_length": self.length}
        sizes |= {"eos_token_id": eos, "pad_token_id": pad}
        step = math.lcm(2, sizes["layers"])
        rank = step * max(1, round(RANK / step))
        extra = rank * (sizes["vocab_size"] + sizes["width"]) if entry.latent else 0
        if entry.matched:
            dense = architectures.counts(architectures.new("qwen3", **sizes))["total"]
            others = {name: value for name, value in sizes.items() if name != "ffn"}
            sizes["ffn"] = architectures.matched(entry.architecture, dense - extra, **others)
        model = architectures.new(entry.architecture, **sizes, seed=seed)
        head = MTPHead(model, seed) if entry.recipe.mtp else None
        latent = Latent(model, rank, rotate=entry.latent == "rotated", seed=seed) if entry.latent else None
        return Contender(model, head, latent)

    def measure_speeds(self, lineup: Mapping[str, Entry], rounds: int = 15) -> None:
        """Seconds per token of everything that the entries compute, see `turns.in_turns`."""
        path = self.folder / "speeds.json"
        found: dict[str, float] = resume.read_json(path) or {}
        needed = {entry.computation: entry for entry in lineup.values()}
        first = next(iter(lineup.values())).computation
        if missing := needed.keys() - found.keys():
            # The first takes part again when an entry is added later, so that ratios stay right.
            arms = {name: self._look(entry) for name, entry in needed.items() if name in {first, *missing}}
            for arm in arms.values():
                arm()
            took = in_turns(arms, rounds, self._progress("speeds", "rounds") if self._progress else None)
            unit = found.get(first, took[first]) / took[first]
            found |= {name: unit * took[name] for name in missing}
            resume.write_json(path, found)
        self.speeds = found

    def enter(self, name: str, entry: Entry, pace: Entry, budgets: Sequence[Budget] = ("tokens", "time")) -> None:
        """Choose the rates of one entry, train it and judge it.

        Args:
            pace: the entry whose time the budget "time" is.
        """
        self.seconds[name] = self.speeds[entry.computation]
        most = round(self.budget * self.speeds[pace.computation] / self.seconds[name])
        tokens = {"tokens": self.budget, "time": most}
        if len(entry.rates) > 1:
            trials = {rates: self._tried(replace_rates(entry, rates), tokens["time"]) for rates in entry.rates}
            entry = replace_rates(entry, min(trials, key=lambda rates: trials[rates]))
        elif entry.rates:
            entry = replace_rates(entry, entry.rates[0])
        self.rates[name] = (entry.recipe.lr_matrix, entry.recipe.lr_other)
        self.dense[name] = entry.architecture == "qwen3" and not entry.latent
        contender = self.build(entry, 0)
        with contender.whole():
            self.parameters[name] = architectures.counts(contender.model)
        for budget in budgets:
            self.tokens[name, budget] = tokens[budget]
            seeds = range(self.seeds if entry.headline else 1)
            self.losses[name, budget] = [self._trained(entry, tokens[budget], seed, "heldout") for seed in seeds]

    def table(self, against: str = DEFAULT) -> pd.DataFrame:
        """One row per entry and budget, with the difference to one of them on the same seeds.

        Columns: recipe, dense, budget, tokens, seeds, bits_per_byte, spread (standard deviation over seeds),
        difference, low, high (bits per byte, 95 % interval), parameters, active, lr_matrix, lr_other, speed (tokens/s
        over that one's).
        """
        rows = []
        for (name, budget), losses in self.losses.items():
            gap = self.difference(name, against, budget)
            bits = [loss.mean for loss in losses]
            rows.append(
                {
                    "recipe": name, "dense": self.dense[name],
                    "budget": budget, "tokens": self.tokens[name, budget], "seeds": len(losses),
                    "bits_per_byte": statistics.mean(bits),
                    "spread": statistics.stdev(bits) if len(bits) > 1 else math.nan,
                    "difference": gap.mean, "low": gap.low, "high": gap.high,
                    "parameters": self.parameters[name]["total"], "active": self.parameters[name]["active"],
                    "lr_matrix": self.rates[name][0], "lr_other": self.rates[name][1],
                    "speed": self.seconds[against] / self.seconds[name],
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def difference(self, name: str, other: str, budget: Budget) -> Difference:
        """Bits per byte of one minus another's, on the seeds that both have; interval over files and seeds."""
        one, two = self.losses[name, budget], self.losses[other, budget]
        count = min(len(one), len(two))
        return paired(one[:count], two[:count], self.sources, over_seeds=True)

    def saving(self, name: str, other: str, budget: Budget, draws: int = 2000) -> Difference:
        """Share of another's bits that one saves, 1 − b/b', with a paired 95 % interval over files and seeds."""
        one, two = self.losses[name, budget], self.losses[other, budget]
        count = min(len(one), len(two))
        _, code = np.unique(np.asarray(self.sources, dtype=str), return_inverse=True)
        sums = np.array([[np.bincount(code, loss.nats) for loss in side[:count]] for side in (one, two)])
        files = sums.shape[2]
        random = np.random.default_rng(0)
        drawn = random.multinomial(files, np.full(files, 1 / files), size=draws)
        seeds = random.multinomial(count, np.full(count, 1 / count), size=draws)
        mine, theirs = (np.einsum("df,sf,ds->d", drawn, side, seeds) for side in sums)
        low, high = np.quantile(1 - mine / theirs, [0.025, 0.975]) if files >= MIN_GROUPS else (math.nan, math.nan)
        return Difference(float(1 - sums[0].sum() / sums[1].sum()), float(low), float(high), files)

    def _look(self, entry: Entry) -> Callable[[], float]:
        """A short training whenever it is called: seconds per token."""
        contender, rows = self.build(entry, 0), self._laid(entry, 0)
        tokens = _SPEED_STEPS * entry.recipe.batch * self.length
        # Without a ramp, whose small batches cost a few per cent more per token and are over soon.
        recipe = replace(entry.recipe, ramp=0.0)

        def look() -> float:
            timing: dict[str, float] = {}
            contender.train(rows, recipe, tokens=tokens, timing=timing)
            return timing["seconds"] / tokens

        return look

    def _laid(self, entry: Entry, seed: int) -> Rows:
        key = (entry.recipe.layout, seed)
        if key not in self._rows:
            eos, pad = int(self.tokenizer.eos_token_id), int(self.tokenizer.pad_token_id)
            self._rows = {key: lay(self._ids, self.length, eos=eos, pad=pad, layout=entry.recipe.layout, seed=seed)}
        return self._rows[key]

    def _tried(self, entry: Entry, tokens: int) -> float:
        """Bits per byte that rates are chosen by; infinite where training diverges."""
        try:
            return self._trained(entry, tokens, 0, "validation").mean
        except BenchError as error:
            if "not finite" not in str(error):
                raise
            return math.inf

    def _trained(self, entry: Entry, tokens: int, seed: int, split: str) -> Loss:
        """Bits and bytes of every text of a split after a training; kept in the folder."""
        plan = [entry.recipe, entry.architecture, entry.matched, entry.latent, tokens, seed, split]
        key = hashlib.sha256(repr(plan).encode()).hexdigest()[:16]
        path, texts = self.folder / f"{key}.json", self.texts[split]
        sizes = np.array([len(text.encode()) for text in texts])
        if (kept := resume.read_json(path)) is not None:
            return Loss(np.array(kept), sizes)
        contender = self.build(entry, seed)
        told = None
        if self._progress is not None:
            told = self._progress(f"{entry.architecture}, {entry.recipe.optimizer}, seed {seed}", "steps")
        checkpoint = path.with_suffix(".pt")
        contender.train(
            self._laid(entry, seed), entry.recipe, tokens=tokens, seed=seed, checkpoint=checkpoint, progress=told
        )
        with contender.whole():
            bits = judge.text_nats(contender.model, self.tokenizer, texts) / math.log(2)
        resume.write_json(path, bits.tolist())
        checkpoint.unlink(missing_ok=True)
        return Loss(bits, sizes)
