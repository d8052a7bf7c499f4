"""Arms that run in turns on the same inputs, so that what the machine does meanwhile happens to all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from peers import Arm
from steps import Step

from tinyonn_lib.scan.observer import Observer


class Observed(Arm):
    """Our observer around a step. It is there during its own blocks only, and keeps its totals from block to block."""

    def __init__(self, step: Step, targets: str, rows: bool, budget: float) -> None:
        super().__init__(step)
        self.observer = Observer(step.model, targets, rows=rows, budget=budget)

    def __enter__(self) -> Arm:
        self.observer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.observer.__exit__(*error)  # type: ignore[arg-type]

    def __call__(self) -> None:
        self.step()
        self.observer.end_sample()


@dataclass
class Blocks:
    """What the blocks of one arm took.

    Attributes:
        warm: seconds per step of the block that is not counted.
        seconds: of each counted block, per step.
        observed: share of the steps of the counted blocks that were observed; 1 where nothing samples.
        peak: bytes of device memory at most; 0 on a CPU.
    """

    warm: float = 0.0
    seconds: list[float] = field(default_factory=list)
    observed: float = 1.0
    peak: int = 0

    def ratio(self, bare: Blocks) -> tuple[float, float, float]:
        """Median of the rounds' ratios to `bare`, and their quartiles (the extremes of fewer than four rounds)."""
        pairs = [mine / plain for mine, plain in zip(self.seconds, bare.seconds, strict=True)]
        if len(pairs) < 4:
            return median(pairs), min(pairs), max(pairs)
        low, middle, high = quantiles(pairs, n=4, method="inclusive")
        return middle, low, high


def in_turns(arms: Mapping[str, Arm], rounds: int, steps: int, device: torch.device) -> dict[str, Blocks]:
    """Every arm `rounds` times, `steps` steps at a time, in an order that moves on by one each round.

    The first block of each arm warms caches, allocators and step-sampling controllers, and is kept apart. Attaching and
    detaching are not timed; closing a sample is part of the step.
    """
    blocks = {name: Blocks() for name in arms}
    for name, arm in arms.items():
        blocks[name].warm = _block(arm, steps, device)[0]
    before = {name: _counted(arm) for name, arm in arms.items()}
    names = list(arms)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds, peak = _block(arms[name], steps, device)
            blocks[name].seconds.append(seconds)
            blocks[name].peak = max(blocks[name].peak, peak)
    for name, arm in arms.items():
        seen, passed = (now - then for now, then in zip(_counted(arm), before[name], strict=True))
        blocks[name].observed = seen / passed if passed else 1.0
    return blocks


def _block(arm: Arm, steps: int, device: torch.device) -> tuple[float, int]:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with arm:
        begin = time.perf_counter()
        for _ in range(steps):
            arm()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds / steps, torch.cuda.max_memory_allocated() if cuda else 0


def _counted(arm: Arm) -> tuple[int, int]:
    """Steps observed, and steps passed, so far."""
    return (arm.observer.samples, arm.observer.steps) if isinstance(arm, Observed) else (0, 0)
