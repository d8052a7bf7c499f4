from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import killed_worker
import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import texts
from tinyonn_lib.lm.judge import bits_per_byte
from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.pretrain import layout as layouts
from tinyonn_lib.pretrain import train
from tinyonn_lib.pretrain.mtp import MTPHead
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.train import pretrain, pretrain_each

TEXTS = [f"the cat number {i} sat on the mat, and the dog ate the hat of Größe {i % 7}." for i in range(400)]
TOKENIZER = train_bpe(TEXTS, 300)
BLOCKS = texts.pack(texts.encode(TEXTS, TOKENIZER, None), 32, 0, seed=0)


def test_pretraining_learns_and_beats_the_start(tiny: Callable[..., Any]) -> None:
    model = tiny()
    before = bits_per_byte(model, TOKENIZER, TEXTS[:20])
    history = pretrain(BLOCKS, model, tokens=40 * 16 * 32, shards=2)
    assert len(history) == 40
    assert not model.training
    assert history["tokens"].iloc[-1] == 40 * 16 * 32
    assert bits_per_byte(model, TOKENIZER, TEXTS[:20]) < 0.5 * before


def test_budget_by_seconds_keeps_its_steps(tiny: Callable[..., Any], tmp_path: Path) -> None:
    runs = [
        pretrain(BLOCKS, tiny(), Recipe(batch=4), seconds=1.0, shards=1, checkpoint=tmp_path / "c.pt") for _ in range(2)
    ]
    assert len(runs[0]) == len(runs[1]) >= 1  # the second call finds steps and result of the first


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        (torch.zeros(3, 1, dtype=torch.long), {}),
        (torch.full((3, 8), 300), {}),
        (torch.zeros(3, 64, dtype=torch.long), {}),
        (BLOCKS, {"tokens": 0}),
        (BLOCKS, {"seconds": -1.0}),
        (BLOCKS, {"recipe": Recipe(precision="float8")}),  # type: ignore[arg-type]
        (BLOCKS, {"recipe": Recipe(mtp=0.3)}),
    ],
)
def test_refuses(tiny: Callable[..., Any], blocks: torch.Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(BenchError):
        pretrain(blocks, tiny(), **options)


def test_diverging_names_the_step(tiny: Callable[..., Any]) -> None:
    with pytest.raises(BenchError, match=r"step .*learning rate"):
        pretrain(BLOCKS, tiny(), Recipe(lr_other=math.inf, warmup_steps=0), tokens=30 * 512, shards=1)


def test_killed_while_saving_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    """An MoE with multi-token prediction, document masks and a growing batch; SIGKILL amid the fourth checkpoint."""
    whole, expected = killed_worker.train(tmp_path / "whole.pt")
    child = subprocess.run(
        [sys.executable, killed_worker.__file__, str(tmp_path / "killed.pt")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL
    timing: dict[str, float] = {}
    history, weights = killed_worker.train(tmp_path / "killed.pt", timing)
    assert timing["resumed_from"] == 3 < len(history)
    assert history["tokens"].diff().nunique() > 1  # the kill was amid the ramp
    pd.testing.assert_frame_equal(history, whole, check_exact=True)
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    assert weights.keys() == expected.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "killed.pt"}


def test_a_checkpoint_of_another_recipe_or_order_is_not_used(tiny: Callable[..., Any], tmp_path: Path) -> None:
    timing: dict[str, float] = {}
    common: dict[str, Any] = {"tokens": 3 * 4 * 32, "shards": 1, "checkpoint": tmp_path / "c.pt", "timing": timing}
    first = pretrain(BLOCKS, tiny(), Recipe(batch=4), **common)
    again = pretrain(BLOCKS, tiny(), Recipe(batch=4), **common)
    assert timing["resumed_from"] == 3
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    for change in ({"recipe": Recipe(batch=4, momentum=0.5)}, {"recipe": Recipe(batch=4), "seed": 1}):
        pretrain(BLOCKS, tiny(), **change, **common)
        assert timing["resumed_from"] == 0


def test_another_budget_in_seconds_is_measured_anew(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes a second a look: 6 steps a second and 2 seconds of trial, so (seconds − 2) · 6 steps."""
    now = iter(range(1000))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(now)))

    def steps(**change: Any) -> int:
        given: dict[str, Any] = {"recipe": Recipe(batch=4), "seconds": 3.0} | change
        return len(pretrain(BLOCKS, tiny(), shards=1, checkpoint=tmp_path / "c.pt", **given))

    looks = [steps(), next(now), steps(), next(now), steps(seconds=4.0), steps(recipe=Recipe(batch=2), seconds=4.0)]
    assert looks[::2] == [6, 6, 12]
    assert looks[3] == looks[1] + 1  # nothing was measured the second time
    assert looks[5] == 12
    (tmp_path / "c.pt.steps").unlink()
    assert steps(seconds=0.5) == 1  # at least a step


@pytest.mark.parametrize("layout", ["documents", "padded"])
def test_other_layouts_learn_and_their_padding_costs(tiny: Callable[..., Any], layout: layouts.Layout) -> None:
    ids = texts.encode(TEXTS, TOKENIZER, None)
    rows = layouts.lay(ids, 32, eos=0, pad=1, layout=layout)
    recipe, model = Recipe(layout=layout, precision="float32"), tiny()
    history = pretrain(rows, model, recipe, tokens=20 * 16 * 32, shards=2)
    assert history["tokens"].tolist() == [16 * 32 * (step + 1) for step in range(20)]
    assert history["loss"].iloc[-3:].mean() < 0.7 * history["loss"].iloc[0]
    assert history["loss"].iloc[0] == pytest.approx(math.log(300), rel=0.15)  # nats a token, padding not among them


def test_each_model_has_its_budget_its_head_and_its_checkpoint(tiny: Callable[..., Any], tmp_path: Path) -> None:
    models = {"large": (tiny(), 4 * 4 * 32), "small": (tiny(width=32), 2 * 4 * 32)}
    heads = {name: MTPHead(model) for name, (model, _) in models.items()}
    before = {name: head.projection.weight.detach().clone() for name, head in heads.items()}
    told: list[tuple[str, str]] = []

    def progress(name: str, unit: str) -> Callable[..., None]:
        told.append((name, unit))
        return lambda *news: None

    history = pretrain_each(
        models, BLOCKS, tmp_path, progress, device="cpu", heads=heads, recipe=Recipe(batch=4, mtp=0.3), shards=1,
        every_seconds=1e9,
    )  # fmt: skip
    assert history.groupby("model", sort=False)["step"].max().to_dict() == {"large": 4, "small": 2}
    assert told == [("large", "steps"), ("small", "steps")]
    assert {path.name for path in tmp_path.iterdir()} == {"large.pt", "small.pt"}
    assert all(not torch.equal(before[name], head.projection.weight) for name, head in heads.items())
    with pytest.raises(BenchError, match=r"weighs MTP with 0\.3: give a head"):
        pretrain_each(models, BLOCKS, tmp_path, progress, device="cpu", recipe=Recipe(mtp=0.3))
    with pytest.raises(BenchError, match="weighs MTP with 0: give a head"):
        pretrain_each(models, BLOCKS, tmp_path, progress, device="cpu", heads=heads)


def test_afterwards_the_model_computes_as_before(tiny: Callable[..., Any]) -> None:
    """Kernels and mode are put back, also after a failure."""
    model = tiny()
    kernel = model.config._attn_implementation
    pretrain(BLOCKS, model, Recipe(batch=2), tokens=64, shards=1)
    assert (model.config._attn_implementation, model.training) == (kernel, False)
    with pytest.raises(BenchError, match="not finite"):
        pretrain(BLOCKS, model, Recipe(lr_other=math.inf, warmup_steps=0), tokens=30 * 512, shards=1)
    assert (model.config._attn_implementation, model.training) == (kernel, False)
