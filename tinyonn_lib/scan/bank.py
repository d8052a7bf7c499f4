"""Where sums live while scanning: one bank per device, float64, no synchronisation in the step.

A sample is first collected in scratch buffers and added to the totals in one go when it is closed. So an
exception in the middle of a sample, or a sample that is discarded, leaves no trace in the totals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyonn_lib.scan.statistics import COUNTERS, KINDS


@dataclass(frozen=True)
class Rows:
    """Rows of a kind's scratch buffer: sums known after the forward, then sums that scale with the loss, then *squared*
    norms. The totals hold the same with the roots of the squares, and at the end, where `joint`, the root of their sum.
    """

    forward: int
    backward: int
    squares: int
    joint: bool

    @property
    def scratch(self) -> int:
        """How many rows there are."""
        return self.forward + self.backward + self.squares


ROWS = {
    "neurons": Rows(forward=4, backward=1, squares=3, joint=True),
    "linear": Rows(forward=2, backward=0, squares=1, joint=False),
    "embedding": Rows(forward=1, backward=0, squares=1, joint=False),
    "experts": Rows(forward=2, backward=0, squares=2, joint=True),
}
# A threshold of zero would count neurons that are exactly zero as "top".
_TINY = torch.finfo(torch.float32).tiny


class KindBank:
    """Scratch and totals of all targets of one kind on one device, side by side.

    Attributes:
        sample: (scratch rows, units), the sample in progress.
        total: float64 (statistics, units), everything closed so far.
    """

    def __init__(self, kind: str, units: int, device: torch.device) -> None:
        # Apple's MPS has no float64: one sample in float32 there, totals on the host.
        mps = device.type == "mps"
        self.rows = ROWS[kind]
        dtype = torch.float32 if mps else torch.float64
        self.sample = torch.zeros(self.rows.scratch, units, device=device, dtype=dtype)
        home = torch.device("cpu") if mps else device
        self.total = torch.zeros(len(KINDS[kind]), units, device=home, dtype=torch.float64)

    def close(self, gradients: bool, scale: float | Tensor, good: Tensor | None) -> None:
        """Add the sample in progress to the totals; without its gradients should `good` be False."""
        rows, total = self.rows, self.total
        sample = self.sample.to(total) if self.sample.device != total.device else self.sample
        total[: rows.forward] += sample[: rows.forward]
        if gradients:
            norms = sample[rows.forward :]
            squares = norms[rows.backward :]
            joint = squares.sum(0, keepdim=True).sqrt_() if rows.joint else None
            squares.sqrt_()
            parts = norms if joint is None else torch.cat([norms, joint])
            parts = parts if _is_one(scale) else parts / _on(scale, parts)
            total[rows.forward :] += parts if good is None else torch.where(good.to(parts.device), parts, 0.0)
        self.sample.zero_()


class Bank:
    """Everything that is counted on one device.

    Attributes:
        kinds: by kind of target, those that keep rows.
        act: (targets,) squared norm of the input, the sample in progress.
        weight: (weights + 1,) squared norm of each weight's gradient, the sample in progress; the last stays zero.
        norms: float64 (targets, 2), sums over closed samples.
        last: float64 (targets, 2), norms of the sample closed last; NaN where its gradients overflowed.
        finite: (targets, 2), how many samples were finite before the first that was not.
    """

    def __init__(self, device: torch.device, units: Mapping[str, int], weights: list[list[int]], count: int) -> None:
        """
        Args:
            device: where the weights are.
            units: rows by kind.
            weights: per target the numbers (on this device) of its weights.
            count: how many weights there are.
        """
        self.device = device
        home = torch.device("cpu") if device.type == "mps" else device
        self.kinds = {kind: KindBank(kind, number, device) for kind, number in units.items() if number}
        dtype = torch.float32 if device.type == "mps" else torch.float64
        targets, most = len(weights), max(len(each) for each in weights)
        self.act = torch.zeros(targets, device=device, dtype=dtype)
        self.weight = torch.zeros(count + 1, device=device, dtype=dtype)
        padded = [each + [count] * (most - len(each)) for each in weights]
        self._weights = torch.tensor(padded, device=device)
        self.norms = torch.zeros(targets, 2, device=home, dtype=torch.float64)
        self.last = torch.zeros_like(self.norms)
        self.finite = torch.zeros(targets, 2, device=home, dtype=torch.int64)
        self._still = torch.ones(targets, 2, device=home, dtype=torch.bool)

    def recount(self) -> None:
        """Count finite samples from here."""
        self.finite.zero_()
        self._still.fill_(True)

    def discard(self) -> None:
        """Forget the sample in progress."""
        for bank in self.kinds.values():
            bank.sample.zero_()
        self.act.zero_()
        self.weight.zero_()

    def overflown(self) -> Tensor:
        """0-dim bool on the device: whether any gradient of the sample in progress is NaN or infinite."""
        return ~torch.isfinite(self.weight.sum())

    def close(self, gradients: bool, scale: float | Tensor, good: Tensor | None = None) -> None:
        """Add the sample in progress to the totals.

        Args:
            gradients: whether the sample has gradients.
            scale: factor on the loss (AMP, accumulation) that is taken out of gradients and saliency.
            good: 0-dim bool, False when the loss was scaled so far up that gradients overflowed and AMP will skip the
                step: its gradients are not counted. None: they count whatever they are.
        """
        for bank in self.kinds.values():
            bank.close(gradients, scale, good)
        grad = self.weight[self._weights].sum(1).sqrt_()
        grad = grad if _is_one(scale) else grad / _on(scale, grad)
        counted = grad if good is None else torch.where(good.to(grad.device), grad, 0.0)
        found = torch.stack([self.act.sqrt(), counted], dim=1).to(self.norms)
        self._still &= torch.isfinite(found)
        self.finite += self._still
        self.norms += found
        self.last = found
        if good is not None:
            self.last = torch.where(good.to(found.device), found, found.new_tensor([1.0, torch.nan]) * found)
        self.act.zero_()
        self.weight.zero_()


class Counts:
    """Tokens and samples per target: whole numbers on the host, and device tensors where a mask decides."""

    def __init__(self, targets: int) -> None:
        self.host = np.zeros((targets, len(COUNTERS)))
        self._masked: dict[tuple[int, int], Tensor] = {}

    def add(self, row: int, column: int, parts: list[int | Tensor]) -> None:
        """Add to counter `column` (order of `COUNTERS`) of target `row`, without waiting for the device."""
        for part in parts:
            if isinstance(part, Tensor):
                before = self._masked.get((row, column))
                self._masked[row, column] = part if before is None else before + part
            else:
                self.host[row, column] += part

    def load(self, counts: np.ndarray) -> None:
        """Go on from counts of an earlier run, (targets, counters)."""
        self.host[:] = counts
        self._masked.clear()

    def array(self) -> np.ndarray:
        """float64 (targets, counters); waits for the device."""
        counts = self.host.copy()
        for place, value in self._masked.items():
            counts[place] += float(value)
        return counts


def forward_sums(h: Tensor, top: int, mask: Tensor | None, into: Tensor, *, moments: bool = True) -> Tensor | None:
    """Add the forward sums of one call to `into`.

    Args:
        h: activations, (tokens, units), any float type.
        top: how many units per token are the top; all that tie with the last of them count, zeros never.
        mask: bool (tokens,), False for padding and ignored tokens; None when all count.
        into: rows |h|, h, h^2, top with `moments`, else |h|, top; (rows, units).

    Returns:
        The sum of all h^2 (0-dim) with `moments`, else None.
    """
    h = h if h.dtype in (torch.float32, torch.float64) else h.float()
    if mask is not None:
        h = h.masked_fill(~mask[:, None], 0.0)
    size = h.abs()
    into[0] += size.sum(0)
    square: Tensor | None = None
    if moments:
        into[1] += h.sum(0)
        squares = (h * h).sum(0)
        into[2] += squares
        square = squares.sum()
    # In place and as floats: a bool sum is five times slower, and whole numbers up to 2^24 are exact.
    into[3 if moments else 1] += size.ge_(_kth_largest(size, top)).sum(0)
    return square


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
        values = size.topk(k, dim=1).values[:, -1:]  # kthvalue is refused under deterministic algorithms
    return values.clamp(min=_TINY)


def _is_one(scale: float | Tensor) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _on(scale: float | Tensor, like: Tensor) -> float | Tensor:
    return scale.to(like) if isinstance(scale, Tensor) else scale
