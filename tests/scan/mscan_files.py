from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, settings

from tinyonn_lib.scan.mscan import Writer
from tinyonn_lib.scan.statistics import Target

TARGETS = (
    Target("model.layers.0.self_attn.q_proj", "linear", 0, 0),
    Target("model.layers.0.mlp", "neurons", 8, 0),
    Target("model.layers.0.mlp", "experts", 4, 0),  # one name, watched in two ways
    Target("model.embed_tokens", "embedding", 0, -1),
)
META = {"model": "tiny", "tokens": 100, "rho": 0.05}
COUNT = len(TARGETS)
properties = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def norms(step: int, count: int = COUNT) -> np.ndarray:
    """What step `step` measures, the same on every call."""
    draw = np.random.default_rng(step)
    return np.exp(np.linspace(-4, 4, count)[:, None] + draw.normal(0, 0.5, (count, 2)))


def put(file: Writer, step: int) -> None:
    count = len(file.header.targets)
    file.write(step, 1000 + step // 3, 50 + step, norms(step, count), np.arange(count) % 4)


def make(path: Path, steps: Iterable[int], flush: Iterable[int] = (), **options: object) -> Path:
    with Writer(path, TARGETS, META, **options) as file:  # type: ignore[arg-type]
        for step in steps:
            put(file, step)
            if step in flush:
                file.flush()
    return path


def equal(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True))


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
