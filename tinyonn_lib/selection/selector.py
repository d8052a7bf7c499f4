"""A selector: a mixture of experts whose routers were warmed up to tell text from trash, and its folder on disk.

By default a folder holds the routers alone and a reference to the model they belong to: of OLMoE-1B-7B's 14 GB they are
4 MB. `save(full=True)` writes the whole model, which plain transformers loads, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import load
from tinyonn_lib.selection.routers import Layer, routers

FILE, WEIGHTS = "selector.json", "routers.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class Selector:
    """What scores texts.

    Attributes:
        model: the MoE, its routers in float32.
        tokenizer: its own.
        units: per layer, what its logits are measured in (`calibrate.units_of`, before the warm-up): so every layer
            counts alike, and routers written small as much as others.
        gap: per layer `(E,)`, how much more an expert is called on corrupted text (share of the probability); empty
            before a warm-up.
        combined: ranking → coefficients that tell clean from corrupted calibration text (`judge.combine`), for
            "combined" and, without router scores, "perplexity_fitted"; empty before a warm-up.
        about: how it was warmed up.
        hashed: of the routers as they were in the base model.
    """

    model: Any
    tokenizer: Any
    units: tuple[float, ...]
    gap: tuple[Tensor, ...] = ()
    combined: dict[str, dict[str, float]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    hashed: str = ""

    @property
    def layers(self) -> list[Layer]:
        return routers(self.model)


def of(model: Any, tokenizer: Any) -> Selector:
    """A model as it is, not warmed up, with units of 1.

    Raises:
        BenchError: a dense model.
    """
    layers = in_float32(model)
    return Selector(model.eval(), tokenizer, (1.0,) * len(layers), hashed=hash_rows(layers))


def save(selector: Selector, folder: Path, base: str, full: bool = False) -> None:
    """Write a selector.

    Args:
        base: folder or hub id of the model it came from; a folder is noted as seen from `folder`.
        full: the whole model and tokenizer, too; then no base is needed.

    Raises:
        BenchError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    layers = selector.layers
    rows: dict[str, Tensor] = {f"{layer.name}.weight": layer.weight for layer in layers}
    rows |= {f"{layer.name}.bias": layer.bias for layer in layers if layer.bias is not None}
    rows |= {f"gap.{place}": gap for place, gap in enumerate(selector.gap)}
    local = Path(base).is_dir()
    note = {
        "format": _FORMAT,
        "base": "." if full else os.path.relpath(Path(base).resolve(), folder.resolve()) if local else base,
        "base_is_folder": full or local,
        "base_routers": "" if full else selector.hashed,
        "units": list(selector.units),
        "combined": selector.combined,
        "about": selector.about,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).unlink(missing_ok=True)  # of an older selector, which would lie about these rows
        if full:
            selector.model.save_pretrained(folder)
            selector.tokenizer.save_pretrained(folder)
        save_file({name: row.detach().float().cpu().contiguous() for name, row in rows.items()}, folder / WEIGHTS)
        # Last: a folder with it is a whole one.
        (folder / FILE).write_text(json.dumps(note, indent=2) + "\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise BenchError(f"Cannot write the selector to {folder}: {error} (disk full?)") from error


def load_selector(folder: str | Path, dtype: load.Dtype = "float32", device: str = "auto", base: str = "") -> Selector:
    """Load a selector, whether its folder holds the routers alone or the whole model.

    Args:
        folder: such as `runs/default/selector/epoch_2`.
        dtype, device: of the model; routers are float32.
        base: the model's folder or hub id, if it is no longer where the selector's folder says.

    Raises:
        BenchError: not a selector, damaged, or another base model than it was warmed up on.
    """
    folder = Path(folder)
    note, rows = _read(folder)
    if not base:
        base = str((folder / note["base"]).resolve()) if note["base_is_folder"] else note["base"]
        if note["base_is_folder"] and not Path(base).is_dir():
            raise BenchError(
                f"The selector {folder} was warmed up on the model {base}, which is not there: move it back, "
                "or warm up again, with full=true to need none."
            )
    model = load.load_model(base, dtype, device)
    layers = in_float32(model)
    found = hash_rows(layers)
    if note["base_routers"] not in ("", found):
        raise BenchError(f"The selector {folder} was warmed up on another model than {base}: give that one as base.")
    with torch.no_grad():
        for layer in layers:
            for name, own in ((f"{layer.name}.weight", layer.weight), (f"{layer.name}.bias", layer.bias)):
                if own is None:
                    continue
                if name not in rows or rows[name].shape != own.shape:
                    raise BenchError(f"The selector {folder} has no rows for {name} of {base}: warm it up again.")
                own.copy_(rows[name])
    gap = tuple(rows[f"gap.{place}"] for place in range(len(layers)) if f"gap.{place}" in rows)
    if len(note["units"]) != len(layers) or len(gap) not in (0, len(layers)):
        raise BenchError(f"The selector {folder} has units or gaps for another number of layers: warm it up again.")
    made = Selector(model, load.load_tokenizer(base), tuple(note["units"]), gap, note["combined"], note["about"])
    return replace(made, hashed=note["base_routers"])


def hash_rows(layers: Sequence[Layer]) -> str:
    """Tells base models apart, whatever the precision they were loaded in."""
    whole = hashlib.sha256()
    for layer in layers:
        whole.update(layer.weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return whole.hexdigest()[:16]


def in_float32(model: Any) -> list[Layer]:
    """Let the routers compute in float32: in bfloat16 the steps of a training, and ties, would be rounded away.

    The gates that they hand on keep the model's precision.
    """
    layers = routers(model)
    for layer in layers:
        if layer.weight.dtype == torch.float32:
            continue
        layer.module.float()
        layer.module.register_forward_pre_hook(_widen)
        layer.module.register_forward_hook(_narrow(layer.index, model.dtype))
    return routers(model)


def _widen(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _narrow(index: int, dtype: torch.dtype) -> Any:
    def hook(_: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output
        return tuple(
            value.to(dtype) if place != index and isinstance(value, Tensor) and value.is_floating_point() else value
            for place, value in enumerate(output)
        )

    return hook


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / FILE).is_file():
        raise BenchError(f"{folder} holds no {FILE}: give a selector's folder, such as runs/default/selector/epoch_1.")
    try:
        note = json.loads((folder / FILE).read_text())
        if note["format"] != _FORMAT:
            raise BenchError(f"{folder / FILE} has format {note['format']}, not {_FORMAT}: warm the selector up again.")
        rows = load_file(folder / WEIGHTS)
        missing = {"base", "base_is_folder", "base_routers", "units", "combined", "about"} - note.keys()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BenchError(f"The selector {folder} is damaged ({str(error)[:200]}): warm it up again.") from error
    if missing:
        raise BenchError(f"{folder / FILE} lacks {', '.join(sorted(missing))}: warm the selector up again.")
    return note, rows
