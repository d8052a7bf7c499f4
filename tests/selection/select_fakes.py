"""Scorers that need no model, and what the tests start as a process that scores."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import worker
from tinyonn_lib.selection.rows import Bad, Row
from tinyonn_lib.selection.select_worker import Job, take_part


class Hashed:
    """Scores that look random and depend on the text alone; one in 7 is NaN in `ifd`, texts with "zzz" are refused.

    Args:
        kill_at: the call at which it kills its process; 0: never.
        fail_at: the same with an error that a user is meant to read.
    """

    def __init__(self, kill_at: int = 0, fail_at: int = 0) -> None:
        self.calls, self.kill_at, self.fail_at = 0, kill_at, fail_at

    def __call__(self, rows: Sequence[Row]) -> tuple[pd.DataFrame, list[Bad]]:
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == self.fail_at:
            raise BenchError("no heart for it")
        bad = [
            Bad(row.source_dataset, row.source_index, f"too long: {len(row.text)} tokens")
            for row in rows
            if "zzz" in row.text
        ]
        good = [row for row in rows if "zzz" not in row.text]
        table = pd.DataFrame(
            {
                "source_dataset": [row.source_dataset for row in good],
                "source_index": [row.source_index for row in good],
                "tokens": [len(row.text.split()) for row in good],
                "literal": np.array([uniform(row.text, "literal") for row in good], dtype=np.float32),
                "random": [uniform(row.text, "random") for row in good],
                "ifd": [np.nan if uniform(row.text, "ifd") < 1 / 7 else uniform(row.text, "ifd") for row in good],
            }
        )
        return table, bad


def uniform(text: str, what: str) -> float:
    digest = hashlib.blake2b(f"{what} {text}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class Told:
    """Scores by a table: text → score of each column; texts must be distinct."""

    def __init__(self, scores: dict[str, dict[str, float]]) -> None:
        self.scores = scores

    def __call__(self, rows: Sequence[Row]) -> tuple[pd.DataFrame, list[Bad]]:
        ids = {name: [getattr(row, name) for row in rows] for name in ("source_dataset", "source_index")}
        names = next(iter(self.scores.values()))
        return pd.DataFrame(ids | {name: [self.scores[row.text][name] for row in rows] for name in names}), []


def make(job: Job, device: str) -> Hashed:
    mine = int(os.environ.get("RANK", 0)) == job.options.get("rank", 0)
    return Hashed(job.options.get("kill_at", 0), job.options.get("fail_at", 0)) if mine else Hashed()


if __name__ == "__main__":
    sys.exit(worker.run(lambda path: take_part(path, make)))
