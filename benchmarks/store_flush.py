"""One flush of a scan's totals: packed absolute values against document 000's own Redis layout.

516,096 units: gate rows, up rows and down columns of 28 layers of 2048/6144, three statistics each. Every arm writes to
a real server that syncs its file before it answers. A packed flush is `Store.commit`, with all samples since the last
one in it; the document's layout is written for every single sample, so its seconds are per sample. The arms take turns,
a layer at a time. With `--quick` the document's layout is written for two layers only, and its seconds are reckoned.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
from harness import Bar, Row, main

from tinyonn_lib.scan import readable
from tinyonn_lib.scan.server import private_server
from tinyonn_lib.scan.shards import Cut
from tinyonn_lib.scan.statistics import Layout, Target, Totals
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.tables import units_table

WIDTH, LAYERS, QUICK_LAYERS = 6144, 28, 2
ONE_BY_ONE = 3000  # commands that are measured, the rest is reckoned
SAMPLES = 50  # for the error
# ARGV: the units' keys share a prefix, then three values per unit.
LUA = """
local fields = {'avg_act', 'avg_grad_norm', 'freq_act'}
for row = 0, (#ARGV - 1) / 3 - 1 do
  for which = 1, 3 do redis.call('HINCRBYFLOAT', ARGV[1] .. row, fields[which], ARGV[1 + 3 * row + which]) end
end
"""


@dataclass
class Arm:
    """One way to write.

    Attributes:
        name, covers: what it is, and what one flush has in it.
        store: on a server of its own.
        write: the flush, or a part of it; returns seconds.
        before: bytes of memory that the server's data took at first.
        seconds: per flush.
        pending: seconds of the flush in progress.
    """

    name: str
    covers: str
    store: Store
    write: Callable[[Store, Totals], float]
    before: int = 0
    seconds: list[float] = field(default_factory=list)
    pending: float = 0.0

    def add(self, part: Totals, everyone: Sequence[Arm]) -> None:
        """Write a part, undisturbed by what others have left to do."""
        rest([arm.store for arm in everyone])
        self.pending += self.write(self.store, part)

    def end(self, share: float = 1.0) -> None:
        """The flush is complete, or this share of it: then its seconds are reckoned."""
        self.seconds.append(self.pending / share)
        self.pending = 0.0

    def row(self, units: int, share: float = 1.0) -> Row:
        """For the table. share: of the units that were written."""
        median = statistics.median(self.seconds)
        return {
            "layout": self.name,
            "a flush covers": self.covers,
            "units": units,
            "flushes": len(self.seconds),
            "seconds": median,
            "least": min(self.seconds),
            "most": max(self.seconds),
            "values_per_s": 3 * units / median,
            "bytes_per_unit": (memory(self.store) - self.before) / (units * share),
        }


def layout_of(layers: int) -> Layout:
    names = (f"model.layers.{i}.mlp.{name}_proj" for i in range(layers) for name in ("gate", "up", "down"))
    return Layout(tuple(Target(name, "linear", WIDTH, int(name.split(".")[2])) for name in names), rho=0.05)


def draw(layout: Layout, rng: np.random.Generator, scale: float | np.ndarray = 1.0) -> Totals:
    counts = np.tile([128.0, 1.0, 128.0, 1.0], (len(layout.targets), 1))
    sums = tuple(rng.random(target.shape) * scale for target in layout.targets)
    return Totals(layout, sums, counts, np.ones((len(layout.targets), 2)))


@contextmanager
def opened(folder: Path, layout: Layout, name: str) -> Iterator[Store]:
    """A scan begun on a private server of its own."""
    with private_server(folder / name) as server, Store(server.url, name, retry_seconds=60.0) as store:
        store.begin(layout, {}, Cut(10, "", 1))
        store.claims.take(0)
        yield store


def memory(store: Store) -> int:
    """Bytes of memory that the server uses, without what it holds for a client that has just written."""
    store.close()
    return int(store.connection.redis.info("memory")["used_memory"])


def rest(stores: Sequence[Store]) -> None:
    """Wait until no server rewrites its file in the background and the disk has all it was given."""
    keys = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
    while any(store.connection.redis.info("persistence")[key] for store in stores for key in keys):
        time.sleep(0.05)
    os.sync()


def timed(write: Callable[[Store, Totals], object]) -> Callable[[Store, Totals], float]:
    def flush(store: Store, sample: Totals) -> float:
        began = time.perf_counter()
        write(store, sample)
        return time.perf_counter() - began

    return flush


def commit(store: Store, sample: Totals) -> None:
    store.commit(0, sample, 1)


def publish(store: Store, sample: Totals) -> None:
    store.publish()


def lua(store: Store, sample: Totals) -> None:
    script = store.connection.redis.register_script(LUA)
    for target, part in zip(sample.layout.targets, sample.sums, strict=True):
        script(args=[store.key(f"param:{target.name}:row:"), *part[[0, 2, 1]].T.ravel().tolist()])


def one_by_one(store: Store, sample: Totals) -> float:
    """Seconds for all commands, reckoned from the first ones."""
    prefix, values = store.key(f"param:{sample.layout.targets[0].name}:row:"), sample.sums[0]
    redis = store.connection.redis
    began = time.perf_counter()
    for number in range(ONE_BY_ONE):
        row, which = divmod(number, 3)
        redis.hincrbyfloat(f"{prefix}{row}", readable.FIELDS[which], float(values[which, row]))
    return (time.perf_counter() - began) / ONE_BY_ONE * 3 * sample.layout.units


def errors(folder: Path) -> tuple[float, float]:
    """Largest relative error of an average after many samples, packed and the document's way, 1e-15 to 1 in size."""
    layout = Layout((Target("gate", "linear", 64, 0),), rho=0.05)
    rng, total, exact = np.random.default_rng(1), Totals.zeros(layout), np.full((3, 64), Fraction(0))
    with opened(folder, layout, "errors") as store:
        for _ in range(SAMPLES):
            sample = draw(layout, rng, np.logspace(-15, 0, 64))
            readable.accumulate(store, sample)
            total.sums[0][:] += sample.sums[0]
            total.counts[:] += sample.counts
            exact += np.vectorize(Fraction, otypes=[object])(sample.sums[0])
        store.commit(0, total, 1)
        tokens, samples = 128 * SAMPLES, SAMPLES
        truth = (exact / np.array([[tokens], [tokens], [samples]], dtype=object))[[0, 2, 1]].astype(float)
        packed = units_table(store.totals())[["act", "grad", "freq"]].to_numpy().T
        document = readable.read(store)[list(readable.FIELDS)].to_numpy().T
    return tuple(float((np.abs(found - truth) / truth).max()) for found in (packed, document))  # type: ignore[return-value]


def layers_of(sample: Totals) -> Iterator[Totals]:
    """The same sample, a layer at a time."""
    for begin in range(0, len(sample.sums), 3):
        part = slice(begin, begin + 3)
        layout = Layout(sample.layout.targets[part], sample.layout.rho)
        yield Totals(layout, sample.sums[part], sample.counts[part], sample.norms[part])


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    layout, layers = layout_of(LAYERS), QUICK_LAYERS if args.quick else LAYERS
    share = layers / LAYERS
    rng = np.random.default_rng(0)
    samples = [draw(layout, rng) for _ in range(1 if args.quick else 3)]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)

        def arm(name: str, covers: str, write: Callable[[Store, Totals], float]) -> Arm:
            store = stack.enter_context(opened(folder, layout, name.split(":")[0].replace(" ", "-") + str(len(arms))))
            arms.append(Arm(name, covers, store, write, memory(store)))
            return arms[-1]

        arms: list[Arm] = []
        packed = arm("packed: Store.commit", "all samples since the last one", timed(commit))
        document = arm("document: HINCRBYFLOAT, pipelined", "one sample", timed(readable.accumulate))
        everysec = arm("document: as above, file synced every second", "one sample", timed(readable.accumulate))
        tensors = arm("document: HINCRBYFLOAT in Lua, a tensor per call", "one sample", timed(lua))
        single = arm(f"document: one by one, reckoned from {ONE_BY_ONE}", "one sample", one_by_one)
        view = arm("readable view: Store.publish", "averages of all committed samples", timed(publish))
        everysec.store.connection.redis.config_set("appendfsync", "everysec")
        commit(view.store, samples[0])
        for sample in samples:  # in turns, so that whatever else the machine does falls on all of them alike
            for part in islice(layers_of(sample), layers):
                for written in (document, everysec, tensors):
                    written.add(part, arms)
                packed.add(sample, arms)
                packed.end()
            for whole in (single, view):
                whole.add(sample, arms)
            for ended in (single, view):
                ended.end()
            for ended in (document, everysec, tensors):
                ended.end(share)
        rows = [each.row(layout.units, share if each in (document, everysec, tensors) else 1.0) for each in arms]
        found = errors(folder)
    for row, error in zip(rows, found, strict=False):
        row["largest relative error"] = error
    rows[arms.index(single)]["bytes_per_unit"] = math.nan  # only a few units were written
    faster = rows[1]["seconds"] / rows[0]["seconds"]
    return rows, [
        Bar("times faster than the document's layout, pipelined", faster, 500, "higher"),
        Bar("bytes per unit on the server", rows[0]["bytes_per_unit"], 32, "lower"),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, "store_flush", measure))
