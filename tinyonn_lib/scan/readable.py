"""The totals as document 000 §1.3 lays them out, for those who read with redis-cli.

One hash per unit, `tinyonn:{SCAN}:param:NAME:row:I` (the document's key behind the scan's prefix, since two scans may
share a server), fields `avg_act avg_grad_norm freq_act`. Two ways lead there:

- `publish` turns committed totals into averages and writes those. Running it again writes the same.
- `accumulate` is the document's own way, HINCRBYFLOAT per unit, field and sample. That command adds, so the fields
  then hold sums, and `param:NAME` holds the `tokens` and `samples` to divide them by (ERRATA 000). The server keeps 17
  decimals, so each addition errs by up to 1e-17 and 1e-30 adds nothing; and a sample that was cut off by a kill is half
  in, and nobody can tell. It is here to be compared with; scans use the packed layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.packing import labels
from tinyonn_lib.scan.statistics import ACTIVITY, COUNTERS, KINDS, Layout, Totals
from tinyonn_lib.scan.tables import units_table

if TYPE_CHECKING:
    from tinyonn_lib.scan.store import Store

FIELDS = ("avg_act", "avg_grad_norm", "freq_act")
_DIVISORS = ("tokens", "samples", "tokens")
_COLUMNS = ("act", "grad", "freq")  # of `units_table`
_BATCH = 10_000  # commands per round trip
Command = tuple[Any, ...]


def publish(store: Store) -> int:
    """Write the averages of everything committed so far; a mean of nothing (no gradient was counted) is left out.

    Returns:
        How many units were written.

    Raises:
        BenchError: nothing is committed, or the server is gone.
    """
    totals = store.totals()
    units = units_table(totals)
    means = zip(*(units[column].to_list() for column in _COLUMNS), strict=True)

    def commands() -> Iterator[Command]:
        for key, values in zip(_unit_keys(store, totals.layout), means, strict=True):
            known = [item for pair in zip(FIELDS, values, strict=True) if not math.isnan(pair[1]) for item in pair]
            if known:
                yield "HSET", key, *known
        yield "HSET", store.key("meta"), "readable", "averages"

    _send(store, commands())
    return len(units)


def accumulate(store: Store, sample: Totals) -> None:
    """Add one sample, the document's way.

    Args:
        store: a scan that was begun.
        sample: the sums and counts of this sample alone.

    Raises:
        BenchError: NaN or infinity, which HINCRBYFLOAT refuses (nothing is added), or the server is gone: then nobody
            knows how much was added.
    """
    if not all(np.isfinite(part).all() for part in sample.sums):
        raise BenchError("NaN or infinity cannot be added with HINCRBYFLOAT: look at this sample")

    def commands() -> Iterator[Command]:
        keys = _unit_keys(store, sample.layout)
        for name, target, part, counts in zip(
            labels(sample.layout), sample.layout.targets, sample.sums, sample.counts, strict=True
        ):
            act, freq, grad = (KINDS[target.kind].index(which) for which in ACTIVITY[target.kind])
            # redis-py sends repr(value), and that of a np.float64 is no number.
            for values in zip(part[act].tolist(), part[grad].tolist(), part[freq].tolist(), strict=True):
                key = next(keys)
                for field, value in zip(FIELDS, values, strict=True):
                    yield "HINCRBYFLOAT", key, field, value
            yield "HINCRBYFLOAT", store.key(f"param:{name}"), "tokens", float(counts[COUNTERS.index("tokens")])
            yield "HINCRBYFLOAT", store.key(f"param:{name}"), "samples", float(counts[COUNTERS.index("grad_samples")])
        yield "HSET", store.key("meta"), "readable", "sums"

    _send(store, commands(), patience=0.0)


def read(store: Store) -> pd.DataFrame:
    """The readable view back as a table.

    Returns:
        `target, kind, row, avg_act, avg_grad_norm, freq_act`, one row per unit, averages however they were written;
        NaN where there is none.

    Raises:
        BenchError: nothing was published.
    """
    layout = store.layout()
    way = store.connection.attempt(lambda: store.connection.redis.hget(store.key("meta"), "readable"))
    if layout is None or way is None:
        raise BenchError(f"scan {store.scan_id!r} was not published in the readable layout: `tinyonn store publish`")
    found = _send(store, (("HMGET", key, *FIELDS) for key in _unit_keys(store, layout)))
    values = np.array([[math.nan if v is None else float(v) for v in fields] for fields in found]).reshape(-1, 3)
    if way == b"sums":
        keys = (store.key(f"param:{name}") for name in labels(layout))
        counts = np.array(_send(store, (("HMGET", key, *_DIVISORS) for key in keys)), dtype=float)
        with np.errstate(invalid="ignore"):
            values /= np.repeat(counts, [target.rows for target in layout.targets], axis=0)
    return pd.DataFrame(
        {
            "target": np.repeat([target.name for target in layout.targets], [t.rows for t in layout.targets]),
            "kind": np.repeat([target.kind for target in layout.targets], [t.rows for t in layout.targets]),
            "row": np.concatenate([np.arange(target.rows) for target in layout.targets]),
            **dict(zip(FIELDS, values.T, strict=True)),
        }
    )


def remove(store: Store) -> None:
    """Delete the readable view."""
    layout = store.layout()
    if layout is not None and store.connection.redis.hexists(store.key("meta"), "readable"):
        names = (store.key(f"param:{name}") for name in labels(layout))
        _send(store, (("UNLINK", key) for keys in (names, _unit_keys(store, layout)) for key in keys))


def _unit_keys(store: Store, layout: Layout) -> Iterator[str]:
    for name, target in zip(labels(layout), layout.targets, strict=True):
        prefix = store.key(f"param:{name}:row:")
        yield from (f"{prefix}{row}" for row in range(target.rows))


def _send(store: Store, commands: Iterable[Command], patience: float | None = None) -> list[Any]:
    """Pipelined, without a transaction: a server must not stand still for a million commands."""
    rest, answers = iter(commands), []
    while batch := list(islice(rest, _BATCH)):

        def attempt(batch: list[Command] = batch) -> list[Any]:
            with store.connection.redis.pipeline(transaction=False) as pipe:
                for command in batch:
                    pipe.execute_command(*command)
                found: list[Any] = pipe.execute()
            return found

        answers += store.connection.attempt(attempt, patience=patience)
    return answers
