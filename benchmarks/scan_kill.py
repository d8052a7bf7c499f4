"""SIGKILL a scan again and again at random moments: nothing committed may be lost, nothing counted twice.

Each life is a process of its own that runs the scan on a private server, as the notebook does. In turn the worker and
its server are killed, at a moment drawn at random over the life, start-up included; the same command then goes on. At
the end totals and records are compared, bit for bit, with those of a scan that nobody disturbed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bar, Row, main
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.records import merge_records
from tinyonn_lib.scan.scan import scan_samples
from tinyonn_lib.scan.server import private_server
from tinyonn_lib.scan.statistics import Totals
from tinyonn_lib.scan.store import Store

KILLS, QUICK_KILLS = 50, 6
SAMPLES = 600  # a scan of a few seconds; as many scans as the kills need
LIFE_SECONDS = 1.0  # from the server being up to the kill, at most
VOCABULARY = 256
CONTEXT = multiprocessing.get_context("forkserver")  # a process starts in no time, with everything imported
CONTEXT.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", "tinyonn_lib.scan.scan"])


def model_of() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 32}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, initializer_range=0.1, **shape, **heads)).eval()


def samples_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, rng.integers(8, 96)).tolist() for _ in range(count)]


class Told(Store):
    """Tells the parent what the server has acknowledged."""

    line: Connection

    def commit(self, shard: int, totals: Totals, position: int) -> int:
        epoch = super().commit(shard, totals, position)
        self.line.send((shard, position))
        return epoch


def life(line: Connection, folder: Path, count: int) -> None:
    """One process: runs the scan to its end, unless it is killed."""
    torch.set_num_threads(1)
    try:
        with private_server(folder / "store") as server:
            store = Told(server.url, "scan", retry_seconds=0.3)
            store.line = line
            line.send(server.pid)
            scan_samples(
                model_of(), samples_of(count), store,
                targets="neurons,linears", flush_seconds=0.02, fingerprint={"benchmark": 1}, records=folder / "records",
            )  # fmt: skip
        line.send("done")
    except BenchError as error:
        line.send(str(error))


@dataclass
class Ended:
    """How a life ended.

    Attributes:
        acknowledged: shard -> last position that the server had acknowledged.
        commits: how many were acknowledged.
        said: "done", or the line of its error; empty when it was killed.
        seconds: after which the kill came; NaN without one.
    """

    acknowledged: dict[int, int] = field(default_factory=dict)
    commits: int = 0
    said: str = ""
    seconds: float = math.nan


def live(folder: Path, count: int, victim: str = "", moment: float = 0.0) -> Ended:
    """Start a life and kill the victim ("worker", "server" or none) `moment` seconds after its server was up."""
    line, far = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=life, args=(far, folder, count))
    process.start()
    far.close()
    ended, server, began = Ended(), 0, 0.0
    while True:
        armed = victim and server and not ended.said and math.isnan(ended.seconds)
        try:
            ready = line.poll(max(0.0, began + moment - time.monotonic()) if armed else None)
            told: Any = line.recv() if ready else None
        except EOFError:
            break
        if not ready:
            with suppress(ProcessLookupError):
                os.kill(server if victim == "server" else int(process.pid or 0), signal.SIGKILL)
            ended.seconds = time.monotonic() - began
        elif isinstance(told, int):
            server, began = told, time.monotonic()
        elif isinstance(told, tuple):
            ended.acknowledged[told[0]] = told[1]
            ended.commits += 1
        else:
            ended.said = told
    process.join()
    return ended


@dataclass
class State:
    """What is on the server: committed samples, samples in the sums, next sample of each shard."""

    committed: int
    counted: set[int]
    positions: dict[int, int]
    totals: Totals | None


def look(folder: Path) -> State:
    with private_server(folder / "store") as server, Store(server.url, "scan") as store:
        shards = store.shards()
        begun = [shard for shard in shards if shard.epoch]
        totals = store.totals() if begun else None
        return State(
            sum(shard.position - shard.samples.start for shard in shards),
            {int(number) for number in totals.counts[:, 1]} if totals else {0},
            {shard.number: shard.position for shard in shards},
            totals,
        )


def bits(totals: Totals | None) -> bytes:
    assert totals is not None
    return b"".join(part.tobytes() for part in (*totals.sums, totals.counts, totals.norms))


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    kills = QUICK_KILLS if args.quick else KILLS
    count, rng, rows = SAMPLES, random.Random(0), list[Row]()
    gone = doubled = differ = records = missing = scans = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "undisturbed"
        live(whole, count)
        undisturbed = look(whole)
        merged = merge_records(whole / "records", whole / "all.mscan").read_bytes()
        while len(rows) < kills:
            scans += 1
            broken, before, done = Path(name) / f"scan{scans}", 0, False
            while not done:
                victim = ("worker", "server")[len(rows) % 2] if len(rows) < kills else ""
                ended = live(broken, count, victim, rng.uniform(0.0, LIFE_SECONDS))
                done, state = ended.said == "done", look(broken)
                wrong = sum(state.positions.get(shard, 0) < told for shard, told in ended.acknowledged.items())
                gone += wrong + (state.committed < before)
                doubled += state.counted != {state.committed}
                if not done and not victim:
                    raise BenchError(f"a scan that nobody killed stopped: {ended.said}")
                if not math.isnan(ended.seconds):
                    rows.append(
                        {
                            "kill": len(rows) + 1, "scan": scans, "victim": victim, "after_s": ended.seconds,
                            "commits": ended.commits, "samples_before": before, "samples_after": state.committed,
                            "acknowledged_but_gone": wrong, "samples_in_sums": max(state.counted),
                        }
                    )  # fmt: skip
                before = state.committed
            differ += bits(state.totals) != bits(undisturbed.totals)
            records += merge_records(broken / "records", broken / "all.mscan").read_bytes() != merged
            missing += abs(state.committed - count)
    return rows, [
        Bar("kills at random moments", len(rows), kills, "higher"),
        Bar("commits acknowledged and then gone", gone, 0, "lower"),
        Bar("times that the sums held other samples than were committed", doubled, 0, "lower"),
        Bar("samples missing or there twice at the end", missing, 0, "lower"),
        Bar("scans whose totals differ from an undisturbed one's in any bit", differ, 0, "lower"),
        Bar("scans whose records differ from an undisturbed one's in any byte", records, 0, "lower"),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, "scan_kill", measure))
