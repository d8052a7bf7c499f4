from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mscan_files import COUNT, META, TARGETS, equal, make, norms, properties, put

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.mscan import File, Writer, merge, read


@pytest.mark.parametrize("before", [None, 0, 2, 5, 6, 9, 99])
@pytest.mark.parametrize("state", ["finished", "unfinished", "torn"])
def test_going_on_drops_what_will_be_done_again(
    whole: Path, ends: list[int], path: Path, before: int | None, state: str
) -> None:
    cut = {"finished": None, "unfinished": ends[-2], "torn": ends[-2] - 3}[state]
    path.write_bytes(whole.read_bytes()[:cut])
    stays = list(range(8 if state == "torn" else 10))[:before]
    with Writer(path, TARGETS, META, append=True, before_step=before) as file:
        assert File(path).steps()["step"].tolist() == stays
        assert File(path).torn is not None
        for step in range(len(stays), 12):
            put(file, step)
    merge([path], path)
    assert path.read_bytes() == canonical(path.parent / "wanted", range(12)).read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["scan.mscan", "wanted"]


def canonical(path: Path, steps: Iterable[int]) -> Path:
    merge([make(path, steps)], path)
    return path


def test_going_on_from_nothing(path: Path, whole: Path, ends: list[int]) -> None:
    wanted = make(path, range(3)).read_bytes()
    for cut in (0, 1, 15, 16, ends[0] - 1):
        path.write_bytes(wanted[:cut])  # killed before the header was complete
        assert make(path, range(3), append=True).read_bytes() == wanted
    path.unlink()
    assert make(path, range(3), append=True, before_step=0).read_bytes() == wanted


def test_only_the_same_scan_goes_on(path: Path) -> None:
    before = make(path, range(3)).read_bytes()
    with pytest.raises(BenchError, match="meta 'tokens' .100 and 7."):
        Writer(path, TARGETS, {**META, "tokens": 7}, append=True)
    with pytest.raises(BenchError, match="its targets differ"):
        Writer(path, TARGETS[:2], META, append=True)
    path.with_name("other").write_bytes(b"a diary, not a scan")
    with pytest.raises(BenchError, match="is not an .mscan file"):
        Writer(path.with_name("other"), TARGETS, META, append=True)
    assert path.read_bytes() == before
    with Writer(path, TARGETS, META, append=True) as file, pytest.raises(BenchError, match="cannot follow step 2"):
        put(file, 2)


@given(
    owner=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    flush=st.sets(st.integers(0, 11)),
    rows=st.integers(1, 40),
)
@settings(properties, max_examples=25)
def test_merged_bytes_depend_on_the_records_alone(tmp_path: Path, owner: list[int], flush: set[int], rows: int) -> None:
    parts = [
        make(tmp_path / str(worker), [s for s in range(12) if owner[s] == worker], flush, rows_per_segment=rows)
        for worker in (2, 0, 1)
    ]
    merge([*parts, parts[0]], tmp_path / "merged")  # one of them twice: kept once
    assert (tmp_path / "merged").read_bytes() == canonical(tmp_path / "wanted", range(12)).read_bytes()


def test_merged_segments_have_a_fixed_number_of_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyonn_lib.scan.mscan.SEGMENT_ROWS", 10)
    before = read(make(path, range(8), flush=(2, 3)))
    merge([path], path)
    assert [segment.records for segment in File(path).segments] == [10, 10, 10, 2]
    equal(read(path, strict=True), before)


def test_what_does_not_belong_together_is_not_merged(path: Path, tmp_path: Path, whole: Path, ends: list[int]) -> None:
    with Writer(path, TARGETS, META) as file:
        file.write(3, 1001, 53, norms(4), np.arange(COUNT))
    for paths, line in (
        ([whole, path], "step 3 of .*q_proj is there twice with different values"),
        ([], "nothing to merge"),
        ([tmp_path / "none"], "No such file"),
    ):
        with pytest.raises(BenchError, match=line):
            merge(paths, tmp_path / "merged")
    with Writer(tmp_path / "other", TARGETS, {}) as file:
        put(file, 20)
    with pytest.raises(BenchError, match="belongs to another scan"):
        merge([whole, tmp_path / "other"], tmp_path / "merged")
    (tmp_path / "torn").write_bytes(whole.read_bytes()[: ends[3]])
    with pytest.raises(BenchError, match="torn"):
        merge([tmp_path / "torn"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge([tmp_path / "torn"], tmp_path / "merged", strict=False)
    assert File(tmp_path / "merged", strict=True).records == 6 * COUNT
