"""The exported checkpoint is a standard one and equals the dense model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import export, partition, routing
from tinyonn_lib.lm import models, tokenizer

from .conftest import Tiny


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return tokenizer.train_bpe(["some words to learn from", "and some more words"], 300)


def test_stranger_loads_it_and_gets_the_dense_logits(tiny: Tiny, tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    part = partition.partition("sp", tiny.scores, 4)
    folder = export.export(tiny.model, tok, tiny.ffns, part, tmp_path / "moe", card={"partition": "sp"})
    proof = export.verify(folder, tiny.model, tiny.ids)
    assert proof["class"] == "Qwen3MoeForCausalLM"
    assert proof["missing"] == proof["unexpected"] == []
    assert proof["relative_error"] <= 1e-5
    assert isinstance(proof["generated"], str)
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert "| partition | sp |" in (folder / "README.md").read_text()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}  # a second entry would make the file's hash random
        assert "lm_head.weight" not in set(weights.keys())  # tied


def test_routers_and_k_travel_and_k_stays_adjustable(tiny: Tiny, tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    part = partition.partition("random", tiny.scores, 4)
    routers = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    folder = export.export(tiny.model, tok, tiny.ffns, part, tmp_path / "moe", k=2, routers=routers)
    for k, arguments in ((2, {}), (3, {"num_experts_per_tok": 3})):
        moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
        with torch.no_grad(), routing.scaled(tiny.ffns, routing.linear_router(routers, part, k)):
            expected = tiny.model(tiny.ids).logits
        with torch.no_grad():
            found = moe(tiny.ids).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_wrong_checkpoint_is_caught(tiny: Tiny, tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    part = partition.partition("sp", tiny.scores, 4)
    half = export.export(tiny.model, tok, tiny.ffns, part, tmp_path / "half", k=2)
    assert export.verify(half, tiny.model, tiny.ids)["relative_error"] > 1e-3


def test_model_without_a_target_family(tiny: Tiny) -> None:
    dense = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    with pytest.raises(BenchError, match="No standard MoE checkpoint continues a 'gpt2' model"):
        export.target_config(dense.config, partition.partition("sp", tiny.scores, 4), 4)


def test_partition_of_another_model(tiny: Tiny, tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    part = partition.partition("sp", tiny.scores, 4)
    wide = models.new_model(vocab_size=300, width=32, layers=2, ffn=48, head_dim=16)
    with pytest.raises(BenchError, match="each of layer 0's 48 neurons exactly once"):
        export.export(wide, tok, models.ffns(wide), part, tmp_path / "a")
    deep = models.new_model(vocab_size=300, width=32, layers=3, ffn=32, head_dim=16)
    with pytest.raises(BenchError, match="2 layers and the model 3"):
        export.export(deep, tok, models.ffns(deep), part, tmp_path / "b")


def test_experts_that_the_grouped_kernels_cannot_hold(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="experts of 4 neurons.*multiple of 8"):
        export.target_config(tiny.model.config, partition.partition("sp", tiny.scores, 8), 8)


def test_packed_weights_are_refused(
    tiny: Tiny, tok: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.model, "is_quantized", True, raising=False)
    with pytest.raises(BenchError, match="Cannot export a 4-bit model: load it with dtype=bfloat16"):
        export.export(tiny.model, tok, tiny.ffns, partition.partition("sp", tiny.scores, 4), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
