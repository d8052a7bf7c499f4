from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_models import error, neurons, reference, samples, tiny
from scan_totals import bits
from scan_workers import OPTIONS, start, texts, until

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import scan
from tinyonn_lib.scan.mscan import read
from tinyonn_lib.scan.records import merge_records
from tinyonn_lib.scan.scan import scan_samples
from tinyonn_lib.scan.server import PrivateServer, private_server
from tinyonn_lib.scan.statistics import STATISTICS, Totals
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.tables import neurons_table, tensors_table

RHO = 0.1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_equals_autograd_and_leaves_the_model_as_it_was(store: Store) -> None:
    model, drawn = tiny().train(), samples(5)
    model.lm_head.weight.requires_grad_(False)
    told: list[tuple[int, int, str]] = []
    totals = scan_samples(
        model, drawn, store, rho=RHO, shards=2, fingerprint={}, progress=lambda *event: told.append(event)
    )
    expected = reference(model.eval(), drawn, RHO)
    for name in STATISTICS:
        assert error(neurons(totals, name), expected[name]) < 1e-5
    assert told[-1][:2] == (5, 5)
    assert "samples/s" in told[-1][2]
    assert [event[0] for event in told] == sorted(event[0] for event in told)
    assert bits(store.totals()) == bits(totals)
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "lm_head.weight")
    assert not model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    table = neurons_table(totals)
    assert len(table) == 2 * 128
    assert (table[["grad_gate", "grad_up", "grad_down", "saliency", "act"]] > 0).all(axis=None)
    np.testing.assert_allclose(table.groupby("layer")["freq"].mean(), 13 / 128, rtol=1e-9)


def test_modes_come_back_even_after_an_error(store: Store) -> None:
    model = tiny().train()
    model.model.layers[0].eval()
    with pytest.raises(BenchError, match="sample 1 has 1 tokens"):
        scan_samples(model, [[1, 2], [3]], store, rho=RHO, fingerprint={})
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BenchError, match=r"in sample 0;"):
        scan_samples(model, samples(2), store, rho=RHO, fingerprint={})
    assert model.training
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[0].mlp.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(shard.epoch or shard.holder for shard in store.shards())


def test_nan_in_a_late_shard_is_named_by_its_sample_and_not_committed(store: Store, tmp_path: Path) -> None:
    model = tiny()
    model.model.embed_tokens.weight.data[96] = float("nan")
    drawn = [[token % 90 for token in sample] for sample in samples(9)]
    drawn[7][2] = 96
    options: dict[str, Any] = {"shards": 3, "fingerprint": {}, "records": tmp_path}
    with pytest.raises(BenchError, match=r"NaN or infinite in sample 7;"):
        scan_samples(model, drawn, store, **options)
    assert [shard.position for shard in store.shards()] == [3, 6, 6]
    with pytest.raises(BenchError, match=r"NaN or infinite in sample 7;"):
        scan_samples(model, drawn, store, flush_seconds=0.0, **options)
    assert [shard.position for shard in store.shards()] == [3, 6, 7]
    assert (store.totals().counts[:, 1] == 7).all()
    with pytest.raises(BenchError, match="lacks the records of samples 8: finish the scan"):
        merge_records(tmp_path, tmp_path / "all.mscan")


def test_stopped_and_resumed_is_bit_equal(store: Store, server: PrivateServer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = tiny(), samples(6)

    def stop(done: int, total: int, text: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    def run(**more: Any) -> Totals:
        return scan_samples(model, drawn, store, rho=RHO, shards=2, flush_seconds=0.0, fingerprint={"data": 1}, **more)

    with Store(server.socket, "uninterrupted") as other:
        whole = scan_samples(model, drawn, other, rho=RHO, shards=2, fingerprint={"data": 1})
    monkeypatch.setattr(scan, "_TELL_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    assert [(shard.position, shard.holder) for shard in store.shards()] == [(3, None), (4, None)]
    told: list[tuple[int, int, str]] = []
    assert bits(run(progress=lambda *event: told.append(event))) == bits(whole)
    assert told[0] == (4, 6, "going on from the last commit")
    monkeypatch.setattr(scan, "next_token_loss", None)
    assert bits(run()) == bits(whole)  # nothing left to do


def test_the_number_of_shards_matters_only_for_the_last_bits(server: PrivateServer) -> None:
    model, drawn, found = tiny(), samples(7, high=40), {}
    for shards in (1, 3, 50):
        with Store(server.socket, f"shards{shards}") as store:
            found[shards] = scan_samples(model, drawn, store, rho=RHO, shards=shards, fingerprint={})
            assert len(store.shards()) == min(shards, 7)
    for shards in (3, 50):
        np.testing.assert_array_equal(found[shards].counts, found[1].counts)
        for one, other in zip(found[shards].sums, found[1].sums, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def test_another_model_data_or_rho_is_refused(store: Store) -> None:
    model, drawn = tiny(), samples(2)
    scan_samples(model, drawn, store, rho=RHO, fingerprint={"model": "a"})
    for line, texts_, options in (
        ("model was 'a' and is 'b'", drawn, {"fingerprint": {"model": "b"}}),
        ("rho was", drawn, {"rho": 0.2}),
        ("targets was", drawn, {"targets": "neurons,linears"}),
        ("samples_sha256 was", drawn[::-1], {}),
        ("shards was 2 and is 1", drawn, {"shards": 1}),
        ("nothing to scan", [], {}),
        ("give one id per sample", drawn, {"sequences": [1]}),
    ):
        with pytest.raises(BenchError, match=line):
            scan_samples(model, texts_, store, **({"rho": RHO, "fingerprint": {"model": "a"}} | options))


def test_records_hold_every_sample_and_add_up_to_the_totals(store: Store, tmp_path: Path) -> None:
    drawn = samples(6, high=30)
    totals = scan_samples(
        tiny(), drawn, store, targets="neurons,linears,embeddings", rows=False, shards=4, fingerprint={"model": "tiny"},
        records=tmp_path / "records", sequences=[7, 7, 8, 9, 9, 9],
    )  # fmt: skip
    table = read(merge_records(tmp_path / "records", tmp_path / "all.mscan"))
    assert table.attrs["meta"]["model"] == "tiny"
    steps = table.groupby("step")[["sequence", "tokens"]].first()
    assert steps["sequence"].tolist() == [7, 7, 8, 9, 9, 9]
    assert steps["tokens"].tolist() == list(map(len, drawn))
    means = table.groupby(["target", "kind"], sort=False, observed=True)[["act", "grad"]].mean()
    tensors = tensors_table(totals)
    assert list(means.index) == list(zip(tensors["target"], tensors["kind"], strict=True))
    np.testing.assert_allclose(means, tensors[["act_norm", "grad_norm"]], rtol=3.2e-4)


def test_a_server_that_is_gone_for_good_and_back_again(tmp_path: Path) -> None:
    with private_server(tmp_path / "whole") as server, Store(server.url, "scan") as store:
        whole = scan_samples(tiny(), texts(), store, **OPTIONS)
    with private_server(tmp_path / "s") as server, Store(server.url, "scan") as store:
        (worker,) = start(1, store, pause=0.02)
        until(lambda: store.shards()[1].epoch)
        os.kill(server.pid, signal.SIGKILL)
        assert "is safe; run the same command again" in worker.answer()
    with private_server(tmp_path / "s") as server, Store(server.url, "scan") as store:
        assert 8 < sum(shard.epoch for shard in store.shards()) < 40
        assert bits(scan_samples(tiny(), texts(), store, **OPTIONS)) == bits(whole)
        assert (whole.counts[:, 1] == 40).all()


def test_others_progress_counts(server: PrivateServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(scan, "_TELL_SECONDS", 0.0)
    told: list[tuple[int, int, str]] = []
    with Store(server.url, "others") as store:
        (worker,) = start(1, store, pause=0.05)
        found = scan_samples(tiny(), texts(), store, progress=lambda *event: told.append(event), **OPTIONS)
        assert bits(found) == worker.answer()
    done = [event[0] for event in told]
    assert done[0] >= 1
    assert done[-1] <= 40
    assert any(after - before > 1 for before, after in itertools.pairwise(done))  # the other's too
