"""Totals as the fields of a hash, and back: little-endian float64, one field per target and statistic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.statistics import COUNTERS, KINDS, NORMS, Layout, Totals

_FLOAT = np.dtype("<f8")
Value = bytes | memoryview


def pack(totals: Totals) -> dict[str, Value]:
    """Fields `counts`, `norms`, and `TARGET/STATISTIC` for every row of the sums; views, good until those change."""
    fields = {"counts": _bytes(totals.counts), "norms": _bytes(totals.norms)}
    for names, part in zip(_fields(totals.layout), totals.sums, strict=True):
        fields |= {name: _bytes(row) for name, row in zip(names, part, strict=True)}
    return fields


def unpack(layout: Layout, state: Mapping[bytes, bytes]) -> Totals:
    """The other way round, bit for bit; further fields are ignored.

    Raises:
        BenchError: fields that are missing or of another size.
    """
    totals = Totals.zeros(layout)
    try:
        totals.counts[:] = np.frombuffer(state[b"counts"], _FLOAT).reshape(-1, len(COUNTERS))
        totals.norms[:] = np.frombuffer(state[b"norms"], _FLOAT).reshape(-1, len(NORMS))
        for names, part in zip(_fields(layout), totals.sums, strict=True):
            for name, row in zip(names, part, strict=True):
                row[:] = np.frombuffer(state[name.encode()], _FLOAT)
    except (KeyError, ValueError):
        raise BenchError("the totals on the server are damaged: someone else wrote to these keys; scan again") from None
    return totals


def labels(layout: Layout) -> list[str]:
    """What each target is called on the server: its name, and its kind where one module is watched in two ways."""
    often = Counter(target.name for target in layout.targets)
    return [f"{each.name}/{each.kind}" if often[each.name] > 1 else each.name for each in layout.targets]


def _fields(layout: Layout) -> list[list[str]]:
    return [
        [f"{label}/{statistic}" for statistic in KINDS[target.kind]]
        for label, target in zip(labels(layout), layout.targets, strict=True)
    ]


def _bytes(values: np.ndarray) -> Value:
    """The memory itself, where it can be: copying megabytes takes as long as sending them."""
    packed = np.ascontiguousarray(values, dtype=_FLOAT)
    return packed.data.cast("B") if packed.size else b""
