"""The contest: chosen by validation alone, the same start for everybody, and after a kill on to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kv_texts import drawn
from torch import Tensor, nn

from tinyonn_lib.evaluate import Loss
from tinyonn_lib.kv import contest, judge
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import LINEAR_ALL, LINEUP, Contest, Entry, Texts
from tinyonn_lib.kv.data import Caches
from tinyonn_lib.kv.ridge import fit_ridge, linears
from tinyonn_lib.kv.train import Recipe

RECIPE = Recipe(steps=4, batch=4)
OURS = Entry("ours", "ours", "lm", ridge=True)
CACHES = Entry("ours, own cache", "ours", "mse", ridge=True)


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> Texts:
    rows = [drawn(count, seed, groups=12) for seed, count in enumerate((16, 6, 14))]
    return Texts(*(Caches(student, {"t": teacher}, each) for each in rows))


def ring(texts: Texts, **options: Any) -> Contest:
    return Contest(texts, **{"recipe": RECIPE, "rates": [1e-3, 3e-2]} | options)


def state(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_floors_are_there_from_the_start(texts: Texts) -> None:
    table = ring(texts).table().set_index("cache")
    assert table["kind"].to_dict() == {
        "own cache": "reference", "no cache": "floor", "zero cache": "floor", "mean cache": "floor",
        "own cache of another text": "floor",
    }  # fmt: skip
    assert table.loc[judge.OWN, "closed"] == 1
    assert table.loc[judge.ZERO, "closed"] == 0
    assert not table["edge"].any()
    assert table["mse"].isna().all()
    assert table.loc[judge.OWN, "nll"] == judge.loss(judge.floors(texts.train)[judge.OWN], texts.heldout).mean


def test_held_out_loss_chooses_nothing(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """With held-out losses turned upside down and shuffled, rates, projectors and the best are the same."""
    honest, told = judge.loss, np.random.default_rng(0)

    def poisoned(source: judge.Source, caches: Caches) -> Loss:
        found = honest(source, caches)
        return Loss(-told.permutation(found.nats), found.tokens) if caches is texts.heldout else found

    def held() -> Contest:
        found = ring(texts)
        for entry in (CACHES, OURS):
            found.enter(entry)
        return found

    one = held()
    monkeypatch.setattr(judge, "loss", poisoned)
    other = held()
    assert one.losses["ours"][0].mean > 0 > other.losses["ours"][0].mean
    assert (one.rates, one.edges, one.best(["ours"])) == (other.rates, other.edges, other.best(["ours"]))
    for label in ("ours", "ours, own cache"):
        assert one.validation[label] == other.validation[label]
        assert same(state(one.projectors[label]), state(other.projectors[label]))


def test_each_takes_the_rate_that_validation_likes_best(texts: Texts) -> None:
    rates = [3e-2, 1e-4, 3e-3]
    found = ring(texts, rates=rates)
    found.enter(replace(OURS, faster=2.0))
    alone = {}
    for rate in rates:
        single = ring(texts, rates=[rate])
        single.enter(replace(OURS, faster=2.0))
        assert single.rates["ours"] == 2 * rate
        assert not single.edges  # a single rate has no edges
        alone[2 * rate] = single
    best = min(alone, key=lambda rate: alone[rate].validation["ours"])
    assert found.rates["ours"] == best
    assert same(state(found.projectors["ours"]), state(alone[best].projectors["ours"]))
    assert found.losses["ours"][0].mean == alone[best].losses["ours"][0].mean
    assert ("ours" in found.edges) == (best in (2e-4, 6e-2))
    assert len({single.validation["ours"] for single in alone.values()}) == 3


def test_best_is_by_validation_within_its_kinds(texts: Texts) -> None:
    found = ring(texts)
    loss = found.losses[judge.OWN][0]
    worse = Loss(loss.nats + 1, loss.tokens)
    found.add("poor by validation", "ours", [loss], chosen_by=2.0)
    found.add("poor by held-out", "ours", [worse], chosen_by=1.0)
    found.add("another", "document", [loss], chosen_by=0.5)
    assert found.best(["ours"]) == "poor by held-out"
    assert found.best(["document"]) == found.best(["ours", "document"]) == "another"


@pytest.mark.parametrize(("rate", "rates", "edge"), [(1.0, (1.0, 2.0, 3.0), True), (3.0, (1.0, 2.0, 3.0), True),
                                                      (2.0, (1.0, 2.0, 3.0), False), (1.0, (1.0, 2.0), False),
                                                      (0.0, (), False)])  # fmt: skip
def test_edges(rate: float, rates: tuple[float, ...], edge: bool, texts: Texts) -> None:
    found = ring(texts)
    found.add("x", "ours", found.losses[judge.OWN], rate=rate, rates=rates)
    assert found.table().set_index("cache").loc["x", "edge"] == edge
    assert found.edges == ({"x"} if edge else set())


def test_everybody_begins_at_the_closed_form_whoever_was_trained_before(texts: Texts) -> None:
    """The memo is the solution itself: not the projector that was first, nor what became of it."""
    found = ring(texts)
    found.enter(CACHES)
    for options in (OURS.options, LINEAR_ALL | {"sources": 1}, LINEAR_ALL | {"sources": 1, "joint": False}):
        for _ in range(2):  # solved, then remembered
            fresh, begun = found.fresh(options, 7), found.fresh(options, 7)
            fit_ridge(fresh, texts.train, texts.validation)
            found._begin(begun)
            assert same(state(fresh), state(begun))
    trained, begun = found.projectors[CACHES.label], found.fresh(CACHES.options, RECIPE.seed)
    found._begin(begun)
    for one, other in zip(linears(trained).values(), linears(begun).values(), strict=True):
        assert not torch.equal(one.weight, other.weight)


def test_the_order_of_entries_makes_no_difference(texts: Texts) -> None:
    one, other = ring(texts), ring(texts)
    for entry in (CACHES, OURS):
        one.enter(entry)
    for entry in (OURS, CACHES):
        other.enter(entry)
    for label in (OURS.label, CACHES.label):
        assert same(state(one.projectors[label]), state(other.projectors[label]))
        assert one.validation[label] == other.validation[label]


def test_closed_form_alone_is_the_ridge(texts: Texts) -> None:
    found = ring(texts, seeds=3)
    found.enter(Entry("ridge", "control", ridge=True, options=LINEAR_ALL))
    fresh = found.fresh(LINEAR_ALL, 0)
    assert fresh.layer_maps == {"t": [list(range(5))] * 3}  # `sources` 0: all of the teacher's layers
    fit_ridge(fresh, texts.train, texts.validation)
    row = found.table().set_index("cache").loc["ridge"]
    assert (row["nll"], row["seeds"], row["lr"]) == (judge.loss(judge.projected(fresh), texts.heldout).mean, 1, 0.0)
    near = judge.error(judge.projected(fresh), texts.heldout)
    assert row[list(near)].to_dict() == near
    assert row["parameters"] == sum(p.numel() for p in fresh.parameters())
    assert row["layers"] == 5


def test_all_layers_unless_they_are_beyond_a_closed_form(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five layers of 32, keys with values: 320 inputs."""
    for most, layers in ((320, 5), (319, 4), (63, 1), (10**6, 5)):
        monkeypatch.setattr(contest, "WIDEST", most)
        assert len(ring(texts).fresh(LINEAR_ALL, 0).layer_maps["t"][0]) == layers


def test_our_best_of_another_text_is_a_floor(texts: Texts) -> None:
    found = ring(texts)
    found.enter(OURS)
    found.shuffle("ours")
    row = found.table().set_index("cache").loc[contest.SHUFFLED]
    expected = judge.loss(judge.shuffled(judge.projected(found.projectors["ours"])), texts.heldout)
    assert (row["kind"], row["nll"]) == ("floor", expected.mean)
    assert expected.mean != found.losses["ours"][0].mean
    assert found.best(["ours"]) == "ours"


def test_seeds_repeat_the_best_rate_from_other_starts(texts: Texts) -> None:
    found = ring(texts, seeds=3)
    entry = Entry("MLP", "document", "mse", faster=10.0, options=contest.DOCUMENT)
    found.enter(entry)
    first = ring(texts, recipe=replace(RECIPE, seed=1), rates=[found.rates["MLP"] / 10])
    first.enter(entry)
    means = [each.mean for each in found.losses["MLP"]]
    assert len(set(means)) == 3
    assert means[1] == first.losses["MLP"][0].mean
    row = found.table().set_index("cache").loc["MLP"]
    assert (row["nll"], row["spread"]) == (pytest.approx(np.mean(means)), pytest.approx(np.std(means, ddof=1)))
    gap = found.duel("MLP", judge.OWN)
    assert gap.mean == pytest.approx(row["nll"] - found.losses[judge.OWN][0].mean)
    assert gap.low < gap.mean < gap.high


def test_fresh_is_by_its_seed_and_leaves_random_numbers_alone(texts: Texts) -> None:
    found = ring(texts, options={"mlp_ratio": 0.25, "layer_maps": {"t": [[0], [1], [4]]}})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (found.fresh({}, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(one), state(two))
    assert not same(state(one), state(other))
    assert (one.options["mlp_ratio"], one.layer_maps) == (0.25, {"t": [[0], [1], [4]]})
    assert found.fresh(contest.DOCUMENT, 0).options["mlp_ratio"] == 1.0  # ours are ours alone


class Killed(Exception):
    pass


class Reports:
    """A reporter that after some steps of all trainings raises; and what was resumed."""

    def __init__(self, stop: int = 10**9) -> None:
        self.stop, self.steps, self.resumed = stop, 0, 0

    def __call__(self, what: str, unit: str) -> Any:
        def report(done: int, total: int, note: str = "") -> None:
            self.resumed += "going on" in note
            self.steps += 1
            if self.steps > self.stop:
                raise Killed

        return report


def test_a_killed_contest_goes_on_to_the_same_bits(texts: Texts, tmp_path: Path) -> None:
    entry = Entry("ours, dropout", "ours", "lm", ridge=True, options={"dropout": 0.3})
    kept: dict[str, Any] = {"resume": tmp_path / "kept", "every_seconds": 0.0, "rates": [1e-3, 1e-2], "seeds": 2}
    plain = ring(texts, rates=[1e-3, 1e-2], seeds=2)
    plain.enter(entry)
    for stop in (1, 2):
        with pytest.raises(Killed):
            ring(texts, progress=Reports(stop), **kept).enter(entry)
    reports = Reports()
    found = ring(texts, progress=reports, **kept)
    found.enter(entry)
    assert reports.resumed > 0
    assert same(state(plain.projectors[entry.label]), state(found.projectors[entry.label]))
    for one, other in zip(plain.losses[entry.label], found.losses[entry.label], strict=True):
        np.testing.assert_array_equal(one.nats, other.nats)
    assert plain.rates == found.rates
    again = Reports()
    last = ring(texts, progress=again, **kept)
    last.enter(entry)
    assert again.resumed == 3  # both rates and the second seed
    assert same(state(last.projectors[entry.label]), state(found.projectors[entry.label]))
    other = Reports()
    ring(texts, progress=other, **kept | {"recipe": replace(RECIPE, steps=3)}).enter(entry)
    assert other.resumed == 0


def test_the_student_is_left_alone(texts: Texts) -> None:
    student = texts.train.student.model
    before = state(student)
    found = ring(texts)
    found.enter(OURS)
    assert same(before, state(student))
    assert not any(p.requires_grad for p in student.parameters())


def test_lineup() -> None:
    """The document's in the widths of its table, controls without an MLP, ours; each label once."""
    assert len({entry.label for entry in LINEUP}) == len(LINEUP)
    document = [entry for entry in LINEUP if entry.kind == "document"]
    assert {entry.options["mlp_ratio"] for entry in document if entry.options["kind"] == "mlp"} == {0.5, 1.0, 2.0}
    assert all(entry.options["shared"] and entry.options["sources"] == 1 and not entry.ridge for entry in document)
    assert {entry.objective for entry in document} == {"mse", "lm"}
    assert all(entry.options["kind"] == "linear" for entry in LINEUP if entry.kind == "control")
    assert {entry.label for entry in LINEUP if entry.kind == "ours"} == {contest.OURS, contest.OURS_CACHES}
    assert {contest.RIDGE, contest.RIDGE_TRAINED} <= {entry.label for entry in LINEUP if entry.kind == "control"}
