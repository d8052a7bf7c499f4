"""Peak memory of selecting: does it grow with the data set?

Short rows are written as .jsonl (two thirds of them an instruction and its answer, one in a thousand broken), scored
and cut to the best 5 %, each size in a process of its own. Scores come from a hash of the text, so that reading,
chunks, sorting and writing are measured and no model. What counts is the largest resident memory of that process; with
1 M rows it may be somewhat more than with 10 k, for ids and scores of all rows are sorted in memory, but not for the
texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from harness import Bar, Row, main

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import rows as selection_rows

SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000), (10_000, 100_000)
SHARE, WORDS = 0.05, 30
MB = 1_000_000


def write_rows(path: Path, count: int) -> None:
    """Short rows of random words, no two alike."""
    make = np.random.default_rng(0)
    words = [f"{letter}{ending}" for letter in "bcdfghklmnprst" for ending in ("o", "ane", "ister", "el", "ivity")]
    with path.open("w") as file:
        for start in range(0, count, 10_000):
            picks = make.integers(0, len(words), (min(10_000, count - start), WORDS))
            for number, picked in enumerate(picks.tolist(), start=start):
                text = f"{number} " + " ".join(words[pick] for pick in picked)
                record = {"question": text[:60], "answer": text[60:]} if number % 3 else {"text": text}
                file.write("{broken\n" if number % 1000 == 999 else json.dumps(record) + "\n")


def hashed(rows: Sequence[selection_rows.Row]) -> tuple[pd.DataFrame, list[selection_rows.Bad]]:
    """Scores that look random, as many columns as a scorer's."""
    digests = b"".join(hashlib.blake2b(row.text.encode(), digest_size=32).digest() for row in rows)
    scores = np.frombuffer(digests, dtype="<u4").reshape(len(rows), 8).astype(np.float32)
    table = pd.DataFrame(
        scores, columns=["literal", "centred", "log_mass", "contrastive", "combined", "random", "perplexity", "ifd"]
    )
    table.insert(0, "source_dataset", [row.source_dataset for row in rows])
    table.insert(1, "source_index", [row.source_index for row in rows])
    table.insert(2, "tokens", [len(row.text.split()) for row in rows])
    return table, []


def select_alone(line: Connection, source: Path, folder: Path) -> None:
    """In its own process: score and cut, and report memory before and at its peak, seconds, and what was kept."""
    from tinyonn_lib.selection import scores
    from tinyonn_lib.selection.select import cut, score

    assert scores.RANKINGS  # imported, and torch with it, before memory counts
    before, began = status("VmRSS"), time.perf_counter()
    score(str(source), hashed, folder / "scored", settings={})
    scored = time.perf_counter()
    found = cut(folder / "scored", "contrastive", SHARE, folder / "selected.parquet", folder / "selected.jsonl")
    line.send(
        (
            before,
            status("VmHWM"),
            scored - began,
            time.perf_counter() - scored,
            found.kept,
            sum(found.rejected.values()),
        )
    )


def status(name: str) -> int:
    """Of this process, in bytes: VmRSS is resident now, VmHWM was at the peak."""
    lines = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    if sys.platform != "linux":
        raise BenchError("Peak memory is read from /proc: run this on Linux.")
    rows = []
    for count in QUICK_SIZES if args.quick else SIZES:
        with tempfile.TemporaryDirectory(prefix="tinyonn-") as scratch:
            source = Path(scratch, "rows.jsonl")
            write_rows(source, count)
            context: Any = multiprocessing.get_context("spawn")  # a fork would hold this process's memory
            ours, theirs = context.Pipe()
            process = context.Process(target=select_alone, args=(theirs, source, Path(scratch)))
            process.start()
            theirs.close()
            try:
                before, peak, scoring, cutting, kept, rejected = ours.recv()
            except EOFError:
                raise BenchError("The selecting process died: too little memory or disk?") from None
            process.join()
            size = source.stat().st_size
        rows.append(
            {
                "rows": count, "input_mb": size / MB, "scoring_seconds": scoring, "cutting_seconds": cutting,
                "rows_per_second": count / (scoring + cutting), "kept": kept, "rejected": rejected,
                "baseline_mb": before / MB, "peak_mb": peak / MB,
            }
        )  # fmt: skip
    most, least = rows[-1], rows[0]
    name = f"peak memory of {most['rows']:,} rows minus that of {least['rows']:,}, MB"
    wrong = sum(row["kept"] != int(SHARE * (row["rows"] - row["rejected"]) + 0.5) for row in rows)
    return rows, [
        Bar(name, most["peak_mb"] - least["peak_mb"], 150, "lower"),
        Bar("sizes with another number of rows than 5 %", wrong, 0, "lower"),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, "selection_memory", measure))
