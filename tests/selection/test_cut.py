"""Cutting the best share of what was scored: exactly, into two files, with little memory."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import ranking, scores
from tinyonn_lib.selection.select import Cut, cut, score

from .cuts import contents, cut_to, write
from .select_fakes import Hashed, Told

IDS = ["source_dataset", "source_index"]
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -2.5, math.nan, math.inf, -math.inf]) | st.floats()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("bac"), NUMBERS), min_size=1, max_size=40),
    st.floats(0, 1, exclude_min=True), st.integers(1, 9), st.sampled_from(["random", "length"]),
)  # fmt: skip
def test_the_cut_is_that_of_pandas(
    tmp_path_factory: pytest.TempPathFactory, given: list[tuple[str, float]], share: float, chunk: int, by: str
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    texts: dict[str, list[str]] = {}
    told = {}
    for number, (name, value) in enumerate(given):
        texts.setdefault(name, []).append(f"row {number}")
        told[f"row {number}"] = {"tokens": value, "random": value}
    score(write(folder / "data", **texts), Told(told), folder / "scored", settings={}, chunk=chunk)
    table = pd.DataFrame(
        [(f"{name}.jsonl", n, t, told[t]["random"]) for name in texts for n, t in enumerate(texts[name])]
    )
    table.columns = pd.Index([*IDS, "text", "random"])
    column, sign = scores.RANKINGS[by]
    assert column in ("random", "tokens")
    table["quality_score"] = sign * table["random"]
    if table["random"].isna().all():
        with pytest.raises(BenchError, match="not a number for any row"):
            cut_to(folder / "scored", folder, by, share)
        assert not (folder / "selected.parquet").exists()
        return
    reference = table.sort_values(["quality_score", *IDS], ascending=[False, True, True], na_position="last")
    wanted = max(1, math.floor(share * len(given) + 0.5))
    found = cut_to(folder / "scored", folder, by, share)
    nan = int(table["random"].isna().sum())
    assert found == Cut(len(given), wanted, {}, 0, nan, max(0, wanted - (len(given) - nan)))
    chosen = pd.read_parquet(folder / "selected.parquet")
    columns = [*IDS, "text", "quality_score"]
    pd.testing.assert_frame_equal(
        chosen[columns], reference[columns].head(wanted).reset_index(drop=True), check_dtype=False, check_exact=True
    )
    lines = [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]
    assert lines == [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        for row in chosen.to_dict("records")
    ]
    everything = pd.read_parquet(folder / "scores.parquet")
    assert everything[IDS].values.tolist() == table.sort_values(IDS)[IDS].values.tolist()
    kept = everything.loc[everything["kept"], IDS].values.tolist()
    assert sorted(kept) == sorted(chosen[IDS].values.tolist())


def test_all_columns_and_both_files(tmp_path: Path, data: str) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=8)
    cut_to(tmp_path / "scored", tmp_path / "out", "literal")
    chosen = pd.read_parquet(tmp_path / "out" / "selected.parquet")
    columns = [
        "source_dataset",
        "source_index",
        "text",
        "quality_score",
        "prompt",
        "tokens",
        "literal",
        "random",
        "ifd",
    ]
    assert chosen.columns.tolist() == columns
    cut(tmp_path / "scored", "literal", 0.3, tmp_path / "alone" / "a.parquet", None)
    assert contents(tmp_path / "alone") == {"a.parquet": (tmp_path / "out" / "selected.parquet").read_bytes()}
    # What a score is in float32 it is in JSON.
    lines = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert [line["literal"] for line in lines] == chosen["literal"].astype(float).tolist()
    assert chosen["quality_score"].tolist() == chosen["literal"].astype(float).tolist()
    everything = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert everything.columns.tolist() == [c for c in columns if c not in ("text", "prompt", "quality_score")] + [
        "quality_score",
        "kept",
    ]
    texts = pd.concat([pd.read_json(Path(data) / f"{name}.jsonl", lines=True).head(39) for name in "b"])
    for row in chosen[chosen["source_dataset"] == "b.jsonl"].itertuples():
        if row.source_index < 39:
            assert texts["text"][row.source_index] == row.text


@pytest.mark.parametrize(
    ("by", "share", "unique", "message"),
    [
        ("quality", 0.1, 0.0, "Unknown ranking 'quality': choose one of literal"),
        ("perplexity", 0.1, 0.0, "lack 'perplexity'"),
        ("random", 0.0, 0.0, "share above 0"),
        ("random", 1.1, 0.0, "at most 1"),
        ("random", 0.1, 1.1, "at most 1"),
    ],
)
def test_wrong_questions(tmp_path: Path, data: str, by: str, share: float, unique: float, message: str) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=50)
    with pytest.raises(BenchError, match=message):
        cut_to(tmp_path / "scored", tmp_path / "out", by, share, unique)


def test_a_killed_cut_leaves_the_one_before_and_nothing_that_stays(tmp_path: Path, data: str) -> None:
    program = """
        import os, sys; from pathlib import Path; from tinyonn_lib.selection import cut
        cut._all_scores = lambda *_: os.kill(os.getpid(), 9)
        out = Path(sys.argv[2])
        cut.cut(Path(sys.argv[1]), "random", 0.5, out / "selected.parquet", out / "selected.jsonl")
    """
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10)
    cut_to(tmp_path / "scored", tmp_path / "out")
    before = contents(tmp_path / "out")
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "scored"), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    left = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert ".selected.parquet.part" in left
    assert {name: left[name].read_bytes() for name in before} == before
    cut_to(tmp_path / "scored", tmp_path / "out", share=0.5)
    cut_to(tmp_path / "scored", tmp_path / "expected", share=0.5)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_disk_that_fills_up_while_cutting(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10)
    cut_to(tmp_path / "scored", tmp_path / "out")
    before = contents(tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ranking, "_spread", full)
    with pytest.raises(BenchError, match=r"Cannot write to .*out \(No space left"):
        cut_to(tmp_path / "scored", tmp_path / "out", share=0.5)
    assert contents(tmp_path / "out") == before  # of the cut before, without leftovers


@pytest.mark.parametrize("bucket", [1, 20_000, 10**9])
def test_buckets_do_not_show(tmp_path: Path, data: str, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10)
    cut_to(tmp_path / "scored", tmp_path / "expected", "ifd", 0.9)
    monkeypatch.setattr(ranking, "_BUCKET", bucket)
    monkeypatch.setattr(ranking, "_PENDING", 0)
    cut_to(tmp_path / "scored", tmp_path / "out", "ifd", 0.9)
    lines = [(tmp_path / name / "selected.jsonl").read_text() for name in ("out", "expected")]
    assert lines[0] == lines[1]
    assert lines[0].count("\n") == 89


def test_ties_go_by_the_names_of_the_data(tmp_path: Path) -> None:
    """Folders are read in another order: a/x, a/y, a.jsonl."""
    write(tmp_path / "data" / "a", x=["a"], y=["b"])
    source, told = write(tmp_path / "data", a=["c"]), Told({text: {"random": 0.5} for text in "abc"})
    score(source, told, tmp_path / "scored", settings={})
    cut_to(tmp_path / "scored", tmp_path / "out", share=1.0)
    assert pd.read_parquet(tmp_path / "out" / "selected.parquet")["text"].tolist() == ["c", "a", "b"]
    assert pd.read_parquet(tmp_path / "out" / "scores.parquet")["source_dataset"].tolist() == [
        "a/x.jsonl", "a/y.jsonl", "a.jsonl"
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """30 MB of text, half of it chosen, with buckets of 1 MB: at most a few of them at a time."""
    program = """
        import sys, tracemalloc; from pathlib import Path; import pyarrow as pa
        from select_fakes import Hashed
        from tinyonn_lib.selection import ranking, scores
        from tinyonn_lib.selection.select import cut, score
        ranking._BUCKET, ranking._PENDING = 10**6, 10**6
        folder = Path(sys.argv[1])
        with (folder / "a.txt").open("w") as file:
            for number in range(3_000):
                file.write(f"{number} " + "word" * 2_500 + chr(10) * 2)
        tracemalloc.start()
        score(str(folder / "a.txt"), Hashed(), folder / "scored", settings={}, chunk=64)
        print(cut(folder / "scored", "random", 0.5, folder / "a.parquet", folder / "a.jsonl").kept)
        print(tracemalloc.get_traced_memory()[1], pa.default_memory_pool().max_memory())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    kept, python, arrow = map(int, done.stdout.split())
    assert kept == 1_500
    assert (tmp_path / "a.jsonl").stat().st_size > 15_000_000
    assert python < 5_000_000
    assert arrow < 10_000_000
