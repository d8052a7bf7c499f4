"""What the trainers of TRL have in common here: quiet, offline, leaving nothing behind, and resumable to the bit.

TRL's own checkpoints do not go on to the same weights: the answers that wait for their optimiser steps are not saved,
and a kill in the middle of writing leaves half a folder that the next start picks. So this file keeps the checkpoints
of `lm.train.fit`: written whole or not at all, only between two rounds, when no answers are waiting. Every optimiser
step draws its random numbers from its own seed, so that there is no state of a generator to bring back; the data come
in a fixed order, and a resumed trainer is simply given the rest of them.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from tinyonn_lib.align.seeds import seed_of
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.schedule import lr_factor
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NothingToLearn(BenchError):
    """In a model's own answers is nothing to learn from. The contest tells it as a result and goes on.

    Attributes:
        tokens: generated in vain.
    """

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


class Rounds:
    """The rounds of a training: optimiser, learning rate, history, checkpoint.

    Attributes:
        done: rounds that a checkpoint has brought back.
        rows: column → values, one per finished round.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rounds: int,
        updates: int,
        lr: float,
        seed: int,
        plan: Mapping[str, Any],
        data: Any,
        columns: Mapping[str, str],
        checkpoint: Path | None,
        every_seconds: float,
        progress: Progress | None,
    ) -> None:
        """Look for a checkpoint and go back to it.

        Args:
            rounds, updates: rounds in all, and optimiser steps in each.
            lr: AdamW's peak rate; linear decay over the last half.
            plan, data: what else must be the same for a checkpoint to be used: settings, and tensors.
            columns: column of the history → name in the logs, averaged over those of a round's steps that have it.
        """
        params = [param for param in model.parameters() if param.requires_grad]
        if not params:
            raise BenchError("Nothing to train: no parameter requires a gradient.")
        self.model, self.rounds, self.updates, self.seed = model, rounds, updates, seed
        self.optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.rows: dict[str, list[float]] = {"step": [], **{name: [] for name in columns}}
        self.done = 0
        self._params, self._columns, self._progress = params, columns, progress
        self._checkpoint, self._every, self._saved = checkpoint, every_seconds, time.monotonic()
        self._logs: list[Mapping[str, float]] = []
        self._key = ""
        if checkpoint is not None:
            whole = {**plan, "rounds": rounds, "updates": updates, "lr": lr, "seed": seed}
            self._key = resume.fingerprint(whole, params, data)
            found = resume.restore(checkpoint, self._key, params, model, [self.optimizer])
            if found is not None:
                self.done, self.rows = found.step, found.history
                if progress is not None:
                    progress(self.done, rounds, "going on from the last checkpoint")
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr
        first = self.done * updates
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step + first, rounds * updates, "trapezoidal", 0, 0.5, 0.0)
        )

    def callback(self) -> Any:
        """What the trainer calls: a seed before each step, a row and perhaps a checkpoint behind each round."""
        from transformers import TrainerCallback

        watch = self

        class Watch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                torch.manual_seed(seed_of(watch.seed, watch.done * watch.updates + state.global_step))

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
                if "grad_norm" in logs:  # the last log sums up the whole training
                    watch.add(logs)

        return Watch()

    def add(self, logs: Mapping[str, float]) -> None:
        """What an optimiser step has to tell; the last of a round makes its row, and perhaps a checkpoint.

        Raises:
            BenchError: the loss or the gradient is not finite.
        """
        self._logs.append(logs)
        if len(self._logs) == self.updates:
            self._finish()

    def _finish(self) -> None:
        number = len(self.rows["step"]) + 1
        for name in ("loss", "grad_norm"):
            if not all(math.isfinite(float(log.get(name, 0.0))) for log in self._logs):
                raise BenchError(f"The {name} is not finite at step {number}: lower the learning rate.")
        self.rows["step"].append(float(number))
        for name, key in self._columns.items():
            seen = [float(log[key]) for log in self._logs if log.get(key) is not None]
            self.rows[name].append(sum(seen) / len(seen) if seen else math.nan)
        self._logs.clear()
        last = number == self.rounds
        if self._checkpoint is not None and (last or time.monotonic() - self._saved >= self._every):
            # No state of a generator: every step has its own seed.
            resume.save(
                self._checkpoint, self._key, number, self._params, self.model, [self.optimizer], self.rows, [],
                [resume.rng_state()],
            )  # fmt: skip
            self._saved = time.monotonic()
        if self._progress is not None:
            self._progress(number, self.rounds, " ".join(f"{n} {v[-1]:.3f}" for n, v in list(self.rows.items())[1:3]))

    def table(self) -> pd.DataFrame:
        """The history: one row per round, `step` from 1."""
        return pd.DataFrame(self.rows).astype({"step": "int64"})


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """TRL in a box: yields the settings every trainer shares; afterwards all it changed is as before but the weights.

    Raises:
        BenchError: trl is not installed.
    """
    with _quiet():
        try:
            import trl
        except ImportError as error:
            raise BenchError("Training on rewards and preferences needs TRL: pip install 'tinyonn[align]'") from error
        del trl
        states = random.getstate(), np.random.get_state(), resume.rng_state()
        had, cached = model.__dict__.get("forward"), getattr(model.config, "use_cache", None)
        device = next(model.parameters()).device
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield {
                    "output_dir": folder, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                    "logging_steps": 1, "logging_nan_inf_filter": False, "use_cpu": device.type == "cpu",
                    "bf16": False, "gradient_checkpointing": False, "max_grad_norm": 1.0,
                }  # fmt: skip
            finally:
                model.__dict__.pop("forward", None)  # TRL puts a fused head in its place
                if had is not None:
                    model.forward = had
                if cached is not None:
                    model.config.use_cache = cached  # transformers' trainer switches it off, for good
                model.eval()
                random.setstate(states[0])
                np.random.set_state(states[1])
                resume.set_rng_state(states[2])


@contextmanager
def _quiet() -> Iterator[None]:
    import datasets
    from transformers.utils import logging as transformers_logging

    silenced = logging.root.manager.disable
    bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable(logging.WARNING)  # accelerate, deepspeed and TRL each have a logger of their own
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silenced)
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()


def run(trainer: Any) -> None:
    """Train to the end, without the lines that transformers prints when there is no progress bar.

    Raises:
        BenchError: the model no longer gives probabilities.
    """
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    with probabilities():
        trainer.train()


@contextmanager
def probabilities() -> Iterator[None]:
    """Inside, sampling from NaN is told in one line.

    Raises:
        BenchError: the model no longer gives probabilities.
    """
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # torch.multinomial on NaN
            raise
        raise BenchError("The model's probabilities are not finite any more: lower the learning rate.") from error
