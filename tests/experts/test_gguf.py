"""Divided checkpoints as GGUF files: each tensor's bytes, each hyperparameter, and llama.cpp's logits if it is here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tinyonn_lib.experts import export
from tinyonn_lib.lm import tokenizer
from tinyonn_lib.lm.gguf import to_gguf

from .dense import dense, divide

gguf = pytest.importorskip("gguf")
IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
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
    return tokenizer.train_bpe(["some words to learn from", "and some more words"] * 3, 300)


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


def expected(folder: Path, size: int) -> dict[str, np.ndarray]:
    """llama.cpp's names → what they must hold, from the safetensors, by llama.cpp's documentation of names."""
    tensors = load_file(folder / "model.safetensors")
    names = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "mlp.gate": "ffn_gate_inp",
    }  # fmt: skip
    for layer in range(2):
        names |= {f"model.layers.{layer}.{old}": f"blk.{layer}.{new}" for old, new in parts.items()}
    found = {}
    for old, new in names.items():
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in tensors:
                found[f"{new}.{kind}"] = tensors[f"{old}.{kind}"].numpy()
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        experts = len(tensors[f"{mlp}gate.weight"])
        bias = tensors.get(f"{mlp}gate.e_score_correction_bias", torch.zeros(experts))
        found[f"blk.{layer}.exp_probs_b.bias"] = bias.numpy()
        for part in ("gate", "up", "down"):
            axis = 1 if part == "down" else 0
            stack = torch.stack([tensors[f"{mlp}experts.{e}.{part}_proj.weight"] for e in range(experts)]).numpy()
            found[f"blk.{layer}.ffn_{part}_exps.weight"] = padded(stack, axis + 1, size)
            key = next(
                (k for k in tensors if re.fullmatch(rf"{re.escape(mlp)}shared_experts?\.{part}_proj\.weight", k)), ""
            )
            shared = tensors[key].numpy() if key else np.zeros((32, 0) if axis else (0, 32), np.float32)
            half = 0.5 if part == "down" and "shared_expert." in key else 1
            width = max(size, -(-shared.shape[axis] // size) * size)
            found[f"blk.{layer}.ffn_{part}_shexp.weight"] = padded(shared, axis, width) * np.float32(half)
    return found


def padded(array: np.ndarray, axis: int, width: int) -> np.ndarray:
    extra = [(0, width - n if i == axis else 0) for i, n in enumerate(array.shape)]
    return np.pad(array, extra)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_every_tensor_and_hyperparameter(name: str, dtype: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[name]
    reader = gguf.GGUFReader(to_gguf(folder, tmp_path / "model.gguf", dtype))
    config = json.loads((folder / "config.json").read_text())
    size = config["moe_intermediate_size"] if dtype != "q8_0" else 32
    want, found = expected(folder, size), {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == want.keys()
    for key, tensor in found.items():
        matrix = want[key].ndim > 1 and "gate_inp" not in key
        kind = gguf.GGMLQuantizationType[dtype.upper() if matrix else "F32"]
        assert tensor.tensor_type == kind
        assert tuple(reversed(tensor.shape.tolist())) == want[key].shape
        assert tensor.data.tobytes() == gguf.quants.quantize(want[key], kind).tobytes()
    assert {key: field(reader, f"glm4moe.{key}") for key in HYPERPARAMETERS} == {
        "block_count": 2, "embedding_length": 32, "context_length": 64, "vocab_size": 310,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"], "rope.freq_base": 1000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "leading_dense_block_count": 0, "expert_weights_norm": False,
        "expert_count": len(want["blk.0.exp_probs_b.bias"]), "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": size,
        "expert_shared_count": len(want["blk.1.ffn_up_shexp.weight"]) // size,
        "expert_gating_func": 2 if name.startswith("Glm4") else 1,
        "expert_weights_scale": 2.0 if name.startswith("Glm4") else 1.0,
    }  # fmt: skip
    assert field(reader, "glm4moe.rope.scaling.factor") == (2.0 if "linear" in name else None)


HYPERPARAMETERS = (
    "block_count", "embedding_length", "context_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "rope.dimension_count", "rope.freq_base",
    "attention.layer_norm_rms_epsilon", "leading_dense_block_count", "expert_weights_norm", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "expert_shared_count", "expert_gating_func",
    "expert_weights_scale",
)  # fmt: skip


def field(reader: Any, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


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
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python builds for minutes: compared where it is there"
    )
    path = to_gguf(folders[name], tmp_path / "model.gguf")
    routed = CASES[name][2]
    for k in (routed, 1) if routed else (4,):  # under a zero router all tie, and each program breaks ties its way
        key = {"glm4moe.expert_used_count": k}
        options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "flash_attn": False, "type_k": 0, "type_v": 0}
        llama = llama_cpp.Llama(str(path), verbose=False, kv_overrides=key, **options)  # type 0: cache in float32
        llama.eval(IDS[0].tolist())
        found = torch.from_numpy(np.array(llama.scores[: IDS.shape[1]]))
        moe = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32, num_experts_per_tok=k)
        with torch.no_grad():
            expected_logits = moe(IDS).logits[0]
        assert (found - expected_logits).abs().max() <= 1e-4 * expected_logits.abs().max()
        text = "some more words, and 12 <|endoftext|>"
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == tok(text)["input_ids"]
        llama.close()
