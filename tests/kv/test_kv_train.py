"""Training of projectors: what falls, what moves, what stays, and that a killed training goes on to the same bits."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from kv_texts import drawn
from torch import Tensor, nn

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV, KVModel
from tinyonn_lib.kv.data import Caches, own_of, teachers_of
from tinyonn_lib.kv.loss import compute_kv_loss
from tinyonn_lib.kv.projector import KVDimensionProjector
from tinyonn_lib.kv.train import Recipe, loss, train

OBJECTIVES = ["mse", "cosine", "normalised", "lm"]


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> Caches:
    return Caches(student, {"t": teacher}, drawn(24))


def made(caches: Caches, **options: Any) -> KVDimensionProjector:
    torch.manual_seed(0)
    configs = {name: model.model.config for name, model in caches.teachers.items()}
    return KVDimensionProjector.from_configs(configs, caches.student.model.config, **options)


def with_a_copy(caches: Caches) -> Caches:
    """The same, with a student of its own that may be trained."""
    other = copy.copy(caches)
    other.student = KVModel(copy.deepcopy(caches.student.model))
    return other


def values(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.parameters()]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls_and_the_projector_alone_moves(objective: str, texts: Caches) -> None:
    projector = made(texts, dropout=0.1)
    before, frozen, own = values(projector), values(texts.student.model), texts[torch.arange(4)]
    history = train(projector, texts, Recipe(objective, lr=3e-3, steps=80))
    assert history["step"].tolist() == list(range(1, 81))
    assert history["lr"].max() == pytest.approx(3e-3)
    assert history["lr"][0] < 3e-4 < history["lr"][18] < history["lr"][20]  # warmed up in 20 steps
    assert history["loss"].tail(10).mean() < 0.9 * history["loss"].head(3).mean()
    assert all(not torch.equal(one, two) for one, two in zip(before, values(projector), strict=True))
    assert equal(frozen, values(texts.student.model))
    assert torch.equal(texts.student.read(own["ids"]).keys, own["own.keys"])
    assert not any(value.requires_grad or value.grad is not None for value in texts.student.model.parameters())
    assert all(value.grad is None for value in projector.parameters())
    assert not projector.training


def test_all_teachers_and_their_gates_learn(student: KVModel, teacher: KVModel) -> None:
    both = Caches(student, {"t": teacher, "s": student}, drawn(16))
    projector = made(both)
    before = values(projector)
    train(projector, both, Recipe(lr=1e-3, steps=10))
    assert all(not torch.equal(one, two) for one, two in zip(before, values(projector), strict=True))
    assert projector.gates is not None
    assert projector.gates.abs().min() > 0


def test_deterministic_up_to_the_seed(texts: Caches) -> None:
    def run(seed: int, start: int) -> tuple[list[Tensor], list[float]]:
        projector = made(texts, dropout=0.3)
        torch.manual_seed(start)
        history = train(projector, texts, Recipe(steps=12, batch=5, seed=seed))
        return values(projector), history["loss"].tolist()

    (one, losses), (two, again), (other, others) = run(3, 0), run(3, 1), run(4, 0)
    assert losses == again
    assert equal(one, two)
    assert losses[0] != others[0]
    assert not equal(one, other)


def test_the_seed_is_dropout_s_too(texts: Caches) -> None:
    """With all texts in each batch their order hardly matters; what is dropped does."""
    spread = {}
    for dropout in (0.0, 0.5):
        found = [train(made(texts, kind="mlp", dropout=dropout).eval(), texts, Recipe(steps=1, batch=24, seed=seed))
                 for seed in (0, 1)]  # fmt: skip
        spread[dropout] = abs(found[0]["loss"][0] - found[1]["loss"][0])
    assert spread[0.0] < 1e-5 < 1e-3 < spread[0.5]


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_elsewhere_are_left_alone(fails: bool, texts: Caches) -> None:
    projector = made(texts, dropout=0.5)
    if fails:
        with torch.no_grad():
            next(projector.parameters()).fill_(float("nan"))
    torch.manual_seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with pytest.raises(BenchError, match="step 1") if fails else contextlib.nullcontext():
        train(projector, texts, Recipe(steps=3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert not projector.training


class Stop(Exception):
    pass


class Stopping:
    """Caches that are killed at a look."""

    def __init__(self, caches: Caches, at: int) -> None:
        self._caches, self._left = caches, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._caches, name)

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, rows: Tensor) -> Any:
        if not self._left:
            raise Stop
        self._left -= 1
        return self._caches[rows]


@pytest.mark.parametrize(("objective", "lr_student"), [("mse", 0.0), ("lm", 0.0), ("mse", 1e-3), ("lm", 1e-3)])
def test_resumed_to_the_same_bits(objective: str, lr_student: float, texts: Caches, tmp_path: Path) -> None:
    plan, path = Recipe(objective, steps=14, batch=5, lr_student=lr_student), tmp_path / "c.pt"

    def run(caches: Any, mine: Caches, start: int, **more: Any) -> tuple[pd.DataFrame, list[Tensor]]:
        projector = made(texts, dropout=0.4)
        torch.manual_seed(start)
        history = train(projector, caches, plan, **more)
        return history, values(projector) + values(mine.student.model)

    whole, stopped, resumed = (with_a_copy(texts) for _ in range(3))
    expected = run(whole, whole, 0)
    with pytest.raises(Stop):
        run(Stopping(stopped, 9), stopped, 1, checkpoint=path, every_seconds=0)
    assert path.exists()
    assert not any(value.requires_grad for value in stopped.student.model.parameters())
    timing: dict[str, float] = {}
    found = run(resumed, resumed, 2, checkpoint=path, timing=timing)
    assert timing["resumed_from"] == 8  # one look is for the fingerprint
    pd.testing.assert_frame_equal(found[0], expected[0], check_exact=True)
    assert equal(found[1], expected[1])
    assert equal(values(stopped.student.model), values(texts.student.model)) == (lr_student == 0)


@pytest.mark.parametrize(
    "change",
    [{"activation": "relu"}, {"dropout": 0.2}, {"layer_maps": {"t": [[0, 1, 2], [0, 1, 2], [2, 3, 4]]}}, {"seed": 1},
     {"objective": "cosine"}, {"lr": 2e-3}],
)  # fmt: skip
def test_another_training_s_checkpoint_is_not_used(change: dict[str, Any], texts: Caches, tmp_path: Path) -> None:
    """Not even if all weights are the same at the start."""
    path = tmp_path / "c.pt"
    train(made(texts), texts, Recipe(steps=3), checkpoint=path)
    timing: dict[str, float] = {}
    train(made(texts), texts, Recipe(steps=3), checkpoint=path, timing=timing)
    assert timing["resumed_from"] == 3
    of_recipe = {key: value for key, value in change.items() if key in ("seed", "objective", "lr")}
    projector = made(texts, **{key: value for key, value in change.items() if key not in of_recipe})
    assert equal(values(projector), values(made(texts)))
    train(projector, texts, Recipe(steps=3, **of_recipe), checkpoint=path, timing=timing)
    assert timing["resumed_from"] == 0


def test_a_frozen_projector_is_refused(texts: Caches) -> None:
    projector = made(texts, trainable=False)
    before = values(projector)
    with pytest.raises(BenchError, match="frozen: make it with trainable=True"):
        train(projector, texts, Recipe(steps=1, lr_student=1e-3))
    assert equal(before, values(projector))
    assert not any(value.requires_grad for value in texts.student.model.parameters())


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_co_training_moves_both_at_their_own_rates(objective: str, texts: Caches) -> None:
    mine, projector = with_a_copy(texts), made(texts)
    before = [values(projector), values(mine.student.model)]
    history = train(projector, mine, Recipe(objective, lr=1e-3, lr_student=5e-5, steps=1))
    for rate, old, module in zip((1e-3, 5e-5), before, (projector, mine.student.model), strict=True):
        moved = max(float((one - two).abs().max()) for one, two in zip(old, values(module), strict=True))
        # Adam's first step is the rate, whatever the gradient.
        assert moved == pytest.approx(rate * history["lr"][0] / 1e-3, rel=1e-2)
    assert not any(value.requires_grad or value.grad is not None for value in mine.student.model.parameters())
    assert equal(before[1], values(texts.student.model))


def test_a_student_that_trains_is_read_anew(texts: Caches) -> None:
    mine, batch = with_a_copy(texts), texts[torch.arange(6)]
    mine.student.model.requires_grad_(True)
    with torch.no_grad():
        for value in mine.student.model.parameters():
            value *= 1.1
    projector = made(texts)
    said = projector(teachers_of(batch, ["t"]))
    frozen, moving = (loss(projector, mine, batch, Recipe(lr_student=rate)) for rate in (0.0, 1e-4))
    mask = batch["mask"]
    torch.testing.assert_close(frozen, compute_kv_loss(own_of(batch), said, mask=mask))
    torch.testing.assert_close(moving, compute_kv_loss(mine.student.read(batch["ids"]), said, mask=mask))
    assert abs(float(frozen.detach() - moving.detach())) > 1e-3
    moving.backward()
    layer = mine.student.model.model.layers[0].self_attn
    assert all(part.weight.grad.abs().max() > 0 for part in (layer.k_proj, layer.v_proj))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_the_student_s_own_cache(objective: str, texts: Caches) -> None:
    """0 to itself; and as next-token loss what the student's usual one is, per token."""
    batch = texts[torch.arange(6)]

    def perfect(_: Any) -> KV:
        return own_of(batch)

    given: Any = perfect
    found = float(loss(given, texts, batch, Recipe(objective)))
    rows = [ids[mask].tolist() for ids, mask in zip(batch["ids"], batch["mask"], strict=True)]
    expected = evaluate.loss(texts.student.model, rows).mean if objective == "lm" else 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("objective", "heads"), [("mse", 1), ("cosine", 2), ("normalised", 2)])
def test_the_loss_knows_heads_and_padding(objective: str, heads: int, texts: Caches) -> None:
    batch, projector = texts[torch.arange(6)], made(texts)
    assert not batch["mask"].all()
    said = projector(teachers_of(batch, ["t"]))
    expected = compute_kv_loss(own_of(batch), said, objective, heads=heads, mask=batch["mask"])
    torch.testing.assert_close(loss(projector, texts, batch, Recipe(objective)), expected)


def test_more_texts_per_step_than_there_are(texts: Caches) -> None:
    assert train(made(texts), texts, Recipe(steps=2, batch=1000))["tokens"].tolist() == [
        texts.ids.numel(), 2 * texts.ids.numel()
    ]  # fmt: skip


def test_every_text_in_its_turn(texts: Caches) -> None:
    seen: list[int] = []

    class Watched(Stopping):
        def __getitem__(self, rows: Tensor) -> Any:
            seen.extend(rows.tolist())
            return self._caches[rows]

    watched: Any = Watched(texts, 0)
    train(made(texts), watched, Recipe(steps=6, batch=8))
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] not in (seen[24:], list(range(24)))


def test_the_document_s_rates_are_the_defaults() -> None:
    assert (Recipe().lr, Recipe().lr_student, Recipe().objective) == (1e-3, 0.0, "mse")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"objective": "l1"}, "Unknown objective 'l1': choose one of mse, cosine, normalised, lm"),
        *(({"lr": lr}, f"lr={lr}, ") for lr in (0.0, -1e-3, math.nan, math.inf)),
        *(({"lr_student": lr}, f"lr_student={lr}, ") for lr in (-5e-5, math.nan, math.inf)),
        *(({"batch": batch}, f"batch={batch}: ") for batch in (0, -8)),
    ],
)
def test_recipes_that_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BenchError, match=says) as caught:
        Recipe(**change)
    assert "\n" not in str(caught.value)


def test_no_steps_are_refused(texts: Caches) -> None:
    with pytest.raises(BenchError, match="steps=0"):
        train(made(texts), texts, Recipe(steps=0))
