from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_models import error, ffns, reference, samples, tiny

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.scan import scan_samples
from tinyonn_lib.scan.server import PrivateServer, private_server
from tinyonn_lib.scan.statistics import STATISTICS, neurons_table
from tinyonn_lib.scan.store import Store

RHO = 0.1
# A worker in a process of its own: `python -c CHILD folder`, committing after every sample.
CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from scan_models import ffns, samples, tiny
from tinyonn_lib.scan.scan import scan_samples
from tinyonn_lib.scan.server import private_server
from tinyonn_lib.scan.store import Store
model = tiny()
def progress(done, total, text):
    print(done, flush=True)
    time.sleep(0.02)
with private_server(Path(sys.argv[1])) as server, Store(server.url, "scan", retry_seconds=1.0) as store:
    scan_samples(model, ffns(model), samples(200, low=100), store, rho=0.1, flush_seconds=0.0,
                 fingerprint={"model": "tiny"}, progress=progress)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    with private_server(tmp_path_factory.mktemp("scan")) as running:
        yield running


@pytest.fixture
def store(server: PrivateServer, request: pytest.FixtureRequest) -> Iterator[Store]:
    with Store(server.socket, request.node.name) as opened:
        yield opened


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_equals_autograd_and_leaves_the_model_as_it_was(store: Store) -> None:
    model, texts = tiny().train(), samples(5)
    model.lm_head.weight.requires_grad_(False)
    told: list[tuple[int, int, str]] = []
    totals = scan_samples(
        model, ffns(model), texts, store, rho=RHO, fingerprint={}, progress=lambda *event: told.append(event)
    )
    expected = reference(model.eval(), texts, RHO)
    for index, name in enumerate(STATISTICS):
        assert error(totals.sums[:, index], expected[name]) < 1e-5
    assert told[-1][:2] == (5, 5)
    assert "samples/s" in told[-1][2]
    assert store.totals().sums.tobytes() == totals.sums.tobytes()
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
        scan_samples(model, ffns(model), [[1, 2], [3]], store, rho=RHO, fingerprint={})
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BenchError, match=r"in sample 0;"):
        scan_samples(model, ffns(model), samples(2), store, rho=RHO, fingerprint={})
    assert model.training
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[0].mlp.training
    assert all(p.requires_grad for p in model.parameters())
    assert store.workers() == {}


def test_stopped_and_resumed_is_bit_equal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny(), samples(6)

    def stop(done: int, total: int, text: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"rho": RHO, "fingerprint": {"data": 1}, "flush_seconds": 0.0}
    whole = scan_samples(model, ffns(model), texts, store, worker="whole", **options)
    monkeypatch.setattr("tinyonn_lib.scan.scan._TELL_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        scan_samples(model, ffns(model), texts, store, worker="cut", progress=stop, **options)
    assert store.workers()["cut"][0] == 3
    resumed = scan_samples(model, ffns(model), texts, store, worker="cut", **options)
    again = scan_samples(model, ffns(model), texts, store, worker="cut", **options)  # nothing left to do
    assert resumed.sums.tobytes() == whole.sums.tobytes() == again.sums.tobytes()
    assert resumed.counts.tobytes() == whole.counts.tobytes()


def test_another_model_data_or_rho_is_refused(store: Store) -> None:
    model, texts = tiny(), samples(2)
    scan_samples(model, ffns(model), texts, store, rho=RHO, fingerprint={"model": "a"})
    with pytest.raises(BenchError, match="model was 'a' and is 'b'"):
        scan_samples(model, ffns(model), texts, store, rho=RHO, fingerprint={"model": "b"})
    with pytest.raises(BenchError, match="rho was"):
        scan_samples(model, ffns(model), texts, store, rho=0.2, fingerprint={"model": "a"})
    with pytest.raises(BenchError, match="samples was"):
        scan_samples(model, ffns(model), texts[::-1], store, rho=RHO, fingerprint={"model": "a"})
    with pytest.raises(BenchError, match="nothing to scan"):
        scan_samples(model, ffns(model), [], store, rho=RHO, fingerprint={"model": "a"})


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_killed_in_the_middle_and_resumed(tmp_path: Path, victim: str) -> None:
    model, texts, folder = tiny(), samples(200, low=100), tmp_path / "s"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    while int(child.stdout.readline()) < 20:
        pass
    if victim == "worker":
        child.send_signal(signal.SIGKILL)
        child.wait()
    else:
        import redis

        pid = int(redis.Redis(unix_socket_path=str(folder / "server.sock")).info("server")["process_id"])
        subprocess.run(["kill", "-9", str(pid)], check=True)
        _, log = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "is safe; run the same command again" in log
    began = time.monotonic()
    with private_server(folder) as server, Store(server.url, "scan") as store:
        done = store.workers()["0"][0]
        assert 0 < done < 200
        resumed = scan_samples(model, ffns(model), texts, store, rho=RHO, fingerprint={"model": "tiny"})
    assert time.monotonic() - began < 60
    with private_server(tmp_path / "whole") as server, Store(server.url, "scan") as store:
        whole = scan_samples(model, ffns(model), texts, store, rho=RHO, fingerprint={"model": "tiny"})
    assert resumed.sums.tobytes() == whole.sums.tobytes()
    assert resumed.counts.tobytes() == whole.counts.tobytes()
    assert (whole.counts[:, 1] == 200).all()
