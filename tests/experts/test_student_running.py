"""A running student leaves the model as it is, asks its teacher, and learns the same in threads side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.experts.student import Pruned, Student
from tinyonn_lib.lm.engine import Local
from tinyonn_lib.lm.threads import threads

from .conftest import Tiny
from .students import WIDTH, data, layers_of


@pytest.mark.parametrize("goal", ["kl", "lm", "layer"])
def test_outside_of_the_loss_the_model_is_the_dense_one_to_the_bit(tiny: Tiny, goal: str) -> None:
    layers = layers_of(tiny, tiny.part(), 1)
    pruned = [Pruned(torch.arange(32) < 10, torch.ones(WIDTH)) for _ in range(2)]
    with torch.no_grad():
        expected = tiny.model(tiny.ids).logits
    for each in (layers, pruned) if goal != "layer" else (layers,):
        student = Student(tiny.model, tiny.ffns, each, goal=goal)
        with student.running(), torch.no_grad():
            assert torch.equal(tiny.model(tiny.ids).logits, expected)
            loss = student.loss(data(tiny.ids))
            assert torch.equal(tiny.model(tiny.ids).logits, expected)
            assert torch.equal(student.teacher(tiny.ids).logits, expected)
            with pytest.raises(IndexError):
                student.loss(data(torch.full((2, 5), 10**6)))
            assert torch.equal(tiny.model(tiny.ids).logits, expected)
            assert torch.equal(student.loss(data(tiny.ids)), loss)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.model.modules())
    assert torch.equal(tiny.model(tiny.ids).logits, expected)


def test_what_is_imitated_is_the_undivided_model(tiny: Tiny) -> None:
    student = Student(tiny.model, tiny.ffns, layers_of(tiny, tiny.part(), 1), goal="kl")
    seen: list[Tensor] = []
    hook = tiny.model.register_forward_hook(lambda module, args, out: seen.append(out.logits.detach()))
    with student.running():
        student.loss(data(tiny.ids))
    hook.remove()
    assert torch.equal(seen[0], tiny.model(tiny.ids).logits)
    assert not torch.allclose(seen[1], seen[0])


def test_another_teacher_is_asked_and_never_trained(tiny: Tiny) -> None:
    teacher = copy.deepcopy(tiny.model)
    with torch.no_grad():
        teacher.lm_head.weight *= 2
    student = Student(tiny.model, tiny.ffns, layers_of(tiny, tiny.part(), 4 - 1e-5, gain=1e-6), teacher=teacher)
    assert student.teacher is teacher
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    with student.running(), torch.no_grad():
        found = student.loss(data(tiny.ids))
        target, ours = (m(tiny.ids).logits.double().log_softmax(-1) for m in (teacher, tiny.model))
    assert float(found) == pytest.approx(float((target.exp() * (target - ours)).sum(-1).mean()), rel=1e-4)


def gradients(tiny: Tiny, shards: int, ids: Tensor, **options: Any) -> tuple[Tensor, list[Any]]:
    layers = layers_of(tiny, tiny.part(), 2)
    student = Student(tiny.model, tiny.ffns, layers, **options)
    parameters = [p for p in student.layers.parameters() if p.requires_grad]
    with threads(shards) as each, student.running():
        engine = Local(student.loss, parameters, student, [], clip=None, accumulate=1, shards=shards, each=each)
        return engine._gradients(data(ids))


@pytest.mark.parametrize("options", [{"goal": "kl"}, {"goal": "lm"}, {"goal": "kl", "z_loss": 0.3}], ids=str)
def test_threads_side_by_side_give_the_same(tiny: Tiny, options: dict[str, Any]) -> None:
    ids = torch.randint(0, 300, (6, 17), generator=torch.Generator().manual_seed(3))
    whole, expected = gradients(tiny, 1, ids, **options)
    for shards in (2, 3):
        found, grads = gradients(tiny, shards, ids, **options)
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_threads_divide_the_relative_error_by_their_own_outputs(tiny: Tiny) -> None:
    """A ratio of sums is no mean over rows: near enough, and it must not drift further apart."""
    ids = torch.randint(0, 300, (6, 17), generator=torch.Generator().manual_seed(3))
    for options in ({"goal": "layer"}, {"goal": "layer", "balance": 0.1}):
        whole, expected = gradients(tiny, 1, ids, **options)
        found, grads = gradients(tiny, 2, ids, **options)
        assert float(found) == pytest.approx(float(whole), rel=0.05)
        for ours, theirs in zip(grads, expected, strict=True):
            assert float(F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.9
