"""What everything that watches one model shares: switches, the masks of the forward in progress, the last input."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.calls import Input


@dataclass
class Watch:
    """What all weights of one observer share.

    Attributes:
        enabled: False makes every hook return at once (the user's switch).
        sampled: the same, as the step-sampling controller decides.
        passing: the same for the forward in progress: it runs without a graph where gradients are expected.
        gradients: whether samples have a backward.
        method: `auto`, `grad`, `gram` or `tiles`.
        calls: forward/backward pairs that make one sample.
        used: how often each method was used.
        begun: whether a forward of the model has begun since the last sample closed.
    """

    enabled: bool = True
    sampled: bool = True
    passing: bool = False
    gradients: bool = True
    method: str = "auto"
    calls: int = 1
    used: Counter[str] = field(default_factory=Counter)
    begun: bool = False
    _batch: tuple[int, int] | None = None
    _newest: bool = False
    _attention: Tensor | None = None
    _labels: Tensor | None = None
    _masks: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor | None, int | Tensor]] = field(default_factory=dict)
    _input: Input | None = None

    @property
    def on(self) -> bool:
        """Whether hooks look at what passes."""
        return self.enabled and self.sampled and not self.passing

    def leaf(self, output: Tensor) -> None:
        """Frozen weights: make this output a leaf. The backward then goes down to the lowest module that is watched
        and no further, and no value changes. On steps that are not sampled, too, or their backward would fail.
        """
        if self.enabled and self.gradients and not output.requires_grad and torch.is_grad_enabled():
            output.requires_grad_(True)

    def begin(
        self, batch: tuple[int, int] | None, attention: Tensor | None, labels: Tensor | None, *, newest: bool = False
    ) -> None:
        """A new forward of the model starts.

        Args:
            batch: its (texts, positions), None when it cannot be told.
            attention, labels: (texts, >= positions): 0 and -100 mark tokens that do not count.
            newest: the head is asked for the last positions only.
        """
        self.begun, self._batch, self._newest = True, batch, newest
        self._attention, self._labels = attention, labels
        self._masks.clear()
        self._input = None

    def forget(self) -> None:
        """The sample is over: let go of its tensors."""
        self.begun = False
        self._attention = self._labels = self._input = None
        self._masks.clear()

    def input(self, source: Tensor, dtype: torch.dtype) -> Input:
        """The input `source` for a product in `dtype`: the last one again if it is the very same tensor."""
        if self._input is None or not self._input.same(source, dtype):
            self._input = Input(source, dtype)
        return self._input

    def mask(self, shape: torch.Size, device: torch.device, name: str) -> tuple[Tensor | None, int | Tensor]:
        """Which tokens count, and how many.

        Args:
            shape: of the module's input without its features: (texts, positions) or (tokens,).
            device: where the module is.
            name: of the module, for messages.

        Returns:
            (bool (tokens,) or None when all count, their number).

        Raises:
            BenchError: the module ran outside the model's forward, or sees other positions than the model, so that
                nobody knows which of them count.
        """
        if not self.begun:
            raise BenchError(f"{name} ran outside the forward of the observed model: observe the module that you call")
        if self._attention is None and self._labels is None:
            return None, shape.numel()
        key = (tuple(shape), device)
        if key not in self._masks:
            self._masks[key] = self._build(shape, device, name)
        return self._masks[key]

    def _build(self, shape: torch.Size, device: torch.device, name: str) -> tuple[Tensor | None, int | Tensor]:
        masks = [(m, ignored) for m, ignored in ((self._attention, 0), (self._labels, -100)) if m is not None]
        if device.type == "cpu" and all(bool((mask != ignored).all()) for mask, ignored in masks):
            return None, shape.numel()  # only on the CPU: asking the device would stall the step
        texts, positions = self._batch or tuple(masks[0][0].shape)
        if self._newest and len(shape) == 2 and shape[0] == texts and shape[1] < positions:
            positions = shape[1]  # the head, for the newest positions only
        elif tuple(shape) not in ((texts, positions), (texts * positions,)):
            raise BenchError(
                f"{name} saw an input of {tuple(shape)} tokens, the model one of {(texts, positions)} with padding or "
                "ignored labels: it does not see every position once and cannot be counted per token; leave it out of "
                "the targets"
            )
        keep: Tensor | None = None
        for mask, ignored in masks:
            # While generating with a cache the mask covers the past too: the newest positions are the last.
            part = (mask[:, mask.shape[1] - positions :] != ignored).reshape(-1).to(device)
            keep = part if keep is None else keep & part
        assert keep is not None
        return keep, keep.sum()
