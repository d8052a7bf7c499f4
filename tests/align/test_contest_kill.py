"""A contest that is stopped, killed, or finds damaged files ends like one that nobody touched."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.align.small import contest_small, weights
from tests.tiny import environment
from tinyonn_lib.align import trained as module
from tinyonn_lib.align.contest import Contest
from tinyonn_lib.align.kept import kept, key_of
from tinyonn_lib.errors import BenchError

Fresh = Callable[[], Any]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(half: Fresh) -> Contest:
    """Without a folder: nothing is kept, nothing gone on with."""
    return contest_small(half())


def _same(one: Contest, two: Contest) -> None:
    for name in ("runs", "lifts", "history"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)
    assert torch.equal(weights(one.model), weights(two.model))


def test_stopped_wherever_it_tells_something(half: Fresh, whole: Contest, tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {}

    def reporter(what: str, unit: str) -> Callable[[int, int, str], None]:
        def told(done: int, total: int, note: str) -> None:
            if note.startswith("going on"):
                seen[what].append(f"on {done}")
            elif f"stop {done}" not in seen.setdefault(what, []):
                seen[what].append(f"stop {done}")
                raise Stop

        return told

    for _ in range(40):
        try:
            found = contest_small(half(), tmp_path, reporter)
            break
        except Stop:
            continue
    _same(found, whole)
    assert list(seen) == [f"{name}, gains 0.01, seed 0" for name in
                          ("GSPO", "imitating its own right answers", "DPO")]  # fmt: skip
    for what, own in seen.items():  # nothing was done twice
        rounds = 4 if what.startswith("DPO") else 2
        assert own == [f"{word} {n}" for n in range(1, rounds + 1) for word in ("stop", "on")], what
    assert not list(tmp_path.glob("*.pt"))


def test_sigkill_inside_a_training(half: Fresh, whole: Contest, tmp_path: Path) -> None:
    start, folder = tmp_path / "model", tmp_path / "contest"
    half().save_pretrained(start)
    with subprocess.Popen(
        [sys.executable, "-c", f"from tests.align.small import contested; contested({str(start)!r}, {str(folder)!r})"],
        env=environment(tmp_path), stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("imitating its own right answers, gains 0.01, seed 0: 1"):
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert list(folder.glob("*.pt"))
    gone_on: list[str] = []

    def reporter(what: str, unit: str) -> Callable[[int, int, str], None]:
        return lambda done, total, note: gone_on.append(what) if note.startswith("going on") else None

    from transformers import AutoModelForCausalLM

    _same(contest_small(AutoModelForCausalLM.from_pretrained(start), folder, reporter), whole)
    assert gone_on == ["imitating its own right answers, gains 0.01, seed 0"]


def _flipped(data: bytes) -> bytes:
    """One bit of the last tensor."""
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


MADE = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([], dtype=torch.int64)}, {"note": "ü"}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:-20],
    "empty": lambda data: b"",
    "foreign": lambda data: b"not this",
    "a bit": _flipped,
    "a word": lambda data: data.replace("ü".encode(), "ö".encode()),
    "another key": lambda data: data.replace(b'"key":"one"', b'"key":"two"'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_or_foreign_is_made_anew(name: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    kept(path, "one", lambda: MADE)
    data = path.read_bytes()
    changed = DAMAGE[name](data)
    assert changed != data
    path.write_bytes(changed)
    for key in ("one", "two"):
        made: list[int] = []
        tensors, words = kept(path, key, lambda made=made: made.append(1) or MADE)
        assert made == [1]
        assert words == MADE[1]
        assert torch.equal(tensors["a"], MADE[0]["a"])


def test_a_contest_with_damaged_files_trains_again(half: Fresh, whole: Contest, tmp_path: Path) -> None:
    """All but the first with the content of another training, the first cut off."""
    contest_small(half(), tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    data = [path.read_bytes() for path in files]
    for path, own in zip(files, [data[-1][:-1], *data[:-1]], strict=True):
        path.write_bytes(own)
    _same(contest_small(half(), tmp_path), whole)


def test_everything_it_depends_on_makes_another_training(
    half: Fresh, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def counted(path: Path, key: str, make: Callable[[], Any]) -> Any:
        return kept(path, key, lambda: trained.append(key) or make())

    monkeypatch.setattr(module, "kept", counted)

    def count(**changes: Any) -> int:
        trained.clear()
        contest_small(changes.pop("warm", None) or half(), tmp_path, methods=("gspo",), **changes)
        return len(trained)

    assert count() == 1
    assert count() == 0
    other, turned = half(), half()
    with torch.no_grad():
        other.model.norm.weight[3] += 1.0e-6
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 5.0}
    for change in (
        {"warm": other}, {"warm": turned}, {"seed": 1}, {"temperature": 0.9}, {"beta": 0.1}, {"samples": 5},
        {"size": 8}, {"tune_size": 8}, {"learned": 19}, {"rate": 2.0e-2}, {"tried": 2},
    ):  # fmt: skip
        assert count(**change) >= 1, change
        assert count() == 0
    stranger = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token=tokenizer.eos_token)
    stranger.add_tokens(["<more>"])
    assert count(tokenizer=stranger) == 1


def test_kept_gives_back_what_was_made(tmp_path: Path) -> None:
    for _ in range(2):
        tensors, words = kept(tmp_path / "x" / "f", "key", lambda: MADE)
        assert words == {"note": "ü"}
        assert torch.equal(tensors["a"], MADE[0]["a"])
        assert tensors["b"].dtype == torch.int64
    assert kept(tmp_path / "x" / "f", "other", lambda: ({}, {}))[0] == {}
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["f"]
    (tmp_path / "full").write_text("a file, no folder")
    with pytest.raises(BenchError, match="Cannot write the checkpoint f"):
        kept(tmp_path / "full" / "f", "key", lambda: MADE)


def test_a_key_sees_every_value() -> None:
    table = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
    keys = {key_of([table, 1]), key_of([table.assign(a=[1.0, 2.0 + 1e-15]), 1]), key_of([table, 2]),
            key_of([table.iloc[::-1], 1]), key_of([table, 1, ""])}  # fmt: skip
    assert len(keys) == 5
    assert key_of([table.copy(), 1]) in keys
