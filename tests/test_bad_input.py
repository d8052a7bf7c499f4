"""Bad parameters, texts, models and servers through the real command: one clear line, exit 1, no manifest."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import hub, load, texts, tokenizer
from tinyonn_lib.scan.server import find_server, socket_path
from tinyonn_lib.workbench import params, runs
from tinyonn_lib.workbench.phases import PHASES

from .mistakes import bad, call, finished, one_line, refused


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `default` with what the first four phases read."""
    with finished(tmp_path_factory.mktemp("bad"), "pretrain", "scan", "cluster") as folder:
        yield folder


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
    }
    refused(home, cases, subtests)
    assert taken.read_text() == "precious"


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
