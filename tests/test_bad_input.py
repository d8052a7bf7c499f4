"""Bad input through the real command: one clear line, exit 1, no manifest, nothing earlier harmed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import hub, load, texts, tokenizer
from tinyonn_lib.scan.server import find_server, socket_path
from tinyonn_lib.workbench import params, runs
from tinyonn_lib.workbench.phases import PHASES

from . import tiny


@dataclass(frozen=True)
class Case:
    """A command in a run of its own, whose earlier phases are the finished run's, and what its one line must say."""

    phase: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def bad(phase: str, *arguments: object, says: tuple[str, ...], **environment: str) -> Case:
    return Case(phase, tuple(map(str, arguments)), says, environment)


def cells(phase: str, overrides: list[str]) -> None:
    """A phase's notebook, cell by cell in this process: what the command does, without its kernel."""
    notebook = load_notebook_node(str(PHASES[phase].notebook))
    notebook = parameterize_notebook(notebook, params.compose(PHASES[phase], overrides), kernel_name="python3")
    namespace: dict[str, Any] = {"In": []}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            namespace["In"].append(cell.source)
            exec(cell.source, namespace)


def mixture(home: Path) -> Path:
    """A mixture of experts that is nobody's work, with the tokenizer of `pretrain`: spares the phases that make one."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    made = load.load_tokenizer(str(home / "runs/default/pretrain/model"))
    shape = OlmoeConfig(
        vocab_size=len(made), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(shape).save_pretrained(home / "moe")
    made.save_pretrained(home / "moe")
    return home / "moe"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `default`, finished but for experts and router: their notebooks' cells, run here to spare seven kernels."""
    folder = tmp_path_factory.mktemp("bad")
    overrides = tiny.overrides(tiny.write_texts(folder / "texts.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYONN_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("TINYONN_BATCH", raising=False)
        for name in ("pretrain", "scan", "cluster", "selector", "select", "target", "evaluate"):
            own = [o.removeprefix(f"{name}.") for o in overrides if o.startswith(f"{name}.")]
            cells(name, [*own, f"model={mixture(folder)}"] if name == "selector" else own)
        yield folder


def fingerprints(home: Path) -> dict[str, str]:
    files = [path for path in (home / "runs/default").rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): runs.sha256(path) for path in files}


def call(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    surrounding = tiny.environment(home) | environment
    return subprocess.run(
        tiny.command(*arguments), env=surrounding, capture_output=True, text=True, timeout=300, check=False
    )


def one_line(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tinyonn: ")
    for said in says:
        assert said in lines[0]
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scan", "tokenz=3"], ["scan has no parameter 'tokenz'", "Did you mean 'tokens'?"]),
        (["all", "scan.tokenz=3"], ["scan has no parameter 'tokenz'", "Did you mean 'tokens'?"]),
        (["all", "tokens=3"], ["'tokens=3'", "say whose parameter it is, such as scan.tokens"]),
        (["scan", "tokens=many"], ["scan.tokens = 'many'", "valid integer"]),
        (["cluster", "clusters=1"], ["cluster.clusters = 1", "greater than or equal to 2"]),
        (["scan", "batch=2"], ["scan.batch = 2", "should be 1"]),
        (["scan", "run=../up"], ["scan.run = '../up'", "match pattern"]),
        (["scan", "redis_url=redis://:hunter2@host/0"], ["scan.redis_url = …", "TINYONN_REDIS_PASSWORD"]),
        (["scan", "profile=none_such"], ["no profile 'none_such'", "Known: "]),
        (["router", "-m", "lr=0.1,none"], ["router.lr = 'none'", "valid number"]),
        (["selector", "corruptions='byte_noise nonsense'"], ["nonsense", "boilerplate", "wrong_answer"]),
        (["select", "score=nonsense"], ["select.score = 'nonsense'", "'log_mass'"]),
        (["select", "against='random nonsense'"], ["against", "'nonsense'", "perplexity"]),
        (["all", "select.selection_percentage=20"], ["select.selection_percentage = 20", "less than or equal to 1"]),
        (["target", "strategy=zero9"], ["target.strategy = 'zero9'", "'zero3'"]),
        (["target", "dtype=nf4", "processes=2"], ["4-bit base trains in one process", "processes=1"]),
    ],
)  # fmt: skip
def test_parameters_are_refused_before_anything_starts(tmp_path: Path, arguments: list[str], says: list[str]) -> None:
    began = os.times().children_user  # not the clock: on a busy machine that says nothing
    done = call(tmp_path, *arguments)
    assert os.times().children_user - began < 5
    one_line(done, *says)
    assert "hunter2" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300)).save_pretrained(folder)
    tokenizer.train_bpe(["The router feeds the layer."], 300).save_pretrained(folder)
    return folder


def copied_model(home: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(home / "runs/default/pretrain/model", folder)
    change(folder / "model.safetensors")
    return folder


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def with_nan(weights: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, weights, {"format": "pt"})


def store_folder(home: Path, run: str, **given: Any) -> Path:
    """Where the scan of `run` will keep its private server: made here, so that something else can sit there first."""
    phase = PHASES["scan"]
    opened = runs.open_run(
        phase, params.validate(phase, params.defaults(phase) | {"run": run, "base": "default"} | given)
    )
    opened.lock.release()
    folder = (opened.resume / "store").resolve()
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a server that wants a password."""
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "s"
    arguments = [
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--requirepass",
        "right-secret",
        "--dir",
        str(folder),
        "--save",
        "",
    ]
    server = subprocess.Popen([str(find_server()), *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert redis.Redis(unix_socket_path=str(path), password="right-secret").ping()
        yield path
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of something that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


@pytest.fixture
def nobody() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_each_gives_one_clear_line(
    home: Path, tmp_path: Path, locked_server: Path, silent: int, nobody: int, subtests: pytest.Subtests
) -> None:
    own = home / "texts.jsonl"
    (tmp_path / "empty.jsonl").write_text("")
    lines = own.read_text().splitlines()
    (tmp_path / "cut.jsonl").write_text("\n".join([*lines[:6], lines[6][:-5], *lines[7:]]))
    taken = socket_path(store_folder(home, "socket"))
    taken.write_text("precious")
    broken, nan = (copied_model(home, tmp_path / change.__name__, change) for change in (cut, with_nan))
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{silent}"}
    wrong = {"TINYONN_REDIS_PASSWORD": "wrong-secret"}

    cases = {
        "missing": bad("pretrain", f"texts={tmp_path}/none.jsonl", says=("No such file", "none.jsonl", "hub id")),
        "empty": bad("pretrain", f"texts={tmp_path}/empty.jsonl", says=("empty.jsonl is empty",)),
        "broken": bad("pretrain", f"texts={tmp_path}/cut.jsonl", says=("cut.jsonl line 7", "not valid JSON", "Repair")),
        "hub_texts": bad(
            "pretrain", "texts=owner/data", says=("cannot be reached", "--repo-type dataset owner/data"), **unreachable
        ),
        "hub_model": bad(
            "scan", "model=owner/name", f"texts={own}", says=("cannot be reached", "download owner/name"), **unreachable
        ),
        "gpt2": bad(
            "scan", f"model={gpt2(tmp_path / 'gpt2')}", f"texts={own}", says=("GPT2LMHeadModel", "gated", "Llama")
        ),
        "cut_model": bad("scan", f"model={broken}", f"texts={own}", says=(f"Cannot load the model {broken}", "again")),
        "nan": bad(
            "scan",
            f"model={nan}",
            f"texts={own}",
            says=("model.layers.1.mlp: activations", "NaN or infinite in sample 0"),
        ),
        "socket": bad("scan", says=(str(taken), "not a socket", "move it away")),
        "nobody": bad(
            "scan", f"redis_url=redis://127.0.0.1:{nobody}/0", says=("no Redis server", f":{nobody}", "start")
        ),
        "password": bad(
            "scan", f"redis_url=unix://{locked_server}", says=("refuses", "TINYONN_REDIS_PASSWORD"), **wrong
        ),
        "seven": bad("experts", "experts=7", "shared=0", "pool=4", says=("64 neurons", "7 experts", "8 would fit")),
        "many": bad("experts", "experts=128", "pool=4", says=("64 neurons", "too few for 128 experts", "fewer")),
        "large": bad("experts", "experts=4", "size=20", "shared=0", "pool=4", says=("4 experts of 20", "4 of 16")),
        "magic": bad("experts", "methods='sp magic'", says=("no partition method 'magic'", "expertweaver")),
        "pool": bad("experts", "experts=4", "methods=sp", "pool=100", says=("100 experts of 8", "there are 128")),
        "choice": bad("cluster", f"choice={tmp_path}/cut.jsonl", says=("not a table of layer and neuron",)),
        "dense": bad(
            "selector", f"model={home}/runs/default/pretrain/model", says=("no router", "02_scan to 05_router", "OLMoE")
        ),
        "no_selector": bad("select", f"selector={tmp_path}/gpt2", says=("gpt2 holds no selector.json", "epoch_1")),
        "mmlu": bad(
            "evaluate", "tasks=mmlu", says=("cannot be reached", "--repo-type dataset cais/mmlu"), **unreachable
        ),
    }

    def run(name: str) -> subprocess.CompletedProcess[str]:
        case = cases[name]
        return call(home, case.phase, f"run={name}", "base=default", *case.arguments, **case.environment)

    before = fingerprints(home)
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(cases, pool.map(run, cases), strict=True))
    for name, done in answers.items():
        with subtests.test(name):
            one_line(done, *cases[name].says)
            assert "secret" not in done.stdout + done.stderr
            folder = home / "runs" / name / cases[name].phase
            assert (folder / "notebook.ipynb").is_file(), "the partial notebook stays"
            assert not list(folder.glob("*manifest.json*"))
    assert fingerprints(home) == before
    assert taken.read_text() == "precious"


CHOOSING = {  # name → (phase, arguments, what its line says); {} is the home, {t} a folder with bad files
    "missing model": ("selector", ["model=/no/such"], "No such file or folder: /no/such"),
    "hub model": ("selector", ["model=owner/name"], "hf download owner/name"),
    "one expert too few": ("selector", ["model={}/moe", "trash_expert_ratio=0.125"], "between 0.25 and 0.75"),
    "long passages": ("selector", ["model={}/moe", "length=32"], "length=32 is more .* choose 1 to 31"),
    "large step": ("selector", ["model={}/moe", "batch=1000"], r"1\d\d passages are too few .* batch=1000"),
    "bad texts": ("selector", ["model={}/moe", "texts={t}/bad.jsonl"], "bad.jsonl holds no text"),
    "no texts": ("selector", ["model={}/moe", "texts={t}/none.jsonl"], "No such file or folder: .*none.jsonl"),
    "epoch": ("select", ["epoch=9"], "epoch=9: 06_selector left epoch_1, epoch_2"),
    "no rows": ("select", ["texts={t}/none.jsonl"], "No such file or folder: .*none.jsonl"),
    "empty": ("select", ["texts={t}/empty.jsonl"], "No row .* could be scored .1 x empty file."),
    "bad rows": ("select", ["texts={t}/bad.jsonl"], "1 x broken UTF-8, 1 x empty, 1 x not JSON, 1 x not text"),
    "column": ("select", ["texts={}/texts.jsonl", "column=body"], "600 x not text.: check the column"),
    "hub rows": ("select", ["texts=owner/data"], "hf download --repo-type dataset owner/data"),
    "no prompts": ("select", ["score=ifd"], "'ifd' is not a number for any row .ifd needs prompts."),
    "package": ("select", ["pool_packages='networkx no_such_package'"], "Package 'no_such_package' is not installed"),
    "ratio": ("select", ["trash_expert_ratio=0.1"], "0.1 of 4 experts .*: choose between 0.25 and 0.75"),
    "long rows": ("select", ["length=32"], "length=32 is more .* choose 1 to 31"),
    "targets": ("target", ["targets='q_proj nonsense'"], "'nonsense' is no linear layer .*: choose from .*q_proj"),
    "context": ("target", ["length=64"], "Blocks of 64 tokens exceed the model's 32"),
    "base": ("target", ["model={t}"], "holds no config.json"),
    "hub base": ("target", ["model=owner/name"], "hf download owner/name"),
    "held out": ("target", ["heldout_texts={t}/none.jsonl"], "No such file or folder: .*none.jsonl"),
    "rows in a batch": ("target", ["processes=3"], "multiple of 3"),
    "narrow": ("target", ["dtype=nf4"], "NF4 needs widths that are multiples of 64"),
    "task": ("evaluate", ["tasks=nonsense"], "'nonsense' .* Offline there are bits_per_byte, cloze, and mmlu"),
    "no task": ("evaluate", ["tasks="], "No task to evaluate: name at least one"),
    "mmlu folder": ("evaluate", ["tasks=mmlu", "mmlu=/no/such"], "No folder /no/such: give MMLU's folder"),
    "mmlu files": ("evaluate", ["tasks=mmlu", "mmlu={t}"], r"holds no test/\*_test.csv"),
    "examples": ("evaluate", ["tasks='bits_per_byte mmlu'"], "cais/mmlu"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOOSING)
def test_choosing_data_gives_one_clear_line(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": ""}\n{"text": 3}\n{"text": "\xff\xfe"}\n{nope}\n')
    phase, arguments, says = CHOOSING[name]
    sizes = [o.removeprefix(f"{phase}.") for o in tiny.overrides(home / "texts.jsonl") if o.startswith(f"{phase}.")]
    given = [argument.replace("{}", str(home)).replace("{t}", str(tmp_path)) for argument in arguments]
    run, before = name.replace(" ", "_"), fingerprints(home)
    with pytest.raises(BenchError, match=says) as error:
        cells(phase, [*sizes, f"run={run}", "base=default", *given])
    assert "\n" not in str(error.value)
    assert fingerprints(home) == before
    assert not (home / "runs" / run / phase / "manifest.json").exists()


def test_a_mistake_before_the_work_leaves_the_result_that_stands(home: Path) -> None:
    before = fingerprints(home)
    for phase, mistake in (("select", "epoch=9"), ("target", "targets=nonsense"), ("selector", "model=/no/such")):
        sizes = [o.removeprefix(f"{phase}.") for o in tiny.overrides(home / "texts.jsonl") if o.startswith(f"{phase}.")]
        with pytest.raises(BenchError):
            cells(phase, [*sizes, mistake])
        assert fingerprints(home) == before


@pytest.mark.parametrize(
    ("loads", "way"), [(texts.load_texts, "--repo-type dataset owner/name"), (load.load_model, "owner/name")]
)
def test_a_hub_that_never_answers_costs_seconds(
    loads: Callable[[str], object], way: str, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("transformers.models.auto.modeling_auto")  # takes seconds, too, and not the hub's
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent}")
    began = time.monotonic()
    with pytest.raises(BenchError, match=f"cannot be reached from here.*hf download {way}"):
        loads("owner/name")
    assert time.monotonic() - began < hub.PROBE_SECONDS + 1


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
        deadline = time.monotonic() + 60
        while not (home / "runs/first/scan/notebook.ipynb").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        done = call(home, "all", "run=first")
        assert first.poll() is None, "too late to disturb it"
        one_line(done, "Another tinyonn is working on run 'first'", "run=NAME")
        assert first.communicate(timeout=120)[1] == ""
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
