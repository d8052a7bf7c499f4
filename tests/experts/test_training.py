"""Training a router over frozen experts: what it gains, what it leaves alone, and where it goes on after a kill."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import router, routers, training
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.routing import scaled
from tinyonn_lib.experts.student import Routed, adapted
from tinyonn_lib.experts.training import DEAD, LOOKS, Recipe, Trained, calibrate, train, train_pruned
from tinyonn_lib.lm import models

from .conftest import Tiny

Batch = Callable[[int], Tensor]


@torch.no_grad()
def written(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """Texts of the model's own, so that it is as good as trained on them, `(rows, length)`."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, 1), generator=make)
    for _ in range(length - 1):
        likely = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=make)], 1)
    return ids


@pytest.fixture(scope="module")
def texts(tiny: Tiny) -> Tensor:
    return written(tiny.model, 320, 13, seed=1)


@pytest.fixture(scope="module")
def validation(texts: Tensor) -> Tensor:
    return texts[:40]


@pytest.fixture(scope="module")
def batch(texts: Tensor) -> Batch:
    pool = texts[40:]
    return lambda step: pool[torch.randint(0, 280, (12,), generator=torch.Generator().manual_seed(step))]


def begin(tiny: Tiny, part: Partition, seed: int = 0, gates: str = "sigmoid", init: str = "random") -> Any:
    return router.build(tiny.evidence, part, init, gates, seed, torch.device("cpu"))


def nats(model: Any, dense: Any, layers: Any, ids: Tensor, goal: str) -> float:
    """The finished model's loss, with hard choices: for "layer" the mean relative error, else nats per token."""
    errors: list[float] = []

    def watching(ffn: models.FFN, layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            down = ffn.down.weight
            errors.append(float((((layer.scale(x, h) - 1) * h) @ down.T).square().sum() / (h @ down.T).square().sum()))
            return h.new_ones(())

        return scale

    ffns = models.ffns(model)
    scales = [watching(f, each) if goal == "layer" else each.scale for f, each in zip(ffns, layers, strict=True)]
    with torch.no_grad():
        target = dense(ids).logits.double().log_softmax(-1)
        with adapted(layers, ffns), scaled(ffns, scales):
            ours = model(ids).logits.double().log_softmax(-1)
    if goal == "layer":
        return sum(errors) / len(errors)
    if goal == "kl":
        return float((target.exp() * (target - ours)).sum(-1).mean())
    return float(F.nll_loss(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def same(one: Trained, two: Trained, *, exactly: bool = True) -> None:
    pd.testing.assert_frame_equal(one.usage, two.usage, check_exact=exactly, rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(one.history, two.history, check_exact=exactly, rtol=1e-5, atol=1e-6)
    for name in ("model", "layers"):
        first, second = (
            torch.nn.ModuleList(vars(each)[name]) if name == "layers" else each.model for each in (one, two)
        )
        for key, value in first.state_dict().items():
            atol = 0.0 if exactly else 1e-6
            torch.testing.assert_close(value, second.state_dict()[key], rtol=0, atol=atol, equal_nan=True)


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


def dead(tiny: Tiny, part: Partition) -> Any:
    """Expert 1 of layer 0 is never chosen."""
    made = begin(tiny, part)
    with torch.no_grad():
        made[0].bias[1] -= 50
    return made


def shares_of(usage: pd.DataFrame, layer: int, expert: int) -> list[float]:
    return usage[(usage["layer"] == layer) & (usage["expert"] == expert)]["share"].tolist()


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


class Stop(Exception):
    pass


def until(batch: Batch, stop: int, calls: int = 1) -> Batch:
    """The same batches, and an end when this step is asked for the n-th time (each `fit` asks for its first twice)."""
    asked = [0]

    def stopping(step: int) -> Tensor:
        asked[0] += step == stop
        if asked[0] == calls:
            raise Stop
        return batch(step)

    return stopping


RECIPES = {
    "kl": Recipe(lr=0.02, revive=True),
    "layer": Recipe(goal="layer", lr=0.02, revive=True),
    "variable": Recipe(lr=0.02, variable=True, revive=True),
    "experts": Recipe(lr=0.02, lr_experts=2e-3, unfreeze=0.4, revive=True),
}
STEPS = 20


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


def job(kind: str, file: Path | None, stop: int = -1) -> Trained:
    """A training that depends on nothing but its arguments; with `stop` it kills its own process at that step."""
    torch.manual_seed(0)
    model = models.new_model(
        vocab_size=60, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=32, max_length=16, seed=1
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
    model.eval()
    texts = written(model, 60, 10, seed=2)
    part = Partition("any", tuple(torch.randperm(32).view(4, 8).sort(-1).values for _ in range(2)))
    x = torch.randn(200, 16)
    made = [Router(routers.Linear(torch.randn(4, 16), torch.zeros(4)), x, "sigmoid") for _ in range(2)]
    with torch.no_grad():
        for each in made:
            assert each.bias is not None
            each.bias[2] -= 50

    def batch(step: int) -> Tensor:
        if step == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return texts[20:][torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(step))]

    recipe = RECIPES[kind]
    return train(
        model, part, made, batch, texts[:20], k=2, steps=STEPS, recipe=recipe, checkpoint=file, every_seconds=0.0
    )


@pytest.mark.parametrize(("kind", "stop"), [("experts", 16), ("variable", 9)])
def test_sigkill_loses_nothing(kind: str, stop: int, tmp_path: Path) -> None:
    file = tmp_path / "training.pt"
    code = "import sys, pathlib; from tests.experts.test_training import job; "
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


def pruning(tiny: Tiny) -> tuple[list[Tensor], list[Tensor]]:
    """The weaker half of each layer's neurons off, and their mean as a bias."""
    keep, bias = [], []
    for layer in tiny.evidence:
        score = layer.h.var(0) * layer.contribution.square()
        off = score < score.median()
        keep.append((~off).float())
        bias.append(layer.down @ (layer.h.mean(0) * off))
    return keep, bias


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


def test_layers_may_have_different_numbers_of_experts(tiny: Tiny, batch: Batch, validation: Tensor) -> None:
    order = torch.arange(32)
    part = Partition("pool", (order.view(4, 8), order[:24].view(3, 8)), (order[:0], order[24:]))
    made = []
    for index, layer in zip(part.experts, tiny.evidence, strict=True):
        rows = torch.randn(len(index), 32, generator=torch.Generator().manual_seed(1))
        made.append(Router(routers.Linear(rows, torch.zeros(len(index))), layer.x, "sigmoid"))
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
