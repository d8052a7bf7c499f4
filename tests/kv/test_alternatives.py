"""The student fine-tuned, and the student that moves along: copies alone are trained, and what is told is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kv_texts import drawn
from torch import Tensor, nn

from tinyonn_lib import evaluate
from tinyonn_lib.kv import alternatives, judge
from tinyonn_lib.kv.alternatives import co_trained, lora_student
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import DOCUMENT, LORA, Contest, Entry, Texts
from tinyonn_lib.kv.data import Caches, own_of
from tinyonn_lib.kv.train import Recipe, train
from tinyonn_lib.selection.lora import Lora, adapt

OURS = Entry("ours", "ours", ridge=True)


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> Texts:
    rows = [drawn(count, seed, groups=12) for seed, count in enumerate((16, 6, 14))]
    return Texts(*(Caches(student, {"t": teacher}, each) for each in rows))


def ring(texts: Texts, parameters: int = 2000, **options: Any) -> Contest:
    """With ours already judged, of a size."""
    made = Contest(texts, **{"recipe": Recipe(steps=6, batch=4), "rates": [1e-3, 1e-2]} | options)
    made.add("ours", "ours", made.losses[judge.OWN], chosen_by=1.0, parameters=parameters)
    made.add("MLP 1×", "document", made.losses[judge.OWN], chosen_by=1.0, rate=1e-3)
    return made


def state(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def kept(caches: Caches) -> list[Tensor]:
    assert caches._kept is not None
    return [tensor.clone() for tensor in caches._kept.values()]


def test_lora_leaves_the_student_as_it_was(texts: Texts) -> None:
    student = texts.train.student.model
    before, modules = state(student), [type(module) for module in student.modules()]
    found = ring(texts, rates=[1e-2])
    lora_student(found)
    assert same(before, state(student))
    assert modules == [type(module) for module in student.modules()]
    assert not any(value.requires_grad or value.grad is not None for value in student.parameters())
    row = found.table().set_index("cache").loc[LORA]
    assert (row["kind"], row["seeds"]) == ("another way", 1)
    assert row["lr"] in (1e-3, 3e-3, 1e-2)
    assert row["nll"] != found.losses[judge.OWN][0].mean


def test_lora_learns(texts: Texts) -> None:
    """Random texts can only be learnt by heart."""
    known = Texts(texts.train, texts.train, texts.heldout)
    found = ring(known, rates=[1e-2], recipe=Recipe(steps=40, batch=8))
    lora_student(found)
    assert found.validation[LORA] < judge.loss(own_of, texts.train).mean - 0.5


@pytest.mark.parametrize(("wanted", "rank"), [(1, 1), (2.2, 2), (7.6, 8), (1e9, 16)])
def test_lora_is_as_large_as_ours(wanted: float, rank: int, texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rank 1 a layer of (in, out) has in + out; the narrowest side, 16, is full rank."""
    linears = [m for m in texts.train.student.model.model.modules() if isinstance(m, nn.Linear)]
    each = sum(m.in_features + m.out_features for m in linears)
    ranks: list[Lora] = []

    def noted(model: Any, lora: Lora, seed: int) -> Any:
        ranks.append(lora)
        return adapt(model, lora, seed)

    monkeypatch.setattr("tinyonn_lib.selection.lora.adapt", noted)
    found = ring(texts, round(wanted * each), rates=[1e-3], recipe=Recipe(steps=1))
    lora_student(found)
    assert found.parameters[LORA] == rank * each
    assert ranks[-1] == Lora(r=rank, alpha=2.0 * rank)


def test_lora_s_loss_is_the_plain_one_on_the_same_tokens(texts: Texts) -> None:
    """A rate that changes nothing gives the student's own loss, text by text: it pairs with all others."""
    found = ring(texts, rates=[1e-12])
    lora_student(found)
    (one,), (own,) = found.losses[LORA], found.losses[judge.OWN]
    np.testing.assert_array_equal(one.tokens, own.tokens)
    np.testing.assert_allclose(one.nats, own.nats, rtol=1e-5)
    assert found.duel(LORA, judge.OWN).mean == pytest.approx(0, abs=1e-5)
    assert found.validation[LORA] == pytest.approx(judge.loss(own_of, texts.validation).mean, rel=1e-5)


def test_lora_chooses_by_validation_and_repeats_with_other_seeds(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, rows = evaluate.loss, alternatives._rows(texts.heldout)

    def poisoned(model: Any, given: Any) -> evaluate.Loss:
        found = honest(model, given)
        return evaluate.Loss(-found.nats, found.tokens) if given == rows else found

    one, other = (ring(texts, seeds=2, rates=[1e-4, 1e-2, 3e-1]) for _ in range(2))
    lora_student(one)
    monkeypatch.setattr(evaluate, "loss", poisoned)
    lora_student(other)
    assert (one.rates, one.validation[LORA], one.edges) == (other.rates, other.validation[LORA], other.edges)
    assert len(one.losses[LORA]) == 2
    assert one.losses[LORA][0].mean == -other.losses[LORA][0].mean != -other.losses[LORA][1].mean


def test_lora_goes_on_after_a_kill(texts: Texts, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def killing(what: str, unit: str) -> Any:
        def report(done: int, total: int, note: str = "") -> None:
            raise Killed

        return report

    plain, options = ring(texts), {"resume": tmp_path, "every_seconds": 0.0}
    lora_student(plain)
    with pytest.raises(Killed):
        lora_student(ring(texts, progress=killing, **options))
    assert len(list(tmp_path.glob("student_with_LoRA*.pt"))) == 1
    found = ring(texts, **options)
    lora_student(found)
    np.testing.assert_array_equal(plain.losses[LORA][0].nats, found.losses[LORA][0].nats)
    assert plain.rates == found.rates


# The student that moves along


def test_nothing_of_the_contest_is_moved(texts: Texts) -> None:
    found = ring(texts)
    student, caches = texts.train.student, (texts.train, texts.validation, texts.heldout)
    before, tensors, names = state(student.model), [kept(each) for each in caches], list(found.losses)
    table = co_trained(found, [1e-2])
    assert table["own_change"][0] != 0
    assert same(before, state(student.model))
    assert all(same(one, kept(each)) for one, each in zip(tensors, caches, strict=True))
    assert all(each.student is student for each in caches)
    assert not any(value.requires_grad for value in student.model.parameters())
    assert list(found.losses) == names


def test_a_frozen_student_changes_by_nothing(texts: Texts) -> None:
    found = ring(texts)
    row = co_trained(found, [0.0]).iloc[0]
    own = found.losses[judge.OWN][0].mean
    assert (row["lr_student"], row["own"], row["spread"]) == (0, own, 1)
    assert not row["collapsed"]
    assert not row["harmed"]
    assert (row["own_change"], row["low"], row["high"]) == (0, 0, 0)
    projector = found.fresh(DOCUMENT, 0)
    train(projector, texts.train, Recipe("mse", lr=1e-3, steps=6, batch=4))
    assert row["projected"] == judge.loss(judge.projected(projector), texts.heldout).mean
    batch = texts.heldout[torch.arange(len(texts.heldout))]
    spreads = [
        side.transpose(1, 2)[batch["mask"]].double().var(0, correction=0).mean()
        for side in (batch["own.keys"], batch["own.values"])
    ]
    error = judge.error(judge.projected(projector), texts.heldout)["mse"]
    assert row["kv_error"] == pytest.approx(error / float(sum(spreads)), rel=1e-6)


def test_a_student_that_moves_is_measured_where_it_went(texts: Texts) -> None:
    found = ring(texts, recipe=Recipe(steps=30, batch=8))
    table = co_trained(found, [0.0, 3e-2])
    frozen, moved = table.iloc[0], table.iloc[1]
    assert table["lr_student"].tolist() == [0, 3e-2]
    assert moved["own"] - found.losses[judge.OWN][0].mean == pytest.approx(moved["own_change"], abs=1e-9)
    assert moved["spread"] < 0.7 < 1 == frozen["spread"]  # what is easiest to say is little
    for row in (frozen, moved):
        assert row["harmed"] == (row["low"] > 0)
        assert row["collapsed"] == (row["spread"] < alternatives.COLLAPSED)
        assert row["low"] <= row["own_change"] <= row["high"]


def test_error_is_in_units_of_what_its_cache_has_become(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student whose cache shrinks would otherwise look better and better."""
    monkeypatch.setattr(judge, "error", lambda source, caches: {"mse": 1.0})
    row = co_trained(ring(texts, recipe=Recipe(steps=30, batch=8)), [3e-2]).iloc[0]
    assert row["spread"] < 0.7
    now = row["spread"] * alternatives._spread(texts.heldout)
    assert row["kv_error"] == pytest.approx(1 / (2 * now**2))


def test_spread_is_about_the_mean_of_each_entry(texts: Texts) -> None:
    batch = texts.heldout[torch.arange(len(texts.heldout))]
    both = torch.cat([batch["own.keys"], batch["own.values"]], 1).transpose(1, 2)[batch["mask"]].double()
    assert alternatives._spread(texts.heldout) == pytest.approx(float(both.var(0, correction=0).mean().sqrt()))


def test_rows_are_without_padding(texts: Texts) -> None:
    assert alternatives._rows(texts.train) == drawn(16, 0, groups=12)["ids"].tolist()
