"""Bad input where data is chosen, trained on and evaluated: one clear line, nothing earlier harmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyonn_lib.errors import BenchError

from .mistakes import bad, cells, fingerprints, finished, refused, sizes, stops


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `default` without the phases of neurons and experts: a mixture of nobody's stands in for theirs."""
    with finished(tmp_path_factory.mktemp("bad"), "pretrain", "selector", "select", "target", "evaluate") as folder:
        yield folder


def test_each_gives_one_clear_line(home: Path, silent: int, subtests: pytest.Subtests) -> None:
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{silent}"}
    cases = {
        "dense": bad(
            "selector", f"model={home}/runs/default/pretrain/model", says=("no router", "02_scan to 05_router", "OLMoE")
        ),
        "no_selector": bad("select", f"selector={home}/moe", says=("moe holds no selector.json", "epoch_1")),
        "mmlu": bad(
            "evaluate", "tasks=mmlu", says=("cannot be reached", "--repo-type dataset cais/mmlu"), **unreachable
        ),
    }
    refused(home, cases, subtests)


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
    stops(phase, home, name, [argument.replace("{t}", str(tmp_path)) for argument in arguments], says)


def test_a_mistake_before_the_work_leaves_the_result_that_stands(home: Path) -> None:
    before = fingerprints(home)
    for phase, mistake in (("select", "epoch=9"), ("target", "targets=nonsense"), ("selector", "model=/no/such")):
        with pytest.raises(BenchError):
            cells(phase, [*sizes(phase, home), mistake])
        assert fingerprints(home) == before
