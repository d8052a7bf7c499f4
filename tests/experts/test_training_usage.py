"""Who is on in a training: shares of experts, the dead and the revived, and where patience with a stage ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import analytic
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.routing import scaled
from tinyonn_lib.experts.student import Routed
from tinyonn_lib.experts.training import DEAD, Recipe, train
from tinyonn_lib.lm import models

from .conftest import Batch, Tiny
from .trainings import begin, dead, nats, shares_of


def test_usage_tells_who_is_on_and_who_is_dead(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    part = tiny.part()
    recipe = Recipe(lr=1e-4)
    found = train(tiny.model, part, dead(tiny, part), batch, validation, k=2, steps=25, recipe=recipe)
    usage = found.usage
    assert list(usage.columns) == ["step", "layer", "expert", "share", "dead"]
    assert usage["step"].unique().tolist() == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert usage.groupby("step").size().unique().tolist() == [8]
    sums = usage.groupby(["step", "layer"])["share"].sum()
    assert sums.to_numpy() == pytest.approx(2, abs=1e-5)
    assert shares_of(usage, 0, 1) == [0] * 9
    assert usage["dead"].equals(usage["share"] < DEAD)
    assert usage["dead"].sum() == 9


@pytest.mark.parametrize("rows", [15, 16, 17, 40])
def test_every_token_counts_alike_in_usage(tiny: Tiny, batch: Batch, texts: Tensor, rows: int) -> None:
    part, seen = tiny.part(), []
    recipe = Recipe(lr=0.0)
    found = train(tiny.model, part, begin(tiny, part), batch, texts[:rows], k=2, steps=1, recipe=recipe)

    def watching(layer: Routed) -> Callable[[Tensor, Tensor], Tensor]:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            seen.append(layer.hard(x)[0].flatten(0, 1).mean(0))
            return layer.scale(x, h)

        return scale

    with torch.no_grad(), scaled(tiny.ffns, [watching(layer) for layer in found.layers]):
        tiny.model(texts[:rows])
    assert found.usage["share"].tolist() == pytest.approx(torch.cat(seen).tolist(), abs=1e-4)


def test_layers_may_have_different_numbers_of_experts(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    order = torch.arange(32)
    part = Partition("pool", (order.view(4, 8), order[:24].view(3, 8)), (order[:0], order[24:]))
    made = []
    for index, layer in zip(part.experts, tiny.evidence, strict=True):
        rows = torch.randn(len(index), 32, generator=torch.Generator().manual_seed(1))
        made.append(Router(analytic.Linear(rows, torch.zeros(len(index))), layer.x, "sigmoid"))
    found = train(tiny.model, part, made, batch, validation, k=2, steps=3)
    last = found.usage[found.usage["step"] == 3]
    assert last.groupby("layer").size().tolist() == [4, 3]
    assert last.groupby("layer")["share"].sum().tolist() == pytest.approx([2, 2])


@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_variable_number_may_be_any_number(tiny: Tiny, batch: Batch, validation: Tensor, k: int) -> None:
    part, recipe = tiny.part(), Recipe(variable=True)
    found = train(tiny.model, part, begin(tiny, part), batch, validation, k=k, steps=3, recipe=recipe)
    on = found.usage[found.usage["step"] == 3]["share"].sum() / 2
    assert on == pytest.approx(k if k < 4 else 4, abs=0.02 if k < 4 else 0.51)  # up to half an expert stays off


@pytest.mark.parametrize("variable", [False, True])
def test_the_dead_come_back_and_without_it_stay_dead(
    tiny: Tiny, batch: Batch, validation: Tensor, variable: bool
) -> None:
    part = tiny.part()
    for revive in (False, True):
        recipe = Recipe(revive=revive, lr=1e-4, variable=variable)
        found = train(tiny.model, part, dead(tiny, part), batch, validation, k=2, steps=10, recipe=recipe)
        shares = shares_of(found.usage, 0, 1)
        assert shares[0] == 0
        assert shares[-1] == (0 if not revive else pytest.approx(0.5, abs=0.15))


def useless(tiny: Tiny) -> tuple[Any, Partition]:
    """A model in which expert 1 of layer 0 adds nothing: to revive it takes a place from another."""
    model, part = copy.deepcopy(tiny.model), tiny.part()
    with torch.no_grad():
        models.ffns(model)[0].down.weight[:, part.experts[0][1]] = 0
    return model, part


@pytest.mark.parametrize("steps", [1, 4, 10, 15])
def test_reviving_does_not_pass_for_the_best(tiny: Tiny, batch: Batch, validation: Tensor, steps: int) -> None:
    model, part = useless(tiny)
    recipe = Recipe(lr=1e-5, revive=True)
    found = train(model, part, dead(tiny, part), batch, validation, k=2, steps=steps, recipe=recipe)
    looks = found.history["held_out"].dropna()
    assert nats(found.model, model, found.layers, validation, "kl") == pytest.approx(looks.min(), rel=1e-4)


def test_patience_ends_it(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    part = tiny.part()
    for patience, looks in ((1, 2), (3, 4)):
        recipe = Recipe(lr=0.0, patience=patience)  # nothing ever gets better
        found = train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=30, recipe=recipe)
        assert len(found.history) == 3 * looks
        assert found.usage["step"].unique().tolist() == [3 * look for look in range(1, looks + 1)]
    with pytest.raises(BenchError, match="patience=0"):
        train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=3, recipe=Recipe(patience=0))


def test_a_stage_that_ends_early_leaves_no_gap(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    part, recipe = tiny.part(), Recipe(lr=0.0, lr_experts=1e-3, unfreeze=0.5, patience=1)
    found = train(tiny.model, part, begin(tiny, part), batch, validation, k=2, steps=20, recipe=recipe)
    assert found.history["stage"].tolist()[:3] == ["router", "router", "router and experts"]
    assert found.history["step"].tolist() == list(range(1, len(found.history) + 1))
    looks = found.history.loc[found.history["held_out"].notna(), "step"]
    assert found.usage["step"].unique().tolist() == looks.tolist()
