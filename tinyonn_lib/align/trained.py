"""One training of the contest: started, gone on with after a kill, judged, or read back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from tinyonn_lib.align.borrow import NothingToLearn, probabilities
from tinyonn_lib.align.kept import Kept, kept, key_of
from tinyonn_lib.align.methods import LEADER, METHODS, Budget, Rate
from tinyonn_lib.align.verify import success
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.resume import fingerprint
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOTHING, DIVERGED = "nothing to learn", "diverged"


@dataclass(frozen=True)
class Trained:
    """A training and what it came to.

    Attributes:
        found: `verify.success` on the held-out prompts; that of the warm model if there was `NOTHING` to learn, nothing
            right if it `DIVERGED`.
        tuned: share of right sampled answers to the prompts that rates are chosen by.
        history: of the method; its `tokens` alone with one of these notes.
        note: `NOTHING`, `DIVERGED` or empty.
        changed: name → value of the parameters that differ from the warm model's; only of `LEADER`'s first seed.
    """

    found: pd.DataFrame
    tuned: float
    history: pd.DataFrame
    note: str
    changed: dict[str, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Generated for the training."""
        return int(self.history["tokens"].iloc[-1])

    def model(self, warm: PreTrainedModel) -> PreTrainedModel:
        """The model that was judged."""
        model = copy.deepcopy(warm)
        with torch.no_grad():
            for name, value in self.changed.items():
                model.get_parameter(name).copy_(value)
        return model


class Bench:
    """What all trainings of a contest share."""

    def __init__(
        self,
        warm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: pd.DataFrame,
        tune: pd.DataFrame,
        heldout: pd.DataFrame,
        plan: Budget,
        seed: int,
        folder: Path | None,
        every_seconds: float,
        progress: Callable[[str, str], Progress] | None,
    ) -> None:
        """The arguments are those of `contest.contest`; `seed` is that of the judging, and the first of training."""
        self.warm, self.tokenizer, self.plan, self.seed = warm, tokenizer, plan, seed
        self.train, self.tune, self.heldout = train, tune, heldout
        self._folder, self._every, self._progress = folder, every_seconds, progress
        same = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, warm.config.to_json_string()]
        same += [fingerprint({}, list(warm.parameters()), []), asdict(plan), seed, train, tune, heldout]
        self._same = key_of(same)

    def judged(self, model: PreTrainedModel, prompts: pd.DataFrame, cooler: float = 1.0) -> pd.DataFrame:
        """`verify.success`, everybody with the same random numbers; `cooler`: times the temperature."""
        return success(model, self.tokenizer, prompts, self.plan.samples, self.plan.temperature * cooler, self.seed)

    def trained(self, method: str, rate: Rate, seed: int, *, choose: bool = False) -> Trained:
        """A training; `choose`: judged on the prompts that rates are chosen by, too."""
        key = key_of([self._same, method, rate, seed, choose])
        path = None if self._folder is None else self._folder / f"{key[:24]}.safetensors"
        checkpoint = None if path is None else path.with_suffix(".pt")
        tensors, words = kept(path, key, lambda: self._train(method, rate, seed, choose, checkpoint))
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        found, history, changed = (
            {name.removeprefix(of): value for name, value in tensors.items() if name.startswith(of)}
            for of in ("found.", "history.", "changed.")
        )
        asked = self.heldout[["task", "prompt"]].reset_index(drop=True)
        return Trained(
            asked.assign(greedy=found["greedy"].numpy(), sampled=found["sampled"].numpy()), float(words["tuned"]),
            pd.DataFrame({name: history[name].numpy() for name in json.loads(words["columns"])}), words["note"],
            changed,
        )  # fmt: skip

    def _train(self, method: str, rate: Rate, seed: int, choose: bool, checkpoint: Path | None) -> Kept:
        model, note, tuned = copy.deepcopy(self.warm), "", 0.0
        name = f"{METHODS[method].name}, {rate[0]} {rate[1]:g}, seed {seed}"
        try:
            with probabilities():
                try:
                    history = METHODS[method].train(
                        model, self.tokenizer, self.train, self.plan, part=rate[0], lr=rate[1], seed=seed,
                        checkpoint=checkpoint, every_seconds=self._every,
                        progress=None if self._progress is None else self._progress(name, "steps"),
                    )  # fmt: skip
                except NothingToLearn as error:
                    note, history = NOTHING, pd.DataFrame({"tokens": [error.tokens]})
                if not all(bool(value.isfinite().all()) for value in model.parameters()):  # a GPU does not survive it
                    raise BenchError("The weights are not finite any more.")
                found = self.judged(model, self.heldout)
                if choose:
                    tuned = float(self.judged(model, self.tune)["sampled"].mean())
        except BenchError as error:
            if "not finite" not in str(error):
                raise
            note, tuned, history = DIVERGED, 0.0, pd.DataFrame({"tokens": [0]})
            found = pd.DataFrame(0.0, self.heldout.index, ["greedy", "sampled"])
        tensors = {f"found.{name}": torch.tensor(found[name].to_numpy()) for name in ("greedy", "sampled")}
        tensors |= {f"history.{name}": torch.tensor(history[name].to_numpy()) for name in history}
        if method == LEADER and seed == self.seed and not note:
            start = dict(self.warm.named_parameters())
            tensors |= {
                f"changed.{name}": value
                for name, value in model.named_parameters()
                if not torch.equal(value, start[name])
            }
        return tensors, {"note": note, "tuned": repr(tuned), "columns": json.dumps(list(history))}
