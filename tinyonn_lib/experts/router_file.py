"""Routers as checkpoints hold them: rows and, for analytic ones, selection biases; and the file that they travel in."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.analytic import Linear
from tinyonn_lib.experts.weights import open_file

EPSILON = 1e-5
"""Spread of the logits that `unit_gates` makes.

On a trained model of 3 layers with 28 experts each: relative error of the logits with every expert on 6e-6, and with 4,
12 and 20 on up to 7 % of the tokens, ties to within rounding, get another expert, which moves the loss by at most 5e-4
nats per token. Three times as much: 2e-5, 3 %, 4e-4.
"""

_NAME = re.compile(r"layers\.(0|[1-9]\d*)\.(weight|bias)")


def unit_gates(scores: Sequence[Any], epsilon: float = EPSILON) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and selection biases with which a Glm4Moe layer chooses as the scores do, with gates of 1.

    Near 0, σ(z) ≈ ½ + z/4. So logits z = ε·s·Wx give the gate 2·σ(z) ≈ 1 + ε·s·Wx/2, and with ε·s·b/4 added for the
    choice only the order of s·(Wx + b). What all experts have in common changes no order and is taken out. s scales the
    rows to length 1 (root mean square), so scores spread over about 1 where x is normalised, and ε means the same for
    every router. Float32 tells σ near ½ apart by about 6e-8, which is 2.4e-7/ε of that spread: a larger ε makes the
    choice sharper, a smaller one the gates more exact.

    Args:
        scores: per layer a `analytic.Linear`.
        epsilon: spread of the logits.

    Returns:
        Per layer rows `(experts, d_model)` and biases `(experts,)`, float32, for `export(routers=…, biases=…)`.

    Raises:
        BenchError: a router that is not linear.
    """
    rows, biases = [], []
    for layer, score in enumerate(scores):
        if not isinstance(score, Linear):
            name = getattr(score, "__name__", type(score).__name__)
            raise BenchError(
                f"A checkpoint holds linear routers only; layer {layer}'s is '{name}': judge it in memory."
            )
        weight, bias = (
            t.detach().cpu().double() - t.detach().cpu().double().mean(0) for t in (score.weight, score.bias)
        )
        spread = float(weight.square().sum(1).mean().sqrt()) or float(bias.std(correction=0)) or 1.0
        rows.append((weight * (epsilon / spread)).float())
        biases.append((bias * (epsilon / spread / 4)).float())
    return rows, biases


def save_routers(path: Path, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Path:
    """Write `layers.{l}.weight` `(experts, d_model)` and, where given, `layers.{l}.bias` `(experts,)` as safetensors.

    Raises:
        BenchError: the file cannot be written.
    """
    tensors = {f"layers.{layer}.weight": weight for layer, weight in enumerate(weights)}
    tensors |= {f"layers.{layer}.bias": bias for layer, bias in enumerate(biases or ())}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise BenchError(f"Cannot write {path}: {reason}. Make room and repeat.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return path


def load_routers(path: Path) -> tuple[list[Tensor], list[Tensor] | None]:
    """Read what `save_routers` wrote: rows, and biases if it holds any. `export` checks that they fit the partition.

    Raises:
        BenchError: missing or damaged, or not the routers of layers 0, 1, … .
    """
    with open_file(path) as handle:
        found: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    if strange := next((name for name in found if not _NAME.fullmatch(name)), ""):
        raise BenchError(
            f"{path} holds '{strange[:80]}', so it is no file of routers: only layers.N.weight and .bias are."
        )
    weights, biases = (
        {int(name.split(".")[1]): tensor for name, tensor in found.items() if name.endswith(part)}
        for part in (".weight", ".bias")
    )
    layers = range(len(weights))
    if not weights or any(set(part) != set(layers) for part in (weights, biases) if part):
        raise BenchError(f"{path} lacks routers or biases of some layers: write it again.")
    for layer in layers:
        rows = weights[layer]
        bias = biases.get(layer, rows.new_zeros(len(rows)) if rows.ndim else rows)
        if (
            rows.ndim != 2
            or bias.shape != rows.shape[:1]
            or not (rows.is_floating_point() and bias.is_floating_point())
        ):
            raise BenchError(
                f"{path}: layer {layer} has rows of {rows.dtype} {tuple(rows.shape)} and biases of {bias.dtype} "
                f"{tuple(bias.shape)}; needed are floats (experts, d_model) and (experts,)."
            )
    return [weights[layer] for layer in layers], [biases[layer] for layer in layers] if biases else None
