"""GGUF files hold the checkpoint: each tensor's bytes, each hyperparameter, and llama.cpp's logits if it is here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.experts.test_export import files_at_most
from tests.gguf_files import IDS, SHAPE, field, holds, same_in_llama_cpp, some_words, written
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.gguf import to_gguf
from tinyonn_lib.workbench import cli

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 310, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "rms_norm_eps": 1e-5, "rope_parameters": PLAIN, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # transformers' kind, llama.cpp's, options
    "Qwen3, tied": ("qwen3", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3": ("qwen3", "qwen3", {"head_dim": 16}),
    "Qwen2": ("qwen2", "qwen2", {}),
    "Llama, biases": ("llama", "llama", {"head_dim": 16, "attention_bias": True}),
    "Llama, scaled rope": ("llama", "llama", {"rope_parameters": LLAMA3}),
    "Mistral": ("mistral", "llama", {}),
    "Qwen3Moe, gates renormalised": ("qwen3_moe", "qwen3moe", {
        "head_dim": 16, "num_experts": 8, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "Qwen3Moe": ("qwen3_moe", "glm4moe", {"head_dim": 16, "num_experts": 8, "norm_topk_prob": False}),
    "Qwen2Moe, trained gate, tied": ("qwen2_moe", "qwen2moe", {
        "num_experts": 8, "shared_expert_intermediate_size": 40, "tie_word_embeddings": True}),
    "Glm4Moe, half turned, gates renormalised": ("glm4_moe", "glm4moe", {
        "head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "use_qk_norm": True,
        "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
        "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return some_words()


@pytest.fixture(scope="module")
def folders(tok: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base, found = tmp_path_factory.mktemp("models"), {}
    for number, (name, (kind, _, options)) in enumerate(CASES.items()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options}))
        for key, parameter in model.requires_grad_(False).named_parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.1).add_(1.0 if "norm" in key else 0.0)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_()
        found[name] = base / str(number)
        model.save_pretrained(found[name])
        tok.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_every_tensor_and_hyperparameter(name: str, dtype: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, arch, options = CASES[name]
    reader = gguf.GGUFReader(to_gguf(folders[name], tmp_path / "model.gguf", dtype))
    holds(reader, written(folders[name], arch, 32 if dtype == "q8_0" else 1), dtype)
    head, moe = options.get("head_dim", 8), "moe" in arch
    expected: dict[str, Any] = {
        **SHAPE, "feed_forward_length": 64, "attention.key_length": head, "attention.value_length": head,
        "rope.dimension_count": head // 2 if kind == "glm4_moe" else head,
        "expert_count": 8 if moe else None, "expert_used_count": 2 if moe else None,
        "expert_feed_forward_length": (32 if dtype == "q8_0" else 24) if moe else None,
        "expert_weights_norm": options.get("norm_topk_prob", False) if moe else None,
        "expert_gating_func": (2 if kind == "glm4_moe" else 1) if moe else None,
        "expert_weights_scale": (1.5 if kind == "glm4_moe" else 1.0) if moe else None,
    }  # fmt: skip
    if arch == "qwen2moe":
        expected["expert_shared_feed_forward_length"] = 64 if dtype == "q8_0" else 40
    assert field(reader, "general.architecture") == arch
    assert {key: field(reader, f"{arch}.{key}") for key in expected} == expected


@pytest.mark.parametrize("name", ["Qwen2", "Llama, plain"])
def test_transformers_reads_it_back(
    name: str, folders: dict[str, Path], tok: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Another reader than llama.cpp, which does its own turning of Llama's rows; of ours it knows these two."""
    folder = folders.get(name, tmp_path / "llama")
    if name not in folders:
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(folder)
        tok.save_pretrained(folder)
    to_gguf(folder, tmp_path / "model.gguf")
    model, back = (
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)
        for where, more in ((folder, {}), (tmp_path, {"gguf_file": "model.gguf"}))
    )
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, model(IDS).logits)


def test_the_tokenizer_travels(folders: dict[str, Path], tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(to_gguf(folders["Qwen3"], tmp_path / "model.gguf"))
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert tokens[: len(tok)] == tok.convert_ids_to_tokens(range(len(tok)))
    assert tokens[len(tok) :] == [f"[PAD{i}]" for i in range(len(tok), 310)]
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert kinds == [3, 3, *[1] * (len(tok) - 2), *[5] * (310 - len(tok))]  # control, normal, unused
    merges = json.loads((folders["Qwen3"] / "tokenizer.json").read_text())["model"]["merges"]
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.eos_token_id") == tok.eos_token_id


@pytest.mark.parametrize(("numbers", "pre"), [(r"\p{N}", "qwen2"), (r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}{1,4}", None)])
def test_how_texts_are_cut(numbers: str, pre: str | None, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["Qwen2"], tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    if pre is None:
        with pytest.raises(BenchError, match="no byte-level BPE cut like GPT-2's, Qwen2's or Llama-3's"):
            to_gguf(folder, tmp_path / "model.gguf")
    else:
        reader = gguf.GGUFReader(to_gguf(folder, tmp_path / "model.gguf"))
        assert field(reader, "tokenizer.ggml.pre") == pre


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Qwen3", {"rope_parameters": LLAMA3}, "qwen3 cannot hold this model: its rope scaling is 'llama3'"),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8}, "it has a sliding window"),
        ("Mistral", {"sliding_window": 8}, "it has a sliding window"),
        ("Llama, biases", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ("Qwen2", {"num_attention_heads": 8, "head_dim": 8}, "8 heads of 8 are not its width 32"),
        ("Qwen2", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "it is quantised"),
        ("Qwen2Moe, trained gate, tied", {"norm_topk_prob": True}, "qwen2moe .*it renormalises its gates"),
        ("Qwen3Moe", {"num_hidden_layers": 3}, "some of its layers have no experts"),
        ("Glm4Moe, half turned, gates renormalised", {"n_group": 2}, "it chooses experts in groups"),
        (
            "Qwen3",
            {"model_type": "phi3"},
            "'phi3' model is not written as GGUF; these are: qwen2, qwen3, llama, mistral, qwen2_moe",
        ),
        ("Llama, biases", {"num_hidden_layers": 3}, "holds no tensor model.layers.2.self_attn.q_proj.weight"),
        ("Qwen3, tied", {"tie_word_embeddings": False}, "holds no tensor lm_head.weight"),
        ("Qwen3", {"vocab_size": 100}, "The tokenizer has ids up to 2.., the model 100 rows"),
    ],
)
def test_what_cannot_be_written(
    name: str, change: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy(folders[name], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BenchError, match=message) as caught:
        to_gguf(folder, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]  # no half file either


def test_no_tensor_is_left_out_in_silence(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["Qwen3"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    whole, part = tensors["model.norm.weight"], "model.layers.1.self_attn.o_proj.bias"
    spare = {
        "model.layers.2.mlp.gate_proj.weight": whole + 1,
        "model.layers.0.self_attn.rotary_emb.inv_freq": whole + 2,
    }
    save_file({**tensors, **spare}, folder / "model.safetensors")
    assert len(gguf.GGUFReader(to_gguf(folder, tmp_path / "model.gguf")).tensors) == len(tensors)
    save_file({**tensors, part: whole + 1}, folder / "model.safetensors")
    with pytest.raises(BenchError, match=f"qwen3 cannot hold this model: it has no place for {part}"):
        to_gguf(folder, tmp_path / "model.gguf")


def test_other_errors(folders: dict[str, Path], tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder, out = copy(folders["Qwen3"], tmp_path), tmp_path / "model.gguf"
    with files_at_most(50_000), pytest.raises(BenchError, match="Cannot write .*model.gguf: .*Make room"):
        to_gguf(folder, out)
    with pytest.raises(BenchError, match="Unknown GGUF type 'q4_k': choose one of f32, f16, q8_0"):
        to_gguf(folder, out, "q4_k")  # type: ignore[arg-type]
    tensors, big = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, big: tensors[big] * 1e6}, folder / "model.safetensors")
    with pytest.raises(BenchError, match="ffn_down.weight holds weights beyond 65504"):
        to_gguf(folder, out, "f16")
    narrow = {**SIZES, "hidden_size": 48}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **narrow)).save_pretrained(folder)
    with pytest.raises(BenchError, match="multiples of 32; token_embd.weight has 48"):
        to_gguf(folder, out, "q8_0")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BenchError, match=r"Cannot read .*tokenizer.json: a GGUF file needs the tokenizer"):
        to_gguf(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_command_says_what_stays_behind(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(folders["Qwen3"], tmp_path)
    (folder / "mtp.safetensors").touch()
    assert cli.main(["gguf", str(folder), str(tmp_path / "model.gguf"), "--dtype", "q8_0"]) == 0
    path, note = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "model.gguf")
    assert note == "mtp.safetensors stays behind: the head that predicts a second token is for training"
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert field(reader, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0
    assert cli.main(["gguf", str(tmp_path / "none"), str(tmp_path / "model.gguf")]) == 1


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(
    name: str, folders: dict[str, Path], tok: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = to_gguf(folders[name], tmp_path / "model.gguf")
    llama, model = same_in_llama_cpp(path, folders[name], tok)
    greedy = model.generate(IDS, do_sample=False, min_new_tokens=12, max_new_tokens=12)[0, IDS.shape[1] :].tolist()
    for place, token in enumerate(greedy):
        scores = np.array(llama.scores[IDS.shape[1] + place - 1])
        scores[0] = -np.inf  # the end token, which `min_new_tokens` bars
        assert scores.argmax() == token
        llama.eval([token])
    llama.close()
