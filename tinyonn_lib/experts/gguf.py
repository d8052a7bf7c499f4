"""A divided checkpoint as one GGUF file for llama.cpp.

Every family is written as llama.cpp's `glm4moe`, the one architecture there whose gates the file itself describes
(softmax or sigmoid, renormalised or not, selection bias, ungated shared expert, norm of queries and keys or none): so
the result is the checkpoint's for any number of active experts, and `--override-kv glm4moe.expert_used_count=int:4`
changes it. llama.cpp's `qwen3moe` renormalises the chosen gates whatever the file says, which is right only with all
experts on; its own converter takes `Glm4Moe` only with GLM's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.families import FAMILIES, TINY
from tinyonn_lib.experts.gguf_tokenizer import add_tokenizer
from tinyonn_lib.experts.weights import FFN_PARTS, open_file, read_config, read_tensor, tensor_files

GGUFType = Literal["f32", "f16", "q8_0"]
BLOCK = 32  # weights per scale in Q8_0


@dataclass(frozen=True)
class _Planned:
    """A tensor to write: its name in the file, its shape, whether it stays float32, and how to get it."""

    name: str
    shape: tuple[int, ...]
    exact: bool
    make: Callable[[], Tensor]


def to_gguf(folder: Path | str, out: Path | str, dtype: GGUFType = "f32") -> Path:
    """Write a checkpoint of `export` as a GGUF file; one tensor is in memory at a time.

    Norms, biases and routers stay float32. For q8_0 experts are padded with zero neurons to a multiple of 32. A
    variable k (`variable.FILE`) stays behind: a GGUF file has one k for all tokens.

    Args:
        folder: what `export` wrote: Qwen2Moe, Qwen3Moe or Glm4Moe.
        out: the file, replaced if it is there.
        dtype: of the matrices.

    Raises:
        BenchError: the extra is not installed, another kind of model, or something that llama.cpp's glm4moe cannot
            hold: a sliding window, Llama-3's rope scaling, another activation than SiLU, a trained gate of Qwen2Moe's
            shared expert, a tokenizer that is no byte-level BPE, weights too large for f16, widths no multiple of 32
            for q8_0.
    """
    try:
        import gguf
    except ImportError:
        raise BenchError("GGUF files need the extra 'gguf': pip install 'tinyonn[gguf]'.") from None
    if dtype not in get_args(GGUFType):
        raise BenchError(f"Unknown GGUF type '{dtype}': choose one of {', '.join(get_args(GGUFType))}.")
    folder, out = Path(folder), Path(out)
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise BenchError(f"{folder.name} is a '{config.model_type}' model; as GGUF go: {', '.join(FAMILIES)}.")
    if reason := _unsayable(config):
        raise BenchError(f"llama.cpp's glm4moe cannot hold this model: {reason}.")
    plan = list(_plan(config, tensor_files(folder, "model"), BLOCK if dtype == "q8_0" else 1))
    kinds = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
    kind = kinds.get(dtype, gguf.GGMLQuantizationType.Q8_0)
    unfinished = out.with_name(f".{out.name}.partial")
    writer = gguf.GGUFWriter(unfinished, "glm4moe")
    try:
        _add_metadata(writer, config, folder.resolve().name, dtype, plan)
        add_tokenizer(writer, folder, config.vocab_size)
        for item in plan:
            stored = gguf.GGMLQuantizationType.F32 if item.exact else kind
            if stored is gguf.GGMLQuantizationType.Q8_0 and item.shape[-1] % BLOCK:
                raise BenchError(f"q8_0 needs widths that are multiples of {BLOCK}; {item.name} has {item.shape[-1]}.")
            size, per = gguf.GGML_QUANT_SIZES[stored]
            count = int(np.prod(item.shape)) // size * per
            writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), count, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in plan:
            writer.write_tensor_data(_encode(item, kinds["f32"] if item.exact else kind))
        writer.close()
        unfinished.replace(out)
    except OSError as error:
        raise BenchError(f"Cannot write {out}: {error.strerror or error}. Make room and repeat.") from error
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
    return out


def _encode(item: _Planned, kind: Any) -> NDArray[Any]:
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


def _unsayable(config: Any) -> str:
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear"):
        return f"its rope scaling is '{rope}'"
    if getattr(config, "use_sliding_window", False):
        return "it has a sliding window"
    return "" if config.hidden_act == "silu" else f"its activation is '{config.hidden_act}'"


def _add_metadata(writer: Any, config: Any, name: str, dtype: GGUFType, plan: list[_Planned]) -> None:
    """The hyperparameters that llama.cpp reads."""
    import gguf

    family, shapes = FAMILIES[config.model_type], {item.name: item.shape for item in plan}
    experts, size, _ = shapes["blk.0.ffn_gate_exps.weight"]
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
    head = _head_dim(config)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(size)
    writer.add_expert_shared_count(shapes["blk.0.ffn_gate_shexp.weight"][0] // size)
    gates = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gates.SOFTMAX if family.gates == "softmax" else gates.SIGMOID)
    writer.add_expert_weights_scale(getattr(config, "routed_scaling_factor", 1.0))
    writer.add_expert_weights_norm(config.norm_topk_prob)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _plan(config: Any, files: dict[str, Path], step: int) -> Iterator[_Planned]:
    """Every tensor of the file, in its order; experts' widths are padded to multiples of `step`."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, config.num_hidden_layers)
    rest = re.compile(r"model\.layers\.(\d+)\.(self_attn\..*|input_layernorm\.weight|post_attention_layernorm\.weight)")
    plain = [f"{name}.weight" for name in ("model.embed_tokens", "lm_head", "model.norm")]
    layers = (name for name in files if (found := rest.fullmatch(name)) and int(found[1]) < config.num_hidden_layers)
    for name in [*(name for name in plain if name in files), *layers]:
        stem, _, kind = name.rpartition(".")
        shape = _shape(files, name)
        make = partial(read_tensor, files[name], name)
        yield _Planned(f"{names.get_name(stem)}.{kind}", shape, len(shape) == 1, make)
    for layer in range(config.num_hidden_layers):
        yield from _moe(config, layer, files, step)


def _shape(files: dict[str, Path], name: str) -> tuple[int, ...]:
    with open_file(files[name]) as handle:
        return tuple(handle.get_slice(name).get_shape())


def _moe(config: Any, layer: int, files: dict[str, Path], step: int) -> Iterator[_Planned]:
    """Router, selection bias, stacked experts and shared expert (zeros where the class has none) of one layer."""
    family, prefix, block = FAMILIES[config.model_type], f"model.layers.{layer}.mlp.", f"blk.{layer}."
    size = -(-config.moe_intermediate_size // step) * step
    router, bias, gate = (
        prefix + n for n in ("gate.weight", "gate.e_score_correction_bias", "shared_expert_gate.weight")
    )
    experts, width = _shape(files, router)
    yield _Planned(f"{block}ffn_gate_inp.weight", (experts, width), True, partial(read_tensor, files[router], router))
    biased = partial(read_tensor, files[bias], bias) if bias in files else partial(torch.zeros, experts)
    yield _Planned(f"{block}exp_probs_b.bias", (experts,), True, biased)
    if gate in files and read_tensor(files[gate], gate).abs().max() > 2 * TINY:
        raise BenchError(
            "The gate of this Qwen2Moe's shared expert was trained, which llama.cpp's glm4moe cannot hold."
        )
    for part, short in zip(FFN_PARTS, ("gate", "up", "down"), strict=True):
        down = part == "down_proj"
        each = [f"{prefix}experts.{e}.{part}.weight" for e in range(experts)]
        shape: tuple[int, ...] = (experts, width, size) if down else (experts, size, width)
        yield _Planned(f"{block}ffn_{short}_exps.weight", shape, False, partial(_filled, shape, each, files))
        shared = [f"{prefix}{family.shared}.{part}.weight"] if family.shared else []
        neurons = max(size, *(-(-_shape(files, name)[int(down)] // size) * size for name in shared), 0)
        shape = (width, neurons) if down else (neurons, width)
        gain = 1 / family.shared_gain if down else 1.0
        yield _Planned(f"{block}ffn_{short}_shexp.weight", shape, False, partial(_filled, shape, shared, files, gain))


def _filled(shape: tuple[int, ...], names: list[str], files: dict[str, Path], gain: float = 1.0) -> Tensor:
    """Zeros of this shape with a tensor in the corner of each matrix."""
    out = torch.zeros(shape)
    handles = {file: open_file(file) for file in {files[name] for name in names}}
    for matrix, name in zip(out if len(shape) == 3 else [out], names, strict=False):  # no name: zeros stay
        tensor = handles[files[name]].get_tensor(name)
        matrix[: tensor.shape[0], : tensor.shape[1]] = tensor * gain
    return out
