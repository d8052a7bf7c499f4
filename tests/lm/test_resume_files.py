"""Small files for going on after a kill: whole or not at all, and damage is as good as none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    assert resume.read_json(path) is None
    resume.write_json(path, {"of": "ü", "values": [1.5, None]})
    assert resume.read_json(path) == {"of": "ü", "values": [1.5, None]}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", [b"", b'{"of": 1', b"\xff\xfe"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    assert resume.read_json(tmp_path / "a.json") is None


def test_what_fails_in_between_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    resume.write_json(path, 1)

    def stopped() -> None:
        with resume.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("no space")

    with pytest.raises(BenchError, match=r"Cannot write the checkpoint a\.json \(no space\): free disk space"):
        stopped()
    assert resume.read_json(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="Cannot write the checkpoint"):
        resume.write_json(tmp_path / "file" / "a.json", 1)
