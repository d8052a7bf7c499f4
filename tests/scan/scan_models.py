"""Tiny models and the float64 reference that everything in tests/scan is measured against."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyonn_lib.scan.statistics import STATISTICS, Totals

VOCABULARY = 97


def tiny(width: int = 64, neurons: int = 128, layers: int = 2, seed: int = 0, **config: object) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
            initializer_range=0.1, **config,
        )
    )  # fmt: skip
    return model.eval()


def samples(count: int = 4, seed: int = 1, low: int = 5, high: int = 150) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCABULARY, draw.integers(low, high)).tolist() for _ in range(count)]


def nll(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, ids[0, 1:])


def reference(model: nn.Module, texts: list[list[int]], rho: float) -> dict[str, np.ndarray]:
    """Sums per (layer, neuron) by autograd in float64, one text at a time, without any part of the scanner."""
    model = copy.deepcopy(model).double()
    model.requires_grad_(True)
    mlps = [block.mlp for block in model.model.layers]
    kept: dict[int, Tensor] = {}

    def keep(index: int):  # noqa: ANN202
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            args[0].retain_grad()
            kept[index] = args[0]

        return hook

    for index, mlp in enumerate(mlps):
        mlp.down_proj.register_forward_pre_hook(keep(index))
    sums = {name: np.zeros((len(mlps), mlps[0].down_proj.in_features)) for name in STATISTICS}
    for text in texts:
        model.zero_grad()
        nll(model, torch.tensor([text])).backward()
        for index, mlp in enumerate(mlps):
            h, dh = kept[index].detach()[0], kept[index].grad[0]
            top = max(1, round(rho * h.shape[1]))
            hits = torch.zeros_like(h).scatter_(1, h.abs().topk(top, dim=1).indices, 1.0)
            gate, up = (getattr(mlp, name).weight.grad.norm(dim=1) for name in ("gate_proj", "up_proj"))
            down = mlp.down_proj.weight.grad.norm(dim=0)
            joint = (gate**2 + up**2 + down**2).sqrt()
            values = {
                "abs_h": h.abs().sum(0), "h": h.sum(0), "h_sq": (h**2).sum(0), "top": hits.sum(0),
                "saliency": (h * dh).abs().sum(0), "grad_gate": gate, "grad_up": up, "grad_down": down, "grad": joint,
            }  # fmt: skip
            for name, value in values.items():
                sums[name][index] += value.numpy()
    return sums


def neurons(totals: Totals, statistic: str) -> np.ndarray:
    """One statistic of the neurons of all layers, (layers, neurons)."""
    names = [target.name for target in totals.layout.targets if target.kind == "neurons"]
    return np.stack([totals.of(name, statistic, "neurons") for name in names])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value of its layer."""
    return float((np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)).max())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside the decoder layers, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def quantised(width: int = 64, **config: object) -> tuple[nn.Module, nn.Module]:
    """An NF4 model and the same model with dequantised weights."""
    bnb = pytest.importorskip("bitsandbytes")
    model, plain = tiny(width, **config), tiny(width, **config)
    full = linears(plain)
    for name, old in linears(model).items():
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.load_state_dict({"weight": old.weight.data})
        new = new.to("cpu")
        new.support_avx512bf16_for_cpu = False
        new.weight = new.weight._quantize("cpu") if new.weight.quant_state is None else new.weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        full[name].weight.data.copy_(bnb.functional.dequantize_4bit(new.weight.data, new.weight.quant_state))
    return model.requires_grad_(False), plain
