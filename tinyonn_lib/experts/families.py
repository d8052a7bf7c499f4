"""Which standard MoE class continues a dense model, and what its configuration and extra tensors have to be.

Recipes (PEERS §2), each equal to the dense model with every expert on and a zero router:

- softmax gates (Qwen2Moe, Qwen3Moe): gates are softmax over E logits, not renormalised, so `down` carries the factor E.
  Qwen2Moe's one shared expert passes σ(gate·x), ½ for a zero gate, so its `down` carries the factor 2.
- sigmoid gates (Glm4Moe): gates are 2·σ(logit), shared experts are added as they are; nothing is rescaled. The choice
  is by σ(logit) plus a selection bias, which no gate sees: a router's own, if it has one, and for experts that only pad
  one that keeps them behind every real one.

To add a class: an entry in `FAMILIES`; to add a dense model: an entry in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.weights import BIASED

WIDTH_STEP = 8
"""Rows of 16 bytes in bfloat16, which `grouped_mm`, the default way to run experts, requires."""

NEVER = -2.0
"""Selection bias of a padding expert, below the least of the layer's: σ + bias stays below every real expert's."""

TINY = 1e-12
"""Rows of Qwen2Moe's shared gate: σ is ½ to the last bit, and llama.cpp, which divides by gate·x, gets no NaN."""

_CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The shape that every layer of a checkpoint has; smaller layers are padded with zeros up to it.

    Attributes:
        counts: experts of each layer before padding.
        size: neurons per expert, a multiple of `WIDTH_STEP`.
        shared: shared neurons of the layer that has most.
    """

    counts: tuple[int, ...]
    size: int
    shared: int

    @staticmethod
    def of(partition: Partition) -> Layout:
        counts = tuple(index.shape[0] for index in partition.experts)
        return Layout(counts, _ceil(partition.size, WIDTH_STEP), max(len(part) for part in partition.shared))

    @property
    def experts(self) -> int:
        return max(self.counts)

    @property
    def even(self) -> bool:
        """Every layer has the same number of experts."""
        return len(set(self.counts)) == 1


@dataclass(frozen=True)
class Traits:
    """What of a dense configuration decides which class can continue it."""

    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    window: int | None
    windowed: tuple[bool, ...]

    @staticmethod
    def of(config: Any) -> Traits:
        bias = bool(getattr(config, "attention_bias", False))
        window = getattr(config, "sliding_window", None) or None
        if window is not None and window >= config.max_position_embeddings:
            window = None  # never reached
        kinds = ["sliding_attention"] * config.num_hidden_layers  # Mistral's way: all layers or none
        if config.model_type in ("qwen2", "qwen3"):
            kinds = config.layer_types
        windowed = tuple(window is not None and kind == "sliding_attention" for kind in kinds)
        return Traits(
            qkv_bias=bias or config.model_type == "qwen2",
            out_bias=bias,
            qk_norm=config.model_type == "qwen3",
            window=window if any(windowed) else None,
            windowed=windowed,
        )


@dataclass(frozen=True)
class Family:
    """A standard MoE class.

    Attributes:
        gates: factor on a routed expert: "softmax": E·softmax(logits), "sigmoid": 2·σ(logit); not renormalised.
        shared: the shared expert's name in the layer, "" if the class has none.
        shared_gain: factor on the shared expert's `down`.
        shared_width: layout → its width, 0 if the class has none.
        lacks: what of a model or layout the class cannot hold, as the end of "…, which has no", or "".
        fields: the configuration's fields beyond those that dense and MoE have in common.
        extras: (layout, layer, d_model, selection bias `(experts of the layer,)` or None) → further tensors; matrices
            take the model's dtype, vectors stay float32.
    """

    model_type: str
    architecture: str
    gates: Literal["softmax", "sigmoid"]
    shared: str
    shared_gain: float
    shared_width: Callable[[Layout], int]
    lacks: Callable[[Traits, Layout], str]
    fields: Callable[[Traits, Layout], dict[str, Any]]
    extras: Callable[[Layout, int, int, Tensor | None], dict[str, Tensor]]

    def routed_gain(self, layout: Layout) -> float:
        """Factor on the routed experts' `down`."""
        return layout.experts if self.gates == "softmax" else 1.0

    def config(self, dense: Any, layout: Layout, k: int) -> Any:
        """The MoE configuration: the dense one's own fields plus the experts' shape."""
        from transformers import AutoConfig

        own = {name: getattr(dense, name) for name in _CARRIED}
        own["head_dim"] = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
        own |= {"num_experts_per_tok": k, "moe_intermediate_size": layout.size, "norm_topk_prob": False}
        own |= self.fields(Traits.of(dense), layout) | {"architectures": [self.architecture]}
        if self.model_type == "glm4_moe":  # which turns only half of each head if nothing else is said
            own["rope_parameters"] = {**own["rope_parameters"], "partial_rotary_factor": 1.0}
        return AutoConfig.for_model(self.model_type, **own)


def _ceil(number: int, step: int) -> int:
    return -(-number // step) * step


def _windows(dense: Traits) -> dict[str, Any]:
    return {"use_sliding_window": dense.window is not None, "sliding_window": dense.window}


def _qwen2_lacks(dense: Traits, layout: Layout) -> str:
    if dense.out_bias or dense.qk_norm:
        return "bias after attention" if dense.out_bias else "norm of queries and keys"
    return "" if layout.even else "layers with different numbers of experts"


def _qwen2_fields(dense: Traits, layout: Layout) -> dict[str, Any]:
    kinds = ["sliding_attention" if on else "full_attention" for on in dense.windowed]
    return _windows(dense) | {
        "qkv_bias": dense.qkv_bias,
        "layer_types": kinds,
        "num_experts": layout.experts,
        "shared_expert_intermediate_size": FAMILIES["qwen2_moe"].shared_width(layout),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_lacks(dense: Traits, layout: Layout) -> str:
    if layout.shared or not layout.even:
        return "shared experts" if layout.shared else "layers with different numbers of experts"
    return "sliding window in some layers only" if len(set(dense.windowed)) > 1 else ""


def _qwen3_fields(dense: Traits, layout: Layout) -> dict[str, Any]:
    return _windows(dense) | {
        "attention_bias": dense.qkv_bias,
        "num_experts": layout.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _glm4_lacks(dense: Traits, layout: Layout) -> str:
    if layout.experts < 2:
        return "layers of a single expert"
    return "bias after attention" if dense.out_bias else "sliding window" if dense.window else ""


def _glm4_fields(dense: Traits, layout: Layout) -> dict[str, Any]:
    return {
        "attention_bias": dense.qkv_bias,
        "use_qk_norm": dense.qk_norm,
        "partial_rotary_factor": 1.0,
        "n_routed_experts": layout.experts,
        "n_shared_experts": FAMILIES["glm4_moe"].shared_width(layout) // layout.size,
        "routed_scaling_factor": 2.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_mtp_layers": 0,
    }


def _glm4_bias(layout: Layout, layer: int, width: int, bias: Tensor | None) -> dict[str, Tensor]:
    own = torch.zeros(layout.counts[layer]) if bias is None else bias.detach().float().cpu()
    padding = own.new_full((layout.experts - len(own),), float(own.min()) + NEVER)
    return {"gate.e_score_correction_bias": torch.cat([own, padding])}


FAMILIES = {
    "qwen2_moe": Family(
        "qwen2_moe", "Qwen2MoeForCausalLM", "softmax",
        shared="shared_expert", shared_gain=2.0,
        shared_width=lambda layout: max(WIDTH_STEP, _ceil(layout.shared, WIDTH_STEP)),
        lacks=_qwen2_lacks, fields=_qwen2_fields,
        extras=lambda layout, layer, width, bias: {"shared_expert_gate.weight": torch.full((1, width), TINY)},
    ),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", "softmax",
        shared="", shared_gain=1.0, shared_width=lambda layout: 0,
        lacks=_qwen3_lacks, fields=_qwen3_fields, extras=lambda layout, layer, width, bias: {},
    ),
    "glm4_moe": Family(
        "glm4_moe", "Glm4MoeForCausalLM", "sigmoid",
        shared="shared_experts", shared_gain=1.0,
        shared_width=lambda layout: max(layout.size, _ceil(layout.shared, layout.size)),
        lacks=_glm4_lacks, fields=_glm4_fields, extras=_glm4_bias,
    ),
}  # fmt: skip
"""Model type → class."""

SOURCES = {
    "qwen2": ("qwen2_moe", "glm4_moe"),
    "qwen3": ("qwen3_moe", "glm4_moe"),
    "llama": ("glm4_moe",),
    "mistral": ("glm4_moe", "qwen2_moe"),
}
"""Dense model type → classes in order of preference."""


def family(dense: Any, partition: Partition, *, bias: bool = False) -> Family:
    """The first class that can hold this model (its configuration) divided like this.

    Args:
        bias: the routers have selection biases, which classes with softmax gates lack.

    Raises:
        BenchError: none can, with each one's reason.
    """
    if dense.model_type not in SOURCES:
        raise BenchError(
            f"No standard MoE checkpoint continues a '{dense.model_type}' model; exportable: {', '.join(SOURCES)}."
        )
    if getattr(dense, "mlp_bias", False):
        raise BenchError(BIASED)
    if not partition.size:
        raise BenchError("The experts of this partition have no neurons: choose fewer experts or fewer shared neurons.")
    traits, layout = Traits.of(dense), Layout.of(partition)
    reasons = []
    for name in SOURCES[dense.model_type]:
        each = FAMILIES[name]
        lacks = "selection bias" if bias and each.gates == "softmax" else each.lacks(traits, layout)
        if not lacks:
            return each
        reasons.append(f"{each.architecture.removesuffix('ForCausalLM')} has no {lacks}")
    raise BenchError(
        f"No standard MoE class holds this '{dense.model_type}' model divided like this: {'; '.join(reasons)}."
    )


def trainable(dense: Any, partition: Partition) -> Family:
    """The class for a router that is trained: one with a selection bias, if any holds this model; it learns better.

    Raises:
        BenchError: as `family`.
    """
    try:
        return family(dense, partition, bias=True)
    except BenchError:
        return family(dense, partition)
