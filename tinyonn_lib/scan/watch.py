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
        attention, labels: (batch, positions) of the forward in progress, or None.
        used: how often each method was used.
    """

    enabled: bool = True
    sampled: bool = True
    passing: bool = False
    gradients: bool = True
    method: str = "auto"
    calls: int = 1
    attention: Tensor | None = None
    labels: Tensor | None = None
    used: Counter[str] = field(default_factory=Counter)
    _masks: dict[tuple[int, torch.device], tuple[Tensor | None, int | Tensor]] = field(default_factory=dict)
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

    def begin(self, attention: Tensor | None, labels: Tensor | None) -> None:
        """A new forward of the model starts, with these masks."""
        self.attention, self.labels = attention, labels
        self._masks.clear()
        self._input = None

    def forget(self) -> None:
        """Let go of the last input."""
        self._input = None

    def input(self, source: Tensor, dtype: torch.dtype) -> Input:
        """The input `source` for a product in `dtype`: the last one again if it is the very same tensor."""
        if self._input is None or not self._input.same(source, dtype):
            self._input = Input(source, dtype)
        return self._input

    def mask(self, x: Tensor, name: str) -> tuple[Tensor | None, int | Tensor]:
        """Which tokens of x (..., d) count, and how many: (bool (tokens,) or None for all, count)."""
        return self.mask_of(x.shape[:-1].numel(), x.device, name)

    def mask_of(self, tokens: int, device: torch.device, name: str) -> tuple[Tensor | None, int | Tensor]:
        """As `mask`, for a module that sees this many tokens."""
        if self.attention is None and self.labels is None:
            return None, tokens
        key = (tokens, device)
        if key not in self._masks:
            self._masks[key] = self._build(tokens, device, name)
        return self._masks[key]

    def _build(self, tokens: int, device: torch.device, name: str) -> tuple[Tensor | None, int | Tensor]:
        keep: Tensor | None = None
        for source, ignored in ((self.attention, 0), (self.labels, -100)):
            if source is None:
                continue
            positions = tokens // source.shape[0]
            if positions * source.shape[0] != tokens or positions > source.shape[1]:
                raise BenchError(
                    f"{name} saw {tokens} tokens, the model's mask is {tuple(source.shape)}: this module does not "
                    "see every position once and cannot be counted per token; leave it out of the targets"
                )
            # While generating with a cache the mask covers the past too: the newest positions are the last.
            part = (source[:, source.shape[1] - positions :] != ignored).reshape(-1).to(device)
            keep = part if keep is None else keep & part
        if keep is None or (device.type == "cpu" and bool(keep.all())):
            return None, tokens  # only on the CPU: asking the device would stall the step
        return keep, keep.sum()
