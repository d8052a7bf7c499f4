"""The document's experiment log: its keys, numbers as numbers, notes that follow the measurements."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml
from kv_tables import table

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.log import write_logs

DOCUMENT = {
    "experiment": ["name", "date"],
    "model": ["teacher", "student"],
    "projector": ["mlp_ratio", "dropout", "init_method", "params"],
    "training": ["learning_rate", "batch_size", "steps"],
    "results": ["initial_loss", "final_loss", "reduction", "convergence_step"],
    "notes": [],
}


def read(paths: list[Path], name: str) -> dict:
    return yaml.safe_load(next(path for path in paths if path.stem == name).read_text(encoding="utf-8"))


def test_a_file_per_configuration_with_the_documents_keys(tmp_path: Path) -> None:
    paths = write_logs(tmp_path / "logs", table(), teacher="T", student="S: small", date="2025-01-18")
    assert len({path.name for path in paths}) == 57 == len(list((tmp_path / "logs").iterdir()))
    for path in paths:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert list(content) == list(DOCUMENT)
        assert all(set(keys) <= set(content[part]) for part, keys in DOCUMENT.items() if keys)
        assert content["experiment"] == {"name": path.stem, "date": "2025-01-18"}
        assert content["model"] == {"teacher": "T", "student": "S: small"}


def test_the_numbers_are_the_tables(tmp_path: Path) -> None:
    measured = table()
    paths = write_logs(tmp_path, measured, teacher="T", student="S")
    row = measured[measured["configuration"] == "1×, no LayerNorm, relu, normal"].iloc[0]
    content = read(paths, "mlp_1x_no_layernorm_relu_normal")
    assert content["experiment"] == {"name": "mlp_1x_no_layernorm_relu_normal"}  # no clock unless it is given
    assert content["projector"] == {
        "kind": "mlp", "mlp_ratio": 1.0, "dropout": 0.0, "init_method": "normal", "layernorm": False,
        "activation": "relu", "params": int(row["parameters"]),
    }  # fmt: skip
    assert content["training"] == {"learning_rate": 0.01, "batch_size": 256, "steps": 150, "seeds": 3}
    results = content["results"]
    assert results["reduction"] == pytest.approx(1 - row["validation"] / row["initial_loss"], rel=1e-5)
    assert results["heldout_loss"] == pytest.approx(row["heldout"], rel=1e-5)
    assert results["convergence_step"] == 60
    assert type(content["projector"]["params"]) is type(results["convergence_step"]) is int
    linear = read(paths, "linear_xavier")
    assert linear["projector"]["mlp_ratio"] is None
    assert linear["results"]["convergence_step"] is None


def test_the_notes_follow_the_measurements(tmp_path: Path) -> None:
    measured = table()
    name, label = "mlp_1x_layernorm_silu_xavier", "1×, LayerNorm, silu, xavier"
    usual = read(write_logs(tmp_path, measured, teacher="T", student="S"), name)["notes"]
    assert usual[0].startswith("Held-out loss 0.45 against 0.55 of linear, 2 times its parameters; the student's loss")
    assert "LayerNorm 0.45, no LayerNorm 0.44 (beyond twice the spread over seeds, 0.001)." in usual[2]
    assert "silu 0.45, relu 0.451, gelu 0.4515 (within twice the spread over seeds, 0.001)." in usual[3]
    assert len(usual) == 5
    here = measured["configuration"] == label
    measured.loc[here, ["heldout", "lr_at_edge", "dead_units", "steps_to_target"]] = [0.6, True, 0.25, float("nan")]
    told = read(write_logs(tmp_path, measured, teacher="T", student="S"), name)["notes"]
    assert told[0].startswith("Held-out loss 0.6 against 0.55")
    assert told[5:] == [
        "The best learning rate, 0.01, is at the edge of those tried: a better one may lie beyond.",
        "Did not reach the target loss in 150 steps.",
        "25.0% of the hidden units are never on.",
    ]
    measured["heldout_spread"] = float("nan")
    assert "(one seed)" in read(write_logs(tmp_path, measured, teacher="T", student="S"), name)["notes"][1]


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    slower = table().assign(seconds_per_step=9.0, slower=9.0)
    first = write_logs(tmp_path / "a", table(), teacher="T", student="S")
    second = write_logs(tmp_path / "b", slower, teacher="T", student="S")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_table_of_one_row(tmp_path: Path) -> None:
    alone: pd.DataFrame = table().iloc[[27]]
    assert read(write_logs(tmp_path, alone, teacher="T", student="S"), "mlp_1x_layernorm_gelu_xavier")["notes"] == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="Cannot write"):
        write_logs(tmp_path / "file" / "logs", table(), teacher="T", student="S")
