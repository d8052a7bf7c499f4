"""What the scanner refuses rather than silently misses, and the table of what it sees of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tinyonn_lib.errors import BenchError

if TYPE_CHECKING:
    import pandas as pd

    from tinyonn_lib.scan.fused import Experts
    from tinyonn_lib.scan.statistics import Totals
    from tinyonn_lib.scan.weight import Weight


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The token embedding of a transformers model, None for any other module."""
    return _end(model, "get_input_embeddings")


def head(model: nn.Module) -> nn.Module | None:
    """The output head of a transformers model, None for any other module."""
    return _end(model, "get_output_embeddings")


def own_forward(module: nn.Module) -> bool:
    """Whether a linear or embedding computes something of its own, as a scaled embedding does."""
    plain = type(module).forward in (nn.Linear.forward, nn.Embedding.forward)
    return not plain and "bitsandbytes" not in type(module).__module__


def refuse_blind_spots(model: nn.Module, name: str, module: nn.Module) -> None:
    """Errors:
    BenchError: hooks on this module would be ignored, or its norms would be wrong.
    """
    above = ["", *(name[:place] for place, letter in enumerate(name) if letter == "."), name]
    for each in map(model.get_submodule, above):
        if hasattr(each, "_orig_mod") or getattr(each, "_compiled_call_impl", None) is not None:
            raise BenchError(
                f"{name}: the model is compiled, and hooks inside a compiled graph are ignored; observe it uncompiled"
            )
    weight: Any = getattr(module, "weight", None)
    single = isinstance(module, nn.Linear | nn.Embedding)
    frozen = not getattr(weight, "requires_grad", False)
    if single and own_forward(module) and frozen:
        raise BenchError(
            f"{name}: {type(module).__name__} has a forward of its own, so the gradient of its frozen weight cannot be "
            "told from inputs and outputs; leave it out of the targets, or make it trainable"
        )
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.sparse or module.max_norm is not None):
        raise BenchError(f"{name}: an embedding with max_norm, scale_grad_by_freq or sparse cannot be observed")
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if frozen and tied and head(model) is None and module is input_embedding(model):
        raise BenchError(f"{name} is tied to a head outside the observed module: observe the whole language model")
    # bitsandbytes on CPUs with AVX512-BF16 repacks NF4 weights in the first forward that needs no
    # gradient; from then on gradients through them are wrong, silently (PEERS §6).
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    risky = getattr(module, "support_avx512bf16_for_cpu", False)
    if packed or (risky and weight is not None and weight.device.type == "cpu"):
        raise BenchError(
            f"{name}: bitsandbytes would repack its 4-bit weights on this CPU and give wrong gradients; "
            "set support_avx512bf16_for_cpu=False on every Linear4bit right after loading"
        )


def missing(watched: Weight | Experts, sample: int, calls: int) -> str:
    """One line: what of the weight did not fire as it should in this sample, and what to do."""
    for name in watched.modules:
        ran = watched.fired[name]
        if not ran:
            return (
                f"sample {sample}: {name} never ran. A fused kernel or a replaced forward bypasses it; switch that "
                "off, or leave it out of the targets"
            )
        if ran > calls:
            return (
                f"sample {sample}: {name} ran {ran} times, expected {calls}; call end_sample() after each backward, "
                f"set calls={ran} for gradient accumulation, or enabled=False around forwards that are no training step"
            )
    seen = max(watched.arrived.values(), default=0)
    where = f"sample {sample}: {watched.name}"
    if seen > calls * len(watched.modules):
        return f"{where} saw {seen} backward passes, expected {calls}; call end_sample() after each"
    return (
        f"{where} saw {seen} of {calls * len(watched.modules)} gradients. Call backward() on the loss before "
        "end_sample(), or pass gradients=False to watch forwards only"
    )


def coverage(model: nn.Module, totals: Totals) -> pd.DataFrame:
    """What a scan saw of every parameter of the model.

    Args:
        model: the model that was scanned.
        totals: of its scan.

    Returns:
        One row per parameter: `parameter, module` (last part of its module's name), `shape, values, observed` (kinds of
        the targets that it belongs to, or ""), `samples` (in how many it fired), `why` (why it was not observed).
    """
    import pandas as pd

    kinds: dict[int, dict[str, int]] = {}
    for target, counts in zip(totals.layout.targets, totals.counts, strict=True):
        module: Any = model.get_submodule(target.name)
        parts = [module.gate_proj, module.up_proj, module.down_proj] if target.kind == "neurons" else [module]
        for parameter in (p for part in parts for p in part.parameters(recurse=False) if p.dim() > 1):
            kinds.setdefault(id(parameter), {})[target.kind] = int(counts[1])
    rows = []
    for name, parameter in model.named_parameters():
        seen = kinds.get(id(parameter), {})
        owner = name.rpartition(".")[0].rpartition(".")[2] or "(model)"
        shape = "×".join(map(str, parameter.shape))
        why = "" if seen else _why_not(model, name, parameter)
        rows.append((name, owner, shape, parameter.numel(), ", ".join(seen), max(seen.values(), default=0), why))
    return pd.DataFrame(rows, columns=["parameter", "module", "shape", "values", "observed", "samples", "why"])


def by_module(table: pd.DataFrame) -> pd.DataFrame:
    """`coverage`, summed up over layers: one row per kind of module that holds parameters in one and the same state.

    Returns:
        `module, parameters, values, observed, samples, why`; `samples` is the smallest of the group.
    """
    groups = table.groupby(["module", "observed", "why"], sort=False)
    found = groups.agg(parameters=("parameter", "size"), values=("values", "sum"), samples=("samples", "min"))
    return found.reset_index()[["module", "parameters", "values", "observed", "samples", "why"]]


def _why_not(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    owner = model.get_submodule(name.rpartition(".")[0])
    if parameter.dim() < 2:
        return "a vector: norm or bias"
    if isinstance(owner, nn.Linear | nn.Embedding):
        return "not among the targets"
    return f"{type(owner).__name__} is no linear, embedding or fused experts that we know"


def _end(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    try:
        found = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
