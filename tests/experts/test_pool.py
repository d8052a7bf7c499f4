"""A pool has exactly as many experts as asked for, made of the best neurons, each of one layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.partition import DROPPED, SHARED
from tinyonn_lib.experts.pool import _allot, pool
from tinyonn_lib.experts.score import FEATURES


@pytest.fixture
def scores() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    index = [(layer, neuron) for layer in range(3) for neuron in range(60)]
    table = pd.DataFrame(index, columns=["layer", "neuron"])
    table[list(FEATURES)] = rng.normal(size=(180, len(FEATURES)))
    table["sp"] = rng.normal(size=180) + table["layer"].map({0: 2.0, 1: 0.0, 2: -1.0})
    return table


@pytest.mark.parametrize(("rest", "label"), [("shared", SHARED), ("dropped", DROPPED)])
def test_exactly_so_many_of_the_best(scores: pd.DataFrame, rest: str, label: int) -> None:
    part = pool(scores, experts=20, size=4, rest=rest)
    part.check([60, 60, 60])
    counts = [len(index) for index in part.experts]
    assert sum(counts) == 20
    assert all(index.shape[1] == 4 for index in part.experts if len(index))
    assert counts[0] > counts[1] > counts[2]  # layers compete: the first has the higher scores
    table = part.table().merge(scores, on=["layer", "neuron"])
    assert set(table.loc[table["expert"] < 0, "expert"]) == {label}
    for _, rows in table.groupby("layer"):
        inside, outside = rows[rows["expert"] >= 0]["sp"], rows[rows["expert"] < 0]["sp"]
        assert inside.empty or outside.empty or inside.min() >= outside.max()


def test_seats_follow_the_votes(scores: pd.DataFrame) -> None:
    even = scores.assign(sp=np.tile(np.arange(60), 3))
    assert [len(index) for index in pool(even, experts=9, size=4).experts] == [3, 3, 3]
    loud = scores.assign(sp=np.where(scores["layer"] == 2, 100.0, 0.0) + np.tile(np.arange(60), 3))
    assert [len(index) for index in pool(loud, experts=10, size=4).experts] == [0, 0, 10]
    # A full layer leaves its surplus to the others.
    assert [len(index) for index in pool(loud, experts=20, size=4).experts] == [3, 2, 15]


@pytest.mark.parametrize(
    ("votes", "seats", "expected"),
    [
        ([60, 25, 15], 10, [6, 3, 1]),  # 6, 2.5 and 1.5: equal remainders, the first gets the seat
        ([61, 25, 14], 10, [6, 3, 1]),  # 6.1, 2.5, 1.4
        ([259, 272, 269], 100, [32, 34, 34]),  # 32.4, 34.0, 33.6
        ([100, 1, 0], 4, [2, 1, 1]),  # the first has room for two; what is left goes round
    ],
)
def test_seats_by_largest_remainders(votes: list[int], seats: int, expected: list[int]) -> None:
    room = np.array([2, 50, 50]) if votes[0] == 100 else np.array([50, 50, 50])
    assert _allot(np.array(votes), room, seats).tolist() == expected


def test_equal_votes_give_equal_seats() -> None:
    given = _allot(np.full(40, 320), np.full(40, 54), 100)
    assert given.sum() == 100
    assert np.ptp(given) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"experts": 100, "size": 128}, "100 experts of 128 needs 12800 neurons, there are 180"),
        ({"experts": 4, "size": 45}, "do not fit into the layers one by one"),
        ({"rest": "burnt"}, "choose shared or dropped"),
    ],
)
def test_pools_that_cannot_be(scores: pd.DataFrame, arguments: dict[str, object], says: str) -> None:
    with pytest.raises(BenchError, match=says):
        pool(scores, **arguments)
