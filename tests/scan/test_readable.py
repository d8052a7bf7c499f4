from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scan_totals import CUT, LAYOUT, totals

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import readable
from tinyonn_lib.scan.server import private_server
from tinyonn_lib.scan.shards import Cut
from tinyonn_lib.scan.statistics import Layout, Target, Totals
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.tables import units_table

ONE = Layout((Target("gate", "linear", 6, 0),), rho=0.5)
SCALES = np.array([1e-30, 1e-16, 1e-9, 1.0, 1e6, 1e12])
SAMPLES = 50


def test_published_averages_are_those_of_the_tables(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readable, "_BATCH", 4)
    store.begin(LAYOUT, {}, CUT)
    with pytest.raises(BenchError, match="not published in the readable layout"):
        readable.read(store)
    for shard in range(2):
        store.claims.take(shard)
        store.commit(shard, totals(shard), CUT.range(shard).stop)
        assert store.publish() == LAYOUT.units  # the second time over what is there
    found, expected = readable.read(store), units_table(store.totals())
    for field, column in zip(readable.FIELDS, ("act", "grad", "freq"), strict=True):
        assert (found[field] == expected[column]).all()  # to the last bit
    assert (found[["target", "kind", "row"]] == expected[["target", "kind", "row"]]).all(axis=None)
    unit = store.connection.redis.hgetall(store.key("param:model.layers.0.self_attn.q_proj:row:2"))
    assert sorted(unit) == [b"avg_act", b"avg_grad_norm", b"freq_act"]
    assert float(unit[b"avg_act"]) == expected["act"][5 + 2]
    store.clear()
    assert not list(store.connection.redis.scan_iter("*published-averages*"))


def test_what_was_never_counted_is_left_out(store: Store) -> None:
    store.begin(ONE, {}, Cut(1, "x", 1))
    store.claims.take(0)
    forward_only = Totals(ONE, (np.ones((3, 6)),), np.array([[2.0, 1.0, 0.0, 0.0]]), np.zeros((1, 2)))
    store.commit(0, forward_only, 1)
    store.publish()
    assert sorted(store.connection.redis.hgetall(store.key("param:gate:row:0"))) == [b"avg_act", b"freq_act"]
    found = readable.read(store)
    assert found["avg_grad_norm"].isna().all()
    assert (found["avg_act"] == 0.5).all()


def test_one_name_watched_in_two_ways_is_told_apart(store: Store) -> None:
    both = Layout((Target("x", "linear", 1, 0), Target("x", "embedding", 1, 0)), rho=0.5)
    store.begin(both, {}, Cut(1, "x", 1))
    store.claims.take(0)
    sums = (np.full((3, 1), 2.0), np.full((2, 1), 3.0))
    store.commit(0, Totals(both, sums, np.ones((2, 4)), np.zeros((2, 2))), 1)
    store.publish()
    found = readable.read(store)
    assert found["avg_act"].tolist() == found["avg_grad_norm"].tolist() == [2.0, 3.0]


def test_the_documents_own_way_errs_by_a_1e_17_per_addition(store: Store) -> None:
    """HINCRBYFLOAT keeps 17 decimals: small values lose digits, then vanish; packed float64 does neither."""
    draw = np.random.default_rng(0)
    store.begin(ONE, {}, Cut(SAMPLES, "x", 1))
    exact = np.full((3, 6), Fraction(0))
    packed = Totals.zeros(ONE)
    for _ in range(SAMPLES):
        sums = draw.random((3, 6)) * SCALES
        counts = np.array([[5.0, 1.0, 5.0, 1.0]])
        readable.accumulate(store, Totals(ONE, (sums,), counts, np.zeros((1, 2))))
        packed.sums[0][:] += sums
        packed.counts[:] += counts
        exact += np.vectorize(Fraction, otypes=[object])(sums)
    store.claims.take(0)
    store.commit(0, packed, SAMPLES)
    divisors = np.array([[5 * SAMPLES], [5 * SAMPLES], [SAMPLES]], dtype=object)  # tokens, tokens, samples
    truth = (exact / divisors)[[0, 2, 1]].astype(float)
    found = readable.read(store)[list(readable.FIELDS)].to_numpy().T
    assert (np.abs(found - truth) <= SAMPLES * 1e-17 + 1e-15 * truth).all()
    assert (found[:, 0] == 0).all()
    assert (truth[:, 0] > 0).all()
    units = units_table(store.totals())[["act", "grad", "freq"]].to_numpy().T
    assert (np.abs(units - truth) <= SAMPLES * 2.0**-53 * truth).all()
    assert (np.abs(found - truth) > SAMPLES * 2.0**-53 * truth)[:, :2].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_documents_own_way_refuses_what_the_server_would(store: Store, bad: float) -> None:
    store.begin(ONE, {}, Cut(1, "x", 1))
    sums = np.ones((3, 6))
    sums[2, 3] = bad
    with pytest.raises(BenchError, match="NaN or infinity cannot be added with HINCRBYFLOAT"):
        readable.accumulate(store, Totals(ONE, (sums,), np.ones((1, 4)), np.zeros((1, 2))))
    assert not store.connection.redis.exists(store.key("param:gate:row:0"))
    with pytest.raises(Exception, match="not a valid float|NaN or Infinity"):
        store.connection.redis.hincrbyfloat(store.key("x"), "field", bad)


def test_a_store_that_is_gone_is_told(tmp_path: Path) -> None:
    with private_server(tmp_path / "s") as server:
        store = Store(server.url, "scan", retry_seconds=0.2)
        store.begin(ONE, {}, Cut(1, "x", 1))
        store.claims.take(0)
        store.commit(0, Totals.zeros(ONE), 1)
    for call in (store.publish, lambda: readable.accumulate(store, Totals.zeros(ONE)), lambda: readable.read(store)):
        with pytest.raises(BenchError, match="went away"):
            call()
