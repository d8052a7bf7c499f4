"""Cut a dense FFN into experts: rows of gate and up, columns of down (document 000 §1.6, on ERRATA's facts)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm.models import FFN


class TinyONNExpert(nn.Module):
    """A small gated FFN: `down(act(gate(x)) ⊙ up(x))`, `(…, d_model) → (…, d_model)`, plain `nn.Linear`s."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> None:
        """`gate`, `up`: `(size, d_model)`; `down`: `(d_model, size)`; the tensors become the weights, uncopied."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(w) for w in (gate, up, down))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear


def dense_weight(linear: Any) -> Tensor:
    """The weight `(out, in)` of a linear layer; 4-bit weights are dequantised exactly as the layer itself does."""
    weight = linear.weight
    if hasattr(weight, "quant_state") and weight.quant_state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).detach()
    plain: Tensor = weight.detach()
    return plain


def assemble(ffns: Sequence[FFN], partition: Partition) -> Iterator[list[TinyONNExpert]]:
    """The experts of one layer after the other, so that only one layer is held twice.

    Raises:
        BenchError: The partition belongs to a model of another depth or width, or leaves out or doubles a neuron.
    """
    if len(ffns) != len(partition.experts):
        raise BenchError(
            f"The partition has {len(partition.experts)} layers and the model {len(ffns)}: "
            "it was made from another model's statistics; scan this one."
        )
    for layer, (ffn, index) in enumerate(zip(ffns, partition.experts, strict=True)):
        gate, up, down = (dense_weight(m) for m in (ffn.gate, ffn.up, ffn.down))
        if not torch.equal(index.reshape(-1).sort().values, torch.arange(gate.shape[0])):
            raise BenchError(
                f"The partition does not name each of layer {layer}'s {gate.shape[0]} neurons exactly once: "
                "it was made from another model's statistics; scan this one."
            )
        act: Any = ffn.module.act_fn
        yield [TinyONNExpert(gate[e], up[e], down[:, e], act) for e in index.to(gate.device)]
