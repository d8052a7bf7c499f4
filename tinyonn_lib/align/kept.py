"""What was once computed, kept in a file: read back only if all it depends on is the same and nothing is damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tinyonn_lib.lm import resume

Kept = tuple[dict[str, torch.Tensor], dict[str, str]]
"""Tensors by their names, and words."""


def key_of(whole: Sequence[Any]) -> str:
    """A name for everything that something depends on: tables with each value, the rest as `repr` shows it."""
    told = [item.to_csv(index=False) if isinstance(item, pd.DataFrame) else repr(item) for item in whole]
    return hashlib.sha256(chr(0).join(told).encode()).hexdigest()


def kept(path: Path | None, key: str, make: Callable[[], Kept]) -> Kept:
    """Read back, or made now and written so that a kill leaves the whole file or none.

    Args:
        path: a safetensors file; None keeps nothing.
        key: of `key_of`.

    Raises:
        BenchError: no space, or no right to write there.
    """
    from safetensors.torch import save

    if path is None:
        return make()
    if found := _read(path, key):
        return found
    tensors, words = make()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = words | {"key": key}
    with resume.replacing(path) as temporary:
        temporary.write_bytes(save(tensors, told | {"sha256": _sum(tensors, told)}))
    return tensors, words


def _read(path: Path, key: str) -> Kept | None:
    """None for no file, one of something else, or one that is cut off or changed."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            told = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told.pop("sha256") != _sum(tensors, told) or told.pop("key") != key:
            return None
    except Exception:  # whatever is wrong with it: as good as none
        return None
    return tensors, told


def _sum(tensors: dict[str, torch.Tensor], words: dict[str, str]) -> str:
    from safetensors.torch import save

    return hashlib.sha256(json.dumps(words, sort_keys=True).encode() + save(tensors)).hexdigest()
