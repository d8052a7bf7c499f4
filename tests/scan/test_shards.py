from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_models import tiny
from scan_totals import CUT, LAYOUT, bits, totals
from scan_workers import OPTIONS, SAMPLES, Worker, committed, start, texts, until

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import claims
from tinyonn_lib.scan.records import merge_records
from tinyonn_lib.scan.scan import scan_samples
from tinyonn_lib.scan.server import PrivateServer
from tinyonn_lib.scan.shards import Cut, Holder
from tinyonn_lib.scan.store import Store


@pytest.fixture(scope="module")
def whole(server: PrivateServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """One worker, nobody disturbs it: bits of the totals, bytes of the records."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Store(server.socket, "undisturbed") as store:
            found = scan_samples(tiny(), texts(), store, records=folder, **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    return bits(found), merge_records(folder, folder / "all.mscan").read_bytes()


@given(samples=st.integers(1, 300), shards=st.integers(1, 400))
def test_shards_cover_every_sample_once_and_evenly(samples: int, shards: int) -> None:
    cut = Cut.of([[number] for number in range(samples)], shards)
    parts = [cut.range(number) for number in range(cut.shards)]
    assert cut.shards == min(samples, shards)
    assert [index for part in parts for index in part] == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_shards_are_refused() -> None:
    with pytest.raises(BenchError, match="at least one shard"):
        Cut.of([[1, 2]], 0)


def test_who_is_dead() -> None:
    me = Holder.me()
    assert Holder.parse(me.dump().encode()) == me
    assert not me.dead()
    child = subprocess.Popen(["sleep", "60"])
    other = Holder(me.host, me.place, child.pid, psutil.Process(child.pid).create_time())
    assert not other.dead()
    child.kill()
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert other.dead()  # killed, and its parent has not noticed yet
    child.wait()
    assert other.dead()
    assert Holder(me.host, me.place, me.pid, me.started - 3600).dead()  # the number belongs to somebody else now
    assert not Holder("elsewhere", "another machine", child.pid, 0.0).dead()
    assert not Holder.parse(b"{]").dead()


def test_a_claim_of_the_dead_is_free_at_once_and_of_another_machine_when_it_expires(
    store: Store, server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.begin(LAYOUT, {}, CUT)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 3600.0)
    me = Holder.me()
    gone = Holder(me.host, me.place, me.pid, me.started - 3600)
    with Store(server.socket, store.scan_id) as other, monkeypatch.context() as patch:
        patch.setattr(Holder, "me", lambda: gone)
        assert other.claims.take(0)
        other.commit(0, totals(1), 1)
    assert [shard.free for shard in store.shards()] == [True, True, True]
    assert store.claims.take(0)
    assert store.resume(0)
    away = Holder("elsewhere", "another machine", 1, 0.0)
    with Store(server.socket, store.scan_id) as other, monkeypatch.context() as patch:
        patch.setattr(Holder, "me", lambda: away)
        patch.setattr(claims, "LEASE_SECONDS", 0.3)
        assert other.claims.take(1)
        assert not store.claims.take(1)
        assert str(store.shards()[1].holder) == "process 1 on elsewhere"
        assert [shard.free for shard in store.shards()] == [False, False, True]
        assert until(lambda: store.claims.take(1))
    store.commit(1, totals(2), 4)
    assert store.shards()[1].holder == me


def test_a_lease_is_renewed_while_a_step_takes_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)
    store.begin(LAYOUT, {}, CUT)
    store.claims.take(0)
    with claims.Lease(store.claims) as lease:
        lease.hold(0)
        time.sleep(0.9)  # three leases long
        assert store.shards()[0].holder is not None
        assert not lease.lost
        store.connection.redis.hset(store.key("shard:0"), "owner", "somebody")
        until(lambda: lease.lost)
        lease.hold(None)
        until(lambda: store.shards()[0].holder is None)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bits(
    store: Store, whole: tuple[bytes, bytes], tmp_path: Path, workers: int
) -> None:
    crew = start(workers, store, records=tmp_path)
    assert sorted(worker.first for worker in crew) == list(range(workers))
    assert [worker.answer() for worker in crew] == [whole[0]] * workers
    assert bits(store.totals()) == whole[0]
    assert merge_records(tmp_path, tmp_path / "all.mscan").read_bytes() == whole[1]
    assert not any(shard.holder for shard in store.shards())


def test_killed_stopped_and_restarted_workers_change_nothing(
    store: Store, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"pause": 0.03, "lease": 0.5, "records": tmp_path}

    def shard_of(worker: Worker) -> int:
        return next(s.number for s in store.shards() if s.holder is not None and s.holder.pid == worker.pid)

    killed, frozen = start(2, store, **options)
    until(lambda: store.shards() and committed(store) >= 4 and sum(s.holder is not None for s in store.shards()) == 2)
    killed.kill()
    frozen.signal(signal.SIGSTOP)
    left, owner = shard_of(frozen), store.key("shard:%d")
    before = store.connection.redis.hget(owner % left, "owner")
    heirs = start(2, store, **options)
    until(lambda: store.connection.redis.hget(owner % left, "owner") != before)  # thought dead, and replaced
    frozen.signal(signal.SIGCONT)
    assert [worker.answer() for worker in (frozen, *heirs)] == [whole[0]] * 3
    assert [len(shard.samples) for shard in store.shards()] == [8] * 5
    assert committed(store) == SAMPLES
    assert (store.totals().counts[:, 1] == SAMPLES).all()
    assert merge_records(tmp_path, tmp_path / "all.mscan").read_bytes() == whole[1]


def test_records_that_are_not_all_there_are_told(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="there are no records in"):
        merge_records(tmp_path, tmp_path / "all.mscan")
    (worker,) = start(1, store, pause=0.1, records=tmp_path)
    until(lambda: store.shards() and 9 <= store.shards()[1].position <= 11)  # in the middle of the second shard
    worker.kill()
    with pytest.raises(BenchError, match=r"lacks the records of samples \d+ to 39: finish the scan"):
        merge_records(tmp_path, tmp_path / "all.mscan")
    (tmp_path / "shard-001.mscan").rename(tmp_path / "elsewhere")
    again = Worker(store.address, store.scan_id, 0.0, 15.0, tmp_path)
    missing = r"shard-001\.mscan is missing, .* samples 8 to \d+: give every worker of the scan the same folder"
    assert re.search(missing, again.answer())
