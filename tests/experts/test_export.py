"""The exported checkpoint is whole or absent, says where it comes from, and equals the dense model."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import export
from tinyonn_lib.experts.checkpoint import cut, whole_folder
from tinyonn_lib.lm import tokenizer

from .dense import dense, divide

IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return tokenizer.train_bpe(["some words to learn from", "and some more words"], 300)


@pytest.fixture(scope="module")
def model() -> Any:
    return dense("qwen3", vocab_size=300, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folder(model: Any, tok: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model as someone might publish it."""
    path = tmp_path_factory.mktemp("hub") / "Some-Model"
    model.save_pretrained(path)
    tok.chat_template = "{{ messages }}"
    tok.save_pretrained(path)
    GenerationConfig(temperature=0.5, do_sample=True).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\ntags: [a]\n---\n# Some model\n")
    (path / "LICENSE").write_text("do as you like")
    (path / "modeling_evil.py").write_text("raise SystemExit")
    return path


def test_stranger_loads_it_and_gets_the_dense_logits(model: Any, tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = export.export(model, divide(), tmp_path / "moe", tokenizer=tok, card={"partition": "sp"})
    rows = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    half = export.export(model, divide(), tmp_path / "half", k=2, routers=rows)
    proof, caught = export.verify_all([(path, model, IDS), (half, model, IDS)])
    assert caught["relative_error"] > 1e-3
    assert proof["class"] == "Qwen3MoeForCausalLM"
    assert proof["missing"] == proof["unexpected"] == []
    assert proof["relative_error"] <= 1e-5
    assert proof["generated"] == tok.decode(proof["tokens"])
    assert "auto_map" not in json.loads((path / "config.json").read_text())
    with safe_open(path / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}  # a second entry would make the file's hash random
        assert "lm_head.weight" not in set(weights.keys())  # tied


def test_a_folder_brings_its_tokenizer_licence_and_template(folder: Path, tmp_path: Path) -> None:
    path = export.export(folder, divide(shared=8), tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (path / name).read_bytes() == (folder / name).read_bytes()
    assert (path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not list(path.glob("*.py"))
    text = (path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["license_link"] == "LICENSE"
    assert "base_model" not in front  # a folder's name is no hub id
    assert "| base model | Some-Model (qwen3) |" in text
    assert str(folder.parent) not in text


def test_the_card_tells_what_was_done(tmp_path: Path) -> None:
    part = divide(counts=(3, 6), sizes=(20, 9), dropped=2)
    card = {"ΔNLL, nats per token": "+0.1", "<b>x</b>|y\nz": "<script>"}
    text = (export.export(dense("llama"), part, tmp_path / "moe", card=card) / "README.md").read_text()
    for line in (
        "| partition | random |",
        "| experts per layer | 3 to 6 |",
        "| neurons per expert | 9 to 20 |",
        "| shared neurons per layer | 2 to 8 |",
        "| dropped neurons, all layers | 4 |",
        "| padding (zeros), all layers | 102 neurons in experts, 3 whole experts, 38 shared neurons |",
        "| ΔNLL, nats per token | +0.1 |",
        "| &lt;b&gt;x&lt;/b&gt;&#124;y z | &lt;script&gt; |",
        "| router | none: zero rows, every expert on |",
        "all experts tie and all have to be on",
        "equals the base model less its dropped neurons",
        "2·sigmoid(router logit)",
    ):
        assert line in text
    assert "num_experts_per_tok" not in text  # it would leave the choice to chance


def test_the_card_tells_of_the_router(tmp_path: Path) -> None:
    rows, biases = [torch.randn(4, 32) for _ in range(2)], [torch.randn(4) for _ in range(2)]
    for options, row, rule in (
        ({"biases": biases, "card": {"router": "ridge"}}, "ridge", "sigmoid(router logit) + `e_score_correction_bias`"),
        ({"biases": biases}, "linear, with a bias for the choice", "sigmoid(router logit) + `e_score"),
        ({}, "linear", "Those with the highest router logits are on."),
    ):
        given: dict[str, Any] = {"k": 2, "routers": rows, **options}
        text = (export.export(dense("qwen3"), divide(), tmp_path / "moe", **given) / "README.md").read_text()
        assert f"| router | {row} |" in text
        assert rule in text
        assert "\nmodel = AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=1)  # fewer active\n" in text


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("Qwen/Qwen3-4B", None, ("Qwen/Qwen3-4B", "")),
        ("/home/anna/secret/run7", None, ("run7", "")),
        ("", "models--Qwen--Qwen3-4B/snapshots/" + "a1" * 20, ("Qwen/Qwen3-4B", "a1" * 20)),
    ],
)
def test_lineage_names_the_model_and_never_a_path(
    name: str, path: str | None, expected: tuple[str, str], tmp_path: Path
) -> None:
    from dataclasses import replace

    from tinyonn_lib.experts import card, weights

    model = dense("qwen3")
    model.config._name_or_path = name
    found = weights.open_weights(model)
    if path is not None:
        (tmp_path / path).mkdir(parents=True)
        found = replace(found, folder=tmp_path / path)
    assert card.lineage(found) == expected


def test_the_card_warns_where_bfloat16_rounds(tmp_path: Path) -> None:
    model = dense("qwen2").to(torch.bfloat16)
    for experts, warns in ((6, True), (8, False)):
        part = divide(counts=(experts, experts), sizes=(8, 8))
        text = (export.export(model, part, tmp_path / "moe") / "README.md").read_text()
        assert (f"bfloat16 rounds it: {experts} is no power of two" in text) == warns
        assert "| weights of the base model | bfloat16 |" in text


def test_shards_are_standard_and_equal_the_single_file(folder: Path, tmp_path: Path) -> None:
    single, many = (export.export(folder, divide(), tmp_path / str(n), shard_bytes=n) for n in (10**9, 70_000))
    names = sorted(file.name for file in many.glob("model*"))
    count = len(names) - 1
    shards = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names == [*shards, "model.safetensors.index.json"]
    assert count > 2
    index = json.loads((many / "model.safetensors.index.json").read_text())
    whole = load_file(single / "model.safetensors")
    held = {key: load_file(many / file)[key] for key, file in index["weight_map"].items()}
    assert held.keys() == whole.keys()
    assert all(torch.equal(held[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name in shards:
        assert sum(tensor.nbytes for tensor in load_file(many / name).values()) <= 70_000
    assert AutoModelForCausalLM.from_pretrained(many)(IDS).logits.shape == (2, 17, 300)


def test_two_exports_are_the_same_bytes(folder: Path, model: Any, tmp_path: Path) -> None:
    first, second, third = (
        export.export(s, divide(), tmp_path / n) for s, n in ((folder, "a"), (folder, "b"), (model, "c"))
    )
    data = (first / "model.safetensors").read_bytes()
    assert data == (second / "model.safetensors").read_bytes() == (third / "model.safetensors").read_bytes()


def test_a_checkpoint_that_does_not_load_is_told(model: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BenchError, match="does not load with plain transformers"):
        export.verify(tmp_path, model, IDS)


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_and_an_earlier_result_untouched(model: Any, tmp_path: Path) -> None:
    with files_at_most(50_000), pytest.raises(BenchError, match="Cannot write .*moe: .*Nothing was left") as caught:
        export.export(model, divide(), tmp_path / "moe")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    path = export.export(model, divide(), tmp_path / "moe")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with files_at_most(50_000), pytest.raises(BenchError, match="Cannot write"):
        export.export(model, divide(counts=(8, 8)), tmp_path / "moe")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


_SLOW = """
import sys, time
from pathlib import Path
from tests.experts.dense import divide
from tinyonn_lib.experts import checkpoint, export
flush = checkpoint.Shards._flush
def slow(self):
    flush(self)
    print("shard", flush=True)
    time.sleep(60)
checkpoint.Shards._flush = slow
export.export(sys.argv[1], divide(), Path(sys.argv[2]), shard_bytes=30_000)
"""


def test_a_kill_leaves_no_half_checkpoint_and_the_next_export_clears_up(folder: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _SLOW, str(folder), str(tmp_path / "moe")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "shard\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "moe").exists()
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    export.export(folder, divide(), tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_two_writers_of_one_folder_do_not_touch_each_other(tmp_path: Path) -> None:
    target = tmp_path / "moe"
    with whole_folder(target, "config.json") as first:
        (first / "config.json").write_text("first")
        with whole_folder(target, "config.json") as second:
            (second / "config.json").write_text("second")
        assert (target / "config.json").read_text() == "second"
        assert (first / "config.json").read_text() == "first"
    assert (target / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


_HALFWAY = """
import os, signal, sys
from pathlib import Path
from tinyonn_lib.experts.checkpoint import whole_folder
rename = Path.rename
def once(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = once
with whole_folder(Path(sys.argv[1]), "config.json") as partial:
    (partial / "config.json").write_text("new")
"""


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "moe"
    target.mkdir()
    (target / "config.json").write_text("old")
    done = subprocess.run([sys.executable, "-c", _HALFWAY, str(target)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(RuntimeError), whole_folder(target, "config.json"):
        raise RuntimeError("the next call fails, too")
    assert (target / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_after_the_renames_leaves_the_new_result(tmp_path: Path) -> None:
    for name in ("moe", ".moe.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    with whole_folder(tmp_path / "moe", "config.json") as partial:
        assert (tmp_path / "moe" / "config.json").read_text() == "moe"
        (partial / "config.json").write_text("next")
    assert (tmp_path / "moe" / "config.json").read_text() == "next"
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_folders_of_others_are_left_alone(folder: Path, model: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BenchError, match="exists and is no earlier result .*choose another"):
        export.export(model, divide(), tmp_path)
    with pytest.raises(BenchError, match="is the dense model itself"):
        export.export(folder, divide(), folder)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (folder / "LICENSE").exists()


def test_what_does_not_belong_together(model: Any, tmp_path: Path) -> None:
    routers = [torch.zeros(4, 32)] * 2
    for changes, message in (
        ({"partition": divide(neurons=48)}, "each of layer 0's 64 neurons exactly once"),
        ({"partition": divide(3, counts=(4, 4, 4))}, "3 layers and the model 2"),
        ({"k": 0}, "k=0 active experts: choose 1 to 4"),
        ({"k": 5}, "k=5 active experts"),
        ({"k": 2}, "k=2 of 4 experts without a router: with zero rows all experts tie, so give routers"),
        ({"biases": [torch.zeros(4)] * 2}, "Selection biases without routers"),
        ({"routers": routers[:1]}, "rows do not belong to this partition and model: 1 layers instead of 2"),
        ({"routers": [routers[0], torch.zeros(5, 32)]}, r"rows do not .*: layer 1 has \(5, 32\) instead of \(4, 32\)"),
        (
            {"routers": routers, "biases": [torch.zeros(3)] * 2},
            r"biases do not .*: layer 0 has \(3,\) instead of \(4,\)",
        ),
        ({"routers": [routers[0], routers[0] * torch.nan]}, "rows of layer 1 hold NaN or infinity"),
        ({"routers": routers, "biases": [torch.full((4,), torch.inf)] * 2}, "biases of layer 0 hold NaN or infinity"),
    ):
        options: dict[str, Any] = {"partition": divide(), **changes}
        with pytest.raises(BenchError, match=message):
            export.export(model, options.pop("partition"), tmp_path / "moe", **options)
    with pytest.raises(BenchError, match="No such file or folder"):
        export.export(tmp_path / "nowhere.safetensors", divide(), tmp_path / "moe")
    assert not list(tmp_path.iterdir())


def test_cut_takes_rows_or_columns_and_pads_with_zeros() -> None:
    matrix, index = torch.arange(12.0).view(4, 3), torch.tensor([[3, 0], [1, 2]])
    rows = cut(matrix, index, 0, experts=3, size=3)
    assert torch.equal(rows[:2, :2], matrix[index])
    assert rows.shape == (3, 3, 3)
    assert rows[2].count_nonzero() == rows[:, 2].count_nonzero() == 0
    columns = cut(matrix.T.contiguous(), index, 1, experts=3, size=3)
    assert torch.equal(columns, rows.mT)
