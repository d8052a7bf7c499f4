"""One optimiser step in one process: gradients by `torch.autograd.grad` in threads, resumable to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.record import HeldOut

LossFn = Callable[[Any], Tensor]


class Engine(Protocol):
    """What `fit` trains with: this process alone, or together with others (`parallel.Accelerated`).

    Attributes:
        main: whether this process is the one that tells and writes.
    """

    main: bool

    def step(self, data: Any) -> tuple[Tensor, Tensor]:
        """One optimiser step on a batch: its mean loss and its gradient norm before clipping."""

    def agree(self, value: float) -> float:
        """The mean over all processes; each must ask at the same moment."""

    def look(self, held_out: HeldOut) -> float:
        """The held-out loss, mean over all processes."""

    def values(self) -> list[Tensor]:
        """The trained values, as far as this process holds them; in place."""

    def save(self, path: Path, key: str, step: int, history: Mapping[str, list[float]], best: list[Tensor]) -> None:
        """Write a checkpoint that a kill at any moment leaves old or new."""

    def restore(self, path: Path, key: str) -> resume.Found | None:
        """Go back to the checkpoint, if there is one of this training."""

    def finish(self) -> None:
        """Leave the trained values in the caller's parameters, and no gradients."""


class Local:
    """This process alone, a batch cut into `accumulate` pieces and each of them into `shards` for as many threads."""

    main = True

    def __init__(
        self,
        loss_fn: LossFn,
        params: Sequence[nn.Parameter],
        module: nn.Module | None,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        clip: float | None,
        accumulate: int,
        shards: int,
        each: Callable[..., list[Any]],
    ) -> None:
        self._loss_fn, self._params, self._module, self._optimizers = loss_fn, params, module, optimizers
        self._clip, self._accumulate, self._shards, self._each = clip, accumulate, shards, each

    def step(self, data: Any) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        check_rows(data, self._accumulate)
        pieces = [part(data, place, self._accumulate) for place in range(self._accumulate)]
        loss, grads = self._gradients(pieces[0] if len(pieces) > 1 else data)
        for piece in pieces[1:]:
            more, grads_more = self._gradients(piece)
            loss = loss + more
            grads = [a if b is None else b if a is None else a + b for a, b in zip(grads, grads_more, strict=True)]
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = grad if grad is None or len(pieces) == 1 else grad / len(pieces)
        norm = nn.utils.clip_grad_norm_(self._params, math.inf if self._clip is None else self._clip)
        self._each(lambda optimizer: optimizer.step(), self._optimizers)
        return loss if len(pieces) == 1 else loss / len(pieces), norm

    def agree(self, value: float) -> float:
        """See `Engine`."""
        return value

    def look(self, held_out: HeldOut) -> float:
        """See `Engine`."""
        return held_out.loss()

    def values(self) -> list[Tensor]:
        """See `Engine`."""
        return [param.data for param in self._params]

    def save(self, path: Path, key: str, step: int, history: Mapping[str, list[float]], best: list[Tensor]) -> None:
        """See `Engine`."""
        resume.save(path, key, step, self._params, self._module, self._optimizers, history, best, [resume.rng_state()])

    def restore(self, path: Path, key: str) -> resume.Found | None:
        """See `Engine`."""
        return resume.restore(path, key, self._params, self._module, self._optimizers)

    def finish(self) -> None:
        """See `Engine`."""
        for param in self._params:
            param.grad = None

    def _gradients(self, data: Any) -> tuple[Tensor, list[Tensor | None]]:
        """Mean loss and its gradients. Not `.backward()`: threads would race for the same `.grad`."""

        def one(piece: Any) -> tuple[Tensor, list[Tensor | None]]:
            loss = self._loss_fn(piece)
            return loss.detach(), list(torch.autograd.grad(loss, self._params, allow_unused=True))

        if self._shards == 1:
            return one(data)
        pieces = [piece for place in range(self._shards) if rows(piece := part(data, place, self._shards))]
        counts = [rows(piece) for piece in pieces]
        results = self._each(one, pieces)
        total_loss, total = results[0][0] * (counts[0] / sum(counts)), results[0][1]
        total = [None if grad is None else grad * (counts[0] / sum(counts)) for grad in total]
        for (loss, grads), count in zip(results[1:], counts[1:], strict=True):
            weight = count / sum(counts)
            total_loss = total_loss + weight * loss
            for place, grad in enumerate(grads):
                old = total[place]
                if grad is not None:
                    total[place] = grad * weight if old is None else old.add_(grad, alpha=weight)
        return total_loss, total


def rows(data: Any) -> int:
    """Length of a batch's first dimension."""
    return int(resume.tensors_in(data)[0].shape[0])


def part(data: Any, place: int, parts: int) -> Any:
    """Rows of part `place`: contiguous, as equal as they can be."""
    if isinstance(data, Tensor):
        return data.tensor_split(parts)[place]
    if isinstance(data, Mapping):
        return {name: part(value, place, parts) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return tuple(part(value, place, parts) for value in data)
    return data


def check_rows(data: Any, accumulate: int, processes: int = 1) -> None:
    """Pieces of unequal size would not weigh alike.

    Raises:
        BenchError: the batch cannot be cut into equal pieces.
    """
    if rows(data) % (accumulate * processes):
        raise BenchError(
            f"A batch of {rows(data)} rows cannot be cut into equal pieces for accumulate={accumulate} on "
            f"{processes} processes: make it a multiple of {accumulate * processes}."
        )
