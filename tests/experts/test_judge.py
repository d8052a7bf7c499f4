"""Tables compare what is comparable: same tokens, same share of active neurons."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from tinyonn_lib import evaluate
from tinyonn_lib.experts import judge, partition, routing

from .conftest import Tiny


@pytest.fixture
def court(tiny: Tiny) -> judge.Judge:
    ids = torch.randint(0, 300, (20, 12), generator=torch.Generator().manual_seed(7)).tolist()
    held = pd.DataFrame({"ids": ids, "source": [f"file{i % 10}" for i in range(20)]})
    return judge.Judge(tiny.model, tiny.ffns, held, tiny.neurons)


@pytest.mark.parametrize(("wanted", "realised"), [(0.3, 0.25), (0.33, 0.25), (0.05, 0.25), (0.6, 0.5), (0.9, 1.0)])
def test_pruning_gets_the_share_that_the_experts_really_have(
    tiny: Tiny, court: judge.Judge, wanted: float, realised: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(court, "static", lambda share: asked.append(share) or {})
    parts = {"random": [partition.partition("random", tiny.scores, 4)]}
    assert list(judge.under_oracle(court, parts, [wanted])) == [realised] == asked


def test_shares_that_come_to_the_same_are_measured_once(tiny: Tiny, court: judge.Judge) -> None:
    parts = {"random": [partition.partition("random", tiny.scores, 4, seed) for seed in (0, 1)]}
    found = judge.under_oracle(court, parts, [0.25, 0.26, 1.0])
    assert list(found) == [0.25, 1.0]
    assert len(found[0.25]["random, oracle router"]) == 2


def test_with_everything_on_nothing_is_lost(tiny: Tiny, court: judge.Judge) -> None:
    parts = {"random": [partition.partition("random", tiny.scores, 4)]}
    table = court.table(judge.under_oracle(court, parts, [1.0])[1.0], 1.0)
    assert set(table["method"]) == {"random, oracle router", "flap_static", "flap_static + bias"}
    assert table["mean"].abs().max() < 1e-5
    assert (table["files"] == 10).all()


def test_row_is_the_mean_difference_to_the_dense_model(tiny: Tiny, court: judge.Judge) -> None:
    scales = routing.static(court.flap, 0.25)
    row = court.table({"flap_static": [court.loss(scales)]}, 0.25).iloc[0]
    with routing.scaled(tiny.ffns, scales):
        pruned = evaluate.loss(tiny.model, court.ids)
    assert row["mean"] == pytest.approx(pruned.mean - evaluate.loss(tiny.model, court.ids).mean)


def test_the_better_static_control_is_the_one_to_beat(court: judge.Judge) -> None:
    losses = court.static(0.5)
    best = court.best_static(losses)
    assert losses[best][0].mean == min(losses[name][0].mean for name in losses)
