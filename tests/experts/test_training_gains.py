"""Training a router: what it gains, what it leaves alone, and that the best found is what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import training
from tinyonn_lib.experts.student import Routed
from tinyonn_lib.experts.training import LOOKS, Recipe, calibrate, train
from tinyonn_lib.lm import models

from .conftest import Batch, Tiny
from .trainings import begin, nats


@pytest.mark.parametrize("goal", ["layer", "kl", "lm"])
@pytest.mark.parametrize("gates", ["sigmoid", "softmax"])
def test_every_goal_is_better_reached_than_at_the_beginning(
    tiny: Tiny, batch: Batch, validation: Tensor, goal: str, gates: str
) -> None:
    part = tiny.part("sp")
    gains = []
    for seed in (0, 1):
        start = [Routed(each, part, place, 2) for place, each in enumerate(begin(tiny, part, seed, gates))]
        before = nats(tiny.model, tiny.model, start, validation, goal)
        recipe = Recipe(goal=goal, lr=0.05)
        found = train(tiny.model, part, begin(tiny, part, seed, gates), batch, validation, k=2, steps=50, recipe=recipe)
        gains.append((before, nats(found.model, tiny.model, found.layers, validation, goal)))
    if goal == "lm":  # of which the model's own entropy, by far the most, cannot be lowered
        floor = nats(
            tiny.model, tiny.model, [Routed(r, part, i, 4) for i, r in enumerate(begin(tiny, part))], validation, goal
        )
        gains = [(before - floor, after - floor) for before, after in gains]
    assert sum(after for _, after in gains) < 0.85 * sum(before for before, _ in gains)
    assert all(after < before for before, after in gains)


def test_a_good_beginning_is_not_spoilt(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    part = tiny.part("sp")
    start = [Routed(each, part, place, 2) for place, each in enumerate(begin(tiny, part, init="analytic"))]
    before = nats(tiny.model, tiny.model, start, validation, "kl")
    routers_ = begin(tiny, part, init="analytic")
    found = train(tiny.model, part, routers_, batch, validation, k=2, steps=40, recipe=Recipe(lr=0.02))
    assert nats(found.model, tiny.model, found.layers, validation, "kl") < 0.98 * before


@pytest.mark.parametrize("variable", [False, True])
def test_experts_stay_to_the_bit_and_routers_are_trained_in_place(
    tiny: Tiny, batch: Batch, validation: Tensor, variable: bool
) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    part, given = tiny.part(), begin(tiny, tiny.part())
    old = [p.detach().clone() for p in given.parameters()]
    recipe = Recipe(variable=variable)
    found = train(tiny.model, part, given, batch, validation, k=2, steps=12, recipe=recipe)
    assert found.model is tiny.model
    assert all(a is b for a, b in zip(found.routers, given, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(old, given.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.model.modules())


def test_trained_experts_are_a_copys_ffns_alone(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    part = tiny.part()
    recipe = Recipe(lr_experts=1e-3, unfreeze=0.3)
    found = train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=20, recipe=recipe)
    assert found.model is not tiny.model
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())
    for name, value in found.model.state_dict().items():
        assert torch.equal(before[name], value) != (".mlp." in name), name
    assert not any(p.requires_grad for p in found.model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in found.model.modules())
    stages = found.history["stage"].tolist()
    assert stages == ["router"] * 14 + ["router and experts"] * 6
    assert found.history["step"].tolist() == list(range(1, 21))
    assert found.history["tokens"].tolist() == [12 * 13 * step for step in range(1, 21)]
    assert found.history["step"].dtype == found.history["tokens"].dtype == "int64"
    assert found.usage["step"].iloc[-1] == 20
    assert found.usage["step"].is_monotonic_increasing


def test_experts_that_train_help(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    part, recipe = tiny.part(), Recipe(lr=0.02, lr_experts=2e-3, unfreeze=0.5)
    found = train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=60, recipe=recipe)
    alone, joint = (
        found.history[found.history["stage"] == s]["held_out"].min() for s in ("router", "router and experts")
    )
    assert joint < 0.95 * alone
    assert nats(found.model, tiny.model, found.layers, validation, "kl") == pytest.approx(joint, rel=1e-4)


def test_unfrozen_all_the_time_there_is_one_stage(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    part = tiny.part()
    recipe = Recipe(goal="lm", lr_experts=1e-3, unfreeze=1.0)
    found = train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=5, recipe=recipe)
    assert set(found.history["stage"]) == {"router and experts"}
    assert found.usage["step"].unique().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("goal", ["kl", "lm"])
def test_what_comes_back_is_what_was_best(
    tiny: Tiny, batch: Batch, validation: Tensor, goal: str, variable: bool
) -> None:
    part = tiny.part()
    recipe = Recipe(goal=goal, lr=0.5, variable=variable)  # so much that later looks are worse
    found = train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=20, recipe=recipe)
    looks = found.history["held_out"].dropna().tolist()
    assert len(looks) == LOOKS
    if variable:  # at the end the thresholds follow from more text than at the looks
        final = [float(layer.threshold) for layer in found.layers]
        calibrate(found.model, tiny.ffns, found.layers, torch.cat([validation, *(batch(step) for step in range(8))]))
        assert [float(layer.threshold) for layer in found.layers] == final
        calibrate(found.model, tiny.ffns, found.layers, validation)
        assert [float(layer.threshold) for layer in found.layers] != final
    assert nats(found.model, tiny.model, found.layers, validation, goal) == pytest.approx(min(looks), rel=1e-4)


def test_a_recipe_comes_from_a_phases_parameters() -> None:
    values = {"goal": "lm", "lr": 0.1, "variable": True, "revive": True, "steps": 9, "model": "x"}
    assert training.recipe(values) == Recipe(goal="lm", lr=0.1, revive=True)
    assert training.recipe({}) == Recipe()


def test_a_damaged_model_is_one_clear_line(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    part, broken = tiny.part(), copy.deepcopy(tiny.model)
    with torch.no_grad():
        models.ffns(broken)[0].up.weight[3] = torch.nan
    for goal in ("layer", "kl", "lm"):
        with pytest.raises(BenchError, match=r"The loss is not finite at step 1 .*broken data") as caught:
            train(broken, part, begin(tiny, part), batch, validation, k=2, steps=20, recipe=Recipe(goal=goal))
        assert "\n" not in str(caught.value)
    recipe = Recipe(goal="layer", lr_experts=1e-3)
    with pytest.raises(BenchError, match="Experts can train with goal=kl or lm"):
        train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=20, recipe=recipe)
    with pytest.raises(BenchError, match="Unknown loss 'mse'"):
        train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=20, recipe=Recipe(goal="mse"))
