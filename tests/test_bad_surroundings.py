"""Damage, company and full disks through the real command: one clear line, nothing earlier harmed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import tiny
from .mistakes import call, fingerprints, finished, one_line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `default` with a model and its scan."""
    with finished(tmp_path_factory.mktemp("bad"), "pretrain", "scan") as folder:
        yield folder


def test_a_damaged_artefact_of_an_earlier_phase(home: Path, tmp_path: Path) -> None:
    """One flipped byte, with size and time as they were."""
    shutil.copytree(home / "runs/default/pretrain", tmp_path / "runs/default/pretrain")
    weights = tmp_path / "runs/default/pretrain/model/model.safetensors"
    data, stat = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    one_line(
        call(tmp_path, "scan"), "pretrain/model/model.safetensors is not what pretrain wrote", "`tinyonn pretrain`"
    )
    assert not (tmp_path / "runs/default/scan/manifest.json").exists()
    assert (tmp_path / "runs/default/pretrain/manifest.json").exists()


def test_a_second_process_on_the_same_run_is_told_and_harms_nothing(home: Path) -> None:
    first = subprocess.Popen(
        tiny.command("scan", "run=first", "base=default", "tokens=1500", "length=48", "rho=0.06"),
        env=tiny.environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not (home / "runs/first/scan/notebook.ipynb").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        done = call(home, "all", "run=first")
        assert first.poll() is None, "too late to disturb it"
        one_line(done, "Another tinyonn is working on run 'first'", "run=NAME")
        assert first.communicate(timeout=600)[1] == ""
        assert first.returncode == 0
    finally:
        first.kill()
        first.wait()
    manifests = [json.loads((home / f"runs/{run}/scan/manifest.json").read_text()) for run in ("default", "first")]
    # rho is in none of them. The first was scanned in this process: its memory may be aligned otherwise, which changes
    # the last bits of matrix products.
    assert manifests[1]["metrics"] == pytest.approx(manifests[0]["metrics"], rel=1e-7)


FULL: dict[int, tuple[str, bool]] = {  # kilobytes → the line, whether a result stands
    60: ("when its disk is full", False),  # the server's own file fills it
    200: ("No space left on the disk of", False),  # the notebook and the artefacts fill it
    800: ("No space left on the disk of", True),  # all artefacts fit; the page does not, which loses nothing
}


def test_a_disk_that_fills_up(home: Path, subtests: pytest.Subtests) -> None:
    """Real, tiny disks for one run each, in mount namespaces that are gone afterwards."""
    enter = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    folders = {size: home / f"runs/full{size}" for size in FULL}
    mounts = {size: f"mount -t tmpfs -o size={size}k tmpfs {folder}" for size, folder in folders.items()}
    for folder in folders.values():
        folder.mkdir()
    if not shutil.which("unshare") or subprocess.run([*enter, "sh", "-c", mounts[60]], capture_output=True).returncode:
        pytest.skip("this machine lets us mount no small disk (needs Linux with unshare as root or user namespaces)")

    def run(size: int) -> subprocess.CompletedProcess[str]:
        script = f'{mounts[size]} && {{ "$@"; code=$?; ls -A {folders[size]}/scan; exit $code; }}'
        arguments = tiny.command("scan", f"run=full{size}", "base=default", "tokens=3000")
        return subprocess.run(
            [*enter, "sh", "-c", script, "sh", *arguments],
            env=tiny.environment(home), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    before = fingerprints(home)
    with ThreadPoolExecutor(len(FULL)) as pool:
        answers = dict(zip(FULL, pool.map(run, FULL), strict=True))
    for size, done in answers.items():
        with subtests.test(kilobytes=size):
            one_line(done, FULL[size][0], "make room")
            left = done.stdout.splitlines()
            assert "notebook.ipynb" in left
            assert ("manifest.json" in left) is FULL[size][1]
            assert not [name for name in left if name.endswith(".part")], "half a file would keep the disk full"
    assert fingerprints(home) == before


def test_a_place_that_cannot_hold_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    one_line(call(tmp_path / "file", "pretrain"), "Not a directory", str(tmp_path / "file"), "TINYONN_HOME")
    assert (tmp_path / "file").read_text() == "precious"
