"""Routers trained by two processes: the same ones as by one process, after a kill, too."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import together, training
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.together import Batches, Together
from tinyonn_lib.experts.training import Recipe, Trained
from tinyonn_lib.lm import samples, worker

from .conftest import Tiny, written
from .trainings import begin, dead, pruning

KILL = "TINYONN_TEST_KILL"
"""Step of `fit` at which the first process kills itself."""

RECIPES = {
    "ddp": Recipe(variable=True, lr_experts=2e-4, unfreeze=0.4, balance=0.01, revive=True),
    "zero2": Recipe(variable=True, lr_experts=2e-4, unfreeze=0.4, balance=0.01),
}


def take_part(path: Path) -> None:
    """`together.take_part`, and maybe a kill."""
    if KILL in os.environ and os.environ["RANK"] == "0":
        whole = Batches.__call__

        def killing(self: Batches, step: int) -> Tensor:
            if step == int(os.environ[KILL]):
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, step)

        Batches.__call__ = killing  # type: ignore[method-assign]
    together.take_part(path)


@pytest.fixture(scope="module")
def home(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model; workers find this module and have a thread each."""
    folder = tmp_path_factory.mktemp("home")
    tiny.model.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(together, "_MODULE", "tests.experts.test_together")
        yield folder


@pytest.fixture(scope="module")
def texts(tiny: Tiny) -> Tensor:
    return written(tiny.model, 120, 13, seed=1)


def start(tiny: Tiny, part: Partition) -> Any:
    """One expert is never chosen, and the weights lie in memory as ridge regression leaves them."""
    made = dead(tiny, part)
    for each in made:
        each.weight.data = each.weight.data.T.contiguous().T
    return made


def two(home: Path, strategy: str) -> Together:
    if strategy != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'tinyonn[train]'")
    return Together(str(home / "model"), 2, strategy)


def same(one: Trained, other: Trained) -> None:
    """Two processes' and one's, up to rounding: which grows when experts train, for Adam divides by small gradients."""
    assert one.history.dtypes.equals(other.history.dtypes)
    # The looks choose hard: a token at the border may fall on the other side.
    rounding = {"loss": 1e-5, "held_out": 1e-3, "grad_norm": 1e-3}
    exact = one.history.columns.difference(list(rounding))
    pd.testing.assert_frame_equal(one.history[exact], other.history[exact], rtol=1e-12)
    for column, atol in rounding.items():
        pd.testing.assert_series_equal(one.history[column], other.history[column], rtol=0, atol=atol)
    pd.testing.assert_frame_equal(one.usage, other.usage, check_dtype=False, rtol=0, atol=5e-3)
    for first, second in zip((one.model, *one.layers), (other.model, *other.layers), strict=True):
        for key, value in first.state_dict().items():
            expected = second.state_dict()[key]
            assert value.shape == expected.shape
            atol = (
                1e-2 if key == "threshold" else 2e-4
            )  # a threshold lies between two tokens' scores, whichever they are
            torch.testing.assert_close(value, expected, rtol=0, atol=atol, equal_nan=True, msg=key)


@pytest.mark.parametrize(("strategy", "kill"), [("ddp", 7), ("zero2", 16)])
def test_two_learn_what_one_does_even_after_a_kill(
    tiny: Tiny, home: Path, texts: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, kill: int
) -> None:
    by, part, batch = two(home, strategy), tiny.part(), Batches(texts[40:], 12, 3)
    common: dict[str, Any] = {"k": 2, "steps": 20, "recipe": RECIPES[strategy], "accumulate": 2}
    alone = training.train(tiny.model, part, start(tiny, part), batch, texts[:40], shards=2, **common)
    assert alone.usage["dead"].any()
    common |= {"checkpoint": tmp_path / "training.pt", "every_seconds": 0.0}
    monkeypatch.setenv(KILL, str(kill))
    with pytest.raises(
        BenchError, match="^a training process was killed by signal 9 .* go on from the last checkpoint$"
    ):
        by.train(tiny.model, part, start(tiny, part), batch, texts[:40], **common)
    monkeypatch.delenv(KILL)
    made, told = start(tiny, part), list[tuple[int, int, str]]()
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    found = by.train(tiny.model, part, made, batch, texts[:40], progress=lambda *note: told.append(note), **common)
    done, stage = (7, 12) if kill < 12 else (12, 12)  # the first stage's steps, all of them before the second
    assert told[0] == (done, stage, "going on from the last checkpoint")
    assert ((kill - 12, 8, "going on from the last checkpoint") in told) == (kill > 12)
    same(found, alone)
    assert all(a is b for a, b in zip(found.routers, made, strict=True))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(5))
    for one, other in zip(found.layers, alone.layers, strict=True):
        assert (one.hard(x)[0] == other.hard(x)[0]).float().mean() > 0.99
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())
    assert not any(p.requires_grad for p in (*tiny.model.parameters(), *found.model.parameters()))
    assert not list(tmp_path.glob("together-*"))


def test_the_control_learns_what_it_does_alone(tiny: Tiny, home: Path, texts: Tensor) -> None:
    by, (keep, bias), batch = two(home, "zero2"), pruning(tiny), Batches(texts[40:], 12, 3)
    common: dict[str, Any] = {"steps": 10, "recipe": Recipe(lr=0.02)}
    alone = training.train_pruned(tiny.model, keep, bias, batch, texts[:40], **common)
    found = by.train_pruned(tiny.model, keep, bias, batch, texts[:40], **common)
    same(found, alone)
    assert found.model is tiny.model
    assert found.usage.columns.equals(alone.usage.columns)


def test_batches_are_those_of_shuffled() -> None:
    rows = torch.arange(30).view(10, 3)
    batches, order = Batches(rows, 4, 7), samples.shuffled(rows, 4, 7)
    assert all(torch.equal(batches(step), order(step)) for step in (5, 0, 2))


def test_what_cannot_be_trained_together_is_one_line(
    tiny: Tiny, home: Path, texts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, usual = tiny.part(), two(home, "ddp")

    def refused(line: str, by: Together, size: int = 12, **changes: Any) -> None:
        batch, recipe = Batches(texts, size, 0), Recipe(**changes)
        with pytest.raises(BenchError, match=line) as caught:
            by.train(tiny.model, part, begin(tiny, part), batch, texts[:4], k=2, steps=1, recipe=recipe)
        assert "\n" not in str(caught.value)

    refused("^A batch of 12 rows cannot be cut into equal pieces .* on 16 processes", replace(usual, processes=16))
    refused("^A batch of 3 rows cannot be cut", usual, size=3)
    refused("^Unknown strategy 'zero3': choose one of ddp, zero2", replace(usual, strategy="zero3"))
    refused("^revive=true moves routers .* choose strategy=ddp", replace(usual, strategy="zero2"), revive=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused("^2 processes train on GPUs where there are any: choose device=auto", usual)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"^DeepSpeed is not installed: pip install 'tinyonn\[train\]'", replace(usual, strategy="zero2"))


if __name__ == "__main__":
    sys.exit(worker.run(take_part))
