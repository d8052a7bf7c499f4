"""A checkpoint folder's configuration and tensors, one tensor in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyonn_lib.errors import BenchError


def read_config(folder: Path) -> Any:
    """A model folder's configuration.

    Raises:
        BenchError: no config.json, no JSON, or a kind of model that transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # about five kinds; for a user they are one
        raise BenchError(f"Cannot read the configuration in {folder}: {one_line(error)}") from error


def tensor_files(folder: Path, stem: str) -> dict[str, Path]:
    """Name → file for the tensors in `{stem}.safetensors`, or in the shards that `{stem}.safetensors.index.json` lists.

    Raises:
        BenchError: neither is there, or a file is missing or damaged.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard outside the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchError(f"{index} is damaged: {one_line(error)}") from error
        files = [folder / name for name in names]
    elif single.exists():
        files = [single]
    else:
        raise BenchError(f"The folder {folder} holds no {single.name}: only weights in safetensors files are read.")
    found: dict[str, Path] = {}
    for file in files:
        with open_file(file) as handle:
            found |= dict.fromkeys(handle.keys(), file)
    return found


def open_file(file: Path) -> Any:
    """A safetensors file; tensors are read, not mapped, so that memory holds one only as long as it is used."""
    try:
        return safe_open(file, "pt", backend="pread")
    except (OSError, SafetensorError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else one_line(error)
        raise BenchError(f"Cannot read {file}: {reason} (cut off or damaged? save or download it again).") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with open_file(file) as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor


def one_line(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
