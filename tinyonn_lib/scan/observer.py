"""Watch every FFN neuron of a model during any forward or training step, without changing a bit of it.

Neuron i of an FFN layer is row i of gate and up and column i of down. The observer sees, per layer, the
input X of gate and up, the input h of down and, through tensor hooks, the gradients of their outputs; the
rest is arithmetic in `rownorms` and `bank`. It never replaces a forward, never touches a `.grad`, and never
waits for the device inside a step (DESIGN §4, ERRATA 004).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.audit import checkpointing, input_embedding, missing, refuse_blind_spots, width
from tinyonn_lib.scan.bank import FORWARD_ROWS, Bank, Counts
from tinyonn_lib.scan.layer import FFNLike, Layer, Watch
from tinyonn_lib.scan.statistics import Layout, Totals

METHODS = ("auto", "grad", "gram", "tiles")


class Observer:
    """Per-neuron sums over everything that runs inside the `with` block.

    >>> with Observer(model, ffns(model), rho=0.05) as obs:  # doctest: +SKIP
    ...     for batch in batches:
    ...         model(**batch).loss.backward()
    ...         obs.end_sample()
    ...     totals = obs.totals()

    A *sample* is what happens between two `end_sample()` calls: with batch size 1, one text. The gradient of a
    sample is the gradient of its loss, so with a batch of several texts the batch is the sample. If
    `end_sample()` is never called, a sample closes itself when the next forward of the model begins, and at
    the end of the block.

    Args:
        model: the module whose forward carries `attention_mask` and `labels` (for the token count).
        ffns: the FFN layers to watch (`tinyonn_lib.lm.models.ffns(model)`).
        rho: share of a layer's neurons that count as its top on a token.
        gradients: False for inference and `generate()`: then no gradient is expected.
        method: `"auto"` reads `.grad` of trainable weights that had none before the sample, else takes the
            cheaper of Gram and tiles per layer and length; `"grad"`, `"gram"`, `"tiles"` force one
            (`"grad"` falls back to the inputs where there is no fresh `.grad`).
        calls: forward/backward pairs per sample (gradient accumulation): the norm is that of their summed
            gradient.

    Attributes:
        enabled: set False to let forwards pass unseen (an evaluation inside a training loop).
        loss_scale: factor on the loss, float or 0-dim tensor (AMP), divided out when a sample closes.
        samples: samples closed so far, including those of `load`.
        methods: how often each method was used, per weight and sample.

    Raises:
        BenchError: a target that never fired or fired twice in a sample; a compiled, offloaded or
            repacked module; NaN or infinity (raised by `totals` and `check`, naming layer and sample).
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: Sequence[FFNLike],
        rho: float = 0.05,
        *,
        gradients: bool = True,
        method: str = "auto",
        calls: int = 1,
    ) -> None:
        if not ffns:
            raise BenchError("nothing to observe: the list of FFN layers is empty; is this a gated-FFN model?")
        if method not in METHODS:
            raise BenchError(f"method={method!r}: choose one of {', '.join(METHODS)}")
        if calls < 1:
            raise BenchError(f"calls={calls}: a sample has at least one forward and backward")
        self.model = model
        self.ffns = tuple(ffns)
        self.layout = Layout(
            layers=tuple(ffn.layer for ffn in ffns), widths=tuple(width(ffn) for ffn in ffns), rho=float(rho)
        )
        self.loss_scale: float | Tensor = 1.0
        self.samples = 0
        self._first = 0
        self._watch = Watch(gradients=gradients, method=method, calls=calls)
        self._banks: dict[torch.device, Bank] = {}
        self._places: list[tuple[Bank, int]] = []
        self._layers: list[Layer] = []
        self._counts = Counts(len(self.ffns))
        self._handles: list[RemovableHandle] = []
        self._signature = inspect.signature(model.forward)
        self._allocate()

    @property
    def enabled(self) -> bool:
        return self._watch.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._watch.enabled = value

    @property
    def methods(self) -> Counter[str]:
        return self._watch.used

    def __enter__(self) -> Observer:
        if self._handles:
            raise BenchError("this observer is already watching: use one `with` block at a time")
        for ffn in self.ffns:
            refuse_blind_spots(self.model, ffn)
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True))
            embedding = input_embedding(self.model)
            if embedding is not None and self._watch.gradients and checkpointing(self.model):
                self._handles.append(embedding.register_forward_hook(_keep_graph))
            for layer in self._layers:
                self._handles.extend(layer.attach())
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._pending():
                self.end_sample()
        finally:
            self.discard_sample()
            self._detach()
        if kind is None and self.samples == self._first:
            raise BenchError(f"nothing was observed: {self._silent()} never ran inside the block")

    def end_sample(self) -> None:
        """Close the sample: check that every target fired, add its sums to the totals.

        Raises:
            BenchError: a target did not fire, or fired more than once; the sample is discarded.
        """
        gradients = self._watch.gradients
        for layer in self._layers:
            if not layer.fired["down"] or (gradients and not layer.complete()):
                message = missing(layer, self.samples)
                self.discard_sample()
                raise BenchError(message)
        for bank in self._banks.values():
            bank.close(gradients, self.loss_scale)
        for row, layer in enumerate(self._layers):
            self._counts.add(row, 0, layer.tokens)
            self._counts.add(row, 1, [1])
            if gradients:
                self._counts.add(row, 2, layer.grad_tokens)
                self._counts.add(row, 3, [1])
            layer.reset()
        self.samples += 1

    def discard_sample(self) -> None:
        """Forget the sample in progress; the totals stay as they were."""
        for layer in self._layers:
            layer.reset()
        for bank in self._banks.values():
            bank.discard()

    def check(self) -> None:
        """Wait for the device and refuse totals that hold NaN or infinity.

        Raises:
            BenchError: naming the layer, the sample (counted from the first one of the scan) and whether
                activations or gradients went wrong first.
        """
        closed = self.samples - self._first
        worst: tuple[int, bool, int] | None = None
        for row, (bank, place) in enumerate(self._places):
            finite = bank.finite[place].tolist()
            for statistic, good in enumerate(finite):
                found = (good, statistic >= FORWARD_ROWS, row)  # activations come first
                if good < closed and (worst is None or found < worst):
                    worst = found
        if worst is None:
            return
        good, backward, row = worst
        ffn = self.ffns[row]
        raise BenchError(
            f"layer {ffn.layer} ({ffn.name}): {'gradients' if backward else 'activations'} are NaN or infinite in "
            f"sample {self._first + good}; look at that sample, or load the model in a wider type (bf16 or fp32)"
        )

    def totals(self) -> Totals:
        """Everything of the closed samples, on the host (waits for the device).

        Raises:
            BenchError: as `check`.
        """
        self.check()
        sums = np.zeros(self.layout.shape)
        for row, (bank, place) in enumerate(self._places):
            sums[row] = bank.total[place].cpu().numpy()
        return Totals(self.layout, sums, self._counts.array())

    def load(self, totals: Totals, samples: int) -> None:
        """Go on from totals of an earlier run, bit for bit. Only before the first sample.

        Args:
            totals: as `totals()` gave them.
            samples: how many samples they hold; the next one gets this number in messages.
        """
        if totals.layout != self.layout:
            raise BenchError("these totals belong to another model or rho: they cannot be continued")
        for row, (bank, place) in enumerate(self._places):
            bank.total[place].copy_(torch.from_numpy(totals.sums[row]))
        self._counts.host[:] = totals.counts
        self.samples = self._first = samples

    def _allocate(self) -> None:
        devices: dict[torch.device, list[int]] = {}
        for row, ffn in enumerate(self.ffns):
            weight = getattr(ffn.gate, "weight", None)
            device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
            if device.type == "meta":
                raise BenchError(
                    f"{ffn.name} is offloaded (its weights are on no device): load the model without offload to scan it"
                )
            devices.setdefault(device, []).append(row)
        places: dict[int, tuple[Bank, int]] = {}
        for device, rows in devices.items():
            bank = self._banks[device] = Bank(device, len(rows), self.layout.shape[2])
            places.update({row: (bank, place) for place, row in enumerate(rows)})
        self._places = [places[row] for row in range(len(self.ffns))]
        for row, ffn in enumerate(self.ffns):
            bank, place = self._places[row]
            neurons = self.layout.widths[row]
            self._layers.append(Layer(ffn, bank.sample[place, :, :neurons], self.layout.top(neurons), self._watch))

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._watch.enabled:
            return
        if self._watch.gradients and self._pending() and all(layer.complete() for layer in self._layers):
            self.end_sample()
        for layer in self._layers:
            layer.current = None
        if args:
            kwargs = self._signature.bind_partial(*args, **kwargs).arguments
        attention, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        self._watch.begin(*(m if isinstance(m, Tensor) and m.dim() == 2 else None for m in (attention, labels)))

    def _pending(self) -> bool:
        return any(layer.fired for layer in self._layers)

    def _silent(self) -> str:
        return f"{self.ffns[0].name} and {len(self.ffns) - 1} other layers" if len(self.ffns) > 1 else self.ffns[0].name

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            layer.release()


def _keep_graph(module: nn.Module, args: Any, output: Tensor) -> None:
    """Reentrant checkpointing builds no graph at all unless an input of the checkpoint needs one."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
