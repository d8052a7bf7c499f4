from __future__ import annotations

import socket as sockets
from pathlib import Path

import numpy as np
import pytest
import redis
from scan_totals import CUT, LAYOUT, TARGETS, bits, totals

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.connection import safe_url
from tinyonn_lib.scan.server import PrivateServer, private_server
from tinyonn_lib.scan.shards import Cut
from tinyonn_lib.scan.statistics import Layout, merge
from tinyonn_lib.scan.store import ShardLost, Store


def test_commit_and_resume_to_the_last_bit(store: Store, server: PrivateServer) -> None:
    store.begin(LAYOUT, {"model": "m", "tokens": 10}, CUT)
    assert store.claims.take(0)
    assert store.resume(0) is None
    assert store.commit(0, totals(1), 2) == 1
    assert store.commit(0, totals(2), 3) == 2
    store.claims.release(0)
    with Store(server.url, store.scan_id) as later:
        later.begin(LAYOUT, {"tokens": 10, "model": "m"}, CUT)
        assert later.claims.take(0)
        state = later.resume(0)
        assert state is not None
        found, position, epoch = state
        assert (position, epoch) == (3, 2)
        assert found.layout == LAYOUT
        assert bits(found) == bits(totals(2))
        assert later.commit(0, totals(3), 3) == 3


def test_shards_are_summed_in_their_order(store: Store) -> None:
    store.begin(LAYOUT, {}, CUT)
    for number in (2, 0, 1):
        store.claims.take(number)
        store.commit(number, totals(number), CUT.range(number).start + 1)
    assert bits(store.totals()) == bits(merge(totals(number) for number in range(3)))
    shards = store.shards()
    assert [(shard.samples, shard.position, shard.epoch) for shard in shards] == [
        (range(0, 3), 1, 1),
        (range(3, 6), 4, 1),
        (range(6, 10), 7, 1),
    ]
    assert not any(shard.complete or shard.free for shard in shards)
    store.clear()
    assert store.shards() == []
    assert not store.connection.redis.keys(store.key("*").replace("{", "[{]"))
    with pytest.raises(BenchError, match="no committed totals"):
        store.totals()


def test_a_shard_taken_over_is_lost_to_the_first_worker(store: Store, server: PrivateServer) -> None:
    store.begin(LAYOUT, {}, CUT)
    with pytest.raises(ShardLost, match="shard 1 was taken over"):  # not even claimed
        store.commit(1, totals(1), 4)
    assert store.claims.take(1)
    store.commit(1, totals(1), 4)
    with Store(server.socket, store.scan_id) as other:
        assert not other.claims.take(1)
        store.connection.redis.delete(store.key("claim:1"))  # as if it had expired
        assert other.claims.take(1)
        assert not store.claims.renew(1)
        with pytest.raises(ShardLost, match=r"shard 1 was taken over by process \d+ on"):
            store.commit(1, totals(2), 5)
        other.resume(1)
        assert other.commit(1, totals(3), 5) == 2
        store.claims.release(1)  # not ours any more: nothing happens
        assert other.commit(1, totals(4), 6) == 3
    assert bits(store.totals()) == bits(totals(4))


def test_another_fingerprint_layout_or_cut_is_refused(store: Store) -> None:
    store.begin(LAYOUT, {"model": "a" * 200, "tokens": 10}, CUT)
    with pytest.raises(BenchError, match="tokens was 10 and is 20") as caught:
        store.begin(LAYOUT, {"model": "a" * 200, "tokens": 20}, CUT)
    assert "\n" not in str(caught.value)
    with pytest.raises(BenchError, match=r"rho was 0\.05 and is 0\.1"):
        store.begin(Layout(TARGETS, 0.1), {"model": "a" * 200, "tokens": 10}, CUT)
    for cut, line in (
        (Cut(10, "y", 3), "samples_sha256 was 'x' and is 'y'"),
        (Cut(10, "x", 4), "shards was 3 and is 4"),
    ):
        with pytest.raises(BenchError, match=line):
            store.begin(LAYOUT, {"model": "a" * 200, "tokens": 10}, cut)
    store.begin(LAYOUT, {"model": "a" * 200, "tokens": 10}, CUT)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_totals_are_told(store: Store, damage: str) -> None:
    store.begin(LAYOUT, {}, CUT)
    store.claims.take(0)
    store.commit(0, totals(1), 1)
    field = "lm_head/grad" if damage == "gone" else "model.layers.0.mlp/h"
    change = store.connection.redis
    change.hdel(store.key("shard:0"), field) if damage == "gone" else change.hset(store.key("shard:0"), field, "xyz")
    with pytest.raises(BenchError, match="totals on the server are damaged"):
        store.totals()


def test_the_server_goes_away_and_comes_back(tmp_path: Path) -> None:
    with private_server(tmp_path / "s") as first:
        store = Store(first.url, "scan", retry_seconds=0.5)
        store.begin(LAYOUT, {}, CUT)
        store.claims.take(0)
        store.commit(0, totals(1), 1)
    with pytest.raises(BenchError, match="everything up to epoch 1 of shard 0 is safe; run the same command again"):
        store.commit(0, totals(2), 2)
    with private_server(tmp_path / "s"):
        assert store.commit(0, totals(2), 2) == 2
        assert (store.shards()[0].position, store.shards()[0].epoch) == (2, 2)


def test_a_lost_answer_is_not_written_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.begin(LAYOUT, {}, CUT)
    store.claims.take(0)
    original, failures = redis.client.Pipeline.execute, [1]

    def flaky(self: redis.client.Pipeline, *args: object) -> object:
        result = original(self, *args)
        if failures:
            failures.pop()
            raise redis.exceptions.ConnectionError("answer lost")
        return result

    monkeypatch.setattr(redis.client.Pipeline, "execute", flaky)
    assert store.commit(0, totals(1), 3) == 1
    assert (store.shards()[0].position, store.shards()[0].epoch) == (3, 1)


def test_a_connection_lost_inside_the_transaction_is_retried(
    store: Store, server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py calls that a WatchError, as if someone else had written."""
    store.begin(LAYOUT, {}, CUT)
    store.claims.take(0)
    execute, cut = redis.client.Pipeline.execute, []

    def dropped(self: redis.client.Pipeline, *args: object) -> object:
        if not cut:
            admin = redis.Redis(unix_socket_path=str(server.socket))
            cut.append(admin.client_kill_filter(_type="normal", skipme=True))
        return execute(self, *args)

    monkeypatch.setattr(redis.client.Pipeline, "execute", dropped)
    assert store.commit(0, totals(1), 3) == 1
    assert cut[0] >= 1
    assert store.shards()[0].epoch == 1


def test_wrong_password_is_one_line_without_it(tmp_path: Path) -> None:
    with private_server(tmp_path / "s") as running:
        admin = redis.Redis(unix_socket_path=str(running.socket))
        admin.config_set("requirepass", "right-secret")
        try:
            for url in (f"unix://:wrong-secret@{running.socket}", str(running.socket)):
                with pytest.raises(BenchError, match="refuses this user or password") as caught:
                    Store(url, "scan").begin(LAYOUT, {}, CUT)
                assert "secret" not in str(caught.value)
            with Store(f"unix://:right-secret@{running.socket}", "scan") as store:
                store.begin(LAYOUT, {}, CUT)
        finally:
            redis.Redis(unix_socket_path=str(running.socket), password="right-secret").config_set("requirepass", "")


def test_unreachable_is_one_clear_line_at_once(tmp_path: Path) -> None:
    with sockets.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for where in (f"redis://user:hunter2@127.0.0.1:{port}/0", tmp_path / "no.sock", "redis://no.such.host.invalid:1"):
        with pytest.raises(BenchError, match="no Redis server answers at") as caught:
            Store(where, "scan", retry_seconds=3600.0).begin(LAYOUT, {}, CUT)  # patience is for servers once seen
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="not a redis URL"):
        Store("http://host/0", "scan")
    with pytest.raises(BenchError, match="scan id"):
        Store("redis://host", "a b")
    assert safe_url("redis://u:p@host:1/2?password=p") == "redis://host:1/2"


def test_halves_add_up_to_the_whole(store: Store) -> None:
    store.begin(LAYOUT, {}, CUT)
    for shard in range(3):
        store.claims.take(shard)
        store.commit(shard, totals(shard + 1), CUT.range(shard).stop)
    first, second = store.halves()
    assert bits(first) == bits(totals(1))
    assert bits(second) == bits(merge([totals(2), totals(3)]))
    for half_sums, sums in zip(merge([first, second]).sums, store.totals().sums, strict=True):
        np.testing.assert_allclose(half_sums, sums, rtol=1e-12)


def test_one_shard_has_no_halves(store: Store) -> None:
    store.begin(LAYOUT, {}, Cut(10, "x", 1))
    assert store.halves() == []
