"""What tests of GGUF files share: what a file must hold, whether it does, and whether llama.cpp computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tinyonn_lib.lm import tokenizer

IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
SHAPE: dict[str, Any] = {  # hyperparameters of all these tests' models
    "block_count": 2, "embedding_length": 32, "context_length": 64, "vocab_size": 310, "attention.head_count": 4,
    "attention.head_count_kv": 2, "rope.freq_base": 1000.0,
    "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
}  # fmt: skip


def some_words() -> PreTrainedTokenizerFast:
    """A tokenizer with ten ids fewer than the models have rows."""
    return tokenizer.train_bpe(["some words to learn from", "and some more words"] * 3, 300)


def written(folder: Path, arch: str, step: int = 1) -> dict[str, np.ndarray]:
    """llama.cpp's names → what they must hold, from the safetensors, by llama.cpp's documentation of names.

    Args:
        folder: A checkpoint of two layers with four heads, two of them with keys and values, of width 32.
        arch: llama.cpp's architecture.
        step: Experts are as many neurons wide as a multiple of this.
    """
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    names = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "attn_norm", "mlp.gate": "ffn_gate_inp",
        "post_attention_layernorm": "post_attention_norm" if arch == "glm4moe" else "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for layer in range(2):
        names |= {f"model.layers.{layer}.{old}": f"blk.{layer}.{new}" for old, new in parts.items()}
    found = {
        f"{names[stem]}.{kind}": array for name, array in tensors.items() for stem, _, kind in [name.rpartition(".")]
        if stem in names and kind in ("weight", "bias")
    }  # fmt: skip
    if arch == "qwen2moe":
        found.setdefault("output.weight", found["token_embd.weight"])
    if arch == "llama":
        for key in found:
            heads = {"attn_q": 4, "attn_k": 2}.get(key.split(".")[-2])
            if heads:  # row i of a head's first half, then row i of its second half, and so on
                half = len(found[key]) // heads // 2
                order = [h * 2 * half + i + side * half for h in range(heads) for i in range(half) for side in (0, 1)]
                found[key] = found[key][order]
    if "moe" in arch:
        width = -(-config["moe_intermediate_size"] // step) * step
        for layer in range(2):
            found |= experts(tensors, layer, arch, width, width if arch == "glm4moe" else step)
    if config["rope_parameters"]["rope_type"] == "llama3":
        found["rope_freqs.weight"] = llama3_divisors()
    return found


def experts(tensors: dict[str, np.ndarray], layer: int, arch: str, width: int, unit: int) -> dict[str, np.ndarray]:
    """What stands for a layer's experts, each `width` wide, and for its shared ones, together a multiple of `unit`."""
    mlp, block, found = f"model.layers.{layer}.mlp.", f"blk.{layer}.", {}
    count = len(tensors[f"{mlp}gate.weight"])
    for part in ("gate", "up", "down"):
        axis = 1 if part == "down" else 0
        stack = np.stack([tensors[f"{mlp}experts.{e}.{part}_proj.weight"] for e in range(count)])
        found[f"{block}ffn_{part}_exps.weight"] = padded(stack, axis + 1, width)
        own = [key for key in tensors if key.startswith(f"{mlp}shared") and key.endswith(f"{part}_proj.weight")]
        if own or arch == "glm4moe":
            array = tensors[own[0]] if own else np.zeros((32, 0) if axis else (0, 32), np.float32)
            if arch == "glm4moe" and own and "shared_expert." in own[0] and part == "down":
                array = array * np.float32(0.5)  # it has no place for Qwen's gate, half open here
            rows = max(unit, -(-array.shape[axis] // unit) * unit)
            found[f"{block}ffn_{part}_shexp.weight"] = padded(array, axis, rows)
    if arch == "glm4moe":
        bias = tensors.get(f"{mlp}gate.e_score_correction_bias", np.zeros(count, np.float32))
        found[f"{block}exp_probs_b.bias"] = bias
    elif arch == "qwen2moe":
        found[f"{block}ffn_gate_inp_shexp.weight"] = tensors[f"{mlp}shared_expert_gate.weight"][0]
    return found


def padded(array: np.ndarray, axis: int, width: int) -> np.ndarray:
    return np.pad(array, [(0, width - n if i == axis else 0) for i, n in enumerate(array.shape)])


def llama3_divisors() -> np.ndarray:
    """By Llama 3.1's own description: long waves four times slower, short ones as they are, between them a mixture."""
    divisors = []
    for wave in 2 * np.pi * 1000.0 ** (np.arange(4) / 4):
        smooth = np.clip((16 / wave - 1) / (4 - 1), 0, 1)
        divisors.append(1 / ((1 - smooth) / 4 + smooth))
    return np.array(divisors, np.float32)


def field(reader: Any, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def holds(reader: Any, want: dict[str, np.ndarray], dtype: str) -> None:
    """The file has these tensors and no other: matrices in this type, the rest in float32, to the byte."""
    import gguf

    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    for key, tensor in found.items():
        matrix = want[key].ndim > 1 and "gate_inp" not in key
        stored = gguf.GGMLQuantizationType[dtype.upper() if matrix else "F32"]
        assert tensor.tensor_type == stored, key
        assert tuple(reversed(tensor.shape.tolist())) == want[key].shape, key
        if key == "rope_freqs.weight":
            assert tensor.data == pytest.approx(want[key], rel=1e-5)
        else:
            assert tensor.data.tobytes() == gguf.quants.quantize(want[key], stored).tobytes(), key


def same_in_llama_cpp(path: Path, folder: Path, tok: PreTrainedTokenizerFast, k: int | None = None) -> tuple[Any, Any]:
    """llama.cpp with the file and transformers with the folder give the same logits and ids.

    Args:
        path: The GGUF file, of the architecture glm4moe where `k` is given.
        folder: The checkpoint that it was made from.
        tok: Its tokenizer.
        k: Experts per token instead of the file's own number.

    Returns:
        llama.cpp's model, which has read `IDS` and is to be closed, and transformers'.
    """
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python builds for minutes: compared where it is there"
    )
    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "flash_attn": False, "type_k": 0, "type_v": 0}
    if k:
        options["kv_overrides"] = {"glm4moe.expert_used_count": k}
    llama = llama_cpp.Llama(str(path), verbose=False, **options)  # type 0: cache in float32
    llama.eval(IDS[0].tolist())
    found = torch.from_numpy(np.array(llama.scores[: IDS.shape[1]]))
    more = {"num_experts_per_tok": k} if k else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    with torch.no_grad():
        expected = model(IDS).logits[0]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    text = "some more words, and 12 <|endoftext|>"
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == tok(text)["input_ids"]
    return llama, model
