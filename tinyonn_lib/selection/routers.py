"""The routers of a mixture of experts, found by what transformers itself declares, and their raw logits.

Every MoE class of transformers (≥ 5.6) says in `_can_record_outputs["router_logits"]` which module class gives router
logits and at which place of its output. Names decide nothing: `"gate" in name` also finds `gate_proj` and
`shared_expert_gate` (ERRATA 001).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyonn_lib.errors import BenchError


@dataclass(frozen=True)
class Layer:
    """The router of one layer.

    Attributes:
        name: of the module, from the model.
        module: computes the logits.
        weight: one row per expert, `(E, d_model)`.
        bias: `(E,)`, or None. A selection bias that no logit sees is not meant.
        experts: E.
        index: place of the raw logits in the module's output, if that is a tuple.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    experts: int
    index: int


def routers(model: nn.Module) -> list[Layer]:
    """Every router of the model, first layer first.

    Raises:
        BenchError: a dense model, or routers that are more than one matrix.
    """
    found: dict[str, tuple[nn.Module, int]] = {}
    for path, part in model.named_modules():
        for recorder in _recorders(part):
            for name, module in part.named_modules(prefix=path):
                if isinstance(module, recorder.target_class) and _below(name, recorder.layer_name):
                    found[name] = module, recorder.index
    if not found:
        raise BenchError(
            f"{type(model).__name__} has no router: make an MoE from it with the phases 02_scan to 05_router, or give "
            "an MoE such as allenai/OLMoE-1B-7B-0924."
        )
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    # JetMoe's attention hands on the logits of the router inside it: the inner module is the one that has the rows.
    outer = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
    return [_layer(name, *found[name]) for name in sorted(found.keys() - outer, key=order.__getitem__)]


def _recorders(module: nn.Module) -> list[Any]:
    """What a model's class declares about router logits, as transformers reads it: a recorder, a class, or several."""
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import OutputRecorder

    if not isinstance(module, PreTrainedModel):
        return []
    declared = (module._can_record_outputs or {}).get("router_logits") or []
    several = declared if isinstance(declared, list) else [declared]
    return [item if isinstance(item, OutputRecorder) else OutputRecorder(item, index=1) for item in several]


def _below(name: str, part: str | None) -> bool:
    return part is None or f".{part.strip('.')}." in f".{name}."


def _layer(name: str, module: nn.Module, index: int) -> Layer:
    matrices = [weight for weight in module.parameters() if weight.ndim == 2]
    if len(matrices) != 1 or not matrices[0].is_floating_point():
        raise BenchError(
            f"The router {name} ({type(module).__name__}) is not one matrix with a row for each expert: give another "
            "MoE, such as allenai/OLMoE-1B-7B-0924."
        )
    weight = matrices[0]
    bias = next((value for key, value in module.named_parameters() if key.split(".")[-1] == "bias"), None)
    return Layer(name, module, weight, bias, len(weight), index)


class Watch:
    """Sees what goes into the routers and what comes out.

        with Watch(model) as watch:
            model(input_ids=ids)
        watch.logits

    Each thread sees its own forward passes. What the last one left is dropped when the next begins.
    """

    def __init__(self, model: nn.Module, inputs: bool = True) -> None:
        """Prepare.

        Args:
            model: what will be called: an MoE, or a part of one that holds its routers.
            inputs: keep what goes in, too. That holds the hidden states of all layers in memory.
        """
        self.model = model
        self._with_inputs = inputs
        self.layers = routers(model)
        self._own = threading.local()
        self._hooks: list[RemovableHandle] = []
        self._raw = False

    def __enter__(self) -> Watch:
        self._hooks = [self.model.register_forward_pre_hook(self._clear)]
        for place, layer in enumerate(self.layers):
            self._hooks.append(layer.module.register_forward_hook(self._keep(place, layer.index), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def logits(self) -> list[Tensor]:
        """Raw logits of the last forward pass, per layer `(tokens, E)`, float32, attached to the graph.

        Raises:
            BenchError: a router that did not run, or probabilities in the place of logits.
        """
        found = [logits for _, logits in self._seen()]
        if not self._raw:  # once: looking at values makes a GPU wait
            if all(_probabilities(logits) for logits in found):
                raise BenchError(
                    "The routers give probabilities instead of raw logits, as transformers 5.0 to 5.5 and some model "
                    "classes do: update transformers, or give another MoE."
                )
            self._raw = True
        return found

    @property
    def inputs(self) -> list[Tensor]:
        """What the routers of the last forward pass saw, per layer `(tokens, d_model)`; empty if not to be kept."""
        return [inputs for inputs, _ in self._seen() if inputs is not None]

    def _seen(self) -> list[tuple[Tensor | None, Tensor]]:
        seen: dict[int, tuple[Tensor | None, Tensor]] = getattr(self._own, "seen", {})
        if missing := [layer.name for place, layer in enumerate(self.layers) if place not in seen]:
            raise BenchError(f"The router {missing[0]} did not run: call the watched model first, with all its layers.")
        return [seen[place] for place in range(len(self.layers))]

    def _clear(self, *_: object) -> None:
        self._own.seen = {}

    def _keep(self, place: int, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            logits = output[index] if isinstance(output, tuple) else output
            # A part of the model may be called without the whole: then nothing has cleared yet.
            self._own.__dict__.setdefault("seen", {})[place] = (
                inputs.reshape(-1, inputs.shape[-1]) if self._with_inputs else None,
                logits.reshape(-1, logits.shape[-1]).float(),
            )

        return hook


def _probabilities(logits: Tensor) -> bool:
    return bool(((logits.sum(-1) - 1).abs() < 1e-3).all() & (logits >= 0).all())


@contextmanager
def shifted(model: nn.Module, vector: Tensor) -> Iterator[None]:
    """One vector added to every row of every router: softmax over experts cannot tell the difference.

    Args:
        vector: `(d_model,)`, or one per layer, `(layers, d_model)`.
    """
    layers = routers(model)
    before = [layer.weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer, shift in zip(layers, vector.expand(len(layers), -1), strict=True):
                layer.weight.add_(shift.to(layer.weight))
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)
