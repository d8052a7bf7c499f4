"""Which of llama.cpp's architectures holds a checkpoint, and every tensor of its GGUF file.

| transformers | llama.cpp |
|---|---|
| Qwen2, Qwen3 | `qwen2`, `qwen3` |
| Llama, Mistral | `llama`, which turns neighbouring pairs: rows of queries and keys change places |
| Qwen3Moe that renormalises its gates | `qwen3moe`, which always does |
| Qwen2Moe whose shared expert has a trained gate | `qwen2moe`, the only one with such a gate |
| any other Qwen2Moe or Qwen3Moe, Glm4Moe | `glm4moe`, the only one whose gates the file describes |

`glm4moe` adds its shared expert ungated: Qwen2Moe's untrained gate is ½, which goes into `down`; Qwen3Moe has no
shared expert and gets zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.tensors import open_file, read_config, read_tensor, tensor_files

DENSE = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}
SHARED = {"qwen2_moe": "shared_expert", "qwen3_moe": "", "glm4_moe": "shared_experts"}
"""Model type of experts → the shared expert's name in a layer."""
UNTRAINED = 1e-12  # llama.cpp divides by gate·x: a gate of zeros would give NaN
_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the standard format: its configuration and where each tensor is."""

    config: Any
    files: dict[str, Path]

    @staticmethod
    def of(folder: Path) -> Checkpoint:
        return Checkpoint(read_config(folder), tensor_files(folder, "model"))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def moe(self) -> bool:
        """Experts in each layer."""
        return self.config.model_type in SHARED

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        if name not in self.files:
            raise BenchError(f"The checkpoint holds no tensor {name}: save or download it again.")
        with open_file(self.files[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        return read_tensor(self.files[name], name)


@dataclass(frozen=True)
class Planned:
    """A tensor to write: name and shape in the file, whether it stays float32, how to get it, what it is made of."""

    name: str
    shape: tuple[int, ...]
    exact: bool
    make: Callable[[], Tensor]
    sources: Sequence[str] = ()


def architecture(source: Checkpoint) -> str:
    """llama.cpp's name for what can hold this checkpoint.

    Raises:
        BenchError: nothing can; says why in one line.
    """
    config, kind = source.config, source.config.model_type
    if kind not in DENSE | SHARED:
        raise BenchError(f"A '{kind}' model is not written as GGUF; these are: {', '.join(DENSE | SHARED)}.")
    name = DENSE.get(kind, "glm4moe")
    if kind == "qwen3_moe" and config.norm_topk_prob:
        name = "qwen3moe"
    gates = [name for name in source.files if name.endswith(".shared_expert_gate.weight")]
    if kind == "qwen2_moe" and any(source.read(gate).abs().max() > 2 * UNTRAINED for gate in gates):
        name = "qwen2moe"
    if reason := _unsayable(source, name):
        raise BenchError(f"llama.cpp's {name} cannot hold this model: {reason}.")
    return name


def _unsayable(source: Checkpoint, name: str) -> str:
    config = source.config
    rope, window = config.rope_parameters["rope_type"], getattr(config, "sliding_window", None)
    reasons = {
        "it is quantised; start from the plain model": getattr(config, "quantization_config", None),
        f"its rope scaling is '{rope}'": rope not in ("default", "linear", *(["llama3"] if name == "llama" else [])),
        "it has a sliding window": window and window < config.max_position_embeddings,
        f"its activation is '{config.hidden_act}'": config.hidden_act != "silu",
        f"{config.num_attention_heads} heads of {source.head_dim} are not its width {config.hidden_size}":
            name in ("qwen2", "qwen2moe") and config.num_attention_heads * source.head_dim != config.hidden_size,
        "it renormalises its gates": name == "qwen2moe" and config.norm_topk_prob,
        "it chooses experts in groups": getattr(config, "n_group", 1) != 1,
        "some of its layers have no experts": source.moe and not all(
            f"model.layers.{layer}.mlp.gate.weight" in source.files for layer in range(config.num_hidden_layers)
        ),
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), "")


def plan(source: Checkpoint, arch: str, step: int) -> list[Planned]:
    """Every tensor of the file, in its order.

    Args:
        arch: of `architecture`.
        step: experts are padded with zero neurons to a multiple of this.

    Raises:
        BenchError: the checkpoint lacks a tensor, or has one that this architecture has no place for.
    """
    found = list(_plan(source, arch, step))
    used = {name for item in found for name in item.sources} | {"lm_head.weight"}
    layers = source.config.num_hidden_layers
    for name in source.files:
        numbered = re.match(r"model\.layers\.(\d+)\.", name)
        extra = numbered is not None and int(numbered[1]) >= layers  # such as GLM's layer for a second token
        if name not in used and not extra and not name.endswith(".rotary_emb.inv_freq"):
            raise BenchError(f"llama.cpp's {arch} cannot hold this model: it has no place for {name}.")
    return found


def _plan(source: Checkpoint, arch: str, step: int) -> Iterator[Planned]:
    import gguf

    config = source.config
    numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], config.num_hidden_layers)

    def plain(name: str, make: Callable[[], Tensor] | None = None, stem: str = "") -> Planned:
        shape = source.shape(name)
        place = stem or names.get_name(name.rpartition(".")[0])
        exact = len(shape) == 1 or name.endswith(".mlp.gate.weight")
        return Planned(f"{place}.{name.rpartition('.')[2]}", shape, exact, make or partial(source.read, name), [name])

    yield plain("model.embed_tokens.weight")
    if "lm_head.weight" in source.files:
        yield plain("lm_head.weight")
    elif not config.tie_word_embeddings:
        raise BenchError("The checkpoint holds no tensor lm_head.weight: save or download it again.")
    elif arch == "qwen2moe":  # which knows no tied head
        yield plain("model.embed_tokens.weight", stem="output")
    yield plain("model.norm.weight")
    if config.rope_parameters["rope_type"] == "llama3":
        yield Planned("rope_freqs.weight", (source.head_dim // 2,), True, partial(_rope_factors, config))
    rows = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            biased = part != "o_proj" or arch == "llama"
            for name in (f"{prefix}self_attn.{part}.weight", *([f"{prefix}self_attn.{part}.bias"] if biased else [])):
                if name in source.files or name.endswith("weight"):
                    yield plain(name, partial(_turned, source, name, rows[part]) if part in rows else None)
        norms = (f"{prefix}self_attn.{part}.weight" for part in ("q_norm", "k_norm"))
        yield from (plain(name) for name in norms if name in source.files and arch in ("qwen3", "qwen3moe", "glm4moe"))
        yield from (plain(f"{prefix}{part}.weight") for part in ("input_layernorm", "post_attention_layernorm"))
        if source.moe:
            yield plain(f"{prefix}mlp.gate.weight")
            yield from _experts(source, arch, layer, step)
        else:
            yield from (plain(f"{prefix}mlp.{part}.weight") for part in _PARTS)


def _turned(source: Checkpoint, name: str, heads: int) -> Tensor:
    """Rows of queries or keys from halves, which transformers turns against each other, to neighbouring pairs."""
    tensor = source.read(name)
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(config: Any) -> Tensor:
    """By what Llama-3's rope scaling divides each frequency, `(head_dim / 2,)`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(scaled)).double() / len(scaled))
    return plain / scaled


def _experts(source: Checkpoint, arch: str, layer: int, step: int) -> Iterator[Planned]:
    """Selection bias, stacked experts and shared expert (for glm4moe zeros where there is none) of one layer."""
    config, prefix, block = source.config, f"model.layers.{layer}.mlp.", f"blk.{layer}."
    size = -(-config.moe_intermediate_size // step) * step
    experts, width = source.shape(f"{prefix}gate.weight")
    kind, unit = SHARED[config.model_type], size if arch == "glm4moe" else step
    bias, gate = f"{prefix}gate.e_score_correction_bias", f"{prefix}shared_expert_gate.weight"
    if arch == "glm4moe":
        biased = partial(source.read, bias) if bias in source.files else partial(torch.zeros, experts)
        yield Planned(f"{block}exp_probs_b.bias", (experts,), True, biased, [bias, gate])
    if arch == "qwen2moe":
        yield Planned(f"{block}ffn_gate_inp_shexp.weight", (width,), True, partial(_gate, source, gate), [gate])
    for part, short in _PARTS.items():
        down = part == "down_proj"
        each = [f"{prefix}experts.{e}.{part}.weight" for e in range(experts)]
        shape: tuple[int, ...] = (experts, width, size) if down else (experts, size, width)
        yield Planned(f"{block}ffn_{short}_exps.weight", shape, False, partial(_filled, source, shape, each), each)
        if arch == "qwen3moe":
            continue
        shared = [f"{prefix}{kind}.{part}.weight"] if kind else []
        neurons = max(unit, *(-(-source.shape(name)[int(down)] // unit) * unit for name in shared), 0)
        shape = (width, neurons) if down else (neurons, width)
        gain = 0.5 if down and arch == "glm4moe" and kind == "shared_expert" else 1.0
        make = partial(_filled, source, shape, shared, gain)
        yield Planned(f"{block}ffn_{short}_shexp.weight", shape, False, make, shared)


def _gate(source: Checkpoint, name: str) -> Tensor:
    gate = source.read(name).flatten()
    return gate if gate.any() else torch.full_like(gate, UNTRAINED)


def _filled(source: Checkpoint, shape: tuple[int, ...], names: Sequence[str], gain: float = 1.0) -> Tensor:
    """Zeros of this shape with a tensor in the corner of each matrix."""
    out = torch.zeros(shape)
    handles = {file: open_file(file) for file in {source.files[name] for name in names}}
    for matrix, name in zip(out if len(shape) == 3 else [out], names, strict=False):  # no name: zeros stay
        tensor = handles[source.files[name]].get_tensor(name)
        matrix[: tensor.shape[0], : tensor.shape[1]] = tensor * gain
    return out
