"""The control of pruned neurons is trained, too: what it learns, what it refuses, and where it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.training import Recipe, train_pruned

from .conftest import Batch, Tiny
from .trainings import Stop, nats, pruning, same, until


def test_the_control_learns_factors_and_biases(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    keep, bias = pruning(tiny)
    given = [each.clone() for each in (*keep, *bias)]
    for goal in ("lm", "kl"):
        recipe = Recipe(goal=goal, lr=0.02)
        one = train_pruned(tiny.model, keep, bias, batch, validation, steps=1, recipe=Recipe(goal=goal, lr=0.0))
        found = train_pruned(tiny.model, keep, bias, batch, validation, steps=40, recipe=recipe)
        losses = [nats(each.model, tiny.model, each.layers, validation, goal) for each in (one, found)]
        with torch.no_grad():
            text = F.cross_entropy(tiny.model(validation).logits[:, :-1].flatten(0, 1), validation[:, 1:].flatten())
        least = float(text) if goal == "lm" else 0.0  # what the dense model loses
        assert losses[1] - least < 0.97 * (losses[0] - least)
        assert set(found.history["stage"]) == {"pruned"}
        assert found.usage.empty
        assert list(found.usage.columns) == ["step", "layer", "expert", "share", "dead"]
        for layer, start, mask in zip(found.layers, bias, keep, strict=True):
            assert not torch.equal(layer.bias, start)
            for affine in (layer.gate, layer.up):
                assert bool((affine[:, mask != 0] != torch.tensor([[1.0], [0.0]])).all()), "what remains learns"
                assert bool((affine[:, mask == 0] == torch.tensor([[1.0], [0.0]])).all()), "what is pruned does not"
            assert torch.equal(layer.scale(None, torch.ones(32)) != 0, mask != 0)
    assert all(torch.equal(a, b) for a, b in zip(given, (*keep, *bias), strict=True))
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())


def test_the_controls_held_out_loss_is_that_of_the_whole_control(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    keep, bias = pruning(tiny)
    bias = [3 * each for each in bias]  # so that they matter
    found = train_pruned(tiny.model, keep, bias, batch, validation, steps=10, recipe=Recipe(lr=0.02))
    looks = found.history["held_out"].dropna()
    assert nats(found.model, tiny.model, found.layers, validation, "kl") == pytest.approx(looks.min(), rel=1e-4)


def test_the_control_refuses_the_layer_loss(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    keep, bias = pruning(tiny)
    with pytest.raises(BenchError, match="choose goal=kl or lm"):
        train_pruned(tiny.model, keep, bias, batch, validation, steps=5, recipe=Recipe(goal="layer"))


def test_the_control_goes_on_to_the_bit_and_only_with_its_own(
    tiny: Tiny, batch: Batch, validation: Tensor, tmp_path: Path
) -> None:
    keep, bias = pruning(tiny)
    common: dict[str, Any] = {"steps": 10, "recipe": Recipe(lr=0.02)}
    whole, file = train_pruned(tiny.model, keep, bias, batch, validation, **common), tmp_path / "control.pt"
    options = {**common, "checkpoint": file, "every_seconds": 0.0}
    with pytest.raises(Stop):
        train_pruned(tiny.model, keep, bias, until(batch, 6), validation, **options)
    timing: dict[str, float] = {}
    found = train_pruned(tiny.model, keep, bias, batch, validation, **common, checkpoint=file, timing=timing)
    assert timing["resumed_from"] == 6
    same(found, whole)
    others = [1 - mask for mask in keep]
    train_pruned(tiny.model, others, bias, batch, validation, **common, checkpoint=file, timing=timing)
    assert timing["resumed_from"] == 0
