"""LoRA on any causal language model (Hu et al. 2021), by PEFT: which layers, from which start, and as files."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import quiet_bitsandbytes
from tinyonn_lib.selection.routers import routers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ALL = "all-linear"


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter.

    Attributes:
        r: rank of each layer's change.
        alpha: the change is scaled by alpha / r.
        dropout: share of the inputs that a change does not see in training.
        targets: names of modules, blank-separated, such as "q_proj v_proj"; or "all-linear": every linear layer but
            the head and the routers. An MoE's fused experts are no linear layers and stay as they are, and so do its
            other layers of the same names (shared experts), for PEFT takes these names for those of the fused ones.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = ALL

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise BenchError(
                f"LoRA needs r ≥ 1, alpha > 0 and dropout in [0, 1); got {self.r}, {self.alpha}, {self.dropout}."
            )


def adapt(model: Any, lora: Lora, seed: int, name: str = "") -> PeftModel:
    """A fresh adapter inside the model, which alone is trained; it changes nothing yet. `.unload()` takes it out.

    Args:
        model: of transformers; its own weights are frozen. Weights of 16 or 4 bits get an adapter of float32.
        seed: of the starting values; the global random state stays as it was.
        name: of the base model, for the adapter's files; empty: where the model was loaded from.

    Raises:
        BenchError: no layer of a name that `lora.targets` gives, or an adapter is there already.
    """
    quiet_bitsandbytes()
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise BenchError("The model already holds an adapter: give the plain one (tuned.model.unload() makes it so).")
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,  # type: ignore[arg-type]
        target_modules=_targets(model, lora.targets), task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    model.requires_grad_(False)
    place = model.device
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), quiet():
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = name or model.name_or_path or None
    return adapted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, for `PeftModel.from_pretrained(base, folder)`.

    The same adapter gives the same bytes.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # PEFT's order is that of a set
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def load_adapter(model: Any, folder: str | Path) -> PeftModel:
    """The model with a saved adapter inside, in eval mode; in place.

    Raises:
        BenchError: no adapter there, or one of another model.
    """
    quiet_bitsandbytes()
    from peft import PeftModel

    if not (Path(folder) / "adapter_config.json").is_file():
        raise BenchError(f"The folder {folder} holds no adapter (adapter_config.json): give one that training saved.")
    try:
        with quiet():
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:  # missing modules, other shapes, damaged files: for a user they are one
        reason = (str(error).splitlines() or ["?"])[0][:200]
        raise BenchError(f"The adapter {folder} does not fit this model: {reason}") from error


def merge(model: Any, folder: str | Path) -> Any:
    """The model with a saved adapter's changes in its own weights: a plain model again, the same object.

    A base in NF4 is rounded to NF4 once more.

    Raises:
        BenchError: as `load_adapter`.
    """
    return load_adapter(model, folder).merge_and_unload()


def _targets(model: Any, wanted: str) -> list[str]:
    """Names for PEFT, by the end of a module's name where that is exact."""
    linears = _linears(model)
    ends = sorted({name.rpartition(".")[2] for name in linears})
    free = _as_modules(model, ends)
    there = [name for name in linears if name.rpartition(".")[2] in free]
    if not there:
        raise BenchError(f"{type(model).__name__} has no linear layer that LoRA could adapt.")
    if wanted.strip() == ALL:
        picked = there
    else:
        picked = []
        for target in wanted.split():
            found = [name for name in there if f".{name}".endswith(f".{target}")]
            if not found:
                raise BenchError(
                    f"LoRA target '{target}' is no linear layer of this model: choose from {' '.join(sorted(free))}."
                )
            picked += found
        if not picked:
            raise BenchError(f"No LoRA target is given: choose {ALL}, or from {' '.join(sorted(free))}.")
    short = {name.rpartition(".")[2] for name in picked}
    every = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if every == set(picked) else sorted(set(picked))


def _linears(model: Any) -> list[str]:
    """Linear layers but the head, what belongs to a router, and gates of a single number."""
    from transformers.pytorch_utils import Conv1D

    try:
        routing = tuple(f"{layer.name}." for layer in routers(model))
    except BenchError:  # a dense model
        routing = ()
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and getattr(module, "out_features", 2) > 1
        and not f"{name}.".startswith(routing)
    ]


def _as_modules(model: Any, ends: list[str]) -> set[str]:
    """Those names that PEFT does not take for parts of fused experts, of which it would adapt every one."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config: LoraConfig = LoraConfig(target_modules=ends)
    convert_peft_config_for_transformers(config, model, None)
    return set(config.target_modules or ())


class quiet(warnings.catch_warnings):
    """Without a warning that transformers addresses to PEFT's authors."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        return entered
