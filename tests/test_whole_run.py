"""Everything once, as a user would: the command, its reports, plain papermill, a sweep, a second call."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tinyonn_lib.experts.assemble import load_experts
from tinyonn_lib.experts.methods import METHODS
from tinyonn_lib.workbench.phases import PHASES, ROOT

from . import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    texts = tiny.write_texts(folder / "texts.jsonl")
    done = tiny.tinyonn(folder, "all", *tiny.overrides(texts))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all +\d", done.stdout, re.M), "the table of seconds per phase"
    return folder


def manifest(home: Path, phase: str, run: str = "default") -> dict[str, Any]:
    return dict(json.loads((home / "runs" / run / phase / "manifest.json").read_text()))


def metrics(home: Path, phase: str) -> dict[str, Any]:
    return dict(manifest(home, phase)["metrics"])


def test_pretrain_learns_the_language(home: Path) -> None:
    found = metrics(home, "pretrain")
    assert found["bits_per_byte"] < 1.5  # letters drawn at random from the texts' own cost over 4
    assert found["neurons"] == 128
    texts = pd.read_parquet(home / "runs/default/pretrain/texts.parquet")
    owners = texts.groupby("source")["split"].nunique()
    assert (owners == 1).all()
    assert set(texts["split"]) == {"train", "calibration", "heldout"}


def test_scan_sees_every_neuron_with_a_gradient(home: Path) -> None:
    neurons = pd.read_parquet(home / "runs/default/scan/neurons.parquet")
    assert len(neurons) == 128
    assert (neurons["grad"] > 0).all()
    assert metrics(home, "scan")["tokens"] >= 1500


def test_nothing_judged_was_scanned(home: Path) -> None:
    texts = pd.read_parquet(home / "runs/default/scan/texts.parquet")
    parts = {name: set(rows["text"]) for name, rows in texts.groupby("split")}
    assert not parts["heldout"] & (parts["train"] | parts["calibration"])


def test_experts_are_lossless_with_all_on(home: Path) -> None:
    assert metrics(home, "experts")["relative_error"] <= 1e-5
    table = pd.read_parquet(home / "runs/default/experts/delta_nll.parquet")
    assert set(table["partition"]) == set(METHODS)
    assert {"oracle", "ridge", "static + bias", "representative"} <= set(table["router"])
    assert table.groupby(["text", "active"]).ngroups == 2 * 3
    assert table.groupby("active")["share"].nunique().max() == 1  # all partitions with as many active neurons
    assert (table["seeds"].where(table["partition"] == "random").dropna() == 2).all()
    enough = table[table["text"] == "held-out"]  # the few files of code are too few for an interval
    assert (enough["low"] <= enough["mean"]).all()
    assert (enough["mean"] <= enough["high"]).all()


def test_the_pool_has_the_documents_shape(home: Path) -> None:
    pool = load_experts(home / "runs/default/experts/pool")
    assert len(pool.experts) == 6
    assert {expert.gate_proj.out_features for expert in pool.experts} == {8}
    assert pool.partition.neurons == 128


def test_gradient_projection_is_judged_next_to_its_controls(home: Path) -> None:
    table = pd.read_parquet(home / "runs/default/experts/projection.parquet")
    assert set(table["init"]) >= {"random", "gradient", "gradient_descent", "copy"}
    assert set(table["moment"]) == {"before", "after"}


def test_clusters_and_neurons_have_their_texts(home: Path) -> None:
    neurons = pd.read_parquet(home / "runs/default/cluster/neuron_examples.parquet")
    assert neurons.groupby(["layer", "neuron"]).ngroups == 128
    clusters = pd.read_parquet(home / "runs/default/cluster/cluster_examples.parquet")
    assert set(clusters["cluster"]) == {0, 1, 2}
    assert set(clusters["kind"]) == {"token", "text"}


def test_router_training_pays_and_survives_the_export(home: Path) -> None:
    found, folder = metrics(home, "router"), home / "runs/default/router"
    history = pd.read_parquet(folder / "history.parquet").groupby("model")["held_out"].agg(["first", "last"])
    ours = {"trained router", "trained, variable k"}
    assert ours | {"pruning, trained", "cmoe, trained router", "cmoe, trained, variable k"} == set(history.index)
    assert found["export_gap"] < 1e-4
    assert (folder / "checkpoint_variable/variable_k.json").is_file()
    assert not (folder / "checkpoint/variable_k.json").exists()
    table = pd.read_parquet(folder / "delta_nll.parquet").set_index("method")
    assert {"flap_static", "refined, oracle", "sp, analytic"} < set(table.index)
    router_rows = 4 * 32 * 2  # experts × width × layers, of 3 × 64 × 32 × 2 weights in the FFNs
    granted = router_rows / (3 * 64 * 32 * 2)
    shares = table["share"] - table.loc["trained router", "share"]
    assert shares["pruning, trained"] == pytest.approx(granted)
    usage = pd.read_parquet(folder / "usage.parquet")
    on = usage.groupby(["step", "layer"])["share"].sum()
    assert on.to_numpy() == pytest.approx(2.0), "k experts per token, whatever the step and layer"


def test_second_call_does_no_work(home: Path) -> None:
    before = {p: (home / "runs/default" / p / "manifest.json").stat().st_mtime_ns for p in PHASES}
    done = tiny.tinyonn(home, "all", *tiny.overrides(home / "texts.jsonl"))
    assert done.returncode == 0
    assert done.stdout.count("up to date") == len(PHASES)
    assert before == {p: (home / "runs/default" / p / "manifest.json").stat().st_mtime_ns for p in PHASES}
    assert "everything is done" in tiny.tinyonn(home, "status").stdout


@pytest.mark.parametrize("phase", PHASES)
def test_report_is_one_offline_page(home: Path, phase: str) -> None:
    page = (home / "runs/default" / phase / "report.html").read_text("utf-8")
    assert len(page.encode()) < 15_000_000
    without_plotly = re.sub(r"<script\b.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(\s*["']?(https?:)?//|@import""", without_plotly)
    assert re.search(r'<[^>]*role="img"', page)
    assert re.search(r'<[^>]*aria-label="[^"]{20,}"', page)
    assert "<details" in page
    assert "alert(4711)</script>" not in page
    assert "<img src=x" not in page


def test_hostile_text_is_shown_as_text(home: Path) -> None:
    page = (home / "runs/default/pretrain/report.html").read_text("utf-8")
    assert "&lt;script&gt;alert(4711)" in page


def test_index_has_a_card_for_every_phase(home: Path) -> None:
    page = (home / "reports/index.html").read_text("utf-8")
    for phase in PHASES.values():
        assert phase.title in page
        assert f'href="default/{phase.name}.html"' in page
        assert (home / "reports/default" / f"{phase.name}.html").is_file()


def test_plain_papermill_gives_the_same(home: Path, tmp_path: Path) -> None:
    """`papermill notebooks/02_scan.ipynb out.ipynb -f params/scan.yaml`, with the run's own sizes."""
    given = ["-p", "run", "by_hand", "-p", "base", "default", "-p", "tokens", "1500", "-p", "length", "48"]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(ROOT / "notebooks/02_scan.ipynb"), str(tmp_path / "out.ipynb"),
         "-f", str(ROOT / "params/scan.yaml"), *given],
        env=tiny.environment(home), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (manifest(home, "scan", run) for run in ("default", "by_hand"))
    assert ours["outputs"]["neurons.parquet"]["sha256"] == theirs["outputs"]["neurons.parquet"]["sha256"]
    assert ours["metrics"] == theirs["metrics"]


def test_unknown_name_given_to_papermill_is_an_error(home: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(ROOT / "notebooks/03_cluster.ipynb"), str(tmp_path / "out.ipynb"),
         "-f", str(ROOT / "params/cluster.yaml"), "-p", "clusterz", "4"],
        env=tiny.environment(home), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "cluster has no parameter 'clusterz'. Did you mean 'clusters'?" in done.stderr


def test_sweep_makes_a_run_each_on_the_same_base(home: Path) -> None:
    done = tiny.tinyonn(home, "cluster", "-m", "clusters=2,4", "neighbours=8")
    assert done.returncode == 0, done.stderr
    for clusters in (2, 4):
        found = manifest(home, "cluster", f"default,clusters={clusters},neighbours=8")
        assert found["params"]["clusters"] == clusters
        assert found["params"]["base"] == "default"
        scores = pd.read_parquet(home / f"runs/default,clusters={clusters},neighbours=8/cluster/scores.parquet")
        assert scores["cluster"].nunique() == clusters
    assert "clusters" in (home / "reports/index.html").read_text("utf-8")
