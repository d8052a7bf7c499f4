"""The command converts a folder as 04_experts does, and says in one line what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tinyonn_lib.lm import tokenizer
from tinyonn_lib.workbench import cli

from .conftest import Tiny


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    tiny.model.save_pretrained(path)
    tokenizer.train_bpe(["some words to learn from", "and some more words"], 300).save_pretrained(path)
    tiny.part("sp", shared=0.25).table().to_parquet(path / "partition_sp.parquet")
    return path


def test_convert_divides_a_folder(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    arguments = ["moe", "convert", str(folder), str(folder / "partition_sp.parquet"), str(tmp_path / "moe"), "-k", "2"]
    assert cli.main(arguments) == 0
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert (type(moe).__name__, moe.config.num_experts_per_tok) == ("Glm4MoeForCausalLM", 2)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32, num_experts_per_tok=4).eval()
    with torch.no_grad():
        expected = tiny.model(tiny.ids).logits
        assert (whole(tiny.ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gguf_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    assert cli.main(["moe", "convert", str(folder), str(folder / "partition_sp.parquet"), str(tmp_path / "moe")]) == 0
    assert cli.main(["moe", "gguf", str(tmp_path / "moe"), str(tmp_path / "moe.gguf")]) == 0
    assert "token_embd.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "moe.gguf").tensors}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}", "{folder}/none.parquet", "out"], "none.parquet is not a partition table"),
        (["{folder}", "{folder}/config.json", "out"], "config.json is not a partition table"),
        (["{folder}", "{folder}/partition_sp.parquet", "out", "-k", "5"], "-k 5: the partition has 4 experts"),
        (["{folder}/none", "{folder}/partition_sp.parquet", "out"], "none"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / "out") if a == "out" else a.format(folder=folder) for a in arguments]
    assert cli.main(["moe", "convert", *given]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said
    assert not (tmp_path / "out").exists()
