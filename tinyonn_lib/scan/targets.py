"""From words and name patterns to what is watched: neurons, linears, embeddings, fused experts.

A *weight* may belong to several modules (tied embedding and head) and a module to several targets (the gate of an FFN
is a linear, and part of its neurons). Weights that are one parameter are one target: their gradients are combined
before the norm is taken (ERRATA 004, "key by data_ptr()").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.models import FFN, ffns
from tinyonn_lib.scan.audit import head, input_embedding
from tinyonn_lib.scan.statistics import Layout, Target

WORDS = {
    "neurons": "every neuron of the gated FFNs",
    "linears": "every nn.Linear but the head",
    "embeddings": "input embedding and head",
    "experts": "every module of fused experts",
}


@dataclass(frozen=True)
class Found:
    """A target and where to find it.

    Attributes:
        target: name, kind, rows, layer.
        modules: the modules that own its weights, by name. Several own the *same* weight, except for neurons.
        ffn: for neurons, their FFN.
    """

    target: Target
    modules: dict[str, nn.Module]
    ffn: FFN | None = None


def find(model: nn.Module, targets: str | Sequence[str], *, rows: bool) -> tuple[Found, ...]:
    """Everything that `targets` names: neurons first, then modules in the order of the model.

    Args:
        model: any module.
        targets: words of `WORDS`, or patterns over module names such as `*.self_attn.?_proj`; a string may hold
            several, with commas.
        rows: whether linears and embeddings get statistics per row, or only norms of the whole tensor.

    Raises:
        BenchError: a word or pattern that matches nothing here.
    """
    words = targets.split(",") if isinstance(targets, str) else list(targets)
    names: set[str] = set()
    found: list[Found] = []
    modules = {name: module for name, module in model.named_modules() if observable(module)}
    for word in dict.fromkeys(word.strip() for word in words if word.strip()):
        if word == "neurons":
            found += [_neurons(ffn) for ffn in ffns(model)]
            _refuse_shared(found, modules)
            continue
        matching = _matching(model, modules, word)
        if not matching:
            raise BenchError(_no_match(word, modules))
        names |= matching
    for name in sorted(names):
        if is_parametrized(modules[name]):
            raise BenchError(
                f"{name} is parametrised (weight_norm or the like): it has no weight of its own to observe"
            )
    return tuple(found + [_merged(owners, rows) for owners in _owners(modules) if names & owners.keys()])


def layout_of(found: Sequence[Found], rho: float) -> Layout:
    """What the packed arrays of these targets look like."""
    return Layout(tuple(each.target for each in found), float(rho))


def observable(module: nn.Module) -> bool:
    """Whether a module's weight can be a target."""
    return isinstance(module, nn.Linear | nn.Embedding) or fused(module)


def fused(module: nn.Module) -> bool:
    """Experts as transformers 5 holds them: one module, 3-D parameters, first axis the expert."""
    parts = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(part is not None and part.dim() == 3 for part in parts)


def _matching(model: nn.Module, modules: dict[str, nn.Module], word: str) -> set[str]:
    ends = {id(module) for module in (input_embedding(model), head(model)) if module is not None}
    if word == "linears":
        return {name for name, m in modules.items() if isinstance(m, nn.Linear) and id(m) not in ends}
    if word == "embeddings":
        return {name for name, m in modules.items() if isinstance(m, nn.Embedding) or id(m) in ends}
    if word == "experts":
        return {name for name, m in modules.items() if fused(m)}
    return {name for name in modules if fnmatchcase(name, word)}


def _owners(modules: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Modules grouped by the weight that they own."""
    groups: dict[int, dict[str, nn.Module]] = {}
    for name, module in modules.items():
        if is_parametrized(module):
            continue
        weight = cast("Any", module).gate_up_proj if fused(module) else cast("Any", module).weight
        groups.setdefault(id(weight), {})[name] = module
    return list(groups.values())


def _merged(owners: dict[str, nn.Module], rows: bool) -> Found:
    # A tied weight goes by the name of the embedding.
    names = sorted(owners, key=lambda name: not isinstance(owners[name], nn.Embedding))
    owners = {name: owners[name] for name in names}
    first: Any = owners[names[0]]
    if fused(first):
        return Found(Target(names[0], "experts", int(first.gate_up_proj.shape[0]), layer_of(names[0])), owners)
    embedding = isinstance(first, nn.Embedding)
    units = int(first.num_embeddings if embedding else first.out_features)
    kind = "embedding" if embedding else "linear"
    return Found(Target(names[0], kind, units if rows else 0, layer_of(names[0])), owners)


def _neurons(ffn: FFN) -> Found:
    modules: dict[str, nn.Module] = {f"{ffn.name}.{part}_proj": getattr(ffn, part) for part in ("gate", "up", "down")}
    return Found(Target(ffn.name, "neurons", ffn.neurons, ffn.layer), modules, ffn)


def _refuse_shared(neurons: Sequence[Found], modules: dict[str, nn.Module]) -> None:
    mine = {id(cast("Any", module).weight) for each in neurons for module in each.modules.values()}
    for owners in _owners(modules):
        first: Any = next(iter(owners.values()))
        if len(owners) > 1 and not fused(first) and id(first.weight) in mine:
            raise BenchError(
                f"{' and '.join(owners)} share one weight: their neurons cannot be told apart; use targets=linears"
            )


def layer_of(name: str) -> int:
    """Number of the decoder layer in a module name, -1 outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _no_match(word: str, modules: dict[str, nn.Module]) -> str:
    if word in WORDS:
        return f"targets={word!r}: this model has none ({WORDS[word]})"
    examples = ", ".join(list(modules)[:: max(1, len(modules) // 3)][:3]) or "none at all"
    return (
        f"targets={word!r} matches no linear, embedding or fused experts: use {', '.join(WORDS)}, or a pattern over "
        f"names such as {examples}"
    )
