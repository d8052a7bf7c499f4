"""Everything once, as a user would: the command, its reports, plain papermill, a sweep, a second call."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tinyonn_lib import evaluate
from tinyonn_lib.experts.assemble import load_experts
from tinyonn_lib.experts.methods import METHODS
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.projector import KVDimensionProjector
from tinyonn_lib.lm import judge, load, samples
from tinyonn_lib.selection.rows import Row, rows
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


def metrics(home: Path, phase: str, run: str = "default") -> dict[str, Any]:
    return dict(manifest(home, phase, run)["metrics"])


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


def test_the_selector_is_routers_alone(home: Path) -> None:
    found, folder = metrics(home, "selector"), home / "runs/default/selector"
    asked = manifest(home, "selector")["params"]
    aurocs = {name: value for name, value in found.items() if name.startswith("auroc_")}
    for over in ("learned", "unseen"):
        assert {f"auroc_{score}_{over}" for score in ("contrastive_before", "contrastive", "perplexity")} < set(aurocs)
    assert all(0 <= value <= 1 for value in aurocs.values())
    for score in ("centred", "log_mass", "contrastive"):
        assert found[f"gauge_{score}"] > 0.999  # the experts' sigmoid gates notice a little
    assert found["gauge_literal"] < 0.99
    for name in ("epoch_1", "epoch_2", "seed_1/epoch_1", "seed_1/epoch_2"):
        assert {file.name for file in (folder / name).iterdir()} == {"routers.safetensors", "selector.json"}
        tensors = load_file(folder / name / "routers.safetensors")
        assert sum(tensor.numel() for tensor in tensors.values()) == 2 * (4 * 32 + 4)  # layers × (rows + gaps)
        assert json.loads((folder / name / "selector.json").read_text())["base"].startswith("../")
    about = json.loads((folder / "epoch_2/selector.json").read_text())["about"]
    history = pd.read_parquet(folder / "history.parquet")
    steps = history.groupby(["seed", "epoch"]).size().to_dict()
    assert steps == {(seed, epoch): about["passages"] // 8 for seed in range(asked["seeds"]) for epoch in (1, 2)}
    before, after = (load_file(folder / f"epoch_{epoch}/routers.safetensors") for epoch in (1, 2))
    assert any((before[name] != after[name]).any() for name in before), "the second epoch learned nothing"


def cut_is_sound(folder: Path, asked: dict[str, Any], records: int) -> pd.DataFrame:
    """Everything that must hold of a selection, whatever the data; the kept rows."""
    scores, kept = pd.read_parquet(folder / "scores.parquet"), pd.read_parquet(folder / "selected.parquet")
    assert len(scores) + len(pd.read_parquet(folder / "rejected.parquet")) == records
    assert len(kept) == math.floor(asked["selection_percentage"] * len(scores) + 0.5) == scores["kept"].sum()
    assert kept["quality_score"].is_monotonic_decreasing
    assert kept["quality_score"].min() >= scores.loc[~scores["kept"], "quality_score"].max()
    lines = [json.loads(line) for line in (folder / "selected.jsonl").read_text("utf-8").splitlines()]
    plain = kept.astype(object).where(kept.notna(), None)
    assert lines == plain.to_dict("records"), "the two files hold the same rows, to the last bit"
    return kept


def test_select_keeps_the_share_asked_for(home: Path) -> None:
    folder, asked = home / "runs/default/select", manifest(home, "select")["params"]
    pool = pd.read_json(folder / "pool.jsonl", lines=True, dtype=False)
    assert len(pool) == 160
    assert (pool["corruption"] != "").sum() == round(asked["dirt"] * 160)
    kept = cut_is_sound(folder, asked, 160)
    places = kept["source_index"]
    assert kept["text"].tolist() == pool["text"][places].tolist()
    found = metrics(home, "select")
    assert found["corrupted_kept"] == pytest.approx((pool["corruption"][places] != "").mean())
    assert found["corrupted_in_pool"] == pytest.approx(asked["dirt"])
    full = pd.read_parquet(folder / "against/full.parquet")
    assert sorted(full["source_index"]) == list(range(160))
    for name in asked["against"].split():
        assert len(pd.read_parquet(folder / f"against/{name}.parquet")) == len(kept)


def test_nothing_judged_can_be_selected(home: Path) -> None:
    pool = pd.read_json(home / "runs/default/select/pool.jsonl", lines=True, dtype=False)
    held = pd.read_parquet(home / "runs/default/select/heldout.parquet")
    assert len(held) > 20
    assert not set(pool["source"]) & set(held["source"])
    assert not set(pool["text"]) & set(held["text"])
    judged = pd.read_parquet(home / "runs/default/target/heldout.parquet")
    pd.testing.assert_frame_equal(judged, held)


def test_the_adapter_is_plain_peft_and_loses_what_was_reported(home: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    student, folder = home / "runs/default/pretrain/student", home / "runs/default/target"
    asked, tok = manifest(home, "target")["params"], load.load_tokenizer(str(student))
    held = samples.draw(
        pd.read_parquet(folder / "heldout.parquet"), tok, asked["eval_tokens"], asked["length"], asked["seed"]
    )
    plain = AutoModelForCausalLM.from_pretrained(student).eval()
    table = pd.read_parquet(folder / "contest.parquet").set_index("label")
    assert evaluate.loss(plain, held["ids"].tolist()).mean == pytest.approx(table.loc["base", "loss"])
    tuned = evaluate.loss(PeftModel.from_pretrained(plain, folder / "adapter").eval(), held["ids"].tolist()).mean
    mean, spread = table.loc["selected", ["loss", "spread"]]
    assert spread > 0
    assert abs(tuned - mean) == pytest.approx(spread / 2, rel=1e-3)  # of two seeds the first
    assert metrics(home, "target")["delta_selected"] == pytest.approx(mean - table.loc["base", "loss"])
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == (
        "pretrain/student"
    )


def test_all_rivals_train_on_as_many_tokens(home: Path) -> None:
    folder = home / "runs/default/target"
    rivals = {"selected", "full", *manifest(home, "select")["params"]["against"].split()}
    assert {"random", "longest", "perplexity"} < rivals
    table = pd.read_parquet(folder / "contest.parquet").set_index("label")
    assert set(table.index) == {*rivals, "base"}
    assert table["loss"].is_monotonic_increasing
    assert table.loc["full", "rows"] == 160
    assert set(table.loc[sorted(rivals - {"full"}), "rows"]) == {metrics(home, "select")["kept"]}
    history = pd.read_parquet(folder / "history.parquet")
    seen = history.groupby(["label", "seed"])["tokens"].max()
    assert set(seen.index) == {(label, seed) for label in rivals for seed in (0, 1)}
    assert set(seen) == {12 * 4 * 32}  # 1500 tokens, in whole steps of batch × length
    duels = pd.read_parquet(folder / "duels.parquet")
    assert set(duels["against"]) == {*rivals, "base"} - {"selected"}


def test_a_cache_is_carried_over(home: Path) -> None:
    folder, made = home / "runs/default/kv", home / "runs/default/pretrain"
    table = pd.read_parquet(folder / "contest.parquet").set_index("cache")
    texts = pd.read_parquet(made / "texts.parquet")
    held = samples.draw(texts[texts["split"] == "heldout"], load.load_tokenizer(str(made / "model")), 600, 32, 0)
    student, teacher = (KVModel(load.load_model(str(made / name))) for name in ("student", "model"))
    assert table.loc["own cache", "nll"] == pytest.approx(evaluate.loss(student.model, held["ids"].tolist()).mean, 1e-4)
    projector = KVDimensionProjector.from_pretrained(folder / "projector")
    best = table[table["kind"] == "ours"]["parameters"].iloc[0]
    assert projector.count_parameters()["total"] == best > 0
    ids = torch.tensor(held["ids"].iloc[0])[None]
    given = projector.project_teacher_kv("teacher", teacher.read(ids[:, :-1]))
    greedy = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert student.model.generate(ids, past_key_values=student.cache(given), **greedy).shape == (1, ids.shape[1] + 3)
    mine = student.cache(student.read(ids[:, :-1]))
    assert torch.equal(
        student.model.generate(ids, past_key_values=mine, **greedy), student.model.generate(ids, **greedy)
    )
    assert len(list((folder / "experiments").glob("*.yaml"))) == len(pd.read_parquet(folder / "sweep.parquet")) == 57
    assert {"after.parquet", "together.parquet", "co_trained.parquet"} <= {path.name for path in folder.iterdir()}


def test_evaluate_agrees_with_the_judge(home: Path) -> None:
    folder, student = home / "runs/default/evaluate", str(home / "runs/default/pretrain/student")
    results = json.loads((folder / "results.json").read_text())
    given = {(row["task"], row["metric"]): row["value"] for row in results["scores"]["base"]}
    lines = (folder / "tasks/bits_per_byte.jsonl").read_text("utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    assert len(documents) == 12
    expected = judge.bits_per_byte(load.load_model(student), load.load_tokenizer(student), documents)
    assert given["bits_per_byte", "bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    answers = pd.read_parquet(folder / "samples.parquet")
    assert answers.groupby(["model", "task"])["doc_id"].nunique().to_dict() == {
        (model, task): count for model in ("base", "tuned") for task, count in (("bits_per_byte", 12), ("cloze", 8))
    }
    found = metrics(home, "evaluate")
    assert found["bits_per_byte_bits_per_byte_tuned"] < found["bits_per_byte_bits_per_byte_base"]


@pytest.fixture(scope="module")
def own(home: Path) -> dict[str, str]:
    """Rows of one's own, some of them bad, selected by two scores in a sweep: score → run."""
    names, verbs = ("router", "neuron"), ("scans", "joins", "feeds")
    words = [f"The {name} {verb} the {letter}." for name in names for verb in verbs for letter in "abcdefgh"]
    lines = [json.dumps({"text": f"{one} {words[place - 1]}"}).encode() for place, one in enumerate(words)]
    lines += [json.dumps({"text": f"{one} It splits."}).encode() for one in words[:42]]
    bad = {3: b'{"text": "\xff\xfe"}', 10: b'{"text": " "}', 20: b"{nope", 30: b'{"text": 5}',
           40: json.dumps({"text": " ".join(words)}).encode()}  # fmt: skip
    for place, line in bad.items():
        lines.insert(place, line)
    (home / "own.jsonl").write_bytes(b"\n\n".join(lines) + b"\n")  # blank lines are no records
    done = tiny.tinyonn(
        home, "select", "-m", "score=contrastive,longest", f"texts={home}/own.jsonl", "selection_percentage=0.25",
        "trash_expert_ratio=0.25", "compare_rows=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {score: [*(home / "runs").glob(f"default,score={score},*")] for score in ("contrastive", "longest")}
    return {score: folder.name for score, (folder,) in found.items()}


def test_bad_rows_of_ones_own_are_listed_and_the_others_go_on(home: Path, own: dict[str, str]) -> None:
    for score, run in own.items():
        folder, asked = home / "runs" / run / "select", manifest(home, "select", run)["params"]
        assert (asked["score"], asked["base"]) == (score, "default")
        kept = cut_is_sound(folder, asked, 95)
        assert len(kept) == 23  # of 90: half a row more than a quarter is a whole one
        refused = pd.read_parquet(folder / "rejected.parquet").set_index("source_index")["reason"].to_dict()
        length = refused.pop(40)
        assert refused == {3: "broken UTF-8", 10: "empty", 20: "not JSON", 30: "not text"}
        assert re.fullmatch(r"too long: \d{3} tokens", length)
        texts = {row.source_index: row.text for row in rows(str(home / "own.jsonl")) if isinstance(row, Row)}
        assert kept["text"].tolist() == [texts[place] for place in kept["source_index"]]
        assert metrics(home, "select", run)["rejected"] == 5
        assert not (folder / "heldout.parquet").exists()
    tokens = pd.read_parquet(home / "runs" / own["longest"] / "select/scores.parquet")
    assert (tokens["quality_score"] == tokens["tokens"]).all()


def test_ones_own_rows_are_judged_on_ones_own_texts(home: Path, own: dict[str, str], tmp_path: Path) -> None:
    where = (f"run={own['contrastive']}", "base=default")
    held = tiny.write_texts(tmp_path / "held.jsonl", 40)
    sizes = ["tokens=600", "seeds=1", "batch=4", "length=32", "eval_tokens=600"]
    done = tiny.tinyonn(home, "target", *where, f"heldout_texts={held}", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = pd.read_parquet(home / "runs" / own["contrastive"] / "target/heldout.parquet")
    assert judged["text"].tolist() == [json.loads(line)["text"] for line in held.read_text().splitlines()]
    (tmp_path / "dev").mkdir()
    (tmp_path / "test").mkdir()
    for split, count in (("dev", 1), ("test", 4)):
        with (tmp_path / split / f"logic_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([f"Is {n} odd?", "yes", "no", "both", "none", "AB"[n % 2]] for n in range(count))
    tasks = ("tasks='bits_per_byte mmlu'", f"mmlu={tmp_path}", "fewshot=1", "documents=10")
    done = tiny.tinyonn(home, "evaluate", *where, *tasks)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = pd.read_parquet(home / "runs" / own["contrastive"] / "evaluate/samples.parquet")
    counts = answers.groupby("task")["doc_id"].nunique()
    assert counts.to_dict() == {"bits_per_byte": 10, "mmlu_logic": 4}
    page = (home / "runs" / own["contrastive"] / "evaluate/report.html").read_text("utf-8")
    assert "what in it is trash is not known" in page


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
        assert phase.title in html.unescape(page)
        assert f'href="default/{phase.name}.html"' in page
        assert (home / "reports/default" / f"{phase.name}.html").is_file()


@pytest.mark.parametrize("phase", ["scan", "select"])
def test_plain_papermill_gives_the_same(home: Path, tmp_path: Path, phase: str) -> None:
    """`papermill notebooks/02_scan.ipynb out.ipynb -f params/scan.yaml`, with the run's own sizes."""
    sizes = [o.removeprefix(f"{phase}.") for o in tiny.overrides(home / "texts.jsonl") if o.startswith(f"{phase}.")]
    given = [word for size in ("run=by_hand", "base=default", *sizes) for word in ("-p", *size.split("=", 1))]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(PHASES[phase].notebook), str(tmp_path / "out.ipynb"),
         "-f", str(PHASES[phase].params_file), *given],
        env=tiny.environment(home), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (manifest(home, phase, run) for run in ("default", "by_hand"))
    assert ours["outputs"] | {"neurons.mscan": None} == theirs["outputs"] | {"neurons.mscan": None}
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
