"""Where sums live while scanning: one bank per device, float64, no synchronisation in the step.

A sample is first collected in a scratch buffer and added to the totals in one go when it is closed. So an
exception in the middle of a sample, or a sample that is discarded, leaves no trace in the totals.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tinyonn_lib.scan.statistics import COUNTERS, STATISTICS

# Rows of the scratch buffer: four forward sums, saliency, and the *squared* norms of gate, up, down.
FORWARD_ROWS = 4
SALIENCY = 4
SQUARES = {"gate": 5, "up": 6, "down": 7}
SCRATCH = 8
# A threshold of zero would count neurons that are exactly zero as "top".
_TINY = torch.finfo(torch.float32).tiny


class Bank:
    """Totals and scratch of the layers of one device.

    Attributes:
        sample: (layers, 8, width), the sample in progress.
        total: float64 (layers, 9, width), everything closed so far.
    """

    def __init__(self, device: torch.device, layers: int, width: int) -> None:
        # Apple's MPS has no float64: one sample in float32 there, totals on the host.
        mps = device.type == "mps"
        home = torch.device("cpu") if mps else device
        self.sample = torch.zeros(layers, SCRATCH, width, device=device, dtype=torch.float32 if mps else torch.float64)
        self.total = torch.zeros(layers, len(STATISTICS), width, device=home, dtype=torch.float64)
        # How many samples were finite, per layer and scratch row, before the first that was not.
        self.finite = torch.zeros(layers, SCRATCH, device=home, dtype=torch.int64)
        self._still = torch.ones(layers, SCRATCH, device=home, dtype=torch.bool)

    def discard(self) -> None:
        """Forget the sample in progress."""
        self.sample.zero_()

    def close(self, backward: bool, scale: float | Tensor) -> None:
        """Add the sample in progress to the totals.

        Args:
            backward: whether the sample has gradients.
            scale: factor on the loss (AMP, accumulation) that is taken out of gradients and saliency.
        """
        sample = self.sample.to(self.total) if self.sample.device != self.total.device else self.sample
        self._still &= torch.isfinite(sample.sum(dim=2))
        self.finite += self._still
        total = self.total
        total[:, :FORWARD_ROWS] += sample[:, :FORWARD_ROWS]
        if backward:
            squares = sample[:, 5:8]
            rest = torch.cat([sample[:, 4:5], squares.sqrt(), squares.sum(1, keepdim=True).sqrt_()], dim=1)
            if not isinstance(scale, float) or scale != 1.0:
                rest /= scale.to(rest) if isinstance(scale, Tensor) else scale
            total[:, FORWARD_ROWS:] += rest
        self.sample.zero_()


class Counts:
    """Tokens and samples per layer: whole numbers on the host, and device tensors where a mask decides."""

    def __init__(self, layers: int) -> None:
        self.host = np.zeros((layers, len(COUNTERS)))
        self._masked: dict[tuple[int, int], Tensor] = {}

    def add(self, row: int, column: int, parts: list[int | Tensor]) -> None:
        """Add to counter `column` (order of `COUNTERS`) of layer `row`, without waiting for the device."""
        for part in parts:
            if isinstance(part, Tensor):
                before = self._masked.get((row, column))
                self._masked[row, column] = part if before is None else before + part
            else:
                self.host[row, column] += part

    def array(self) -> np.ndarray:
        """float64 (layers, counters); waits for the device."""
        counts = self.host.copy()
        for place, value in self._masked.items():
            counts[place] += float(value)
        return counts


def forward_sums(h: Tensor, top: int, mask: Tensor | None, into: Tensor) -> None:
    """Add the four forward sums of one call to `into`.

    Args:
        h: input of down, (tokens, neurons), any float type.
        top: how many neurons per token are the top; all that tie with the last of them count, zeros never.
        mask: bool (tokens,), False for padding and ignored tokens; None when all count.
        into: (>= 4, neurons) rows abs_h, h, h_sq, top.
    """
    h = h if h.dtype in (torch.float32, torch.float64) else h.float()
    if mask is not None:
        h = h.masked_fill(~mask[:, None], 0.0)
    size = h.abs()
    into[0] += size.sum(0)
    into[1] += h.sum(0)
    into[2] += (h * h).sum(0)
    # In place and as floats: a bool sum is five times slower, and whole numbers up to 2^24 are exact.
    into[3] += size.ge_(_kth_largest(size, top)).sum(0)


def saliency_sums(h: Tensor, dh: Tensor, mask: Tensor | None, into: Tensor) -> None:
    """Add the sum over tokens of |h * dL/dh| to `into`. h, dh: (tokens, neurons); into: (neurons,)."""
    product = h.to(torch.promote_types(h.dtype, torch.float32)) * dh
    if mask is not None:
        product = product.masked_fill(~mask[:, None], 0.0)
    into += product.abs_().sum(0)


def _kth_largest(size: Tensor, k: int) -> Tensor:
    """(tokens, 1): the k-th largest of each row, never below the smallest normal number."""
    place = size.shape[1] - k
    if size.device.type == "cpu":
        # numpy's vectorised partition is ten times faster than torch.kthvalue on a CPU. Floats that are not
        # negative order like their bits, and integers spare numpy the care for NaN (which lands on top).
        bits = size.view(torch.int64 if size.dtype == torch.float64 else torch.int32).numpy()
        values = torch.from_numpy(np.partition(bits, place, axis=1)[:, place : place + 1]).view(size.dtype)
    else:
        values = size.kthvalue(place + 1, dim=1, keepdim=True).values
    return values.clamp(min=_TINY)
