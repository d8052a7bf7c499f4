"""Watch the weights of a model during any forward or training step, without changing a bit of it.

Every linear leaves its input X and, through a tensor hook, the gradient G of its output; the weight's gradient is
G^T X, and the rest is arithmetic in `rownorms` and `bank`. The observer never replaces a forward, never touches a
`.grad`, and never waits for the device inside a step (DESIGN §4, ERRATA 004).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import targets as targets_of
from tinyonn_lib.scan.audit import missing, refuse_blind_spots
from tinyonn_lib.scan.bank import Counts
from tinyonn_lib.scan.budget import Budget
from tinyonn_lib.scan.plan import Plan
from tinyonn_lib.scan.statistics import Totals
from tinyonn_lib.scan.watch import Watch

CHOICES = ("auto", "grad", "gram", "tiles")
Record = Callable[[int, int | Tensor, Tensor, np.ndarray], None]


class Observer:
    """Sums over everything that runs inside the `with` block, per neuron, row, expert and tensor.

    >>> with Observer(model, "neurons,linears", rho=0.05) as obs:  # doctest: +SKIP
    ...     for batch in batches:
    ...         model(**batch).loss.backward()
    ...         obs.end_sample()
    ...     totals = obs.totals()

    A *sample* is what happens between two `end_sample()` calls: with batch size 1, one text. The gradient of a
    sample is the gradient of its loss, so with a batch of several texts the batch is the sample. If
    `end_sample()` is never called, a sample with gradients closes itself when the next forward of the model begins, and
    any at the end of the block. Where gradients are expected, forwards under `no_grad` (evaluation) pass unseen.

    Args:
        model: the module whose forward carries `attention_mask` and `labels` (for the token count).
        targets: what to watch: "neurons", "linears", "embeddings", "experts", or patterns over module names such as
            `*.self_attn.?_proj`; several with commas or as a list.
        rho: share of a target's rows that count as its top on a token.
        rows: whether linears and embeddings keep statistics per row, or only the norms of the whole tensor.
        gradients: False for inference and `generate()`: then no gradient is expected. (A text of a batch that has ended
            goes on being fed padding by `generate()`, with no mask on it, and is counted.)
        method: `"auto"` reads `.grad` of trainable weights that had none before the sample, else takes the
            cheaper of Gram and tiles per weight and length; `"grad"`, `"gram"`, `"tiles"` force one
            (`"grad"` falls back to the inputs where there is no fresh `.grad`).
        calls: forward/backward pairs per sample (gradient accumulation): the norm is that of their summed
            gradient.
        budget: slowdown allowed, such as 0.05: steps are then sampled so that the time spent observing stays under this
            share of the steps' own time; 0 observes every step.
        record: called at the end of every observed sample with the step's number, its tokens, the norms (targets, 2) of
            inputs and gradients on the device (NaN without gradients), and per target a number into `METHODS`.

    Attributes:
        layout: what is watched.
        enabled: set False to let forwards pass unseen (an evaluation inside a training loop).
        loss_scale: factor on the loss, divided out when a sample closes. A float, or the 0-dim tensor of an AMP scaler:
            then gradients that overflow are left out, because the scaler skips their step.
        record: as above; may be set between samples.
        samples: samples closed so far, including those of `load`.
        steps: steps begun so far, observed or not; `load` sets it to the samples loaded.
        methods: how often each method was used, per weight and sample.

    Raises:
        BenchError: a target that never fired or fired twice in a sample; a compiled, offloaded or
            repacked module; NaN or infinity (raised by `totals` and `check`, naming target and sample).
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str] = "neurons",
        *,
        rho: float = 0.05,
        rows: bool = True,
        gradients: bool = True,
        method: str = "auto",
        calls: int = 1,
        budget: float = 0.0,
        record: Record | None = None,
    ) -> None:
        if method not in CHOICES:
            raise BenchError(f"method={method!r}: choose one of {', '.join(CHOICES)}")
        if calls < 1:
            raise BenchError(f"calls={calls}: a sample has at least one forward and backward")
        if not 0.0 <= budget < 1.0:
            raise BenchError(f"budget={budget} is a share of the step's time: choose it in [0, 1), e.g. 0.05")
        found = targets_of.find(model, targets, rows=rows)
        if not found:
            raise BenchError("nothing to observe: name at least one target, such as neurons")
        self.model = model
        self.layout = targets_of.layout_of(found, rho)
        self.loss_scale: float | Tensor = 1.0
        self.record = record
        self.samples = self.steps = 0
        self._first = 0
        self._forwards = 0  # of the step in progress
        self._passed = False  # whether a forward without a graph passed since the last sample closed
        self._budget = Budget(budget) if budget else None
        self._watch = Watch(gradients=gradients, method=method, calls=calls)
        self._plan = Plan(found, self.layout, self._watch)
        self._counts = Counts(len(found))
        self._handles: list[RemovableHandle] = []
        self._signature = inspect.signature(model.forward)

    @property
    def enabled(self) -> bool:
        return self._watch.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._watch.enabled = value

    @property
    def attached(self) -> bool:
        """Whether its hooks are on the model."""
        return bool(self._handles)

    @property
    def methods(self) -> Counter[str]:
        return self._watch.used

    @property
    def share(self) -> float:
        """Share of the steps that were observed, in [0, 1]; 1 before the first."""
        return self.samples / self.steps if self.steps else 1.0

    def __enter__(self) -> Observer:
        if self._handles:
            raise BenchError("this observer is already watching: use one `with` block at a time")
        if name := self._plan.replaced():
            raise BenchError(f"the weight of {name} was replaced after the observer was made: make the observer anew")
        for name, module in self._plan.modules():
            refuse_blind_spots(self.model, name, module)
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True))
            self._handles.append(self.model.register_forward_hook(self._end_forward, always_call=True))
            for each in self._plan.watched:
                self._handles.extend(each.attach())
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = self._why_nothing()
        try:
            if kind is None and self._pending():
                self.end_sample()
        finally:
            self.discard_sample()
            self._detach()
        endless = not self._watch.gradients and self._budget is not None and self.steps <= 1
        if kind is None and self.samples == self._first and (self._watch.sampled or endless):
            names = self._plan.names
            others = f" and {len(names) - 1} other targets" if len(names) > 1 else ""
            raise BenchError(f"nothing was observed: {names[0]}{others} {why}")

    def end_sample(self, calls: int = 0) -> None:
        """Close the sample: check that every target fired, add its sums to the totals.

        Args:
            calls: how many forward/backward pairs this one has, should they be fewer than usual (the last step of an
                epoch under gradient accumulation); 0 for as many as the observer was made for.

        Raises:
            BenchError: a target did not fire, or fired more often than it should; the sample is discarded.
        """
        if not 0 <= calls <= self._watch.calls:
            raise BenchError(f"end_sample(calls={calls}): this observer was made for calls={self._watch.calls} at most")
        self._forwards = 0
        if not self._watch.sampled or not self._watch.enabled:
            return
        calls = calls or self._watch.calls
        gradients = self._watch.gradients
        if gradients and self._passed and not self._pending():
            raise BenchError(f"sample {self.samples}: {self._plan.names[0]} {self._why_nothing()}")
        for each in self._plan.watched:
            if gradients and calls < self._watch.calls:
                each.finish()
            ran = all(each.fired[name] for name in each.modules)
            often = gradients and any(each.fired[name] != calls for name in each.modules)
            if not ran or often or (gradients and not each.complete(calls)):
                message = missing(each, self.samples, calls)
                self.discard_sample()
                raise BenchError(message)
        # Under AMP an overflow is no accident: the scaler skips the step and tries a smaller factor.
        good = self._plan.good() if gradients and isinstance(self.loss_scale, Tensor) else None
        for bank in self._plan.banks:
            bank.close(gradients, self.loss_scale, good)
        for row, tokens in enumerate(self._plan.tokens()):
            self._counts.add(row, 0, tokens)
            self._counts.add(row, 1, [1])
            if gradients:
                self._counts.add(row, 2, tokens if good is None else [part * good.double() for part in tokens])
                self._counts.add(row, 3, [1 if good is None else good.double()])
        told = self._told() if self.record is not None else None
        self._forget()
        self.samples += 1
        if self.record is not None and told is not None:
            self.record(*told)

    def discard_sample(self) -> None:
        """Forget the sample in progress; the totals stay as they were."""
        self._forget()
        self._forwards = 0
        for bank in self._plan.banks:
            bank.discard()

    def check(self) -> None:
        """Wait for the device and refuse totals that hold NaN or infinity.

        Raises:
            BenchError: naming the target, the sample (counted from the first one of the scan) and whether
                activations or gradients went wrong first.
        """
        good, backward, row = self._plan.first_bad(self.samples - self._first)
        if row >= 0:
            raise BenchError(
                f"{self._plan.names[row]}: {'gradients' if backward else 'activations'} are NaN or infinite in sample "
                f"{self._first + good}; look at that sample, or load the model in a wider type (bf16 or fp32)"
            )

    def totals(self) -> Totals:
        """Everything of the closed samples, on the host (waits for the device).

        Raises:
            BenchError: as `check`.
        """
        self.check()
        sums, norms = self._plan.collect()
        for target, part in zip(self.layout.targets, sums, strict=True):
            if not np.isfinite(part).all():
                raise BenchError(f"{target.name}: sums are NaN or infinite; load the model in a wider type")
        return Totals(self.layout, sums, self._counts.array(), norms)

    def load(self, totals: Totals, samples: int) -> None:
        """Replace what was counted by totals of an earlier run, bit for bit. Between samples only.

        Args:
            totals: as `totals()` gave them.
            samples: how many samples they hold; the next one gets this number in messages and records.
        """
        if totals.layout != self.layout:
            raise BenchError("these totals belong to another model, other targets or rho: they cannot be continued")
        if self._pending():
            raise BenchError("a sample is in progress: close or discard it before loading totals")
        self._plan.load(totals)
        self._forwards = 0
        self._counts.load(totals.counts)
        self.samples = self._first = self.steps = samples

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self._watch
        watch.passing = watch.gradients and not torch.is_grad_enabled()  # an evaluation between training steps
        self._passed = self._passed or watch.passing
        if not watch.enabled or watch.passing:
            return
        calls = watch.calls
        if watch.gradients and self._forwards >= calls:
            if not watch.sampled:
                self._forwards = 0
            elif all(each.complete(calls) for each in self._plan.watched):
                self.end_sample()
        if self._forwards == 0:
            self.steps += 1
            watch.sampled = self._budget.begin() if self._budget is not None else True
        self._forwards += 1
        if not watch.sampled:
            return
        if args:
            kwargs = {**self._signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        attention, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if attention is not None and not (isinstance(attention, Tensor) and attention.dim() == 2):
            raise BenchError("attention_mask is not (texts, positions), so padding cannot be told: pass the 2-D mask")
        labels = labels if isinstance(labels, Tensor) and labels.dim() == 2 else None
        kept = kwargs.get("logits_to_keep", 0)
        watch.begin(_batch(args, kwargs), attention, labels, newest=isinstance(kept, int) and kept > 0)

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._watch.passing = False  # a reference model without a graph must not blind the backward that follows

    def _told(self) -> tuple[int, int | Tensor, Tensor, np.ndarray]:
        """What `record` is called with, before the sample is forgotten."""
        norms = self._plan.last_norms()
        if not self._watch.gradients:
            norms[:, 1] = torch.nan
        first = self._plan.tokens()[0]
        return self.steps - 1, sum(first[1:], start=first[0]) if first else 0, norms, self._plan.methods()

    def _why_nothing(self) -> str:
        if self._watch.gradients and self._passed:
            return "ran without a graph (under no_grad) only: pass gradients=False to watch forwards"
        if self._budget is not None and not self._watch.gradients:
            return "was never sampled: without gradients a step ends where you call end_sample()"
        return "never ran inside the block"

    def _pending(self) -> bool:
        return any(each.pending() for each in self._plan.watched)

    def _forget(self) -> None:
        for each in self._plan.watched:
            each.reset()
        self._watch.forget()
        self._passed = False

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._budget is not None:
            self._budget.pause()
        for each in self._plan.watched:
            each.release()


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(texts, positions) of a forward, from token ids or embeddings."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    return None
