"""What caches look like, which layer reads which, and a single hand-over, against the same by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from kv_texts import drawn
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv import judge, profile
from tinyonn_lib.kv.align import cka
from tinyonn_lib.kv.cache import KV, KVModel
from tinyonn_lib.kv.data import Batch, Caches, own_of


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> Caches:
    return Caches(student, {"t": teacher}, drawn(14))


def spoilt(texts: Caches) -> Any:
    """With padding that would show."""
    other = copy.copy(texts)
    assert texts._kept is not None
    hidden = ~texts.mask[:, None, :, None]
    other._kept = {
        key: tensor.masked_fill(hidden, 1e6) if tensor.ndim == 4 else tensor for key, tensor in texts._kept.items()
    }
    return other


def test_distributions_by_hand(texts: Caches) -> None:
    table = profile.distributions(spoilt(texts))
    order = [("student", side, n) for side in ("keys", "values") for n in range(3)]
    order += [("t", side, n) for side in ("keys", "values") for n in range(5)]
    assert [tuple(row) for row in table[["model", "side", "layer"]].to_numpy()] == order
    batch = texts[torch.arange(14)]
    for row in table.itertuples():
        side = batch[f"{'own.' if row.model == 'student' else 't/'}{row.side}"]
        rows, places = batch["mask"].nonzero(as_tuple=True)
        here = side[rows, row.layer, places].double().numpy().ravel()
        expected = [here.mean(), here.std(), *np.quantile(here, [0.001, 0.999]), here.min(), here.max()]
        found = [row.mean, row.std, row.low, row.high, row.smallest, row.largest]
        np.testing.assert_allclose(np.array(found, float), expected, rtol=1e-4, atol=1e-5)


def test_similarity_is_cka_of_real_tokens(texts: Caches) -> None:
    found = profile.similarity(spoilt(texts), "t")
    assert found.shape == (3, 5)
    assert (list(found.index), list(found.columns)) == (["student 0", "student 1", "student 2"], [0, 1, 2, 3, 4])
    batch = texts[torch.arange(14)]
    rows, places = batch["mask"].nonzero(as_tuple=True)
    sides = [
        KV(*(batch[f"{who}{side}"][rows, :, places].transpose(0, 1)[None] for side in ("keys", "values")))
        for who in ("t/", "own.")
    ]
    np.testing.assert_allclose(found.to_numpy(), cka(*sides).numpy(), rtol=1e-6)
    assert found.to_numpy().min() >= 0
    assert found.to_numpy().max() <= 1


def test_a_model_is_most_like_itself(student: KVModel) -> None:
    found = profile.similarity(Caches(student, {"t": student}, drawn(14)), "t")
    np.testing.assert_allclose(np.diag(found), 1, rtol=1e-6)
    assert profile.layer_maps(found, "similarity", 1) == [[0], [1], [2]]


def test_layer_maps(texts: Caches) -> None:
    alike = profile.similarity(texts, "t")
    alike.iloc[:, :] = [[0.1, 0.2, 0.9, 0.3, 0.8], [0.9, 0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.4, 0.3, 0.2]]
    assert profile.layer_maps(alike, "depth", 1) == [[0], [2], [4]]
    assert profile.layer_maps(alike, "depth", 3) == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert profile.layer_maps(alike, "similarity", 1) == [[2], [0], [1]]
    assert profile.layer_maps(alike, "similarity", 2) == [[2, 4], [0, 4], [0, 1]]
    for how in ("depth", "similarity"):
        assert profile.layer_maps(alike, how, 9) == [[0, 1, 2, 3, 4]] * 3
    with pytest.raises(BenchError, match="layers=random: choose depth or similarity"):
        profile.layer_maps(alike, "random", 1)


# A single hand-over


def plain(texts: Caches, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each token after `at` + 1 as the student alone reads the text, text by text; and how many there are."""
    total, count = np.zeros(texts.ids.shape[1] - at - 1), np.zeros(texts.ids.shape[1] - at - 1)
    for ids, mask in zip(texts.ids, texts.mask, strict=True):
        row = ids[mask][None]
        logits = texts.student.model(input_ids=row).logits.double()
        costs = F.cross_entropy(logits[0, at:-1], row[0, at + 1 :], reduction="none").numpy()
        total[: len(costs)] += costs
        count[: len(costs)] += 1
    return total, count


@pytest.mark.parametrize(("at", "after"), [(1, [1, 2, 4, 8]), (4, [1, 2, 4]), (10, [1])])
def test_its_own_cache_costs_what_reading_costs(at: int, after: list[int], texts: Caches) -> None:
    assert texts.ids.shape[1] == 12
    table, losses = profile.by_distance({"own": own_of}, texts, at)
    total, count = plain(texts, at)
    assert table["after"].tolist() == after
    for row in table.itertuples():
        here = slice(row.after - 1, 2 * row.after - 1)
        assert row.tokens == count[here].sum() > 0
        assert row.nll == pytest.approx(total[here].sum() / count[here].sum(), rel=1e-5)
    assert table["tokens"].sum() == count.sum()
    # The same text by text, over all that comes after.
    assert losses["own"].nats.sum() == pytest.approx(total.sum(), rel=1e-5)
    assert losses["own"].tokens.tolist() == (texts.mask.sum(1) - at - 1).clamp_min(0).tolist()
    assert not losses["own"].nats[losses["own"].tokens == 0].any()


def test_each_cache_by_its_name_and_the_first_first(texts: Caches) -> None:
    floors = judge.floors(texts)
    sources = {name: floors[name] for name in (judge.OWN, judge.ZERO, judge.OTHER)}
    table, losses = profile.by_distance(sources, texts, 3)
    assert list(losses) == list(sources)
    assert table["cache"].tolist() == [*sources] * (len(table) // 3)
    for name, source in sources.items():
        alone, lonely = profile.by_distance({name: source}, texts, 3)
        np.testing.assert_array_equal(losses[name].nats, lonely[name].nats)
        assert table[table["cache"] == name].reset_index(drop=True).equals(alone)
    wide = table.pivot(index="after", columns="cache", values="nll")
    assert (wide[judge.ZERO] - wide[judge.OWN]).abs().min() > 1e-3


@pytest.mark.parametrize("at", [0, 11, 12, 40])
def test_no_place_to_hand_over(at: int, texts: Caches) -> None:
    with pytest.raises(BenchError, match="leaves nothing to predict"):
        profile.by_distance({"own": own_of}, texts, at)


class Numbers:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return " ".join(str(int(n)) for n in ids)


def greedy(student: KVModel, ids: torch.Tensor, count: int) -> list[int]:
    for _ in range(count):
        ids = torch.cat([ids, student.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("at", [5, 11, 50])
def test_goes_on_from_its_own_cache_as_it_would_alone(at: int, texts: Caches) -> None:
    """The first text that is long enough; where none is, the longest as far as it goes."""
    seen: list[Batch] = []

    def zero(batch: Batch) -> KV:
        seen.append(batch)
        own = own_of(batch)
        return KV(own.keys * 0, own.values * 0)

    told = profile.continued({"own": own_of, "zero": zero}, texts, Numbers(), at, new_tokens=5)
    lengths = texts.mask.sum(1).tolist()
    long = [row for row, length in enumerate(lengths) if length > at]
    row = long[0] if long else int(np.argmax(lengths))
    given = texts.ids[row, : min(at + 1, lengths[row])]
    first, own, nothing = told.values()
    assert first == Numbers().decode(given, True)
    assert own == Numbers().decode(greedy(texts.student, given[None], 5), True)
    assert len(nothing.split()) == 5
    # The next one beside it, so that another text may be handed over.
    assert torch.equal(seen[0]["ids"], texts.ids[[row, (row + 1) % len(texts)]])
    assert [label.split(" ")[0] for label in told] == ["The", "own", "zero"]


def test_a_long_text_is_shown_by_its_end(student: KVModel, teacher: KVModel) -> None:
    rows = drawn(2)
    rows["ids"] = [list(range(60)), list(range(50))]
    told = profile.continued({"own": own_of}, Caches(student, {"t": teacher}, rows), Numbers(), 55, new_tokens=2)
    assert next(iter(told.values())) == Numbers().decode(range(15, 56), True)


def test_the_last_text_goes_on_beside_the_first(student: KVModel, teacher: KVModel) -> None:
    rows = drawn(3)
    rows["ids"] = [[4, 5], [6, 7], list(range(9))]
    caches = Caches(student, {"t": teacher}, rows)
    told = profile.continued({"other": judge.floors(caches)[judge.OTHER]}, caches, Numbers(), 4, new_tokens=2)
    assert next(iter(told.values())) == "0 1 2 3 4"
