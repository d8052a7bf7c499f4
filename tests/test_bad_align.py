"""Bad input where a model is aligned: one clear line, nothing earlier harmed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tinyonn_lib.align import filtering, tasks
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import load
from tinyonn_lib.pretrain import architectures

from .mistakes import bad, cells, finished, refused, sizes, stops, stranger


def relative(home: Path, name: str, architecture: str = "qwen3", **options: int) -> None:
    """A tiny model with the run's tokenizer, in a folder of that name."""
    made = load.load_tokenizer(str(home / "runs/default/pretrain/model"))
    shape = {"vocab_size": len(made), "width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64}
    shape |= {"max_length": 32, "experts": 4, "active": 2, "eos_token_id": made.eos_token_id}
    architectures.new(architecture, **(shape | options)).save_pretrained(home / name)
    made.save_pretrained(home / name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `default` with its two models; beside it folders with other models and too little text."""
    with finished(tmp_path_factory.mktemp("bad"), "pretrain") as folder:
        stranger(folder, "Mamba", state_size=4)
        stranger(folder, "Bloom", n_head=2)
        relative(folder, "wide", vocab_size=330)
        relative(folder, "narrow", vocab_size=300)
        relative(folder, "short", max_length=16)
        relative(folder, "moe", "qwen3_moe")
        relative(folder, "mute")
        (folder / "mute/tokenizer.json").unlink()
        relative(folder, "endless")
        rules = json.loads((folder / "endless/tokenizer_config.json").read_text())
        (folder / "endless/tokenizer_config.json").write_text(json.dumps(rules | {"eos_token": None}))
        relative(folder, "half")
        (folder / "half/model.safetensors").unlink()
        (folder / "empty.jsonl").write_text("")
        lines = [json.dumps({"text": f"a{n}"}) for n in range(5)]
        (folder / "two.jsonl").write_text("\n".join(lines[:2]))
        (folder / "tiny.jsonl").write_text("\n".join(lines))
        yield folder


# name → (arguments, what its line says); {} is the home
MISTAKES = {
    "missing model": (["model=/no/such"], "No such file or folder: /no/such"),
    "missing student": (["student=/no/such"], "No such file or folder: /no/such"),
    "missing texts": (["texts=/no/such.jsonl"], "No such file or folder: /no/such.jsonl"),
    "hub model": (["model=owner/name"], "hf download owner/name"),
    "hub student": (["student=owner/name"], "hf download owner/name"),
    "hub texts": (["texts=owner/data"], "hf download --repo-type dataset owner/data"),
    "no model": (["model={}"], "holds no config.json"),
    "half a folder": (["model={}/half"], "Cannot load the model .*model.safetensors.*download it again"),
    "half a student": (["student={}/half"], "Cannot load the model .*model.safetensors.*download it again"),
    "no tokenizer": (["model={}/mute"], "holds no tokenizer .*copy the model's tokenizer there"),
    "no end": (["model={}/endless"], "The tokenizer has no end token.*set tokenizer.eos_token"),
    "other vocabulary": (["student={}/wide"], "student has 330 tokens, the teacher 320.*need the same tokenizer"),
    "small vocabulary": (["model={}/narrow", "student={}/narrow"], "the model has 300: other tokenizer"),
    "recurrent model": (["model={}/Mamba"], "A mamba names no longest context .*choose another model"),
    "recurrent student": (["student={}/Mamba"], "A mamba names no longest context .*choose another model"),
    "no context": (["model={}/Bloom"], "A bloom names no longest context .*choose another model"),
    "short context": (["student={}/short"], "Rows of 32 tokens exceed the 16 that both models can read"),
    "too long": (["length=64"], "Rows of 64 tokens exceed the 32 that both models can read"),
    "empty texts": (["texts={}/empty.jsonl"], "empty.jsonl is empty"),
    "two texts": (["texts={}/two.jsonl"], "Only 2 source.*need one each"),
    "little text": (["texts={}/tiny.jsonl"], "do not fill one block of 32: draw more or shorten"),
    "task": (["task=poetry"], "align.task = 'poetry': Input should be 'arithmetic', 'brackets' or 'format'"),
    "method": (["methods='gspo magic'"], "unknown method 'magic'; name some of gspo grpo rejection dpo gold"),
    "no gspo": (["methods='grpo dpo'"], "gspo is missing: the others are its controls"),
    "no method": (["methods=''"], "gspo is missing"),
    "updates": (["updates=3"], "updates=3 must divide the 16 answers of a round"),
    "rates": (["rates=4"], "align.rates = 4: Input should be less than or equal to 3"),
    "beta": (["beta=-1"], "align.beta = -1: Input should be greater than or equal to 0"),
    "temperature": (["temperature=0"], "align.temperature = 0: Input should be greater than 0"),
    "infinite": (["temperature=inf"], "align.temperature = inf: Input should be a finite number"),
    "group": (["group=1"], "align.group = 1: Input should be greater than or equal to 2"),
    "size": (["size=10000"], "size=10000.*largest number, 1 to 9999"),
    "size of the format": (["task=format", "size=5"], "size is the number of fields, 1 to 4"),
    "size for the context": (["task=brackets", "size=12"], "exceed the model's 32: make the task smaller"),
    "few prompts": (["size=1"], "too few prompts: 60 wanted, . found in 'train'. Ask for fewer or take a larger size"),
    "few held out": (["heldout_prompts=4000"], "too few prompts: 4000 wanted, .* found in 'heldout'. Ask for fewer"),
    "all wrong": (["warm_steps=1"], "40 are always wrong, 0 always right. Warm up longer or take a smaller size"),
    "distillation": (["distil_rate=1.0e+9"], "not finite at step .*lower the learning rate"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_gives_one_clear_line(home: Path, name: str) -> None:
    stops("align", home, name, *MISTAKES[name])


def test_answers_that_are_all_alike() -> None:
    asked = tasks.prompts("arithmetic", 3)
    drawn = pd.DataFrame({"prompt": [0, 0, 1, 1, 2, 2], "right": [True, True] + 4 * [False]})
    with pytest.raises(BenchError, match="2 are always wrong, 1 always right.*more answers at a higher temperature"):
        filtering.keep(asked, drawn)


def test_without_trl(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    stops("align", home, "no_trl", [], r"needs TRL: pip install 'tinyonn\[align\]'")


def test_a_mixture_of_experts_teaches_and_is_rewarded(home: Path) -> None:
    given = ["run=moe", "base=default", f"model={home}/moe", "methods=gspo", "warm_steps=150"]
    cells("align", [*sizes("align", home), *given])
    made = json.loads((home / "runs/moe/align/model/config.json").read_text())
    assert made["model_type"] == "qwen3_moe"
    assert (home / "runs/moe/align/manifest.json").exists()


def test_through_the_command(home: Path, subtests: pytest.Subtests) -> None:
    cases = {
        "recurrent": bad("align", f"model={home}/Mamba", says=("A mamba names no longest context", "another model")),
        "missing": bad("align", "student=/no/such", says=("No such file or folder: /no/such",)),
    }
    refused(home, cases, subtests)
