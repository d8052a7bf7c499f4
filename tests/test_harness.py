"""What every benchmark shares: table, bars, JSON, exit codes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tinyonn_lib.errors import BenchError

FILE = Path(__file__).parents[1] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["harness"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(harness: ModuleType, monkeypatch: pytest.MonkeyPatch, measure: Any, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    return int(harness.main("A claim.\n\nMore.", "x", measure))


def test_a_measurement_is_printed_and_written_whether_or_not_its_bars_hold(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
        rows = [{"arm": "a", "seconds": np.float64(0.5), "bytes": float("nan")}, {"arm": "b", "seconds": np.int64(2)}]
        bars = [harness.Bar("speed", 3.0, 2.0, "higher"), harness.Bar("size", float("nan"), 2.0, "lower")]
        return rows, bars if args.quick else []

    assert call(harness, monkeypatch, measure, "--quick", "--json", str(tmp_path / "new" / "x.json")) == 0
    said = capsys.readouterr().out
    assert "holds  speed: 3 >= 2" in said
    assert "FAILS  size: nan <= 2" in said
    result = json.loads((tmp_path / "new" / "x.json").read_text())
    assert result["benchmark"] == "x"
    assert result["rows"] == [{"arm": "a", "seconds": 0.5, "bytes": None}, {"arm": "b", "seconds": 2}]
    assert result["bars"][0] == {"name": "speed", "value": 3.0, "bound": 2.0, "better": "higher", "holds": True}
    assert result["bars"][1]["holds"] is False
    assert result["environment"]["quick"] is True
    assert call(harness, monkeypatch, measure) == 0


def test_what_could_not_run_ends_with_2(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> Any:
        def measure(args: argparse.Namespace) -> Any:
            raise error

        return measure

    assert call(harness, monkeypatch, fail(BenchError("no server"))) == 2
    assert capsys.readouterr().err == "x: no server\n"
    assert call(harness, monkeypatch, fail(ValueError("a bug"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_environment_says_what_it_ran_on_and_not_where(harness: ModuleType) -> None:
    found = harness.environment(quick=False)
    assert set(found) <= {"python", "system", "cpu", "cores", "threads", "gpu", "quick", *harness.PACKAGES}
    assert found["cores"] >= 1
    assert found["numpy"] == np.__version__
