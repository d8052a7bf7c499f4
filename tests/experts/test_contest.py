"""A contest: who begins alike begins with the same router, and every token counts alike in the mean k."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from tinyonn_lib.experts import contest, training
from tinyonn_lib.experts.contest import Contest
from tinyonn_lib.experts.judge import Judge
from tinyonn_lib.experts.router import build
from tinyonn_lib.experts.routing import scaled
from tinyonn_lib.experts.student import Routed
from tinyonn_lib.experts.training import Recipe, Trained

from .conftest import Tiny
from .trainings import begin


@pytest.fixture
def ring(tiny: Tiny, texts: Tensor) -> Contest:
    held = pd.DataFrame({"ids": tiny.ids.tolist(), "source": ["a", "b", "c"]})
    court = Judge(tiny.model, tiny.ffns, held, tiny.neurons)
    options: dict[str, Any] = {"active": 0.5, "tokens": 300, "batch": 8, "recipe": Recipe(lr=0.05)}
    return Contest(court, tiny.evidence, texts, **options)


def test_a_router_is_fitted_once_and_every_training_begins_with_it(
    ring: Contest, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, fits, begun = tiny.part(), list[str](), list[Any]()

    def fitting(evidence: Any, partition: Any, init: str, gates: str, *more: Any) -> Any:
        fits.append(init)
        return build(evidence, partition, init, gates, *more)

    def training_spy(
        model: Any, partition: Any, routers: Any, *args: Any, real: Any = training.train, **kw: Any
    ) -> Any:
        begun.append({name: value.clone() for name, value in routers.state_dict().items()})
        return real(model, partition, routers, *args, **kw)

    monkeypatch.setattr(contest, "build", fitting)
    monkeypatch.setattr(training, "train", training_spy)
    first = ring.route("fixed", part)
    ring.route("variable", part, variable=True)
    ring.route("random", part, init="random")
    ring.route("other", tiny.part(seed=1))
    assert fits == ["analytic", "random", "analytic"]
    assert all(torch.equal(begun[0][name], begun[1][name]) for name in begun[0])
    assert not torch.equal(begun[0]["0.weight"], begun[3]["0.weight"])
    assert not torch.equal(begun[0]["0.weight"], first.routers[0].weight)
    assert first.routers[0] is not ring.trained["variable"].routers[0]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_mean_k_counts_every_token_of_samples_of_any_length_once(tiny: Tiny, batch: int) -> None:
    part = tiny.part()
    layers = [Routed(each, part, i, 2, variable=True) for i, each in enumerate(begin(tiny, part))]
    training.calibrate(tiny.model, tiny.ffns, layers, tiny.ids)
    samples = [row[:n].tolist() for row, n in zip(tiny.ids.repeat(2, 1), (17, 3, 9, 17, 3, 17), strict=True)]
    on: list[list[float]] = [[], []]

    def watching(place: int) -> Any:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            on[place] += layers[place].hard(x)[0].sum(-1).flatten().tolist()
            return layers[place].scale(x, h)

        return scale

    with torch.no_grad(), scaled(tiny.ffns, [watching(0), watching(1)]):
        for ids in samples:
            tiny.model(torch.tensor([ids]))
    assert len(on[0]) == sum(map(len, samples))
    found = contest.mean_k(samples, Trained(tiny.model, layers, pd.DataFrame(), pd.DataFrame()), batch)
    assert found == pytest.approx([sum(each) / len(each) for each in on], abs=1e-6)


@pytest.mark.parametrize("goal", ["kl", "lm"])
@pytest.mark.parametrize("kept", [0, 2**26])
def test_looks_by_threads_see_what_one_sees(
    tiny: Tiny, texts: Tensor, goal: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, found = tiny.part(), []
    for shards, most in ((1, 2**26), (3, kept)):
        monkeypatch.setattr(training, "KEPT", most)
        course = training._Course(
            tiny.model,
            [Routed(each, part, i, 2) for i, each in enumerate(begin(tiny, part))],
            texts[:21], Recipe(goal=goal, revive=True), 10, lambda step: texts[:8], soft=True,
        )  # fmt: skip
        course._shards = shards
        monkeypatch.setattr(training, "REVIVING", 100)
        found.append([course._measure() for _ in range(2)])
        assert len(course._kept) == (0 if goal == "lm" or not most else -(-21 // (8 // shards)))
    (one, again), (many, repeated) = found
    assert many[0] == repeated[0] == pytest.approx(one[0], rel=1e-6)
    assert one[0] == again[0]
    for first, other in zip(one[1], many[1], strict=True):
        assert torch.equal(first.shares, other.shares)
        assert len(first.x) == 100
        torch.testing.assert_close(other.x, first.x, rtol=1e-5, atol=1e-6)
