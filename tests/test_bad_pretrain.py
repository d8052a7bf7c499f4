"""Bad input where models are grown: one clear line, and before any training begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.pretrain import train

from .mistakes import bad, finished, refused, sizes, stops


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Texts, and folders that hold no tokenizer or half of one."""
    with finished(tmp_path_factory.mktemp("bad")) as folder:
        (folder / "two.jsonl").write_text("\n".join(json.dumps({"text": f"The router {n}."}) for n in range(2)))
        (folder / "half").mkdir()
        (folder / "half/config.json").write_text("{}")
        train_bpe(["The router feeds the layer."], 300).save_pretrained(folder / "cut")
        rules = folder / "cut/tokenizer.json"
        rules.write_text(rules.read_text()[:-100])
        yield folder


# name → (arguments, what its line says); {} is the home
MISTAKES = {
    "architecture": (["architecture=llama9"], "pretrain.architecture = 'llama9': Input should be 'qwen3'"),
    "optimizer": (["optimizer=sgd"], "pretrain.optimizer = 'sgd': Input should be 'muon' or 'adamw'"),
    "schedule": (["schedule=linear"], "pretrain.schedule = 'linear': Input should be 'trapezoidal'"),
    "layout": (["layout=wild"], "pretrain.layout = 'wild': Input should be 'packed', 'documents' or 'padded'"),
    "precision": (["precision=float16"], "pretrain.precision = 'float16': Input should be 'auto'"),
    "infinite rate": (["lr_matrix=inf"], "pretrain.lr_matrix = inf: Input should be a finite number"),
    "active": (["active=9"], "active=9 must be at most experts=8"),
    "one expert": (["experts=1"], "pretrain.experts = 1: Input should be greater than or equal to 2"),
    "mtp": (["architecture=gemma3n", "mtp=0.3"], "gemma3n has no multi-token prediction: choose mtp=0"),
    "heads": (["heads=3", "kv_heads=2"], "heads=3 must be a multiple of kv_heads=2"),
    "vocabulary": (["vocab_size=258"], "pretrain.vocab_size = 258: Input should be greater than or equal to 300"),
    "small tokenizer": (["tokenizers=100"], "^'100' is no size of a vocabulary: give a whole number from 258"),
    "half an entry": (["tokenizers=300.5"], "^'300.5' is no size of a vocabulary"),
    "missing tokenizer": (["tokenizers='300 /no/such'"], "No such file or folder: /no/such"),
    "hub tokenizer": (["tokenizers=owner/name"], "hf download owner/name"),
    "no tokenizer": (["tokenizers={}/half"], "holds no tokenizer .tokenizer.json."),
    "half a tokenizer": (["tokenizers={}/cut"], "Cannot load a tokenizer from .*/cut"),
    "blank tokenizers": (["tokenizers=' '"], "No tokenizer to compare: give sizes, folders or hub ids"),
    "odd head": (["architecture=deepseek_v3", "head_dim=18"], "head_dim=18 is no multiple of 4"),
    "narrow latent": (["architecture=deepseek_v3", "width=16"], "width=16 is too narrow for latent attention"),
    "narrow experts": (["architecture=qwen3_moe", "ffn=16", "active=4"], "ffn=16 is too narrow for experts.*least 32"),
    "narrow student": (["architecture=qwen2_moe", "active=4"], "^student_ffn=32 is too narrow for experts.*least 64"),
    "narrow latent student": (["architecture=deepseek_v3", "width=64"], "^student_width=16 is too narrow for latent"),
    "layers": (["layers=20000"], "pretrain.layers = 20000: Input should be less than or equal to 10000"),
    "wide": (["width=1000000"], "^The model would have .* GB are free: lower some of width=1000000, layers=2, ffn=64"),
    "deep": (["layers=10000", "ffn=1000000"], r"^The model would have 960,\d{3},\d{3},\d{3} parameters; "),
    "wide student": (["student_width=1000000"], "^The student would have .* GB and .* some of student_width=1000000, "),
    "batch": (["batch=1000000000"], r"^The model would have .* GB are free: .* batch=1000000000, length=32\.$"),
    "gemma3n heads": (["architecture=gemma3n", "heads=3"], "width=32 is not a multiple of heads=3"),
    "package": (["texts=python-docs", "corpus_packages=nonesuch"], "Package 'nonesuch' is not installed here"),
    "two texts": (["texts={}/two.jsonl"], "Only 2 source"),
    "too long": (["length=100000", "batch=1"], "do not fill one block of 100000: give more text or shorter blocks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_gives_one_clear_line_before_training(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "pretrain_each", lambda *args, **options: pytest.fail("training began"))
    stops("pretrain", home, name, *MISTAKES[name])


def test_through_the_command(home: Path, subtests: pytest.Subtests) -> None:
    cases = {"experts": bad("pretrain", *sizes("pretrain", home), "architecture=deepseek_v3", "head_dim=18",
                            says=("head_dim=18 is no multiple of 4",))}  # fmt: skip
    refused(home, cases, subtests)
