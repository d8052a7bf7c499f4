"""What a cache is worth: floors and the shuffled control, loss, closeness, the share of the gap with its interval."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from kv_texts import drawn
from sklearn.metrics import r2_score
from torch import Tensor

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import Loss
from tinyonn_lib.kv import judge
from tinyonn_lib.kv.cache import KV, KVModel
from tinyonn_lib.kv.data import Batch, Caches, own_of
from tinyonn_lib.kv.handover import nats
from tinyonn_lib.kv.projector import KVDimensionProjector

MEAN, OTHER = "mean cache", "own cache of another text"


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> Caches:
    return Caches(student, {"t": teacher, "s": student}, drawn(13), batch=4)


def sides(kv: KV) -> tuple[Tensor, Tensor]:
    return kv.keys, kv.values


def tokens_of(side: Tensor, mask: Tensor) -> np.ndarray:
    """`(real tokens, layers × width)` in float64, token by token."""
    rows = [side[row, :, token].flatten() for row, real in enumerate(mask.sum(1).tolist()) for token in range(real)]
    return torch.stack(rows).double().numpy()


def rescaled(batch: Batch) -> KV:
    """Neither the own cache nor far from it."""
    own = own_of(batch)
    return KV(own.keys * 0.8 + 0.05, own.values.roll(1, 0) * 0.3 + own.values)


# What is handed over


@pytest.mark.parametrize("names", [["t"], ["s"], ["s", "t"]])
def test_projected_takes_each_teacher_by_name(names: list[str], texts: Caches) -> None:
    """Not by place: caches may hold more teachers, and in another order."""
    torch.manual_seed(0)
    projector = KVDimensionProjector.from_configs(
        {name: texts.teachers[name].model.config for name in names}, texts.student.model.config
    )
    batch = texts[torch.arange(5)]
    found = judge.projected(projector)(batch)
    expected = projector.project_multi_teacher_kv({n: texts.teachers[n].read(batch["ids"]) for n in names})
    assert found is not None
    for one, two in zip(sides(found), sides(expected), strict=True):
        torch.testing.assert_close(one, two)


def test_floors_by_hand(texts: Caches, student: KVModel, teacher: KVModel) -> None:
    found = judge.floors(texts)
    assert list(found) == ["own cache", "no cache", "zero cache", MEAN, OTHER]
    held = Caches(student, {"t": teacher}, drawn(6, 1))
    batch, whole = held[torch.arange(6)], texts[torch.arange(13)]
    own = own_of(batch)
    assert found["no cache"](batch) is None
    for number, side in enumerate(sides(own)):
        given: list[Any] = [found[name](batch) for name in ("own cache", "zero cache", MEAN)]
        mine, zero, mean = (sides(kv)[number] for kv in given)
        assert torch.equal(mine, side)
        assert zero.shape == mean.shape == side.shape
        assert not zero.any()
        # Of the texts it was made from, padding left out, whatever it is asked about.
        expected = tokens_of(sides(own_of(whole))[number], whole["mask"]).mean(0).reshape(3, -1)
        np.testing.assert_allclose(mean[4, :, 3].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(mean, mean[:1, :, :1].expand_as(mean))


def test_mean_floor_never_sees_padding(texts: Caches) -> None:
    spoilt: Any = copy.copy(texts)
    batches = list(texts.batches())
    for batch in batches:
        for key in ("own.keys", "own.values"):
            batch[key] = batch[key].masked_fill(~batch["mask"][:, None, :, None], 1e9)
    spoilt.batches = lambda: batches
    whole = texts[torch.arange(13)]
    one, two = (judge.floors(each)[MEAN](whole) for each in (texts, spoilt))
    assert one is not None
    assert two is not None
    torch.testing.assert_close(one.keys, two.keys)


def test_shuffled_is_another_text_s_and_never_padding(texts: Caches) -> None:
    batch = texts[torch.arange(13)]
    lengths = batch["mask"].sum(1).tolist()
    assert min(lengths) < 5 < max(lengths)

    def source(given: Batch) -> KV:
        """Each number tells its text and place; NaN where there is none."""
        places = torch.arange(given["ids"].shape[1]) + 100 * torch.arange(len(given["ids"]))[:, None]
        told = places.double().masked_fill(~given["mask"], float("nan"))[:, None, :, None].expand(-1, 3, -1, 16)
        return KV(told, told + 0.5)

    found = judge.shuffled(source)(batch)
    assert found is not None
    assert found.keys.isfinite().all()
    assert torch.equal(found.values, found.keys + 0.5)
    assert torch.equal(found.keys, found.keys[:, :1, :, :1].expand_as(found.keys))
    for row in range(13):
        other = (row - 1) % 13
        said = found.keys[row, 0, :, 0].tolist()
        assert said == [100 * other + place % lengths[other] for place in range(len(said))]
    assert judge.shuffled(lambda _: None)(batch) is None


@pytest.mark.parametrize(("count", "batch"), [(9, 4), (9, 8), (3, 1), (5, 2), (2, 1), (2, 32)])
def test_no_text_is_handed_its_own_as_another_s(count: int, batch: int, texts: Caches) -> None:
    """Not the last one either, which may be alone in its batch."""
    several = Caches(texts.student, {"s": texts.student}, drawn(count, 3), batch=batch)
    seen: list[tuple[list[int], float]] = []

    def watched(given: Batch) -> KV:
        said = judge.shuffled(own_of)(given)
        assert said is not None
        seen.extend(zip(given["ids"].tolist(), (said.values - own_of(given).values).abs().amax((1, 2, 3)).tolist(),
                        strict=True))  # fmt: skip
        return said

    found = judge.loss(watched, several)
    assert [ids for ids, _ in seen] == several.ids.tolist()
    assert min(far for _, far in seen) > 0.01
    assert found.tokens.tolist() == (several.mask.sum(1) - 1).tolist()
    again = judge.loss(judge.shuffled(own_of), several)
    assert np.array_equal(again.nats, found.nats)


def test_a_single_text_has_no_other(texts: Caches) -> None:
    alone = Caches(texts.student, {"s": texts.student}, drawn(1))
    with pytest.raises(BenchError, match="at least two held-out texts"):
        judge.loss(judge.shuffled(own_of), alone)
    assert len(judge.loss(own_of, alone).nats) == 1


# Loss and closeness


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_loss_text_by_text(batch: int, texts: Caches) -> None:
    same = Caches(texts.student, {"s": texts.student}, drawn(13), batch=batch)
    own = judge.loss(own_of, same)
    rows = [ids[mask].tolist() for ids, mask in zip(same.ids, same.mask, strict=True)]
    usual = evaluate.loss(texts.student.model, rows)
    np.testing.assert_allclose(own.nats, usual.nats, rtol=1e-4)
    assert own.tokens.tolist() == usual.tokens.tolist() == [len(row) - 1 for row in rows]
    assert (own.nats.dtype, own.tokens.dtype) == (np.float64, np.int64)
    none = judge.loss(judge.floors(same)[judge.NONE], same)
    for row in range(13):
        ids, mask = same.ids[row : row + 1], same.mask[row : row + 1]
        with torch.no_grad():
            expected = float(nats(same.student, None, ids, mask).double().sum())
        assert none.nats[row] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_error_equals_scikit_learn_s(batch: int, texts: Caches) -> None:
    whole = texts[torch.arange(13)]
    said, mask = rescaled(whole), whole["mask"]

    def source(given: Batch) -> KV:
        """Of the whole, so that it does not depend on how the texts are divided."""
        rows = [whole["ids"].tolist().index(ids) for ids in given["ids"].tolist()]
        kv = said[rows]
        return KV(*(t.masked_fill(~given["mask"][:, None, :, None], 1e6) for t in sides(kv)))

    found = judge.error(source, Caches(texts.student, {"s": texts.student}, drawn(13), batch=batch))
    expected = 0.0
    for name, own, other in zip(("keys", "values"), sides(own_of(whole)), sides(said), strict=True):
        true, guess = tokens_of(own, mask), tokens_of(other, mask)
        expected += float(((true - guess) ** 2).mean())
        r2 = r2_score(true, guess, multioutput="variance_weighted")
        assert 0.2 < r2 < 0.999
        assert found[f"r2_{name}"] == pytest.approx(r2, rel=1e-6)
    assert found["mse"] == pytest.approx(expected, rel=1e-6)
    assert set(found) == {"mse", "r2_keys", "r2_values"}


def test_error_of_own_mean_and_nothing(texts: Caches) -> None:
    floors = judge.floors(texts)
    assert judge.error(floors[judge.OWN], texts) == {"mse": 0.0, "r2_keys": 1.0, "r2_values": 1.0}
    mean = judge.error(floors[MEAN], texts)
    assert (mean["r2_keys"], mean["r2_values"]) == pytest.approx((0, 0), abs=1e-6)
    assert judge.error(floors[judge.ZERO], texts)["r2_keys"] < 0
    nothing = judge.error(floors[judge.NONE], texts)
    assert set(nothing) == {"mse", "r2_keys", "r2_values"}
    assert all(math.isnan(value) for value in nothing.values())


# The share of the gap


def fake(nats: np.ndarray) -> Loss:
    return Loss(nats, np.full(len(nats), 10, np.int64))


def example(texts: int, files: int) -> tuple[list[Loss], Loss, Loss, list[str]]:
    """Three seeds of a cache that closes about two thirds; files of unlike size and worth."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, files, texts) if files < texts else np.arange(texts)
    zero = rng.gamma(4, 10, texts) + 30
    own = zero - rng.gamma(3, 3, files)[group] - rng.random(texts)
    seeds = [zero - (zero - own) * (0.66 + 0.2 * rng.normal(size=files)[group]) for _ in range(3)]
    return [fake(nats) for nats in seeds], fake(own), fake(zero), [f"file {n}" for n in group]


@pytest.mark.parametrize("files", [20, 200])
def test_interval_equals_a_bootstrap_by_hand(files: int) -> None:
    losses, own, zero, groups = example(200, files)
    found = judge.closed(losses, own, zero, groups)
    mean = sum(each.nats for each in losses) / 3
    assert found["closed"] == pytest.approx((zero.nats.sum() - mean.sum()) / (zero.nats.sum() - own.nats.sum()))
    names, rng, shares = sorted(set(groups)), np.random.default_rng(99), []
    members = {name: [n for n, group in enumerate(groups) if group == name] for name in names}
    for _ in range(4000):
        drawn_now = [n for place in rng.integers(0, len(names), len(names)) for n in members[names[place]]]
        up, down = (zero.nats - mean)[drawn_now].sum(), (zero.nats - own.nats)[drawn_now].sum()
        shares.append(up / down)
    low, high = np.quantile(shares, [0.025, 0.975])
    assert high - low > 0.01
    assert found["closed_low"] == pytest.approx(low, abs=0.05 * (high - low))
    assert found["closed_high"] == pytest.approx(high, abs=0.05 * (high - low))


def test_nothing_closes_nothing_and_own_closes_all() -> None:
    _, own, zero, groups = example(60, 12)
    for side, share in ((zero, 0.0), (own, 1.0)):
        found = judge.closed([side, side], own, zero, groups)
        assert list(found.values()) == pytest.approx([share] * 3)
    better = fake(own.nats - 0.5 * (zero.nats - own.nats))
    assert list(judge.closed([better], own, zero, groups).values()) == pytest.approx([1.5] * 3)


def test_interval_follows_the_seed_alone() -> None:
    losses, own, zero, groups = example(60, 12)
    one, two, other = (judge.closed(losses, own, zero, groups, seed) for seed in (0, 0, 1))
    assert one == two
    assert one["closed"] == other["closed"]
    assert one["closed_low"] != other["closed_low"]


def test_too_few_files_give_no_interval() -> None:
    for files, known in ((evaluate.MIN_GROUPS - 1, False), (evaluate.MIN_GROUPS, True)):
        losses, own, zero, _ = example(70, files)
        found = judge.closed(losses, own, zero, [str(n % files) for n in range(70)])
        assert 0.3 < found["closed"] < 1
        assert math.isfinite(found["closed_low"]) == math.isfinite(found["closed_high"]) == known


def test_table() -> None:
    losses, own, zero, groups = example(60, 12)
    found = judge.table({"ours": losses, judge.OWN: [own], judge.ZERO: [zero]}, groups, seed=5)
    assert found.columns.tolist() == ["cache", "nll", "perplexity", "spread", "seeds", "closed", "closed_low",
                                      "closed_high"]  # fmt: skip
    assert found["cache"].tolist() == ["ours", "own cache", "zero cache"]
    assert found["seeds"].tolist() == [3, 1, 1]
    means = [each.nats.sum() / 600 for each in losses]
    ours = found.iloc[0]
    assert ours["nll"] == pytest.approx(np.mean(means))
    assert ours["perplexity"] == pytest.approx(math.exp(np.mean(means)))
    assert ours["spread"] == pytest.approx(math.sqrt(np.sum((np.array(means) - np.mean(means)) ** 2) / 2))
    assert ours["spread"] > 0.001
    assert found["spread"].isna().tolist() == [False, True, True]
    assert found["closed"].tolist()[1:] == [1, 0]
    assert {name: ours[name] for name in found.columns[5:]} == judge.closed(losses, own, zero, groups, seed=5)


def test_table_of_real_caches(texts: Caches) -> None:
    losses = {name: [judge.loss(source, texts)] for name, source in judge.floors(texts).items()}
    assert all(np.isfinite(each[0].nats).all() for each in losses.values())
    found = judge.table(losses, texts.source).set_index("cache")
    assert found.loc[judge.OWN, "closed"] == 1
    assert found.loc[judge.ZERO, "closed"] == 0
    assert found["nll"].nunique() == 5  # five different things to hand over
    assert found["closed_low"].isna().all()  # three files
