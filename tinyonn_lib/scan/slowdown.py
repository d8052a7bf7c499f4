"""What watching costs here and now: the same steps with and without an observer, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.scan.audit import input_embedding
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.scan import device_of, frozen_eval, next_token_loss


def slowdown(
    model: nn.Module,
    samples: Sequence[Sequence[int]],
    *,
    targets: str | Sequence[str] = "neurons",
    rows: bool = True,
    budget: float = 0.05,
) -> pd.DataFrame:
    """Time of forward and backward of the frozen model, watched and not watched.

    Every step: samples in pairs, first without and then with the observer, and the median of the pairs' ratios. With a
    budget: all samples in a row, because only some are watched, and the ratio of the sums, both ways in turns.

    Args:
        model: causal LM.
        samples: token ids per sample; a few dozen are enough, and what the budget needs to find its pace.
        targets, rows: what is watched, as in `Observer`.
        budget: slowdown allowed.

    Returns:
        One row per way: `watched` ("nothing", "every step", "on a budget of ..."), `ms` (median step), `ratio` (to
        nothing), `observed` (share of the steps). A short measurement on a machine that does other things as well:
        for claims see `benchmarks/scan_overhead.py`.
    """
    device = device_of(model)
    ids = [torch.tensor([sample], device=device) for sample in samples]
    with frozen_eval(model):
        keep = (input_embedding(model) or model).register_forward_hook(_needs_graph)
        try:
            exact = Observer(model, targets, rows=rows)
            sparse = Observer(model, targets, rows=rows, budget=budget)
            _timed(model, ids[:2], None)  # caches
            pairs = []
            for one in ids:
                bare = _timed(model, [one], None)[0]
                with exact:
                    pairs.append((bare, _timed(model, [one], exact.end_sample)[0]))
            with sparse:  # the controller finds its pace
                _timed(model, ids, sparse.end_sample)
            found = sparse.samples
            plain, watched = [], []
            for _ in range(2):
                plain += _timed(model, ids, None)
                with sparse:
                    watched += _timed(model, ids, sparse.end_sample)
            share = (sparse.samples - found) / len(watched)
        finally:
            keep.remove()
    ways: list[tuple[str, list[float], float, float]] = [
        ("nothing", [bare for bare, _ in pairs], 1.0, 0.0),
        ("every step", [seen for _, seen in pairs], median(seen / bare for bare, seen in pairs), 1.0),
        (f"on a budget of {budget:.0%}", watched, sum(watched) / sum(plain), share),
    ]
    table = [(name, 1000 * median(times), ratio, part) for name, times, ratio, part in ways]
    return pd.DataFrame(table, columns=["watched", "ms", "ratio", "observed"])


def _timed(model: nn.Module, ids: Sequence[Tensor], close: Callable[[], None] | None) -> list[float]:
    times = []
    for one in ids:
        begin = time.perf_counter()
        next_token_loss(model, one).backward()
        if close is not None:
            close()
        if one.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times


def _needs_graph(module: nn.Module, args: object, output: Tensor) -> None:
    """A frozen model has no backward at all; training an adapter or a prompt would give it one."""
    if isinstance(output, Tensor) and not output.requires_grad and torch.is_grad_enabled():
        output.requires_grad_(True)
