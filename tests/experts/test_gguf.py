"""Divided checkpoints as GGUF files: each tensor's bytes, each hyperparameter, and llama.cpp's logits if it is here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.gguf_files import SHAPE, field, holds, same_in_llama_cpp, some_words, written
from tinyonn_lib.experts import export
from tinyonn_lib.lm.gguf import to_gguf

from .dense import dense, divide

gguf = pytest.importorskip("gguf")
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {  # dense model, partition, k of a real router
    "Qwen2Moe": ({"kind": "qwen2", "tie_word_embeddings": True}, {}, None),
    "Qwen2Moe, shared, routed": ({"kind": "qwen2"}, {"shared": 16}, 2),
    "Qwen3Moe, routed": ({"kind": "qwen3", "head_dim": 16, "tie_word_embeddings": True}, {"dropped": 4}, 2),
    "Glm4Moe of Qwen2, routed with biases": ({"kind": "qwen2"}, {"shared": 16}, 2),
    "Glm4Moe of Qwen3, shared": ({"kind": "qwen3", "head_dim": 16}, {"shared": 16}, None),
    "Glm4Moe of Llama, linear rope": ({"kind": "llama", "rope_parameters": LINEAR}, {"shared": 8}, None),
    "Glm4Moe of Mistral, uneven, routed": ({"kind": "mistral"}, {"counts": (3, 6), "sizes": (20, 9)}, 3),
}


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return some_words()


@pytest.fixture(scope="module")
def folders(tok: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base, found = tmp_path_factory.mktemp("moe"), {}
    for i, (name, (options, division, k)) in enumerate(CASES.items()):
        part = divide(**division)
        generator = torch.Generator().manual_seed(1)
        routers = [torch.randn(len(index), 32, generator=generator) for index in part.experts] if k else None
        biases = [torch.randn(len(index), generator=generator) for index in part.experts] if "bias" in name else None
        model = dense(**options, vocab_size=310)  # ten rows without a token
        given: dict[str, Any] = {"k": k, "routers": routers, "biases": biases}
        found[name] = export.export(model, part, base / str(i), tokenizer=tok, **given)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_every_tensor_and_hyperparameter(name: str, dtype: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[name]
    reader = gguf.GGUFReader(to_gguf(folder, tmp_path / "model.gguf", dtype))
    config = json.loads((folder / "config.json").read_text())
    size = config["moe_intermediate_size"] if dtype != "q8_0" else 32
    want = written(folder, "glm4moe", 32 if dtype == "q8_0" else 1)
    holds(reader, want, dtype)
    expected = {
        **SHAPE, "attention.key_length": config["head_dim"], "rope.dimension_count": config["head_dim"],
        "leading_dense_block_count": 0, "expert_weights_norm": False,
        "expert_count": len(want["blk.0.exp_probs_b.bias"]), "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": size,
        "expert_shared_count": len(want["blk.1.ffn_up_shexp.weight"]) // size,
        "expert_gating_func": 2 if name.startswith("Glm4") else 1,
        "expert_weights_scale": 2.0 if name.startswith("Glm4") else 1.0,
    }  # fmt: skip
    assert {key: field(reader, f"glm4moe.{key}") for key in expected} == expected
    assert field(reader, "glm4moe.rope.scaling.factor") == (2.0 if "linear" in name else None)


def test_a_trained_gate_goes_to_another_architecture(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["Qwen2Moe, shared, routed"], tmp_path / "copy"))
    tensors, gate = load_file(folder / "model.safetensors"), "model.layers.1.mlp.shared_expert_gate.weight"
    save_file({**tensors, gate: torch.full((1, 32), 0.1)}, folder / "model.safetensors")
    reader = gguf.GGUFReader(to_gguf(folder, tmp_path / "model.gguf"))
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert field(reader, "general.architecture") == "qwen2moe"
    assert (found["blk.1.ffn_gate_inp_shexp.weight"] == np.float32(0.1)).all()
    assert (found["blk.0.ffn_gate_inp_shexp.weight"] == np.float32(1e-12)).all()
    down = tensors["model.layers.1.mlp.shared_expert.down_proj.weight"].numpy()
    assert np.array_equal(found["blk.1.ffn_down_shexp.weight"], down)  # its gate keeps the factor


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(
    name: str, folders: dict[str, Path], tok: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = to_gguf(folders[name], tmp_path / "model.gguf")
    routed = CASES[name][2]
    for k in (routed, 1) if routed else (4,):  # under a zero router all tie, and each program breaks ties its way
        llama, _ = same_in_llama_cpp(path, folders[name], tok, k)
        llama.close()
