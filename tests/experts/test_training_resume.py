"""A training goes on where an exception, Ctrl-C or SIGKILL ended it, and only with its own checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn_lib.experts.training import Recipe, train

from .conftest import Batch, Tiny
from .trainings import RECIPES, STEPS, Stop, begin, dead, job, same, shares_of, until


@pytest.mark.parametrize("name", RECIPES)
def test_after_an_interruption_it_goes_on_to_the_bit(
    tiny: Tiny, batch: Batch, validation: Tensor, tmp_path: Path, name: str
) -> None:
    part = tiny.part()
    common: dict[str, Any] = {"k": 2, "steps": STEPS, "recipe": RECIPES[name]}
    whole = train(tiny.model, part, dead(tiny, part), batch, validation, **common)
    assert shares_of(whole.usage, 0, 1)[0] == 0
    assert shares_of(whole.usage, 0, 1)[-1] > 0.05  # so something was revived on the way
    file = tmp_path / "training.pt"
    # Before and after a look (one every 2 steps, or 2 and 1), early and late, in the second stage and at its start.
    for stop, calls in ((1, 1), (2, 1), (3, 1), (11, 1), (12, 2 if name == "experts" else 1), (15, 1), (19, 1)):
        options = {**common, "checkpoint": file, "every_seconds": 0.0}
        with pytest.raises(Stop):
            train(tiny.model, part, dead(tiny, part), until(batch, stop, calls), validation, **options)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.model.modules())
    for _ in range(2):  # the second time everything is in the checkpoint
        timing: dict[str, float] = {}
        found = train(tiny.model, part, dead(tiny, part), batch, validation, **common, checkpoint=file, timing=timing)
        assert timing["resumed_from"] >= (7 if name == "experts" else 19)
        same(found, whole)


def test_an_exception_in_the_progress_bar_loses_nothing(
    tiny: Tiny, batch: Batch, validation: Tensor, tmp_path: Path
) -> None:
    part = tiny.part()
    common: dict[str, Any] = {"k": 2, "steps": 12, "recipe": RECIPES["experts"], "shards": 2}
    whole = train(tiny.model, part, dead(tiny, part), batch, validation, **common)

    def at_the_end(done: int, steps: int, note: str) -> None:
        if done == steps:
            raise KeyboardInterrupt

    file, notes = tmp_path / "training.pt", []
    with pytest.raises(KeyboardInterrupt):
        train(tiny.model, part, dead(tiny, part), batch, validation, **common, checkpoint=file, progress=at_the_end)
    found = train(
        tiny.model, part, dead(tiny, part), batch, validation, **common,
        checkpoint=file, progress=lambda done, steps, note: notes.append((done, note)),
    )  # fmt: skip
    assert notes[0] == (7, "going on from the last checkpoint")
    same(found, whole)


def test_a_checkpoint_of_something_else_is_not_gone_on_with(
    tiny: Tiny, batch: Batch, validation: Tensor, tmp_path: Path
) -> None:
    part, other = tiny.part(seed=0), tiny.part(seed=1)
    assert not torch.equal(part.experts[0], other.experts[0])
    base: dict[str, Any] = {"partition": part, "k": 2, "recipe": Recipe()}
    changes: dict[str, dict[str, Any]] = {
        "k": {"k": 3}, "partition": {"partition": other}, "recipe": {"recipe": Recipe(balance=0.1)},
    }  # fmt: skip

    def run(file: Path, **options: Any) -> float:
        timing: dict[str, float] = {}
        given: dict[str, Any] = base | options
        partition = given.pop("partition")
        made = begin(tiny, part)  # random rows: the same over every partition
        train(tiny.model, partition, made, batch, validation, steps=3, checkpoint=file, timing=timing, **given)
        return timing["resumed_from"]

    resumed = {}
    for name, change in changes.items():
        file = tmp_path / f"{name}.pt"
        assert run(file) == 0
        assert run(file) == 3
        resumed[name] = run(file, **change)
    assert resumed == dict.fromkeys(changes, 0)


@pytest.mark.parametrize(("kind", "stop"), [("experts", 16), ("variable", 9)])
def test_sigkill_loses_nothing(kind: str, stop: int, tmp_path: Path) -> None:
    file = tmp_path / "training.pt"
    code = "import sys, pathlib; from tests.experts.trainings import job; "
    code += "job(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))"
    command = [sys.executable, "-c", code, kind, str(file), str(stop)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert file.exists()
    assert file.with_name("training.pt.experts").exists() == (kind == "experts")
    found, whole = job(kind, file), job(kind, None)
    assert shares_of(whole.usage, 0, 2)[0] == 0
    assert shares_of(whole.usage, 0, 2)[-1] > 0.05
    same(found, whole, exactly=False)
