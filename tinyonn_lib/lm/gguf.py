"""A checkpoint folder as one GGUF file for llama.cpp, dense or with experts.

Which architecture it becomes: `gguf_plan`. With experts, `--override-kv ARCH.expert_used_count=int:4` changes how many
are active. llama.cpp's own converter takes tokenizers it knows by name only, and `Glm4Moe` only with GLM's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.gguf_plan import Checkpoint, Planned, architecture, plan
from tinyonn_lib.lm.gguf_tokenizer import add_tokenizer

GGUFType = Literal["f32", "f16", "q8_0"]
BLOCK = 32  # weights per scale in Q8_0
BESIDE = {
    "variable_k.json": "a GGUF file has a fixed k, so each token gets as many experts as another",
    "mtp.safetensors": "the head that predicts a second token is for training",
}
"""Files beside the standard weights that a GGUF file cannot hold, and why that matters or does not."""


def to_gguf(folder: Path | str, out: Path | str, dtype: GGUFType = "f32") -> Path:
    """Write a checkpoint as a GGUF file; one tensor is in memory at a time.

    Norms, biases and routers stay float32. For q8_0 experts are padded with zero neurons to a multiple of 32. What lies
    beside the weights (`BESIDE`) stays behind.

    Args:
        folder: Qwen2, Qwen3, Llama, Mistral, Qwen2Moe, Qwen3Moe or Glm4Moe in safetensors files, with its tokenizer.
        out: the file, replaced if it is there.
        dtype: of the matrices.

    Raises:
        BenchError: the extra is not installed, another kind of model, or something that llama.cpp's architecture cannot
            hold: a sliding window, another rope scaling, another activation than SiLU, a tensor without a place, a
            tokenizer that is no byte-level BPE, weights too large for f16, widths no multiple of 32 for q8_0.
    """
    try:
        import gguf
    except ImportError:
        raise BenchError("GGUF files need the extra 'gguf': pip install 'tinyonn[gguf]'.") from None
    if dtype not in get_args(GGUFType):
        raise BenchError(f"Unknown GGUF type '{dtype}': choose one of {', '.join(get_args(GGUFType))}.")
    folder, out = Path(folder), Path(out)
    source = Checkpoint.of(folder)
    arch = architecture(source)
    tensors = plan(source, arch, BLOCK if dtype == "q8_0" else 1)
    kinds = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
    kind = kinds.get(dtype, gguf.GGMLQuantizationType.Q8_0)
    unfinished = out.with_name(f".{out.name}.partial")
    writer = gguf.GGUFWriter(unfinished, arch)
    try:
        _add_metadata(writer, source, folder.resolve().name, dtype, {item.name: item.shape for item in tensors})
        add_tokenizer(writer, folder, source.config.vocab_size)
        for item in tensors:
            stored = gguf.GGMLQuantizationType.F32 if item.exact else kind
            if stored is gguf.GGMLQuantizationType.Q8_0 and item.shape[-1] % BLOCK:
                raise BenchError(f"q8_0 needs widths that are multiples of {BLOCK}; {item.name} has {item.shape[-1]}.")
            size, per = gguf.GGML_QUANT_SIZES[stored]
            count = int(np.prod(item.shape)) // size * per
            writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), count, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in tensors:
            writer.write_tensor_data(_encode(item, kinds["f32"] if item.exact else kind))
        writer.close()
        unfinished.replace(out)
    except OSError as error:
        raise BenchError(f"Cannot write {out}: {error.strerror or error}. Make room and repeat.") from error
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
    return out


def _encode(item: Planned, kind: Any) -> NDArray[Any]:
    from gguf import GGMLQuantizationType, quants

    values = item.make().float().numpy()
    if kind is GGMLQuantizationType.F32:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        encoded: NDArray[Any] = (
            values.astype(np.float16) if kind is GGMLQuantizationType.F16 else quants.quantize(values, kind)
        )
    if kind is GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise BenchError(f"{item.name} holds weights beyond 65504, which f16 cannot hold: choose f32 or q8_0.")
    return encoded


def _add_metadata(
    writer: Any, source: Checkpoint, name: str, dtype: GGUFType, shapes: dict[str, tuple[int, ...]]
) -> None:
    """The hyperparameters that llama.cpp reads."""
    import gguf

    config, head, rope = source.config, source.head_dim, source.config.rope_parameters
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if not source.moe:
        return
    experts, size, _ = shapes["blk.0.ffn_gate_exps.weight"]
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(size)
    if shared := shapes.get("blk.0.ffn_gate_shexp.weight"):  # glm4moe reads the count, qwen2moe the length
        writer.add_expert_shared_count(shared[0] // size)
        writer.add_expert_shared_feed_forward_length(shared[0])
    gates = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gates.SIGMOID if config.model_type == "glm4_moe" else gates.SOFTMAX)
    writer.add_expert_weights_scale(getattr(config, "routed_scaling_factor", 1.0))
    writer.add_expert_weights_norm(config.norm_topk_prob)
