"""What the scanner refuses rather than silently misses: blind spots of hooks, and targets that never fired."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tinyonn_lib.errors import BenchError

if TYPE_CHECKING:
    from tinyonn_lib.scan.layer import FFNLike, Layer


def width(ffn: FFNLike) -> int:
    """Neurons of the layer: what down reads."""
    width = getattr(ffn.down, "in_features", None)
    if not isinstance(width, int):
        raise BenchError(f"{ffn.name}: down is {type(ffn.down).__name__}, not a linear layer with in_features")
    return width


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The token embedding of a transformers model, None for any other module."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    return embedding if isinstance(embedding, nn.Module) else None


def checkpointing(model: nn.Module) -> bool:
    """Whether any layer recomputes its forward in the backward (transformers sets this flag per layer)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def refuse_blind_spots(model: nn.Module, ffn: FFNLike) -> None:
    """Errors:
    BenchError: hooks on this layer would be ignored, or its gradients would be wrong.
    """
    for module in (model, ffn.gate, ffn.up, ffn.down):
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise BenchError(
                f"{ffn.name}: the model is compiled and hooks added now would be ignored; observe first, compile later"
            )
    for name, module in (("gate", ffn.gate), ("up", ffn.up), ("down", ffn.down)):
        # bitsandbytes on CPUs with AVX512-BF16 repacks NF4 weights in the first forward that needs no
        # gradient; from then on gradients through them are wrong, silently (PEERS §6).
        weight = getattr(module, "weight", None)
        packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
        risky = getattr(module, "support_avx512bf16_for_cpu", False)
        if packed or (risky and weight is not None and weight.device.type == "cpu"):
            raise BenchError(
                f"{ffn.name}.{name}: bitsandbytes would repack its 4-bit weights on this CPU and give wrong gradients; "
                "set support_avx512bf16_for_cpu=False on every Linear4bit right after loading"
            )


def missing(layer: Layer, sample: int) -> str:
    """One line: which target of the layer did not fire as it should in this sample, and what to do."""
    ffn, fired, calls = layer.ffn, layer.fired, layer.watch.calls
    where = f"layer {ffn.layer} ({ffn.name}), sample {sample}"
    for name in ("gate", "up", "down"):
        if not fired[name]:
            return (
                f"{where}: {name} never ran. A fused kernel or a replaced forward bypasses it; switch that off, "
                "or leave this layer out of the targets"
            )
    seen = max(fired["dh"], fired["gradients"], *(fired[f"grad of {name}"] for name in ("gate", "up", "down")))
    if seen > calls:
        return f"{where}: {seen} backward passes, expected {calls}; call end_sample() after each, or set calls={seen}"
    return (
        f"{where}: {seen} of {calls} gradients arrived. Call backward() on the loss before end_sample(), or pass "
        "gradients=False to watch forwards only"
    )
