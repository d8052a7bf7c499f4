"""A selector's folder that is damaged or cannot be written: one clear line, never a selector of two halves."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.selector import FILE, WEIGHTS, load_selector, save

from .warmed_selectors import warmed


def edited(folder: Path, **fields: Any) -> None:
    note = json.loads((folder / FILE).read_text()) | fields
    (folder / FILE).write_text(json.dumps({name: value for name, value in note.items() if value is not ...}))


def without(folder: Path, key: str) -> None:
    save_file({name: row for name, row in load_file(folder / WEIGHTS).items() if name != key}, folder / WEIGHTS)


def truncated(path: Path, part: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no note": (lambda f: (f / FILE).unlink(), "holds no selector.json: give a selector's folder"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is damaged"),
    "weights cut off": (lambda f: truncated(f / WEIGHTS, 0.6), "is damaged"),
    "weights empty": (lambda f: truncated(f / WEIGHTS, 0), "is damaged"),
    "note cut off": (lambda f: truncated(f / FILE, 0.5), "is damaged"),
    "note no UTF-8": (lambda f: (f / FILE).write_bytes(b"\xff\xfe{}"), "is damaged"),
    "note a list": (lambda f: (f / FILE).write_text("[1]"), "is damaged"),
    "note empty": (lambda f: (f / FILE).write_text("{}"), "is damaged"),
    "format": (lambda f: edited(f, format=2), "has format 2, not 1: warm the selector up again"),
    "no units": (lambda f: edited(f, units=..., combined=...), "lacks combined, units: warm"),
    "no base": (lambda f: edited(f, base=...), "lacks base: warm"),
    "no router": (lambda f: without(f, "model.layers.1.mlp.gate.weight"), "no rows for model.layers.1.mlp.gate.weight"),
    "half of the gaps": (lambda f: without(f, "gap.0"), "warm"),
    "units of another": (lambda f: edited(f, units=[1.0]), "warm"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "holds no selector.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_folder_is_refused_in_one_line(case: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "epoch_1"
    save(warmed(base), folder, str(base))
    damage, line = BROKEN[case]
    damage(folder)
    with pytest.raises(BenchError, match=line) as error:
        load_selector(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_what_cannot_be_written_is_told_in_one_line(base: Path, tmp_path: Path) -> None:
    selector = warmed(base)
    (tmp_path / "taken").write_text("x")
    with pytest.raises(BenchError, match="Cannot write the selector"):
        save(selector, tmp_path / "taken/epoch_1", str(base))
    folder, (soft, hard) = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (500, 2000):  # in the middle of the rows
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # as if the disk were full from there on
        try:
            with pytest.raises(BenchError, match="Cannot write the selector .*disk full"):
                save(selector, folder, str(base))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(BenchError, match="holds no selector.json"):
            load_selector(folder)


def test_a_write_that_failed_leaves_no_selector_of_two_halves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved over an older one, killed in between: new rows with an old note would load and be wrong."""
    selector, folder = warmed(base), tmp_path / "epoch_1"
    save(selector, folder, str(base))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(replace(selector, units=(9.0, 9.0)), folder, str(base))
    with pytest.raises(BenchError, match="holds no selector.json"):
        load_selector(folder)
