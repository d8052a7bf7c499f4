"""Caches as tensors: taken out of a model with un-rotated keys, and handed to a model as `past_key_values`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.rope import Rotation

_PROBE = 5
"""Position at which a single token is read to see how the model places its keys."""

_TOLERANCE = 1e-2
"""Of the audit: far above rounding in bfloat16, far below what a wrong rotation does."""


@dataclass(frozen=True)
class KV:
    """The cache of a batch of texts, heads side by side, keys before their rotation.

    Attributes:
        keys, values: `(batch, layers, tokens, width)` with width = KV heads × head_dim.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.keys.ndim != 4 or self.keys.shape != self.values.shape:
            raise BenchError(
                f"A cache needs keys and values of one shape (batch, layers, tokens, width); got "
                f"{tuple(self.keys.shape)} and {tuple(self.values.shape)}."
            )

    def __getitem__(self, rows: Any) -> KV:
        """Some rows of the batch."""
        return KV(self.keys[rows], self.values[rows])

    @property
    def shape(self) -> torch.Size:
        return self.keys.shape

    def detach(self) -> KV:
        return KV(self.keys.detach(), self.values.detach())


def as_kv(cache: Any) -> KV:
    """A cache in any usual form as `KV`, its keys as they are.

    Args:
        cache: a `KV`, a `transformers` cache, or per layer a pair (keys, values) of `(batch, heads, tokens, head_dim)`
            or `(batch, tokens, width)`.

    Raises:
        BenchError: empty, or layers of different shapes.
    """
    if isinstance(cache, KV):
        return cache
    layers = getattr(cache, "layers", None)
    pairs = cache
    if layers is not None:  # a recurrent layer's cache has neither
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    fits = pairs is not None and len(pairs) and all(len(pair) == 2 for pair in pairs)
    if not fits or not all(isinstance(t, Tensor) for pair in pairs for t in pair):
        raise BenchError(
            "A cache needs one pair (keys, values) of tensors per layer; run the model with use_cache=True."
        )
    shapes = sorted({tuple(t.shape) for pair in pairs for t in pair})
    if len(shapes) > 1:
        raise BenchError(
            f"The layers of this cache, or its keys and values, differ in shape ({', '.join(map(str, shapes))}), so no "
            "single projector reads them: choose another model."
        )
    return KV(*(torch.stack([_merged(pair[side]) for pair in pairs], 1) for side in (0, 1)))


def _merged(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2) if tensor.ndim == 4 else tensor


@dataclass(frozen=True)
class Widths:
    """The sizes of a model's cache (grouped-query attention: fewer KV heads than query heads)."""

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """KV heads × head_dim: what one layer keeps of one token's keys."""
        return self.heads * self.head_dim


def widths(config: Any) -> Widths:
    """From a `transformers` config.

    Raises:
        BenchError: the model's cache is not one key and one value of equal width per layer and token (latent
            attention, recurrent layers, layers that differ in it).
    """
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(text, "kv_lora_rank", None) or kinds or not getattr(text, "num_attention_heads", 0):
        why = "latent attention" if getattr(text, "kv_lora_rank", None) else ", ".join(sorted(kinds)) or "no attention"
        raise BenchError(f"A {text.model_type} has {why}, not plain keys and values per layer: choose another model.")
    try:
        heads = text.num_attention_heads
        kept = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        even = getattr(text, "v_head_dim", None) in (None, head_dim)
    except RuntimeError:  # transformers refuses to name a single one where layers differ (Gemma 4)
        even = False
    if not even:
        raise BenchError(f"A {text.model_type} has keys and values of several widths: choose another model.")
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kept = 1  # of Falcon, which sets the number for its new architecture only
    # The last layers of some (Gemma 3n) read the cache of others.
    layers = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    return Widths(layers=int(layers), heads=int(kept), head_dim=int(head_dim))


class KVModel:
    """A causal language model whose cache can be taken out and put in.

    Attributes:
        model: of `transformers`, in eval mode; frozen.
        widths, dtype: of its cache.
    """

    def __init__(self, model: Any) -> None:
        """
        Raises:
            BenchError: a cache that is not keys and values of one width, or keys that are placed by anything but RoPE
                as `transformers` applies it or embeddings of positions. One token is read twice to see that: alone it
                attends to nothing but itself, so its keys at two positions differ by the rotation and nothing else.
        """
        self.model = model.requires_grad_(False)
        self.config = model.config.get_text_config(decoder=True)
        widths(model.config)
        self.rotation = Rotation(model)
        try:
            probes = [self._probe(place) for place in (0, _PROBE)]
            first = probes[0].layers[0].keys
            self.widths = Widths(as_kv(probes[0]).shape[1], first.shape[1], first.shape[3])
            self.dtype = first.dtype
            self._rotated = self._audit(*probes)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise BenchError(
                f"{type(model).__name__} cannot be read with a cache of keys and values ({why}): choose another model."
            ) from error

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def read(self, ids: Tensor) -> KV:
        """The model's own cache of `ids` `(batch, tokens)`, rows padded at their end; follows `torch`'s grad mode."""
        output = self.model.get_decoder()(input_ids=ids.to(self.device), past_key_values=self.empty(), use_cache=True)
        return self.taken(output.past_key_values)

    @staticmethod
    def empty() -> Any:
        """A cache to fill; made without a config, for then it keeps all tokens of sliding layers, too."""
        from transformers import DynamicCache

        return DynamicCache()

    def taken(self, cache: Any) -> KV:
        """A cache that this model has filled from position 0 on, keys un-rotated."""
        places = torch.arange(cache.get_seq_length(), device=self.device)
        pairs = []
        for number, layer in enumerate(cache.layers):
            keys = self.rotation.unrotate(layer.keys, number, places) if self._rotated[number] else layer.keys
            pairs.append((keys, layer.values))
        return as_kv(pairs)

    def cache(self, kv: KV) -> Any:
        """`kv` as a `DynamicCache` at positions from 0 on, keys rotated with this model's RoPE, in its own precision.

        Raises:
            BenchError: another number of layers or another width than this model's.
        """
        _, layers, tokens, width = kv.shape
        if (layers, width) != (self.widths.layers, self.widths.width):
            raise BenchError(
                f"This cache has {layers} layers of width {width}; the model wants {self.widths.layers} of "
                f"{self.widths.width}: project it first."
            )
        cache, places = self.empty(), torch.arange(tokens, device=kv.keys.device)
        for layer in range(layers):
            keys, values = (
                t[:, layer].unflatten(-1, (self.widths.heads, -1)).transpose(1, 2) for t in (kv.keys, kv.values)
            )
            keys = self.rotation.rotate(keys, layer, places) if self._rotated[layer] else keys
            cache.update(keys.to(self.dtype), values.to(self.dtype), layer)
        return cache

    @torch.no_grad()
    def _probe(self, place: int) -> Any:
        """The cache of one token, read at a position."""
        # Not token 0, which often is padding and then has an embedding of zeros.
        token = torch.full((1, 1), min(7, self.config.vocab_size - 1), device=self.device)
        where = torch.full((1, 1), place, device=self.device)
        read = self.model.get_decoder()(
            input_ids=token, position_ids=where, past_key_values=self.empty(), use_cache=True
        )
        return read.past_key_values

    def _audit(self, at_zero: Any, away: Any) -> list[bool]:
        """Which layers rotate their keys (some models leave every fourth alone)."""
        if self.rotation.module is None:
            # Embeddings of positions (GPT-2) change a key. What turns it (GPT-J), or does not touch it at all (ALiBi),
            # works on places that a handed-over cache does not have.
            sizes = [as_kv(probe).keys.unflatten(-1, (self.widths.heads, -1)).norm(dim=-1) for probe in (at_zero, away)]
            if _same(sizes[1], sizes[0]):
                raise BenchError(
                    f"{type(self.model).__name__} places its keys by neither transformers' rotary embedding nor "
                    "embeddings of positions: choose another model."
                )
            return [False] * self.widths.layers
        rotated = []
        for number, (first, moved) in enumerate(zip(at_zero.layers, away.layers, strict=True)):
            origin, there = (
                self.rotation.unrotate(layer.keys, number, torch.tensor([place], device=self.device)).float()
                for layer, place in ((first, 0), (moved, _PROBE))
            )
            if _same(there, origin):
                rotated.append(True)
            elif _same(moved.keys.float(), first.keys.float()):
                rotated.append(False)
            else:
                raise BenchError(
                    f"Layer {number} of {type(self.model).__name__} places its keys in a way that transformers' rotary "
                    "embedding does not undo: choose another model."
                )
        return rotated


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _TOLERANCE * other.norm())
