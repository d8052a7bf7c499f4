"""Tables compare what is comparable: same tokens, same share of active neurons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import judge, methods, routing, trial

from .conftest import Tiny


def samples(seed: int) -> pd.DataFrame:
    ids = torch.randint(0, 300, (20, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    return pd.DataFrame({"ids": ids, "source": [f"file{i % 10}" for i in range(20)]})


@pytest.fixture(scope="module")
def court(tiny: Tiny) -> judge.Judge:
    return judge.Judge(tiny.model, tiny.ffns, samples(7), tiny.neurons)


@pytest.fixture(scope="module")
def held(tiny: Tiny, court: judge.Judge) -> trial.Trial:
    divided = methods.divide(tiny.evidence, ["sp", "random", "flap_static"], methods.shapes(tiny.evidence, 4), (0, 1))
    other = judge.Judge(tiny.model, tiny.ffns, samples(8), tiny.neurons)
    return trial.trial({"held-out": court, "code": other}, divided, [0.5, 1.0, 0.5])


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


def test_flap_is_variance_times_squared_column_norm(tiny: Tiny, court: judge.Judge) -> None:
    for layer, rows in tiny.neurons.groupby("layer"):
        weight = tiny.ffns[int(layer)].down.weight.double().numpy()
        expected = [
            (r.act_sq - r.act_mean**2) * np.linalg.norm(weight[:, int(r.neuron)]) ** 2 for r in rows.itertuples()
        ]
        np.testing.assert_allclose(court.flap[int(layer)], expected, rtol=1e-6)


def test_static_pruning_and_a_partition_by_rank_are_the_same(tiny: Tiny, court: judge.Judge) -> None:
    """FLAP's best half of the neurons, kept by mask or as the first two of four experts."""
    divided = methods.divide(tiny.evidence, ["flap_static"], methods.shapes(tiny.evidence, 4))["flap_static"][0]
    by_rank = court.loss(routing.chosen(divided.partition, divided.scores["static"], 2))
    np.testing.assert_allclose(by_rank.nats, court.static(0.5)["flap_static"][0].nats, rtol=1e-6)


def test_statistics_of_another_model_cannot_judge(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="belong to another model"):
        judge.Judge(tiny.model, tiny.ffns, samples(7), tiny.neurons[tiny.neurons["neuron"] < 10])


def test_table_has_every_cell_once(held: trial.Trial) -> None:
    table = held.table()
    cells = {("sp", "oracle"), ("sp", "ridge"), ("random", "oracle"), ("random", "ridge"), ("random", "gate_mean"),
             ("flap_static", "oracle"), ("flap_static", "ridge"), ("flap_static", "static"),
             ("flap_static", "static + bias")}  # fmt: skip
    for _, rows in table.groupby(["text", "active"]):
        assert sorted(zip(rows["partition"], rows["router"], strict=True)) == sorted(cells)
    assert len(table) == 2 * 2 * len(cells)
    seeds = table.groupby("partition")["seeds"].unique()
    assert [list(seeds[name]) for name in ("sp", "random", "flap_static")] == [[2], [2], [1]]
    assert table.groupby("active")["k"].unique().map(list).to_dict() == {0.5: [2.0], 1.0: [4.0]}


def test_with_everything_on_nothing_is_lost(held: trial.Trial) -> None:
    table = held.table()
    assert table.loc[table["active"] == 1.0, "mean"].abs().max() < 1e-5
    assert table.loc[table["active"] == 0.5, "mean"].abs().min() > 1e-5


def test_the_winner_is_the_lowest_of_its_kind(held: trial.Trial) -> None:
    table = held.table()
    for oracle in (True, False):
        here = table[(table["text"] == "code") & (table["active"] == 0.5)]
        rows = here[(here["router"] == "oracle") if oracle else ~here["router"].isin(["oracle", "static + bias"])]
        assert held.best("code", 0.5, oracle=oracle) == rows.loc[rows["mean"].idxmin(), "method"]


def test_the_verdict_names_the_winner_whoever_it_is(held: trial.Trial) -> None:
    found = held.verdict("random")
    table = held.table().set_index(["text", "active", "method"])["mean"]
    for (text, active), row in zip(held.losses, found.to_dict("records"), strict=True):
        assert (row["text"], row["active"]) == (text, f"{active:.0%}")
        best, oracle = (held.best(text, active, oracle=how) for how in (False, True))
        assert row["best in a checkpoint"] == f"{best} {table[text, active, best]:+.3f}"
        assert row["best by oracle"] == f"{oracle.removesuffix(', oracle router')} {table[text, active, oracle]:+.3f}"
        pruning = row["pruning"].rpartition(" ")[0]
        gap = table[text, active, "random, ridge router"] - table[text, active, pruning]
        assert row["against pruning"].startswith(f"{gap:+.3f} [")
    assert "Of 4 cells" in held.counts("random")


def test_what_a_checkpoint_holds(tiny: Tiny, court: judge.Judge) -> None:
    divided = methods.divide(tiny.evidence, ["cmoe", "flap_static"], methods.shapes(tiny.evidence, 4))
    found = trial.trial({"held-out": court}, divided, [0.5])
    holds = {label: found.storable(label) for label in found.losses["held-out", 0.5]}
    assert holds == {
        "cmoe, oracle router": False, "cmoe, ridge router": True, "cmoe, representative router": False,
        "flap_static, oracle router": False, "flap_static, ridge router": True,
        "flap_static": True, "flap_static + bias": False,
    }  # fmt: skip


def test_a_killed_trial_goes_on_and_ends_the_same(
    tiny: Tiny, court: judge.Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided = methods.divide(tiny.evidence, ["sp", "random"], methods.shapes(tiny.evidence, 4), (0, 1))
    whole = trial.trial({"held-out": court}, divided, [0.5]).table()

    def stop(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.trial({"held-out": court}, divided, [0.5], stop, tmp_path)
    measured: list[str] = []
    real = court.divided
    monkeypatch.setattr(court, "divided", lambda name, each, active: measured.append(name) or real(name, each, active))
    again = trial.trial({"held-out": court}, divided, [0.5], resume=tmp_path).table()
    assert measured == ["random", "random"]  # sp, both seeds, was kept
    pd.testing.assert_frame_equal(again, whole)
