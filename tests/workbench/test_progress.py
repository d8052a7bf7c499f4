"""Bars only where somebody looks; lines elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import IPython
import pytest

from tinyonn_lib.workbench import progress


@pytest.mark.parametrize(
    ("environment", "kernel", "expected"),
    [
        ({"JPY_SESSION_NAME": "notebooks/03_cluster.ipynb"}, True, True),
        ({"VSCODE_PID": "1"}, True, True),
        ({"JPY_SESSION_NAME": "a.ipynb", "TINYONN_BATCH": "cluster"}, True, False),
        ({}, True, False),  # papermill or nbconvert started the kernel
        ({"JPY_SESSION_NAME": "a.ipynb"}, False, False),
    ],
)
def test_who_is_looking(
    environment: dict[str, str], kernel: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JPY_SESSION_NAME", "TINYONN_BATCH", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shell = SimpleNamespace(kernel=object()) if kernel else None
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert progress.live() is expected


def test_lines_are_sparse_and_the_last_one_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    report = progress.reporter("counting", "steps", every=1000.0)
    for done in range(1, 6):
        report(done, 5, "now")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("  counting: 5 of 5 steps in ")
