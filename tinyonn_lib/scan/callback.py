"""Watch a `transformers.Trainer` run: one callback, nothing else to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.mscan import Writer
from tinyonn_lib.scan.observer import Observer


class ObserverCallback(TrainerCallback):
    """Observe the optimiser steps of a Trainer; a step with all its accumulated batches is one sample.

    >>> with ObserverCallback("linears", path="run.mscan") as watching:  # doctest: +SKIP
    ...     Trainer(model, args, train_dataset=data, callbacks=[watching]).train()
    >>> watching.observer.share  # of the steps were observed

    The `with` takes the hooks off should the training fail; without it they leave at the end of the training. The
    trained weights are those of a run without the callback, bit for bit. With several processes each sees the gradient
    of its own batches, before they are averaged.

    Args:
        targets, rho, rows, method, budget: as for `Observer`; rows are off and the budget is 5 % by default.
        path: an `.mscan` file for the norms of every observed step; none by default.
        meta: JSON-able facts for the file's header.

    Attributes:
        observer: from the beginning of the training on.
    """

    def __init__(
        self,
        targets: str | Sequence[str] = "linears",
        *,
        rho: float = 0.05,
        rows: bool = False,
        method: str = "auto",
        budget: float = 0.05,
        path: str | Path | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._options: dict[str, Any] = {"rho": rho, "rows": rows, "method": method, "budget": budget}
        self._targets, self._path, self._meta = targets, path, dict(meta or {})
        self._observer: Observer | None = None
        self._writer: Writer | None = None
        self._batches = self._step = 0

    @property
    def observer(self) -> Observer:
        if self._observer is None:
            raise BenchError("nothing is observed yet: the training has not begun")
        return self._observer

    def __enter__(self) -> ObserverCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(kind, error, trace)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the hooks on the model."""
        assert model is not None
        self._leave(RuntimeError, None, None)  # of an attempt before, when Trainer looks for a batch size that fits
        observer = Observer(model, self._targets, calls=args.gradient_accumulation_steps, **self._options)
        if self._path is not None:
            observer.record = self._record
            meta = {**self._meta, "budget": self._options["budget"]}
            step = state.global_step  # not 0 when a training is resumed: what was written up to there stays
            self._writer = Writer(
                self._path,
                observer.layout.targets,
                meta,
                append=step > 0 and Path(self._path).exists(),
                before_step=step,
            )
        self._observer, self._batches = observer.__enter__(), 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more batch of the step has had its backward."""
        self._batches += 1

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The step's gradient is complete: close the sample."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            self.observer.loss_scale = scaler._get_scale_async()  # `get_scale` would wait for the device
        self._step = state.global_step
        self.observer.end_sample(calls=self._batches + 1)
        self._batches = 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off and close the file."""
        self._leave(None, None, None)

    def _record(self, step: int, tokens: int | Tensor, norms: Tensor, methods: np.ndarray) -> None:
        if self._writer is not None:
            self._writer.write(self._step, self._step, tokens, norms, methods)

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writer, self._writer = self._writer, None
        try:
            if self._observer is not None and self._observer.attached:
                self._observer.__exit__(kind, error, trace)
        finally:
            if writer is not None:
                writer.close()
