"""Scoring by chunks and cutting the best share: exactly, whatever happens in between, with little memory."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import parts, ranking, scores, select
from tinyonn_lib.selection.dedupe import jaccard, shingles
from tinyonn_lib.selection.select import Cut, cut, score

from .select_fakes import Hashed, Told

FILES = ("selected.parquet", "selected.jsonl", "scores.parquet", "rejected.parquet")
IDS = ["source_dataset", "source_index"]


def write(folder: Path, **texts: list[str]) -> str:
    """A folder of .jsonl files; returns it as a source."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return str(folder)


def cut_to(scored: Path, out: Path, by: str = "random", share: float = 0.3, unique: float = 0.0) -> Cut:
    return cut(scored, by, share, out / "selected.parquet", out / "selected.jsonl", unique=unique)


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def data(tmp_path: Path) -> str:
    """99 rows, 1 too long, 1 empty, 1 not text, 1 broken, 1 torn, in two files."""
    source = write(
        tmp_path / "data", b=[f"text {n}" for n in range(60)], a=[f"über {n}" for n in range(39)] + [" ", "zzz"]
    )
    with (tmp_path / "data" / "a.jsonl").open("ab") as file:
        file.write(b'{"text": 5}\n{"text": "\xff"}\n{"text": "to')
    return source


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


def test_bad_rows_are_counted_and_listed(tmp_path: Path, data: str) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=50)
    found = cut_to(tmp_path / "scored", tmp_path / "out")
    kinds = {"broken UTF-8": 1, "cut off": 1, "empty": 1, "not text": 1, "too long": 1}
    assert (found.scored, found.kept, found.rejected) == (99, 30, kinds)
    rejected = pd.read_parquet(tmp_path / "out" / "rejected.parquet")
    assert rejected.values.tolist() == [
        ["a.jsonl", 39, "empty"],
        ["a.jsonl", 40, "too long: 3 tokens"],
        ["a.jsonl", 41, "not text"],
        ["a.jsonl", 42, "broken UTF-8"],
        ["a.jsonl", 43, "cut off"],
    ]


def test_nothing_to_score(tmp_path: Path) -> None:
    score(write(tmp_path / "data", a=["zzz", " "]), Hashed(), tmp_path / "scored", settings={})
    with pytest.raises(BenchError, match=r"could be scored \(1 x empty, 1 x too long\)"):
        cut_to(tmp_path / "scored", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


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


def test_cutting_before_the_end(tmp_path: Path, data: str) -> None:
    with pytest.raises(BenchError, match="holds no scored rows"):
        cut_to(tmp_path / "scored", tmp_path / "out")
    with pytest.raises(BenchError, match="no heart"):
        score(data, Hashed(fail_at=3), tmp_path / "scored", settings={}, chunk=10)
    with pytest.raises(BenchError, match="Only 2 chunks are scored"):
        cut_to(tmp_path / "scored", tmp_path / "out")
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10, share=(1, 3))
    with pytest.raises(BenchError, match="Only 5 of 11 chunks are scored"):
        cut_to(tmp_path / "scored", tmp_path / "out")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, data: str) -> None:
    """SIGKILL in the middle of scoring; the finished chunks are not scored again."""
    program = """
        import sys; from pathlib import Path; from select_fakes import Hashed
        from tinyonn_lib.selection.select import score
        score(sys.argv[1], Hashed(kill_at=6), Path(sys.argv[2]), settings={"a": 1}, chunk=10)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), data, str(tmp_path / "scored")]
    assert subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode == -9
    counted = Hashed()
    told: list[tuple[int, int, str]] = []
    score(data, counted, tmp_path / "scored", settings={"a": 1}, chunk=10, progress=lambda *a: told.append(a))
    assert counted.calls == 11 - 5
    assert told[0] == (10, 104, "")
    assert told[-1] == (104, 104, "")
    cut_to(tmp_path / "scored", tmp_path / "out")
    score(data, Hashed(), tmp_path / "whole", settings={"a": 1}, chunk=10)
    cut_to(tmp_path / "whole", tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert sorted(contents(tmp_path / "out")) == sorted(FILES)


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


@pytest.mark.parametrize(("workers", "characters"), [(2, 10**9), (3, 10**9), (3, 30)])
def test_shares_make_the_same_parts(
    tmp_path: Path, data: str, workers: int, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_CHUNK_CHARACTERS", characters)  # long rows end a chunk early
    score(data, Hashed(), tmp_path / "alone", settings={}, chunk=7)
    for worker in reversed(range(workers)):
        score(data, Hashed(), tmp_path / "shared", settings={}, chunk=7, share=(worker, workers))
    for name in ("alone", "shared"):
        cut_to(tmp_path / name, tmp_path / f"{name} out")
    (alone,), (shared,) = ([p for p in (tmp_path / n).iterdir() if p.is_dir()] for n in ("alone", "shared"))
    assert contents(alone) == contents(shared)
    assert len(list(alone.glob("[0-9]*"))) == (15 if characters > 30 else 21)
    assert contents(tmp_path / "alone out") == contents(tmp_path / "shared out")


CHANGES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "settings": lambda data, options: options.update(settings={"seed": 2}),
    "column": lambda data, options: options.update(column="body"),
    "chunk": lambda data, options: options.update(chunk=8),
    "text": lambda data, options: (data / "a.jsonl").write_text(
        (data / "a.jsonl").read_text("latin-1").replace("1", "2")
    ),
    "file": lambda data, options: (data / "c.jsonl").write_text('"new"\n'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_is_asked_anew(tmp_path: Path, data: str, change: str) -> None:
    options: dict[str, Any] = {"settings": {"seed": 1}, "column": "text", "chunk": 10}
    score(data, Hashed(), tmp_path / "scored", **options)
    again = Hashed()
    score(data, again, tmp_path / "scored", **options)
    assert again.calls == 0
    CHANGES[change](Path(data), options)
    changed = Hashed()
    score(data, changed, tmp_path / "scored", **options)
    fresh = Hashed()
    score(data, fresh, tmp_path / "fresh", **options)
    assert changed.calls == fresh.calls
    if change != "column":  # where no row is left
        for name in ("scored", "fresh"):
            cut_to(tmp_path / name, tmp_path / f"{name} out")
        assert contents(tmp_path / "scored out") == contents(tmp_path / "fresh out")


def test_large_data_is_told_apart_by_times(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parts.content(data)
    monkeypatch.setattr(parts, "_WHOLE_HASH", 100)
    large = parts.content(data)
    assert [entry[:2] for entry in whole] == [entry[:2] for entry in large]
    assert [entry[2] for entry in large] == [(Path(data) / entry[0]).stat().st_mtime_ns for entry in large]


def test_a_full_disk_loses_nothing(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = pq.write_table, []

    def full(table: Any, where: Any, **options: Any) -> None:
        calls.append(where)
        if len(calls) == 4:
            Path(where).write_bytes(b"PAR1 half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(table, where, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(BenchError, match=r"Cannot write to .*No space left on device.*what was scored is kept"):
        score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10)
    monkeypatch.undo()
    folder = next(p for p in (tmp_path / "scored").iterdir() if p.is_dir())
    assert sorted(file.name for file in folder.iterdir()) == [f"000000{n}-10.parquet" for n in range(3)]
    counted = Hashed()
    score(data, counted, tmp_path / "scored", settings={}, chunk=10)
    assert counted.calls == 11 - 3


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


def test_a_damaged_chunk_is_named(tmp_path: Path, data: str) -> None:
    score(data, Hashed(), tmp_path / "scored", settings={}, chunk=10)
    part = next((tmp_path / "scored").glob("*/0000004-*.parquet"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(BenchError, match="0000004-10.parquet is damaged: delete it and score again"):
        cut_to(tmp_path / "scored", tmp_path / "out")


def test_a_scorer_that_mixes_up_rows_is_found_out(tmp_path: Path, data: str) -> None:
    def wrong(rows: Any) -> Any:
        table, bad = Hashed()(rows)
        return table.iloc[::-1], bad

    with pytest.raises(ValueError, match="other rows"):
        score(data, wrong, tmp_path / "scored", settings={})


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


# -- near-duplicates -----------------------------------------------------------------------------------------------


def families(count: int, seed: int = 0) -> list[str]:
    """Texts of 60 words, many with twins of which one word is another, or none."""
    make = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        words = [f"w{n}" for n in make.integers(0, 5_000, 60)]
        for _ in range(int(make.integers(1, 5))):
            changed = list(words)
            if make.random() < 0.7:
                changed[int(make.integers(0, 60))] = f"x{make.integers(0, 9_999)}"
            texts.append(" ".join(changed))
    return [texts[place] for place in make.permutation(len(texts))]


def brute_force(texts: list[str], least: float, wanted: int) -> tuple[list[int], dict[int, tuple[int, float]]]:
    """Which of the texts, best first, to keep; dropped ones → (most similar kept one, similarity)."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[place : place + 5]) for place in range(max(1, len(words) - 4))}

    sets, kept, dropped = [grams(text) for text in texts], [], {}
    for place, own in enumerate(sets):
        if len(kept) == wanted:
            break
        near = [(len(own & sets[other]) / len(own | sets[other]), -number) for number, other in enumerate(kept)]
        similarity, number = max(near, default=(0.0, 0))
        if similarity >= least:
            dropped[place] = (kept[-number], similarity)
        else:
            kept.append(place)
    return kept, dropped


@pytest.mark.parametrize(("least", "share"), [(0.6, 0.3), (0.8, 0.2), (1.0, 0.3), (0.6, 1.0)])
def test_unique_is_the_brute_force(tmp_path: Path, least: float, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_BUCKET", 30_000)
    texts = families(100)
    told = Told({f"{text} t{n}" if n < 0 else text: {"random": -n / 7} for n, text in reversed([*enumerate(texts)])})
    # Equal texts have equal scores: those of the first one, and the order of the file settles the rest.
    ordered = sorted(range(len(texts)), key=lambda n: (-told.scores[texts[n]]["random"], n))
    score(write(tmp_path / "data", a=texts), told, tmp_path / "scored", settings={}, chunk=16)
    found = cut_to(tmp_path / "scored", tmp_path / "out", share=share, unique=least)
    wanted = math.floor(share * len(texts) + 0.5)
    kept, dropped = brute_force([texts[n] for n in ordered], least, wanted)
    assert dropped
    assert (found.kept, found.duplicates) == (len(kept), len(dropped))
    assert found.kept < wanted if share == 1 else found.kept == wanted
    chosen = pd.read_parquet(tmp_path / "out" / "selected.parquet")
    assert chosen["source_index"].tolist() == [ordered[place] for place in kept]
    listed = pd.read_parquet(tmp_path / "out" / "duplicates.parquet")
    assert listed["source_index"].tolist() == [ordered[place] for place in dropped]
    assert listed["kept_index"].tolist() == [ordered[twin] for twin, _ in dropped.values()]
    np.testing.assert_allclose(listed["similarity"], [similarity for _, similarity in dropped.values()], rtol=1e-12)
    assert set(listed["source_dataset"]) == set(listed["kept_dataset"]) == {"a.jsonl"}
    cut_to(tmp_path / "scored", tmp_path / "out", share=share)
    assert sorted(contents(tmp_path / "out")) == sorted(FILES)  # no list of duplicates that this cut did not look for


def test_shingles() -> None:
    assert len(shingles("a b c d e f g")) == 3
    assert np.array_equal(shingles("One, two!"), shingles("one two"))
    assert len(shingles("!!!")) == len(shingles("one")) == 1
    assert not np.array_equal(shingles("!!!"), shingles("???"))
    assert len(shingles("猫が魚を食べたから")) == 5  # nine characters, no spaces
    assert jaccard(shingles("a b c d e f"), shingles("b c d e f g")) == pytest.approx(1 / 3)


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
