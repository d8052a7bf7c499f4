from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.record import HeldOut, spikes
from tinyonn_lib.lm.schedule import lr_factor
from tinyonn_lib.lm.train import fit


def regression(seed: int = 0) -> tuple[nn.Module, Any, Any]:
    """A model with dropout and batch statistics, its loss and its batches: everything that resuming must restore."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))

    def batch(step: int) -> dict[str, Tensor]:
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
        return {"x": x, "y": x[:, :1] - x[:, 1:2]}

    return model, lambda data: (model(data["x"]) - data["y"]).square().mean(), batch


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


def test_learns_and_reports() -> None:
    model, loss, batch = regression()
    seen: list[tuple[int, int, str]] = []
    timing: dict[str, float] = {}
    history = fit(model, loss, batch, optimizers(model), steps=60, warmup_steps=5, timing=timing,
                  progress=lambda *news: seen.append(news))  # fmt: skip
    assert list(history.columns) == ["step", "tokens", "loss", "lr", "grad_norm", "spike"]
    assert history["step"].tolist() == list(range(1, 61))
    assert history["tokens"].iloc[-1] == 60 * 12 * 8
    assert history["loss"].tail(10).mean() < history["loss"].head(10).mean()
    assert seen[-1][:2] == (60, 60)
    assert timing["tokens_per_second"] > 0
    assert all(p.grad is None for p in model.parameters())


def test_one_step_is_plain_gradient_descent() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    fit([weight], lambda x: (weight * x).sum(), lambda step: torch.tensor([3.0, 4.0]),
        torch.optim.SGD([weight], lr=0.1), steps=1, schedule="constant", clip=1.0)  # fmt: skip
    torch.testing.assert_close(weight.detach(), torch.tensor([1 - 0.1 * 0.6, 2 - 0.1 * 0.8], dtype=torch.float64))


def bounded(model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    return model(part[0]).tanh().square().mean()


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_give_the_gradient_of_the_whole_batch(shards: int) -> None:
    results = []
    x = torch.randn(7, 4, dtype=torch.float64)  # 7 rows: uneven shards
    for count in (1, shards):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        history = fit(model, partial(bounded, model), lambda step: (x, x),
                      torch.optim.SGD(model.parameters(), lr=0.5), steps=5, shards=count)  # fmt: skip
        results.append((model.weight.detach(), history))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-14)
    pd.testing.assert_frame_equal(results[0][1], results[1][1])


def test_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    model, loss, batch = regression()
    fit(model, loss, batch, optimizers(model), steps=2, shards=2)
    assert torch.get_num_threads() == before


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 7, 29])
def test_resume_is_exact(tmp_path: Path, stop_at: int) -> None:
    def train(checkpoint: Path | None, stop: int | None) -> tuple[nn.Module, pd.DataFrame]:
        model, loss, batch = regression()
        torch.manual_seed(5)  # dropout's state at the start

        def interrupted(step: int) -> Any:
            if step == stop:
                raise Stop
            return batch(step)

        history = fit(model, loss, interrupted, optimizers(model), steps=30, warmup_steps=3, checkpoint=checkpoint,
                      every_seconds=0)  # fmt: skip
        return model, history

    whole, expected = train(None, None)
    with pytest.raises(Stop):
        train(tmp_path / "c.pt", stop_at)
    timing: dict[str, float] = {}
    model, history = train(tmp_path / "c.pt", None)
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    for (name, a), b in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    model, loss, batch = regression()  # a finished training is not done again
    torch.manual_seed(5)
    again = fit(
        model, loss, batch, optimizers(model), steps=30, warmup_steps=3, checkpoint=tmp_path / "c.pt", timing=timing
    )
    assert timing["resumed_from"] == 30
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


KILLED = """
import sys, time, pathlib, torch
torch.set_num_threads(1)
from tinyonn_lib.lm import models
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.train import pretrain
model = models.new_model(vocab_size=64, width=32, layers=1, ffn=64, head_dim=16, max_length=16)
blocks = torch.randint(0, 64, (40, 16), generator=torch.Generator().manual_seed(0))
slow = float(sys.argv[2])
def progress(done, total, note):
    if slow and done >= 10: time.sleep(60)  # hold still after a checkpoint, so that the kill hits a known place
history = pretrain(blocks, model, Recipe(batch=8), tokens=40 * 8 * 16, checkpoint=pathlib.Path(sys.argv[1]),
                   every_seconds=0.0 if slow else 60, progress=progress, shards=2)
total = sum(p.double().sum() for p in model.parameters())
print(history["loss"].sum().hex(), float(total).hex())
"""


def test_sigkill_and_resume_is_bit_identical(tmp_path: Path) -> None:
    def run(name: str, slow: int) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / name), str(slow)], text=True,
                                stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip

    child, whole = run("a.pt", 1), run("b.pt", 0)
    while not (tmp_path / "a.pt").exists() and child.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "a.pt").exists()
    resumed = run("a.pt", 0)
    answers = [process.communicate(timeout=600)[0] for process in (resumed, whole)]
    assert answers[0] == answers[1] != ""


def test_foreign_or_broken_checkpoints_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    timing: dict[str, float] = {}
    model, loss, batch = regression()
    fit(model, loss, batch, optimizers(model), steps=10, checkpoint=path)
    for change in ("steps", "seed", "tag", "broken"):
        model, loss, batch = regression(seed=1 if change == "seed" else 0)
        if change == "broken":
            path.write_bytes(path.read_bytes()[:500])
        steps, tag = 11 if change == "steps" else 10, "other" if change == "tag" else ""
        fit(model, loss, batch, optimizers(model), steps=steps, tag=tag, checkpoint=path, timing=timing)
        assert timing["resumed_from"] == 0, change


def test_unwritable_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, loss, batch = regression()
    with pytest.raises(BenchError, match="checkpoint"):
        fit(model, loss, batch, optimizers(model), steps=3, checkpoint=tmp_path / "file" / "c.pt")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_step(tmp_path: Path, bad: float) -> None:
    model, loss, batch = regression()
    calls = iter(range(1000))
    with pytest.raises(BenchError, match=r"not finite at step 8 .*learning rate"):
        fit(model, lambda data: loss(data) * (bad if next(calls) == 7 else 1.0), batch, optimizers(model), steps=40,
            checkpoint=tmp_path / "c.pt", every_seconds=0)  # fmt: skip
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["step"] == 7  # the broken step is never saved


def test_spikes_are_logged() -> None:
    weight, notes = nn.Parameter(torch.zeros(1)), list[str]()
    history = fit([weight], lambda x: (weight * x).sum(), lambda step: torch.tensor([100.0 if step == 20 else 1.0]),
                  torch.optim.SGD([weight], lr=0.1), steps=30,
                  progress=lambda *news: notes.append(news[2]))  # fmt: skip
    assert history.loc[history["spike"], "step"].tolist() == [21]
    assert history["grad_norm"].max() == 100.0
    assert notes[-1].endswith(", 1 spike, the last at step 21")
    assert spikes(history)[["step", "grad_norm"]].values.tolist() == [[21, 100.0]]


@pytest.mark.parametrize("shards", [1, 2])
def test_accumulated_pieces_give_the_gradient_of_the_whole_batch(shards: int) -> None:
    results, x = [], torch.randn(12, 4, dtype=torch.float64)
    for accumulate in (1, 3):
        torch.manual_seed(0)
        model, seen = nn.Linear(4, 3).double(), []

        def loss(part: tuple[Tensor, Tensor], model: nn.Module = model, seen: list[int] = seen) -> Tensor:
            seen.append(len(part[0]))
            return bounded(model, part)

        history = fit(model, loss, lambda step: (x, x), torch.optim.SGD(model.parameters(), lr=0.5), steps=5, clip=0.1,
                      shards=shards, accumulate=accumulate)  # fmt: skip
        assert set(seen) == {12 // shards // accumulate}
        results.append((model.weight.detach(), history))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-14)
    pd.testing.assert_frame_equal(results[0][1], results[1][1])


def test_a_batch_that_does_not_fall_into_equal_pieces() -> None:
    model, loss, batch = regression()
    with pytest.raises(BenchError, match=r"12 rows cannot be cut .* make it a multiple of 5"):
        fit(model, loss, batch, optimizers(model), steps=3, accumulate=5)


def test_bfloat16_is_for_the_loss_only() -> None:
    model, _, batch = regression()
    kinds = set()

    def loss(data: dict[str, Tensor]) -> Tensor:
        out = model(data["x"])
        kinds.add(out.dtype)
        return (out.float() - data["y"]).square().mean()

    for precision, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        fit(model, loss, batch, optimizers(model), steps=1, precision=precision)  # type: ignore[arg-type]
        assert kinds == {kind}
        kinds.clear()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


FALL_AND_RISE = [5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("stop_at", [None, 1, 13, 20])
def test_ends_early_with_the_best_weights(tmp_path: Path, stop_at: int | None) -> None:
    """Held-out losses as listed: the best look is the fourth, and three without a better one end the training."""

    def train(stop: int | None) -> tuple[pd.DataFrame, float]:
        weight, done = nn.Parameter(torch.zeros(1)), [0]

        def batch(step: int) -> Tensor:
            if step == stop:
                raise Stop
            done[0] = step + 1
            return torch.ones(1)

        looks = HeldOut(lambda: FALL_AND_RISE[done[0] // 3 - 1], every=3, patience=3)
        history = fit([weight], lambda x: (weight * x).sum(), batch, torch.optim.SGD([weight], lr=1.0), steps=100,
                      clip=None, schedule="constant", held_out=looks, checkpoint=tmp_path / "c.pt",
                      every_seconds=0)  # fmt: skip
        return history, float(weight.detach())

    if stop_at is not None:
        with pytest.raises(Stop):
            train(stop_at)
    for _ in range(2):  # the second finds it finished
        history, weight = train(None)
        assert history["step"].iloc[-1] == 21
        assert history["held_out"].dropna().tolist() == FALL_AND_RISE[:7]
        assert weight == -12.0


def test_looks_that_cannot_be() -> None:
    with pytest.raises(BenchError, match="every=0"):
        HeldOut(lambda: 0.0, every=0)
    model, loss, batch = regression()
    with pytest.raises(BenchError, match="held-out loss is not finite at step 2"):
        fit(model, loss, batch, optimizers(model), steps=4, held_out=HeldOut(lambda: math.nan, every=2))


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def train(stop: int | None) -> pd.DataFrame:
        weight = nn.Parameter(torch.zeros(1))

        def batch(step: int) -> Tensor:
            if step == stop:
                raise Stop
            return torch.tensor([100.0 if step == 20 else 1.0])

        return fit([weight], lambda x: (weight * x).sum(), batch, torch.optim.SGD([weight], lr=0.5), steps=45,
                   held_out=HeldOut(lambda: 0.25, every=9, patience=9), tensorboard=tmp_path / "log",
                   checkpoint=tmp_path / "c.pt", every_seconds=1e9)  # fmt: skip

    with pytest.raises(Stop):
        train(43)  # 40 steps are in the log, none of them in a checkpoint
    assert not (tmp_path / "c.pt").exists()
    history = train(None)
    train(None)  # finished: writes nothing
    log = event_accumulator.EventAccumulator(str(tmp_path / "log")).Reload()
    for name, column in (("loss", "loss"), ("learning_rate", "lr"), ("gradient_norm", "grad_norm")):
        assert [event.step for event in log.Scalars(name)] == list(range(1, 46))
        assert [event.value for event in log.Scalars(name)] == pytest.approx(history[column].tolist())
    assert [event.step for event in log.Scalars("spike")] == [21]
    assert [(event.step, event.value) for event in log.Scalars("held_out_loss")] == [(s, 0.25) for s in range(9, 46, 9)]


def test_tensorboard_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    model, loss, batch = regression()
    with pytest.raises(BenchError, match=r"pip install 'tinyonn\[train\]'"):
        fit(model, loss, batch, optimizers(model), steps=3, tensorboard=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"shards": 0},
        {"accumulate": 0},
        {"precision": "float8"},
        {"schedule": "square"},
        {"optimizers": []},
        {"model": []},
    ],
)
def test_refuses(change: dict[str, Any]) -> None:
    model, loss, batch = regression()
    given = {"model": model, "loss_fn": loss, "batch": batch, "optimizers": optimizers(model), "steps": 3} | change
    with pytest.raises(BenchError):
        fit(**given)


def test_schedules() -> None:
    flat = [lr_factor(s, 100, "trapezoidal", 10, 0.5, 0.0) for s in range(100)]
    assert flat[0] == pytest.approx(0.1)
    assert set(flat[10:51]) == {1.0}
    assert flat[75] == pytest.approx(0.5)
    assert 0 < flat[99] < 0.03
    cosine = [lr_factor(s, 100, "cosine", 10, 0.5, 0.1) for s in range(101)]
    assert cosine[10] == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    assert lr_factor(50, 100, "constant", 10, 0.5, 0.0) == 1.0
