"""What tests of scoring and cutting share: data in files, a cut of what was scored, and what it left."""

from __future__ import annotations

import json
from pathlib import Path

from tinyonn_lib.selection.select import Cut, cut

FILES = ("selected.parquet", "selected.jsonl", "scores.parquet", "rejected.parquet")


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
