"""As many experts per token as a threshold lets through: the side file of a checkpoint, and running by it.

A standard checkpoint says one k for all tokens. The thresholds lie beside it in `variable_k.json`, which plain
transformers ignores (docs/variable_k.md); `load` and `attach` go by them. A token's empty places point past the last
expert, as transformers marks experts that other processes hold: eager and grouped_mm then compute nothing for them,
batched_mm computes an expert and multiplies it by 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.card import with_variable_k
from tinyonn_lib.experts.families import FAMILIES
from tinyonn_lib.experts.running import choices, routers
from tinyonn_lib.experts.weights import read_config

FILE = "variable_k.json"
FORMAT, VERSION = "tinyonn variable k", 1

ORDERS = {"softmax": "router logit", "sigmoid": "sigmoid(router logit) + e_score_correction_bias"}
"""What is compared with the threshold, by the family's gates."""

_READING = "An expert is on if its order is above its layer's threshold; experts from number `experts` on are padding."


@dataclass(frozen=True)
class VariableK:
    """What the side file holds; per layer but for `model_type`.

    Attributes:
        model_type: of the checkpoint, a key of `FAMILIES`.
        experts: experts before padding.
        thresholds: of the order that `ORDERS` names, unitless.
        mean_k: experts on per token, as measured when the file was written.
    """

    model_type: str
    experts: tuple[int, ...]
    thresholds: tuple[float, ...]
    mean_k: tuple[float, ...]

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: lists of different lengths, or numbers that cannot be.
        """
        if self.model_type not in FAMILIES:
            raise ValueError(f"'{self.model_type}' is none of {', '.join(FAMILIES)}")
        if not len(self.experts) == len(self.thresholds) == len(self.mean_k) > 0:
            raise ValueError("experts, thresholds and mean_k do not name the same layers")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.experts):
            raise ValueError("experts are not whole numbers from 1 on")
        if not all(_is_finite(number) for number in (*self.thresholds, *self.mean_k)):
            raise ValueError("a threshold or mean is no finite number")
        if not all(0 <= mean <= count for mean, count in zip(self.mean_k, self.experts, strict=True)):
            raise ValueError("a mean number of experts is below 0 or above the layer's experts")


def save(
    folder: Path | str, thresholds: Sequence[float], mean_k: Sequence[float], experts: Sequence[int] | None = None
) -> Path:
    """Write the side file into a checkpoint of `export`, and a section about it into its model card.

    Args:
        thresholds: per layer, in the checkpoint's own units: see `Router.exported_threshold`.
        mean_k: per layer experts on per token, measured on text that set no threshold.
        experts: per layer, before padding; None: all that the checkpoint has.

    Raises:
        BenchError: no such checkpoint, values of another model or not finite, or a file that cannot be written.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise BenchError(f"{folder.name} is a '{config.model_type}' model; variable k goes with {', '.join(FAMILIES)}.")
    counts = [_experts(config)] * config.num_hidden_layers if experts is None else experts
    try:
        told = VariableK(config.model_type, tuple(counts), tuple(map(float, thresholds)), tuple(map(float, mean_k)))
    except ValueError as error:
        raise BenchError(f"This variable k cannot be saved: {error}.") from error
    _check_fit(told, config, "The given variable k")
    head = {"format": FORMAT, "version": VERSION, "reading": _READING}
    head["order"] = ORDERS[FAMILIES[config.model_type].gates]
    _write(folder / FILE, json.dumps(head | asdict(told), indent=1) + "\n")
    card = folder / "README.md"
    try:
        text = card.read_text("utf-8") if card.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"Cannot read {card}: {error}. Export the checkpoint again.") from error
    _write(card, with_variable_k(text, config.num_experts_per_tok, told.mean_k))
    return folder / FILE


def read(folder: Path | str) -> VariableK:
    """What `save` wrote.

    Raises:
        BenchError: there is no such file, it is damaged, or a newer version wrote it.
    """
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is not '{FORMAT}'")
        if found["version"] > VERSION:
            raise BenchError(
                f"{path} has version {found['version']} and this package reads up to {VERSION}: upgrade tinyonn."
            )
        lists = (tuple(found[name]) for name in ("experts", "thresholds", "mean_k"))
        return VariableK(found["model_type"], *lists)
    except FileNotFoundError:
        raise BenchError(
            f"{folder} holds no {FILE}, so its k is fixed: load it with AutoModelForCausalLM, or train with a "
            "variable number of experts."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BenchError(f"Cannot read {path}: {reason}. Export the checkpoint again.") from error


def load(folder: Path | str, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(folder, **options)` that runs with variable k, also in `generate()`.

    Raises:
        BenchError: as `read` and `attach`.
    """
    from transformers import AutoModelForCausalLM

    read(folder)  # what is wrong with it should not come after minutes of loading
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    attach(model, folder)
    return model


def attach(model: Any, folder: Path | str) -> ExitStack:
    """Let a loaded checkpoint run with the variable k of `folder`: from now on, or for a block `with attach(…):`.

    `close()` or the end of the block brings its own k back. Each router orders all its experts, and each layer asks the
    device for the largest number of them that a token has on.

    Raises:
        BenchError: as `read`; a dense or another model; one that is attached already; a transformers too old.
    """
    told, gates = read(folder), routers(model)
    _check_fit(told, model.config, f"{Path(folder) / FILE}")
    blocks = [block.experts for block in model.modules() if hasattr(block, "experts") and hasattr(block, "gate")]
    if any(not hasattr(block, "_is_expert_parallel") for block in blocks):
        raise BenchError("This transformers computes experts that are off: variable k needs 5.23 or newer.")
    if any(block._is_expert_parallel for block in blocks):
        raise BenchError("This model runs with variable k already, or its experts are on several processes: load anew.")
    stack = ExitStack()
    for gate, block, threshold, count in zip(gates, blocks, told.thresholds, told.experts, strict=True):
        stack.callback(setattr, gate, "top_k", gate.top_k)
        stack.callback(setattr, block, "_is_expert_parallel", False)
        gate.top_k = gate.num_experts
        block._is_expert_parallel = True  # it then knows of places past the last expert
        stack.callback(gate.register_forward_hook(_above(threshold, count)).remove)
    return stack


@torch.no_grad()
def active(model: Any, ids: Tensor) -> list[float]:
    """Experts on per token, the mean over these token ids `(N, T)`, per layer; shared ones are not counted.

    Raises:
        BenchError: a model without routers.
    """
    with choices(model) as found:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [float((chosen < count).sum(-1).double().mean()) for chosen, count in found]


def _above(threshold: float, count: int) -> Callable[[Any, Any, tuple[Tensor, Tensor, Tensor]], Any]:
    """A hook that of a router's `(logits, weights, experts)` leaves those above the threshold."""

    def hook(gate: Any, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = out
        order = logits.float()
        if (bias := getattr(gate, "e_score_correction_bias", None)) is not None:
            order = order.sigmoid() + bias
        order = order.gather(1, experts)
        order = order.masked_fill((order <= threshold) | (experts >= count), -math.inf)
        # Kernels may not take tokens without any place.
        places = max(1, int((order > -math.inf).sum(-1).max()))
        order, kept = order.topk(places, dim=-1)
        off = order == -math.inf
        return (
            logits,
            weights.gather(1, kept).masked_fill(off, 0.0),
            experts.gather(1, kept).masked_fill(off, gate.num_experts),
        )

    return hook


def _check_fit(told: VariableK, config: Any, what: str) -> None:
    kind, layers = config.model_type, config.num_hidden_layers
    if (told.model_type, len(told.experts)) != (kind, layers):
        raise BenchError(
            f"{what} is for a '{told.model_type}' of {len(told.experts)} layers and the model is a '{kind}' of "
            f"{layers}: they do not belong together."
        )
    if max(told.experts) != _experts(config):
        raise BenchError(
            f"{what} is for layers of up to {max(told.experts)} experts and the model has {_experts(config)}: "
            "they do not belong together."
        )


def _experts(config: Any) -> int:
    """Experts per layer, padding included; Glm4Moe calls them otherwise."""
    return int(config.n_routed_experts if config.model_type == "glm4_moe" else config.num_experts)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, "utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise BenchError(f"Cannot write {path}: {error.strerror or error}. Make room and repeat.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
