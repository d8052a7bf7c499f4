from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from mscan_files import COUNT, META, TARGETS, equal, flipped, norms

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import lognorm
from tinyonn_lib.scan.mscan import File, Writer, delta_sc, integral, read, running, summarise, to_parquet
from tinyonn_lib.workbench import cli


def rows(act: object, grad: object, sequence: object = 0) -> pd.DataFrame:
    """A table of one linear target per column of `act` and `grad` (steps, targets)."""
    act, grad = np.atleast_2d(np.asarray(act, float).T).T, np.atleast_2d(np.asarray(grad, float).T).T
    step, target = (part.ravel() for part in np.indices(act.shape))
    return pd.DataFrame(
        {
            "step": step, "sequence": np.broadcast_to(sequence, len(act))[step], "tokens": 10, "target": target,
            "kind": "linear", "layer": 0, "act": act.ravel(), "grad": grad.ravel(),
        }
    )  # fmt: skip


def z(values: np.ndarray) -> np.ndarray:
    logs = np.log(values)
    return (logs - logs.mean(0)) / logs.std(0)


def test_delta_sc_is_the_difference_of_z_scores(whole: Path) -> None:
    file = File(whole)
    wanted = z(file.matrix("act")) - z(file.matrix("grad"))
    delta = delta_sc(read(whole))
    np.testing.assert_allclose(delta["delta_sc"].to_numpy().reshape(10, COUNT), wanted, rtol=1e-9)
    found = integral(delta)
    assert found["sequence"].tolist() == [1000, 1001, 1002, 1003]
    assert found[["steps", "measured"]].to_numpy().tolist() == [[3, 3], [3, 3], [3, 3], [1, 1]]
    assert found["tokens"].tolist() == [153, 162, 171, 59]
    means = wanted.mean(1)
    np.testing.assert_allclose(found["integral"], [means[n : n + 3].sum() for n in (0, 3, 6, 9)], rtol=1e-9)
    steps = running(delta)
    assert steps["targets"].tolist() == [COUNT] * 10
    np.testing.assert_allclose(steps["integral"][3:6], np.cumsum(means[3:6]), rtol=1e-9)


def test_delta_sc_says_nothing_where_nothing_was_seen() -> None:
    act = np.array([[1.0, 5.0], [2.0, 6.0], [4.0, 5.5], [3.0, 7.0]])
    grad = np.array([[1.0, np.nan], [0.0, np.nan], [2.0, 3.0], [4.0, 0.0]])
    delta = delta_sc(rows(act, grad, sequence=[0, 1, 0, 0]))
    found = delta["delta_sc"].to_numpy().reshape(4, 2)
    seen = [0, 2, 3]
    np.testing.assert_allclose(found[seen, 0], z(act[seen, 0]) - z(grad[seen, 0]))
    assert np.isnan(found[1, 0])  # no gradient
    assert np.isnan(found[:, 1]).all()  # one measured step has nothing to be compared with
    steps = running(delta)
    assert steps["targets"].tolist() == [1, 1, 1, 0]
    sums = integral(delta)
    np.testing.assert_allclose(sums["integral"][0], found[seen, 0].sum())
    assert np.isnan(sums["integral"][1])
    assert sums[["steps", "measured"]].to_numpy().tolist() == [[3, 3], [1, 0]]
    with pytest.raises(BenchError, match="no column delta_sc"):
        integral(rows(act, grad))


def test_a_constant_norm_has_no_say() -> None:
    """Nor has one that only jumps between two neighbouring codes."""
    jump = lognorm.decode(np.array([40000, 40001, 40000, 40000], dtype=np.uint16))
    grad = np.array([1.0, 2.0, 3.0, 4.0])
    for act in (np.full(4, 3.3), jump):
        np.testing.assert_allclose(delta_sc(rows(act, grad))["delta_sc"], -z(grad))
    assert (delta_sc(rows(jump, jump))["delta_sc"] == 0).all()


@pytest.mark.parametrize(
    ("grad", "warning"),
    [(0.0, "every measured gradient is 0"), (np.nan, "no gradient was measured"), (1.0, None)],
)
def test_a_scan_without_gradients_is_called_out(
    path: Path, grad: float, warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    values = norms(0)
    values[:, 1] = grad
    values[0, 1] = np.nan
    with Writer(path, TARGETS, META) as file:
        file.write(0, 0, 9, values, [1] * COUNT)
    found = summarise(File(path))
    assert (found.records, found.steps, found.sequences, found.tokens) == (4, 1, 1, 9)
    assert found.methods == {"grad": 4}
    assert (found.warning or "").startswith(warning or "")
    assert (found.warning is None) == (warning is None)
    assert cli.main(["mscan", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert ("warning: " in out) == (warning is not None)
    if grad == 0:
        assert "75.0% 0, 25.0% not measured" in out


# Out of the format, and the command.


def test_parquet_says_the_same(whole: Path, tmp_path: Path) -> None:
    to_parquet(whole, tmp_path / "x.parquet")
    equal(pd.read_parquet(tmp_path / "x.parquet"), read(whole))
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert json.loads(file.schema_arrow.metadata[b"mscan"])["meta"] == META
    assert file.num_row_groups == 5


def test_info_and_head(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mscan", "info", str(whole)]) == 0
    out = capsys.readouterr().out
    for line in ("40 in 5 segments", "10, from 0 to 9", "4: 1 linear, 1 neurons, 1 experts, 1 embedding", "meta model"):
        assert line in out
    assert "torn" not in out
    assert "warning" not in out
    assert cli.main(["mscan", "head", str(whole), "-n", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].split() == ["step", "sequence", "tokens", "target", "layer", "kind", "method", "act", "grad"]


def test_export_by_command(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.parquet", "a.csv"):
        assert cli.main(["mscan", "export", str(whole), str(tmp_path / name)]) == 0
    assert capsys.readouterr().err == ""
    found = pd.read_csv(tmp_path / "a.csv")
    np.testing.assert_allclose(found["grad"], read(whole)["grad"], rtol=1e-5)
    assert found["target"].tolist() == read(whole)["target"].tolist()
    for out, line in (("a.txt", ".parquet or .csv"), ("none/a.csv", "No such file")):
        assert cli.main(["mscan", "export", str(whole), str(tmp_path / out)]) == 1
        assert line in capsys.readouterr().err


def test_torn_and_damaged_files_by_command(
    whole: Path, ends: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn, damaged = tmp_path / "torn", tmp_path / "damaged"
    torn.write_bytes(whole.read_bytes()[: ends[2] + 9])
    assert cli.main(["mscan", "info", str(torn)]) == 0
    assert "\ntorn: " in capsys.readouterr().out
    assert cli.main(["mscan", "export", str(torn), str(tmp_path / "t.csv")]) == 0
    assert "16 records up to step 3 are complete, 9 bytes after them are not" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "t.csv")) == 16
    damaged.write_bytes(flipped(whole.read_bytes(), ends[2] + 50, 0))
    assert cli.main(["mscan", "info", str(damaged)]) == 1
    assert "segment 3 of 5" in capsys.readouterr().err
    assert cli.main(["mscan", "info", str(damaged), "--salvage"]) == 0
    assert "damaged: segment 3 of 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["mscan"])
