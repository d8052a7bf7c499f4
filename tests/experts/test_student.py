"""The student's losses against their formulas, written out expert by expert in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import routers
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.routing import scaled
from tinyonn_lib.experts.soft import END, START
from tinyonn_lib.experts.student import Pruned, Routed, Student, budgets
from tinyonn_lib.experts.training import calibrate
from tinyonn_lib.lm import models
from tinyonn_lib.lm.engine import Local
from tinyonn_lib.lm.threads import threads

from .conftest import Tiny
from .test_soft import reference

WIDTH = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers_of(
    tiny: Tiny, part: Partition, k: float, gates: str = "sigmoid", *, gain: float = 0.3, variable: bool = False
) -> list[Routed]:
    made = []
    for place, evidence in enumerate(tiny.evidence):
        experts = len(part.experts[place])
        start = routers.Linear(normal(experts, WIDTH, seed=place), normal(experts, seed=place + 10))
        router = Router(start, evidence.x, gates, gain)
        made.append(Routed(router, part, place, k, variable=variable))  # type: ignore[arg-type]
    return made


def data(ids: Tensor, width: float = START) -> dict[str, Tensor]:
    return {"ids": ids, "temperature": torch.full((len(ids),), width)}


def value(tiny: Tiny, layers: Sequence[nn.Module], ids: Tensor, width: float = START, **options: Any) -> Tensor:
    student = Student(tiny.model, tiny.ffns, layers, **options)
    with student.running():
        return student.loss(data(ids, width))


def soft_gates(layer: Routed, x: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """How far experts are on, their gates, the logits: from the router's parameters, `(tokens, experts)`, float64."""
    router = layer.router
    score, gain = x.double() @ router.weight.detach().double().T, float(router.gain.detach().exp())
    logits = gain * score
    if router.bias is None:
        choice, gates = score, logits.softmax(-1) * logits.shape[-1]
    else:
        choice = (1 / (1 + (-logits).exp()) - 0.5) * 4 / gain + router.bias.detach().double()
        gates = 2 / (1 + (-logits).exp())
    if layer.variable:
        soft = reference(choice.flatten(), layer.k * len(choice), width).view_as(choice)
    else:
        soft = torch.stack([reference(row, layer.k, width) for row in choice])
    return soft, gates, logits


def expert_outputs(tiny: Tiny, part: Partition, place: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert's output `(experts, tokens, d_model)` and the shared neurons', float64."""
    ffn = tiny.ffns[place]
    gate, up, down = (linear.weight.detach().double() for linear in (ffn.gate, ffn.up, ffn.down))

    def of(neurons: Tensor) -> Tensor:
        return (F.silu(x.double() @ gate[neurons].T) * (x.double() @ up[neurons].T)) @ down[:, neurons].T

    return torch.stack([of(neurons) for neurons in part.experts[place]]), of(part.shared[place])


def divided_logits(
    tiny: Tiny, part: Partition, layers: Sequence[Routed], ids: Tensor, width: float
) -> tuple[Tensor, list[Tensor]]:
    """The model with its FFNs replaced by sums over experts, in float64; and what each FFN's input was."""
    model = copy.deepcopy(tiny.model).double()
    seen: list[Tensor] = []

    def forward(place: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            seen.append(flat)
            soft, gates, _ = soft_gates(layers[place], flat, width)
            each, shared = expert_outputs(tiny, part, place, flat)
            return ((soft * gates).T[..., None] * each).sum(0).add(shared).view_as(x)

        return run

    for place, ffn in enumerate(models.ffns(model)):
        ffn.module.forward = forward(place)
    with torch.no_grad():
        return model(ids).logits, seen


def dense_inputs(tiny: Tiny, ids: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        f.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))) for f in tiny.ffns
    ]
    with torch.no_grad():
        tiny.model(ids)
    for handle in handles:
        handle.remove()
    return seen


SETTINGS = [("sigmoid", 0.25, False), ("softmax", 0.0, False), ("sigmoid", 0.0, True)]


@pytest.mark.parametrize(("gates", "shared", "variable"), SETTINGS)
@pytest.mark.parametrize("width", [START, 0.1])
def test_layer_loss_is_the_relative_squared_error(
    tiny: Tiny, gates: str, shared: float, variable: bool, width: float
) -> None:
    part = tiny.part(shared=shared)
    layers = layers_of(tiny, part, 2, gates, variable=variable)
    errors = []
    for place, x in enumerate(dense_inputs(tiny, tiny.ids)):
        soft, weights, _ = soft_gates(layers[place], x, width)
        each, always = expert_outputs(tiny, part, place, x)
        dense = each.sum(0) + always
        errors.append(float((((soft * weights).T[..., None] * each).sum(0) + always - dense).square().sum()))
        errors[-1] /= float(dense.square().sum())
    found = value(tiny, layers, tiny.ids, width, goal="layer")
    assert min(errors) > 0.01
    assert float(found.detach()) == pytest.approx(sum(errors) / 2, rel=1e-4)


@pytest.mark.parametrize(("gates", "shared", "variable"), SETTINGS)
def test_kl_and_lm_are_those_of_the_divided_model(tiny: Tiny, gates: str, shared: float, variable: bool) -> None:
    part = tiny.part(shared=shared)
    layers = layers_of(tiny, part, 2, gates, variable=variable)
    with torch.no_grad():
        dense = copy.deepcopy(tiny.model).double()(tiny.ids).logits.log_softmax(-1)
    ours = divided_logits(tiny, part, layers, tiny.ids, 0.2)[0].log_softmax(-1)
    kl = (dense.exp() * (dense - ours)).sum(-1).mean()
    rows, places = torch.arange(3)[:, None], torch.arange(16)
    lm = -ours[rows, places, tiny.ids[:, 1:]].mean()
    assert float(kl) > 0.05
    assert float(value(tiny, layers, tiny.ids, 0.2, goal="kl").detach()) == pytest.approx(float(kl), rel=2e-4)
    assert float(value(tiny, layers, tiny.ids, 0.2, goal="lm").detach()) == pytest.approx(float(lm), rel=1e-5)


@pytest.mark.parametrize("gates", ["sigmoid", "softmax"])
def test_with_every_expert_on_nothing_is_lost(tiny: Tiny, gates: str) -> None:
    part = tiny.part(shared=0.25)
    almost = layers_of(tiny, part, 4 - 1e-5, gates, gain=1e-6)
    for goal in ("kl", "layer"):
        assert abs(float(value(tiny, almost, tiny.ids, goal=goal).detach())) < 1e-6
        assert float(value(tiny, layers_of(tiny, part, 3, gates, gain=1e-6), tiny.ids, goal=goal).detach()) > 1e-3
    with torch.no_grad():
        dense = float(F.cross_entropy(tiny.model(tiny.ids).logits[:, :-1].flatten(0, 1), tiny.ids[:, 1:].flatten()))
    assert float(value(tiny, almost, tiny.ids, goal="lm").detach()) == pytest.approx(dense, abs=1e-4)
    whole = layers_of(tiny, part, 4, gates, gain=1e-6)  # k = E: nothing to choose, and no NaN
    loss = value(tiny, whole, tiny.ids, goal="kl")
    assert abs(float(loss.detach())) < 1e-6
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for each in whole for p in each.parameters() if p.grad is not None)


@pytest.mark.parametrize("goal", ["kl", "lm", "layer"])
@pytest.mark.parametrize("variable", [False, True])
def test_gradients_by_finite_differences(tiny: Tiny, goal: str, variable: bool) -> None:
    part = tiny.part()
    layers = layers_of(tiny, part, 2, variable=variable)
    options: dict[str, Any] = {"goal": goal, "balance": 0.3, "z_loss": 0.2}
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == (8 if variable else 6)
    grads = torch.autograd.grad(value(tiny, layers, tiny.ids, **options), parameters)
    for number, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        along = normal(*parameter.shape, seed=number) if parameter.ndim else torch.ones(())
        step = 0.01 / float(along.norm())
        ends = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter += sign * step * along
                ends.append(float(value(tiny, layers, tiny.ids, **options)))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((grad * along).sum()) == pytest.approx(slope, rel=2e-2, abs=5e-4 * float(along.norm()))


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


def penalties(weight: Tensor, x: Tensor, k: int, bias: Tensor | None = None) -> Tensor:
    experts = len(weight)
    part = Partition("any", (torch.arange(2 * experts).view(experts, 2),))
    router = Router(routers.Linear(weight, torch.zeros(experts)), x, "sigmoid", 1.0)
    with torch.no_grad():
        router.weight.copy_(weight)
        if bias is not None and router.bias is not None:
            router.bias.copy_(bias)
    layer = Routed(router, part, 0, k)
    return layer(x, torch.ones(*x.shape[:-1], 2 * experts), torch.tensor([0.01]), k)[1].detach()


def test_balance_is_nothing_for_equal_shares_and_grows_to_the_number_of_experts() -> None:
    eye = torch.eye(6)
    assert float(penalties(eye, eye, 1)[0]) == pytest.approx(0, abs=1e-6)
    assert float(penalties(eye + eye.roll(1, 0), eye.view(2, 3, 6), 2)[0]) == pytest.approx(0, abs=1e-6)
    one, two = torch.tensor([9.0, 0, 0, 0, 0, 0]), torch.tensor([9.0, 9, 0, 0, 0, 0])
    assert float(penalties(eye, eye, 1, one)[0]) == pytest.approx(6 - 1, abs=1e-4)  # all on one expert: E² / E − 1
    assert float(penalties(eye, eye, 2, two)[0]) == pytest.approx(3 - 1, abs=1e-4)
    half = torch.cat([eye[:1].expand(3, 6), eye[3:]])  # one expert for half of six tokens, three for one each
    assert float(penalties(eye, half, 1)[0]) == pytest.approx(6 * (9 + 3) / 36 - 1, abs=1e-4)


def test_z_loss_is_the_mean_squared_log_sum_of_exponentials() -> None:
    weight, x = normal(5, 6), normal(2, 7, 6, seed=1)
    logits = (x @ weight.T).flatten(0, 1).double()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 14
    assert float(penalties(weight, x, 2)[1]) == pytest.approx(expected, rel=1e-5)


def test_penalties_enter_with_their_weights_as_the_mean_of_the_layers(tiny: Tiny) -> None:
    layers = layers_of(tiny, tiny.part(), 2)
    balance, z = 0.0, 0.0
    for layer, x in zip(layers, dense_inputs(tiny, tiny.ids), strict=True):
        soft, _, logits = soft_gates(layer, x, START)
        balance += float((soft.mean(0) * 2).square().mean() - 1) / 2
        z += float(logits.logsumexp(-1).square().mean()) / 2
    bare = value(tiny, layers, tiny.ids, goal="layer").detach()
    found = value(tiny, layers, tiny.ids, goal="layer", balance=0.5, z_loss=0.25).detach()
    assert balance > 0.01
    assert float(found - bare) == pytest.approx(0.5 * balance + 0.25 * z, rel=1e-4)


def pruned_layers() -> tuple[list[Tensor], list[Tensor], list[Pruned]]:
    keep = [torch.arange(32) % 3 != place for place in range(2)]
    bias = [0.3 * normal(WIDTH, seed=place) for place in range(2)]
    layers = [Pruned(mask, start) for mask, start in zip(keep, bias, strict=True)]
    with torch.no_grad():
        for place, layer in enumerate(layers):
            layer.factor += 0.2 * normal(32, seed=place + 5)
            layer.gate += 0.2 * normal(64, seed=place + 7).view(2, 32)
            layer.up += 0.2 * normal(64, seed=place + 9).view(2, 32)
    return keep, bias, layers


def test_pruned_layers_scale_and_shift_all_that_remains(tiny: Tiny) -> None:
    keep, bias, layers = pruned_layers()
    model = copy.deepcopy(tiny.model).double()

    def forward(ffn: models.FFN, place: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            layer = layers[place]
            h = F.silu(ffn.gate(x) * layer.gate[0] + layer.gate[1]) * (ffn.up(x) * layer.up[0] + layer.up[1])
            return ffn.down(h * keep[place] * layer.factor.double()) + bias[place]

        return run

    for place, ffn in enumerate(models.ffns(model)):
        ffn.module.forward = forward(ffn, place)
    with torch.no_grad():
        ours = model(tiny.ids).logits.log_softmax(-1)
        dense = copy.deepcopy(tiny.model).double()(tiny.ids).logits.log_softmax(-1)
    expected = (dense.exp() * (dense - ours)).sum(-1).mean()
    assert expected > 0.1
    loss = value(tiny, layers, tiny.ids, goal="kl")
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    for mask, layer in zip(keep, layers, strict=True):
        assert layer.factor.grad is not None
        assert layer.bias.grad is not None
        assert float(layer.factor.grad[~mask].abs().max()) == 0
        assert bool((layer.factor.grad[mask] != 0).all())
        assert bool((layer.bias.grad != 0).all())
        for affine in (layer.gate, layer.up):
            assert affine.grad is not None
            assert float(affine.grad[:, ~mask].abs().max()) == 0
            assert bool((affine.grad[:, mask] != 0).all())


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.3, -0.2)])
@pytest.mark.parametrize("k", [1, 2])
def test_a_variable_number_is_k_in_the_mean(tiny: Tiny, shares: tuple[float, float], k: int) -> None:
    part = tiny.part(shared=0.25)
    layers = layers_of(tiny, part, k, variable=True)
    with torch.no_grad():
        for layer, share in zip(layers, shares, strict=True):
            layer.budget += share
    wanted = [float(budget.detach()) for budget in budgets(layers)]
    assert sum(wanted) == pytest.approx(2 * k)
    assert (wanted[0] > wanted[1] + 0.1) == (shares[0] > shares[1])

    def numbers() -> tuple[list[Tensor], list[Tensor]]:
        seen: list[Tensor] = []

        def watching(layer: Routed) -> Callable[[Tensor, Tensor], Tensor]:
            def scale(x: Tensor, h: Tensor) -> Tensor:
                seen.append(layer.hard(x)[0])
                return layer.scale(x, h)

            return scale

        with torch.no_grad(), scaled(tiny.ffns, [watching(layer) for layer in layers]):
            tiny.model(tiny.ids)
        return seen, [layer.threshold.clone() for layer in layers]

    calibrate(tiny.model, tiny.ffns, layers, tiny.ids)
    on, thresholds = numbers()
    tokens = tiny.ids.numel()
    for each, budget in zip(on, wanted, strict=True):
        assert float(each.sum()) / tokens == pytest.approx(budget, abs=1 / tokens)
        assert len(each.sum(-1).unique()) > 1  # and not k each time
    with torch.no_grad():
        for layer in layers:
            assert layer.router.bias is not None
            layer.router.bias += 3
    calibrate(tiny.model, tiny.ffns, layers, tiny.ids)
    again, higher = numbers()
    assert all(torch.equal(a, b) for a, b in zip(on, again, strict=True))
    torch.testing.assert_close(torch.stack(higher), torch.stack(thresholds) + 3, rtol=0, atol=1e-5)


def test_budgets_keep_k_as_their_mean_where_a_layer_is_full(tiny: Tiny) -> None:
    layers = layers_of(tiny, tiny.part(), 3, variable=True)
    with torch.no_grad():
        layers[0].budget += 1.5
    found = [float(budget.detach()) for budget in budgets(layers)]
    assert 0 < min(found) < max(found) < 4
    assert sum(found) / 2 == pytest.approx(3)


def test_k_is_every_layers_budget_and_pruned_layers_have_none(tiny: Tiny) -> None:
    assert budgets(layers_of(tiny, tiny.part(), 3)) == [3, 3]
    assert budgets(pruned_layers()[2]) == [0, 0]


def test_unknown_goal(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="^Unknown loss 'mse': choose one of layer, kl, lm.$"):
        Student(tiny.model, tiny.ffns, [], goal="mse")


def test_cold_and_soft_is_the_finished_model(tiny: Tiny) -> None:
    layers = layers_of(tiny, tiny.part(shared=0.25), 2, gain=0.05)
    with torch.no_grad():
        for layer in layers:
            layer.router.weight *= 100  # decided
        dense = tiny.model(tiny.ids).logits.log_softmax(-1)
        with scaled(tiny.ffns, [layer.scale for layer in layers]):
            hard = tiny.model(tiny.ids).logits.log_softmax(-1)
    expected = float((dense.exp() * (dense - hard)).sum(-1).mean())
    assert float(value(tiny, layers, tiny.ids, END, goal="kl").detach()) == pytest.approx(expected, rel=0.05)
    assert float(value(tiny, layers, tiny.ids, END / 30, goal="kl").detach()) == pytest.approx(expected, rel=2e-3)
