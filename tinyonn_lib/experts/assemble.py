"""Cut a dense FFN into experts: rows of gate and up, columns of down (document 000 §1.6, on ERRATA's facts)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.checkpoint import SHARD_BYTES, Shards, cut, whole_folder
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.weights import (
    BIASED,
    FFN_PARTS,
    Weights,
    dense_weight,
    ffn_name,
    open_file,
    read_tensor,
    tensor_files,
)
from tinyonn_lib.lm.models import FFN

__all__ = ["Experts", "TinyONNExpert", "assemble", "dense_weight", "load_experts", "save_experts"]

Activation = Callable[[Tensor], Tensor]
TABLE = "partition.parquet"


class TinyONNExpert(nn.Module):
    """A small gated FFN: `down(act(gate(x)) ⊙ up(x))`, `(…, d_model) → (…, d_model)`, plain `nn.Linear`s."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: Activation) -> None:
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


def _activation(name: str) -> Activation:
    from transformers.activations import ACT2FN

    act: Activation = ACT2FN[name]
    return act


Source = Weights | Sequence[FFN]
"""Weights in a folder or model (`weights.open_weights`), or a loaded model's FFNs (`models.ffns`)."""


def _layers(source: Source, partition: Partition) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gate, up and down of one layer after the other, each dequantised when its turn comes.

    Raises:
        BenchError: The partition belongs to a model of another depth or width, or leaves out or doubles a neuron, or
            the FFNs have biases.
    """
    if isinstance(source, Weights):
        partition.check(source.neurons())
        for layer in range(len(partition.experts)):
            gate, up, down = (source.read(ffn_name(layer, part)) for part in FFN_PARTS)
            yield gate, up, down
    else:
        if any(linear.bias is not None for ffn in source for linear in (ffn.gate, ffn.up, ffn.down)):
            raise BenchError(BIASED)
        partition.check([ffn.neurons for ffn in source])
        for ffn in source:
            yield dense_weight(ffn.gate), dense_weight(ffn.up), dense_weight(ffn.down)


def _divide(matrices: tuple[Tensor, Tensor, Tensor], index: Tensor, act: Activation) -> list[TinyONNExpert]:
    count, size = index.shape
    parts = (cut(m, index, axis, experts=count, size=size) for m, axis in zip(matrices, (0, 0, 1), strict=True))
    return [TinyONNExpert(gate, up, down, act) for gate, up, down in zip(*parts, strict=True)]


def assemble(source: Source, partition: Partition) -> Iterator[list[TinyONNExpert]]:
    """The routed experts of one layer after the other, so that only one layer is held twice.

    Raises:
        BenchError: The partition belongs to a model of another depth or width, or leaves out or doubles a neuron, or
            the FFNs have biases.
    """
    act = _act(source)
    for matrices, index in zip(_layers(source, partition), partition.experts, strict=True):
        yield _divide(matrices, index, act)


def _act(source: Source) -> Activation:
    if isinstance(source, Weights):
        return _activation(source.config.hidden_act)
    act: Any = source[0].module.act_fn
    return act


@dataclass(frozen=True)
class Experts:
    """What `save_experts` wrote.

    Attributes:
        experts: the routed experts of all layers, numbered through.
        layers: the layer of each.
        shared: per layer the shared neurons as one expert, or None.
        partition: which neuron went where.
    """

    experts: list[TinyONNExpert]
    layers: list[int]
    shared: list[TinyONNExpert | None]
    partition: Partition


def save_experts(source: Source, partition: Partition, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """The document's artefact: TinyONNExpert modules as a file, and beside it which neuron went where.

    `experts.safetensors` (shards with an index above `shard_bytes`) with `experts.{e}.gate_proj.weight`, `up_proj`,
    `down_proj`, e numbered through all layers, `shared.{layer}.…` for shared neurons; `partition.parquet`:
    `Partition.table()` with the column `number` (that e; −1 for shared and dropped neurons).
    """
    config: Any = source.config if isinstance(source, Weights) else source[0].module.config
    about = json.dumps({"act": config.hidden_act, "method": partition.method})
    with whole_folder(Path(folder), TABLE) as partial:
        shards = Shards(partial, "experts", shard_bytes, {"tinyonn": about})
        number = 0
        for layer, matrices in enumerate(_layers(source, partition)):
            groups = [(f"experts.{number + e}", row[None]) for e, row in enumerate(partition.experts[layer])]
            number += len(groups)
            if len(partition.shared[layer]):
                groups.append((f"shared.{layer}", partition.shared[layer][None]))
            for name, index in groups:
                for part, matrix in zip(FFN_PARTS, matrices, strict=True):
                    one = cut(matrix, index, int(part == "down_proj"), experts=1, size=index.shape[1])[0]
                    shards.add(f"{name}.{part}.weight", one.cpu())
        shards.close()
        table = partition.table()
        first = torch.tensor([0] + [len(index) for index in partition.experts]).cumsum(0).numpy()
        table["number"] = (table["expert"] + first[table["layer"]]).where(table["expert"] >= 0, -1)
        table.to_parquet(partial / TABLE, index=False)
    return Path(folder)


def load_experts(folder: Path) -> Experts:
    """Read back what `save_experts` wrote.

    Raises:
        BenchError: no such folder, or a file is missing or damaged.
    """
    files = tensor_files(folder, "experts")
    partition = Partition.read(folder / TABLE)
    with open_file(next(iter(files.values()))) as handle:
        about = json.loads((handle.metadata() or {}).get("tinyonn", "{}"))
    partition = replace(partition, method=about.get("method", ""))
    act = _activation(about.get("act", "silu"))

    def one(name: str) -> TinyONNExpert:
        gate, up, down = (read_tensor(files[key], key) for key in (f"{name}.{part}.weight" for part in FFN_PARTS))
        return TinyONNExpert(gate, up, down, act)

    layers = [layer for layer, index in enumerate(partition.experts) for _ in index]
    try:
        experts = [one(f"experts.{e}") for e in range(len(layers))]
        shared = [one(f"shared.{layer}") if len(p) else None for layer, p in enumerate(partition.shared)]
    except KeyError as error:
        raise BenchError(f"{folder} lacks {error.args[0]}: write the experts again.") from error
    return Experts(experts, layers, shared, partition)
