"""A dense model's weights one tensor at a time, from a folder or a loaded model; 4-bit ones come back dequantised."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import hub
from tinyonn_lib.lm.tensors import one_line, open_file, read_config, read_tensor, tensor_files

FFN_PARTS = ("gate_proj", "up_proj", "down_proj")
BIASED = "This model's FFNs have biases (mlp_bias), which no standard MoE class holds: they cannot be divided."
_PACKED = ".quant_state.bitsandbytes__"  # bitsandbytes' mark: the tensor before it is 4-bit


@dataclass(frozen=True)
class Weights:
    """Names and shapes of a dense model's tensors, each read only when asked for.

    Attributes:
        config: the model's configuration.
        shapes: name → shape once dequantised, in the model's order; tied tensors under one name.
        read: name → the tensor, on the CPU, contiguous, in its own dtype (4-bit: the dtype it was made from).
        folder: where tokenizer and licence may lie; None for a model that was not loaded from a folder.
        packed: some tensors are 4-bit.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    folder: Path | None
    packed: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the FFNs' matrices, once dequantised; norms may have another."""
        return self.read(ffn_name(0, FFN_PARTS[0])).dtype

    def neurons(self) -> list[int]:
        """d_ffn of each layer.

        Raises:
            BenchError: some layer has no gated FFN, or its FFN has biases.
        """
        if any(name.endswith(f".mlp.{part}.bias") for name in self.shapes for part in FFN_PARTS):
            raise BenchError(BIASED)
        found = []
        for layer in range(self.config.num_hidden_layers):
            if missing := [p for p in FFN_PARTS if ffn_name(layer, p) not in self.shapes]:
                raise BenchError(
                    f"Layer {layer} of this '{self.config.model_type}' model has no {missing[0]}: dense gated FFNs "
                    "(gate_proj, up_proj and down_proj in each layer, as in Llama, Qwen or Mistral) are needed."
                )
            found.append(self.shapes[ffn_name(layer, "gate_proj")][0])
        return found


def ffn_name(layer: int, part: str) -> str:
    """The name of one of a layer's `FFN_PARTS`."""
    return f"model.layers.{layer}.mlp.{part}.weight"


def open_weights(source: nn.Module | Path | str) -> Weights:
    """From a Hugging Face folder, a hub id in the cache or reachable, or a loaded model.

    Only file headers are read here. Each name and shape is checked against the model class.

    Raises:
        BenchError: nothing there, a damaged or missing file, another kind of quantisation than bitsandbytes' 4 bits,
            or tensors that are not those of the model class.
    """
    if isinstance(source, nn.Module):
        return _from_model(source)
    path = hub.local_path(str(source), "model")
    return _from_folder(_download(str(source)) if path is None else path)


def dense_weight(linear: Any) -> Tensor:
    """The weight `(out, in)` of a linear layer; 4-bit weights are dequantised exactly as the layer itself does."""
    weight = linear.weight
    if getattr(weight, "quant_state", None) is not None:
        return _dequantise(weight.data, weight.quant_state).detach()
    plain: Tensor = weight.detach()
    return plain


def _dequantise(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if getattr(state, "packing_format_for_cpu", False):
        raise BenchError("A forward pass on this CPU has repacked the 4-bit weights: load the model again before this.")
    if packed.device.type == "cpu" and state.shape[-1] % state.blocksize:  # bitsandbytes 0.50 gets these wrong
        raise BenchError(
            f"A 4-bit weight is {state.shape[-1]} wide, no multiple of {state.blocksize}; on a CPU it would be "
            "dequantised wrongly: use a GPU, or the bfloat16 model."
        )
    return dequantize_4bit(packed, state)


def _expected(config: Any) -> dict[str, tuple[int, ...]]:
    """What the class of this configuration holds: name → shape."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a damaged configuration makes a model class raise
        raise BenchError(f"config.json does not describe a causal language model: {one_line(error)}") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check(name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...], where: str) -> None:
    if found is None:
        raise BenchError(f"{where} holds no tensor {name}: save or download it again, or merge its adapter first.")
    if found != wanted:
        raise BenchError(f"{where} holds {name} as {found}, its config says {wanted}: they do not belong together.")


def _from_model(model: nn.Module) -> Weights:
    config: Any = model.config
    shapes, packed = _expected(config), False
    owners = dict(model.named_modules())
    for name, wanted in shapes.items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(owners.get(owner), leaf, None)
        state = getattr(tensor, "quant_state", None)
        found = None if tensor is None else tuple(tensor.shape if state is None else state.shape)
        _check(name, found, wanted, "The loaded model")
        if tensor is not None and state is None and not (tensor.is_floating_point() and not tensor.is_meta):
            raise BenchError(f"{name} is {tensor.dtype} on {tensor.device}: load the model in plain or 4-bit weights.")
        packed |= state is not None

    def read(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = dense_weight(owners[owner]) if leaf == "weight" else getattr(owners[owner], leaf).detach()
        return tensor.cpu().contiguous()

    folder = Path(config.name_or_path) if config.name_or_path else None
    return Weights(config, shapes, read, folder if folder and folder.is_dir() else None, packed)


def _from_folder(folder: Path) -> Weights:
    config = read_config(folder)
    files = tensor_files(folder, "model")
    packed = {key.split(_PACKED)[0] for key in files if _PACKED in key}
    kind = getattr(config, "quantization_config", None)
    if kind and not packed:
        raise BenchError(f"{folder.name} is quantised, and not in bitsandbytes' 4 bits: start from the plain model.")
    shapes = _expected(config)
    companions: dict[str, list[str]] = {name: [] for name in packed}
    for key in files:
        if (stem := re.sub(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$", "", key)) in packed:
            companions[stem] += [key] * (key != stem)
    read = partial(_read, files, companions, shapes)
    for file in sorted(set(files.values())):
        with open_file(file) as handle:
            for name in handle.keys():  # noqa: SIM118, a handle is no dict
                if name in shapes and name not in packed:
                    part = handle.get_slice(name)
                    _check(name, tuple(part.get_shape()), shapes[name], folder.name)
                    if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                        raise BenchError(f"{name} in {folder.name} is {part.get_dtype()}: start from the plain model.")
    for name, wanted in shapes.items():
        _check(name, wanted if name in files else None, wanted, folder.name)
    return Weights(config, shapes, read, folder, bool(packed))


def _read(
    files: Mapping[str, Path],
    companions: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
) -> Tensor:
    stored = read_tensor(files[name], name)
    if name not in companions:
        return stored
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BenchError("These weights are 4-bit and need the extra 'nf4': pip install 'tinyonn[nf4]'.")
    from bitsandbytes.functional import QuantState

    try:
        parts = {key: read_tensor(files[key], key) for key in companions[name]}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        full = _dequantise(stored, state)
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError, RuntimeError) as error:
        raise BenchError(
            f"The 4-bit tensor {name} is damaged: {one_line(error)}; save or download it again."
        ) from error
    _check(name, tuple(full.shape), shapes[name], files[name].parent.name)
    return full


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    if not cached:
        hub.require_hub(hub_id, "model")
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
    return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=cached))
