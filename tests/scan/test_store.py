from __future__ import annotations

import socket as sockets
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.connection import safe_url
from tinyonn_lib.scan.server import PrivateServer, private_server
from tinyonn_lib.scan.statistics import Layout, Totals
from tinyonn_lib.scan.store import Store

LAYOUT = Layout(layers=(0, 1), widths=(5, 3), rho=0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    with private_server(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def store(server: PrivateServer, request: pytest.FixtureRequest) -> Iterator[Store]:
    with Store(server.socket, request.node.name.replace("[", "-").replace("]", "")) as opened:
        yield opened


def totals(seed: int) -> Totals:
    filled = Totals.zeros(LAYOUT)
    draw = np.random.default_rng(seed)
    for row, width in enumerate(LAYOUT.widths):
        filled.sums[row, :, :width] = draw.standard_normal((9, width)) * 10.0 ** draw.integers(-30, 30, (9, 1))
    filled.counts[:] = draw.integers(0, 10**9, (2, 4))
    return filled


def test_commit_and_resume_to_the_last_bit(store: Store, server: PrivateServer) -> None:
    store.begin(LAYOUT, {"model": "m", "tokens": 10})
    assert store.resume("0") is None
    assert store.commit("0", totals(1), 7) == 1
    assert store.commit("0", totals(2), 9) == 2
    with Store(server.url, store.scan_id) as later:
        later.begin(LAYOUT, {"tokens": 10, "model": "m"})
        state = later.resume("0")
        assert state is not None
        found, position, epoch = state
        assert (position, epoch) == (9, 2)
        assert found.layout == LAYOUT
        assert found.sums.tobytes() == totals(2).sums.tobytes()
        assert found.counts.tobytes() == totals(2).counts.tobytes()
        assert later.commit("0", totals(3), 11) == 3


def test_workers_are_summed(store: Store) -> None:
    store.begin(LAYOUT, {})
    for seed, worker in enumerate(("b", "a")):
        store.resume(worker)
        store.commit(worker, totals(seed), seed)
    both = store.totals()
    np.testing.assert_array_equal(both.sums, totals(1).sums + totals(0).sums)
    assert store.workers() == {"a": (1, 1), "b": (0, 1)}
    store.clear()
    with pytest.raises(BenchError, match="no committed totals"):
        store.totals()


def test_two_processes_as_one_worker_are_refused(store: Store, server: PrivateServer) -> None:
    store.begin(LAYOUT, {})
    store.resume("0")
    with Store(server.socket, store.scan_id) as twin:
        twin.resume("0")
        store.commit("0", totals(1), 1)
        with pytest.raises(BenchError, match="written by another process"):
            twin.commit("0", totals(2), 1)
    assert store.totals().sums.tobytes() == totals(1).sums.tobytes()


def test_another_fingerprint_or_layout_is_refused(store: Store) -> None:
    store.begin(LAYOUT, {"model": "a" * 200, "tokens": 10}, worker="0", share="x")
    with pytest.raises(BenchError, match="tokens was 10 and is 20") as caught:
        store.begin(LAYOUT, {"model": "a" * 200, "tokens": 20})
    assert "\n" not in str(caught.value)
    with pytest.raises(BenchError, match=r"rho was 0\.05 and is 0\.1"):
        store.begin(Layout((0, 1), (5, 3), 0.1), {"model": "a" * 200, "tokens": 10})
    with pytest.raises(BenchError, match="samples was 'x' and is 'y'"):
        store.begin(LAYOUT, {"model": "a" * 200, "tokens": 10}, worker="0", share="y")
    store.begin(LAYOUT, {"model": "a" * 200, "tokens": 10}, worker="1", share="y")


def test_the_server_goes_away_and_comes_back(tmp_path: Path) -> None:
    with private_server(tmp_path / "s") as first:
        store = Store(first.url, "scan", retry_seconds=0.5)
        store.begin(LAYOUT, {})
        store.commit("0", totals(1), 4)
    began = time.monotonic()
    with pytest.raises(BenchError, match="everything up to epoch 1 is safe; run the same command again"):
        store.commit("0", totals(2), 5)
    assert time.monotonic() - began < 3
    with private_server(tmp_path / "s"):
        assert store.commit("0", totals(2), 5) == 2
        assert store.workers() == {"0": (5, 2)}


def test_a_lost_answer_is_not_written_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.begin(LAYOUT, {})
    original, failures = redis.client.Pipeline.execute, [1]

    def flaky(self: redis.client.Pipeline, *args: object) -> object:
        result = original(self, *args)
        if failures:
            failures.pop()
            raise redis.exceptions.ConnectionError("answer lost")
        return result

    monkeypatch.setattr(redis.client.Pipeline, "execute", flaky)
    assert store.commit("0", totals(1), 3) == 1
    assert store.workers() == {"0": (3, 1)}


def test_a_connection_lost_inside_the_transaction_is_retried(
    store: Store, server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py calls that a WatchError, as if someone else had written."""
    store.begin(LAYOUT, {})
    store.resume("0")
    execute, cut = redis.client.Pipeline.execute, []

    def dropped(self: redis.client.Pipeline, *args: object) -> object:
        if not cut:
            admin = redis.Redis(unix_socket_path=str(server.socket))
            cut.append(admin.client_kill_filter(_type="normal", skipme=True))
        return execute(self, *args)

    monkeypatch.setattr(redis.client.Pipeline, "execute", dropped)
    assert store.commit("0", totals(1), 3) == 1
    assert cut[0] >= 1
    assert store.workers() == {"0": (3, 1)}


def test_wrong_password_is_one_line_without_it(tmp_path: Path) -> None:
    with private_server(tmp_path / "s") as running:
        admin = redis.Redis(unix_socket_path=str(running.socket))
        admin.config_set("requirepass", "right-secret")
        try:
            for url in (f"unix://:wrong-secret@{running.socket}", str(running.socket)):
                with pytest.raises(BenchError, match="refuses this user or password") as caught:
                    Store(url, "scan").begin(LAYOUT, {})
                assert "secret" not in str(caught.value)
            with Store(f"unix://:right-secret@{running.socket}", "scan") as store:
                store.begin(LAYOUT, {})
        finally:
            redis.Redis(unix_socket_path=str(running.socket), password="right-secret").config_set("requirepass", "")


def test_unreachable_is_one_clear_line_within_seconds(tmp_path: Path) -> None:
    with sockets.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for where in (f"redis://user:hunter2@127.0.0.1:{port}/0", tmp_path / "no.sock", "redis://no.such.host.invalid:1"):
        began = time.monotonic()
        with pytest.raises(BenchError, match="no Redis server answers at") as caught:
            Store(where, "scan").begin(LAYOUT, {})
        assert time.monotonic() - began < 5
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="not a redis URL"):
        Store("http://host/0", "scan")
    with pytest.raises(BenchError, match="scan id"):
        Store("redis://host", "a b")
    assert safe_url("redis://u:p@host:1/2?password=p") == "redis://host:1/2"
