"""What observing costs a training step: the observer, the documents' naive scanner, torchlens, nnsight, wandb.watch.

    python benchmarks/scan_overhead.py [--json PATH] [--quick]

All run the same step in turns (see `turns`), with and without, and every number is a ratio to the bare step of the same
round. "bare again" is the bare step compared with itself: what differs from 1 there is noise. Ratios of single steps
where every step is observed; of long blocks where a controller chooses which ones, or most steps would look free.

The FLOP bound of an exact step is 1 + (FLOP of the norms) / (FLOP of the bare step), see `steps`. Beside the ratio to
that bound stands `x_flop`: the time that observing adds over the time its FLOP would take at the bare step's speed.
Statistics of activations and reading `.grad` are bound by memory, not by FLOP, so it is large where the FLOP are few.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from harness import Bar, Row, main
from steps import MODES, Size, Step, build, extra_flops, step_flops
from turns import Blocks, Observed, in_turns

from tinyonn_lib.scan.server import private_server

BUDGET = 0.05
SLACK = 1.25  # of the FLOP bound


@dataclass(frozen=True)
class Variant:
    """One way to use the observer."""

    targets: str
    rows: bool
    budget: float
    collects: str


_TENSOR = "|X| and |dL/dW| of every linear"
_NEURON = "9 sums per FFN neuron, gradient norms of rows and columns among them"
VARIANTS = {
    "tensor, every step": Variant("linears", False, 0.0, _TENSOR),
    "tensor, 5 % budget": Variant("linears", False, BUDGET, _TENSOR),
    "neuron, every step": Variant("neurons", True, 0.0, _NEURON),
    "neuron, 5 % budget": Variant("neurons", True, BUDGET, _NEURON),
    "rows, every step": Variant("linears", True, 0.0, "per row of every linear |y|, top 5 %, gradient norm"),
}


@dataclass(frozen=True)
class Plan:
    """How much to measure at one length.

    Attributes:
        rounds: of single steps, for the exact variants.
        budgeted: rounds of the budgeted variants.
        block: steps of such a round, enough for a few observed ones, with frozen and with trainable weights.
        others: rounds of single steps with the peers; 0 for none.
        slow: the same with the slow ones among them.
    """

    rounds: int
    budgeted: int
    block: tuple[int, int]
    others: int = 0
    slow: int = 0


FULL = {128: Plan(15, 4, (30, 16), 5, 2), 512: Plan(7, 3, (16, 8), 2), 2048: Plan(3, 2, (8, 4))}
HALF = {512: Plan(3, 2, (8, 4))}
QUICK = {32: Plan(9, 2, (16, 8), 2, 1), 128: Plan(5, 2, (12, 6))}
SMALL = Size(width=256, ffn=768, heads=4, kv_heads=2)


def run(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """The whole benchmark; rows go to stderr as they come."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for row in measure(SMALL, QUICK, {}, device) if args.quick else measure(Size(), FULL, HALF, device):
        found = f"{row['ratio']:.3f}, {row['observed']:.0%} observed" if "ratio" in row else row["collects"]
        print(f"{row['weights']}, T = {row['tokens']}, {row['variant']}: {found}", file=sys.stderr)
        rows.append(row)
    return rows, bars(rows)


def measure(size: Size, plans: Mapping[int, Plan], half: Mapping[int, Plan], device: torch.device) -> Iterator[Row]:
    """One row per way of looking, length, and kind of weights.

    Args:
        size: of the model.
        plans: by length.
        half: the same for frozen weights in bf16. No bar is about those: FLOP in bf16 and in fp32 do not compare.
        device: where to run.
    """
    model = build(size, device)
    for mode in MODES:
        for tokens, plan in plans.items():
            yield from _ours(size, Step(model, mode, tokens), mode, plan, device)
            yield from _peers(size, mode, tokens, plan, device)
    for tokens, plan in half.items():
        step = Step(build(size, device).to(torch.bfloat16), "frozen", tokens)
        for row in _ours(size, step, "frozen", plan, device):
            yield row | {"weights": "bf16"}


def bars(rows: list[Row]) -> list[Bar]:
    """The claims, each at the length that is worst for it."""
    found = []
    for mode in MODES:
        for name, variant in VARIANTS.items():
            mine = [row for row in rows if row["variant"] == name and row["weights"] == mode]
            if variant.budget or not variant.rows:
                found.append(_bar(f"{name}, {mode} weights: step time with / without", mine, "ratio", 1 + BUDGET))
            if not variant.budget:
                found.append(_bar(f"{name}, {mode} weights: step time / FLOP bound", mine, "of_bound", SLACK))
    return found


def _ours(size: Size, step: Step, mode: str, plan: Plan, device: torch.device) -> Iterator[Row]:
    tokens, block = step.ids.numel(), plan.block[MODES.index(mode)]
    arms = {name: Observed(step, v.targets, v.rows, v.budget) for name, v in VARIANTS.items()}
    every = {name: arm for name, arm in arms.items() if not VARIANTS[name].budget}
    sampled = {name: arm for name, arm in arms.items() if VARIANTS[name].budget}
    bare = peers.Arm(step)
    exact = in_turns({"bare": bare, "bare again": bare, **every}, plan.rounds, 1, device)
    blocks = in_turns({"bare": bare, **sampled}, plan.budgeted, block, device)
    yield _row("bare again", mode, tokens, exact, 1, "nothing; how far from 1 noise takes it")
    for name, variant in VARIANTS.items():
        if variant.budget:
            yield _row(name, mode, tokens, blocks, block, variant.collects)
            continue
        row = _row(name, mode, tokens, exact, 1, variant.collects)
        extra = extra_flops(size, tokens, mode, variant.targets)[0] / step_flops(size, tokens, mode)
        row["flop_bound"], row["of_bound"] = 1 + extra, row["ratio"] / (1 + extra)
        row["x_flop"] = (row["ratio"] - 1) / extra
        yield row


def _peers(size: Size, mode: str, tokens: int, plan: Plan, device: torch.device) -> Iterator[Row]:
    """Each on a model of its own: some leave traces on it."""
    with _redis() as client:
        for name, collects in peers.COLLECTS.items():
            rounds = plan.slow if name in peers.SLOW else plan.others
            if not rounds:
                continue
            why = peers.missing(name)
            if mode == "frozen" and name in peers.TRAINABLE_ONLY:
                why = "nothing to see: it reads gradients of weights"
            if why:
                yield {"weights": mode, "tokens": tokens, "variant": name, "collects": why}
                continue
            bare, mine = (Step(build(size, device), mode, tokens) for _ in range(2))
            found = in_turns({"bare": peers.Arm(bare), name: peers.arm(name, mine, client)}, rounds, 1, device)
            yield _row(name, mode, tokens, found, 1, collects + peers.version(name))


@contextmanager
def _redis() -> Iterator[Any]:
    import redis

    with tempfile.TemporaryDirectory() as folder, private_server(Path(folder)) as server:
        yield redis.Redis.from_url(server.url)


def _row(name: str, mode: str, tokens: int, found: Mapping[str, Blocks], steps: int, collects: str) -> Row:
    bare, mine = found["bare"], found[name]
    ratio, low, high = mine.ratio(bare)
    plain = median(bare.seconds)
    row = {
        "weights": mode, "tokens": tokens, "variant": name, "bare_ms": 1000 * plain, "ratio": ratio, "low": low,
        "high": high, "flop_bound": math.nan, "of_bound": math.nan, "x_flop": math.nan, "observed": mine.observed,
        "rounds": len(mine.seconds), "steps": steps, "warm_up": mine.warm / plain,
    }  # fmt: skip
    memory = {"bare_mib": bare.peak / 2**20, "peak_mib": mine.peak / 2**20} if mine.peak else {}
    return row | memory | {"collects": collects}


def _bar(name: str, rows: list[Row], key: str, bound: float) -> Bar:
    worst = max(rows, key=lambda row: row[key])
    return Bar(f"{name}, at the worst of {len(rows)} lengths, T = {worst['tokens']}", worst[key], bound, "lower")


if __name__ == "__main__":
    sys.exit(main(__doc__, "scan_overhead", run))
