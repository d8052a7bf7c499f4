"""The command converts a folder as 04_experts does, and says in one line what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tinyonn_lib.experts import router_file
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
    arguments = ["moe", "convert", str(folder), str(folder / "partition_sp.parquet"), str(tmp_path / "moe")]
    assert cli.main(arguments) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    assert (type(whole).__name__, whole.config.num_experts_per_tok) == ("Glm4MoeForCausalLM", 4)
    with torch.no_grad():
        expected = tiny.model(tiny.ids).logits
        assert (whole(tiny.ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_convert_with_a_router(folder: Path, tmp_path: Path) -> None:
    rows, biases = [torch.randn(4, 32) for _ in range(2)], [torch.randn(4) for _ in range(2)]
    router_file.save_routers(tmp_path / "mine.safetensors", rows, biases)
    arguments = ["moe", "convert", str(folder), str(folder / "partition_sp.parquet"), str(tmp_path / "moe")]
    assert cli.main([*arguments, "--routers", str(tmp_path / "mine.safetensors"), "-k", "2"]) == 0
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert moe.config.num_experts_per_tok == 2
    for layer in range(2):
        gate = moe.model.layers[layer].mlp.gate
        assert torch.equal(gate.weight, rows[layer])
        assert torch.equal(gate.e_score_correction_bias, biases[layer])
    assert "| router | from mine.safetensors |" in (tmp_path / "moe" / "README.md").read_text()


def test_gguf_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    assert cli.main(["moe", "convert", str(folder), str(folder / "partition_sp.parquet"), str(tmp_path / "moe")]) == 0
    assert cli.main(["gguf", str(tmp_path / "moe"), str(tmp_path / "moe.gguf")]) == 0
    assert "token_embd.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "moe.gguf").tensors}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}", "{folder}/none.parquet", "out"], "none.parquet is not a partition table"),
        (["{folder}", "{folder}/config.json", "out"], "config.json is not a partition table"),
        (["{folder}", "{folder}/partition_sp.parquet", "out", "-k", "5"], "-k 5: the partition has 4 experts"),
        (["{folder}", "{folder}/partition_sp.parquet", "out", "-k", "2"], "k=2 of 4 experts without a router"),
        (
            ["{folder}", "{folder}/partition_sp.parquet", "out", "--routers", "{folder}/none.safetensors"],
            "none.safetensors: it is missing",
        ),
        (
            ["{folder}", "{folder}/partition_sp.parquet", "out", "--routers", "{folder}/model.safetensors"],
            "so it is no file of routers",
        ),
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
