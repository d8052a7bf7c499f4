"""The document's benchmark table, measured: linear and every variant of the bottleneck, each at its own best rate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.data import Caches
from tinyonn_lib.kv.stack import Schedule
from tinyonn_lib.kv.variants import RIDGE, SHAPES, Shape, Task
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.threads import default_shards, threads
from tinyonn_lib.progress import Progress

CLOCKED = ["seconds_per_step", "slower"]
"""Columns that another run measures anew: no part of an artefact."""

REACHED = 1.05
"""Steps are counted until the validation loss is at most this many times that of ridge."""


@dataclass(frozen=True)
class Sweep:
    """What `sweep` measured.

    Attributes:
        table: one row per configuration.
        curves: validation loss, mean over seeds: `configuration, lr, best, step, validation`.
        references: the student's own cache, a zero cache and ridge on the same inputs:
            `cache, validation, heldout, nll`.
        target: validation loss to which the steps are counted.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    references: pd.DataFrame
    target: float


def sweep(
    caches: Caches,
    validation: Caches,
    held: Caches,
    plan: Schedule | None = None,
    *,
    texts: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Train and judge 57 configurations of the document's projector (003, §Benchmark): shared adapters, no dropout.

    Dropout is 0 because random zeros could not be the same for a configuration alone and among others. Losses are mean
    squared errors, keys plus values, as `compute_kv_loss`. Each configuration is judged at the learning rate with the
    least validation loss, mean over seeds; held-out texts choose nothing.

    Args:
        caches: of training texts; their first teacher is the one that is projected.
        validation, held: of other texts of the same models.
        texts: held-out texts for the student's loss, which takes about half of the time; None: all.
        folder: for what is finished; another call with the same data and settings goes on from there.
        progress: in shapes; the last is the timing.

    Returns:
        The table has `configuration, kind, mlp_ratio, layernorm, activation, init, dropout, steps, batch, seeds`;
        `parameters` (keys and values), `lr`, `lr_at_edge` (of three or more), `initial_loss`, `validation` (final),
        `heldout`, `heldout_spread` (standard deviation over seeds, NaN with one), `steps_to_target` (mean curve; NaN:
        never), `dead_units` (share, keys and values), `nll` (nats per held-out token of the student with the projected
        cache), `nll_spread`, `seconds_per_step` (alone), `slower` (ratio to linear), `memory` (bytes to train it).

    Raises:
        BenchError: impossible settings, or caches that are not finite.
    """
    if texts is not None and texts < 1:
        raise BenchError(f"texts is {texts}: give a whole number from 1, or none for all.")
    task = Task(caches, validation, held, plan or Schedule(), min(texts or len(held), len(held)))
    key, shards, total = task.key(), default_shards(caches.student.device), len(SHAPES) + 1
    references = pd.DataFrame(_kept(folder, f"{key} references", task.references))
    target = REACHED * float(references.loc[references["cache"] == RIDGE, "validation"].item())

    def finished(shape: Shape) -> Any:
        return _kept(folder, f"{key} {shape}", lambda: task.measured(shape, target))

    found: list[Any] = []
    with threads(shards) as each:
        for first in range(0, len(SHAPES), shards):
            if progress is not None:
                progress(first, total, SHAPES[first].label("all inits"))
            found += each(finished, SHAPES[first : first + shards])
    if progress is not None:
        progress(len(SHAPES), total, "steps of each configuration alone")
    costs = _kept(folder, f"{key} alone", task.alone)
    rows = [row | cost for part, cost in zip(found, costs, strict=True) for row in part["rows"]]
    if progress is not None:
        progress(total, total, "")
    return Sweep(pd.DataFrame(rows), pd.DataFrame([r for part in found for r in part["curves"]]), references, target)


def _kept(folder: Path | None, key: str, measure: Callable[[], Any]) -> Any:
    """What `measure` says, from `folder` if it is there already."""
    if folder is None:
        return measure()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    found = resume.read_json(path)
    if found is None:
        found = measure()
        resume.write_json(path, found)
    return found
