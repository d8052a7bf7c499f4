"""Take a model's own rotary position embedding off its keys, and put it on again.

A cached key is rotated by its position and its model's frequencies (Su et al. 2021), so two models' cached keys differ
even where the keys mean the same. What is carried from one to the other is the key before the rotation (ERRATA, 003).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError


class Rotation:
    """The rotary embedding of one model: `transformers`' own module and function, whichever kind of scaling it has.

    It shares the model's module, so what that has adjusted to a sequence's length (dynamic NTK, LongRoPE) holds here.
    """

    def __init__(self, model: Any) -> None:
        found = (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
        rotary = next((m for m in found if "Vision" not in type(m).__name__), None)
        self.module: nn.Module | None = rotary
        self._apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None) if rotary else None
        config = model.config.get_text_config(decoder=True)
        # Models with two kinds of attention (Gemma 3) have one set of frequencies for each.
        each = hasattr(rotary, "layer_types")
        self._kinds: list[str] | None = list(config.layer_types) if each else None
        if rotary is not None and self._apply is None:
            raise BenchError(
                f"{type(model).__name__} rotates its keys in a way of its own, which cannot be undone here."
            )

    def rotate(self, keys: Tensor, layer: int, positions: Tensor) -> Tensor:
        """Keys `(batch, heads, tokens, head_dim)` as the model caches them at `positions` `(tokens,)`."""
        return self._turned(keys, layer, positions, 1)

    def unrotate(self, keys: Tensor, layer: int, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return self._turned(keys, layer, positions, -1)

    def _turned(self, keys: Tensor, layer: int, positions: Tensor, sign: int) -> Tensor:
        if self.module is None or self._apply is None:
            return keys
        kind = {} if self._kinds is None else {"layer_type": self._kinds[layer]}
        wide = keys.float()
        cos, sin = self.module(wide, positions[None].to(keys.device), **kind)
        if sign < 0:
            # Some kinds (YaRN) lengthen keys while they turn them: cos² + sin² is that factor's square.
            length = cos.square() + sin.square()
            cos, sin = cos / length, -sin / length
        try:
            turned = _turn(self._apply, wide, cos, sin)
        except RuntimeError:  # the model turns the first dimensions only, and parts them before it calls the function
            part = cos.shape[-1]
            turned = torch.cat((_turn(self._apply, wide[..., :part], cos, sin), wide[..., part:]), -1)
        return turned.to(keys.dtype)


def _turn(apply: Callable[..., Any], keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if "k" in inspect.signature(apply).parameters:
        return apply(keys, keys, cos, sin)[1]
    return apply(keys, cos, sin)  # queries and keys one by one (Gemma 3n)
