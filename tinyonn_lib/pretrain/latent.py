"""The documents' own architecture idea as an ablation: per-layer embeddings told apart by a rotation over depth.

Document 002, 2025-07-19: "borrow from rotary encoding to give per-layer embeddings their order, and decompose them by
a latent LoRA". One table A (vocabulary × r) is shared by all layers; in layer l its row is turned by l · θ_j in each
pair j, as RoPE turns by position, and one up-projection B (r → d), starting at zero as in LoRA, adds it to the layer's
input. The control has the same tensors without the rotation: each layer has its own r / layers columns of A and B,
which is a plain table per layer. Never saved: a checkpoint holds standard architectures only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BASE = 10.0  # slowest pair: a tenth of a radian a layer. RoPE's 10 000 is for thousands of places, not for layers.


class Latent(nn.Module):
    """What each layer's input gets added, from the token ids alone; r · (vocabulary + d) parameters."""

    def __init__(self, model: PreTrainedModel, rank: int, *, rotate: bool = True, seed: int = 0) -> None:
        """
        Args:
            model: a Qwen3; gives vocabulary, d, layers, dtype and device.
            rank: r, columns of the table.
            rotate: False is the control, a table of r / layers columns for each layer.
            seed: of the table; the global random state is left as it was.

        Raises:
            BenchError: another architecture, or a rank that does not fit.
        """
        super().__init__()
        config = cast("Any", model.config)
        if config.model_type != "qwen3":
            raise BenchError(f"Latent embeddings are an ablation of qwen3, not of {config.model_type}.")
        if rank < 1 or rank % (parts := 2 if rotate else config.num_hidden_layers):
            raise BenchError(f"rank={rank} must be a multiple of {parts}: {'pairs' if rotate else 'layers'} share it.")
        self.rotate, self.share = rotate, rank // config.num_hidden_layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(config.vocab_size, rank)
            self.up = nn.Linear(rank, config.hidden_size, bias=False)
            nn.init.normal_(self.table.weight, std=config.initializer_range)
        nn.init.zeros_(self.up.weight)
        speeds = _BASE ** -(torch.arange(rank // 2) / max(1, rank // 2 - 1)) if rotate else torch.zeros(0)
        self.angles = nn.Buffer(torch.arange(config.num_hidden_layers)[:, None] * speeds, persistent=False)
        self.to(device=model.device, dtype=model.dtype)

    def at(self, layer: int, rows: Tensor) -> Tensor:
        """(…, d) to add to the input of a layer, from the tokens' rows of the table, (…, r)."""
        if not self.rotate:
            own = slice(layer * self.share, (layer + 1) * self.share)
            return F.linear(rows[..., own], self.up.weight[:, own])
        first, second = rows.chunk(2, dim=-1)
        cos, sin = self.angles[layer].cos(), self.angles[layer].sin()
        return cast("Tensor", self.up(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)))


@contextmanager
def attached(model: PreTrainedModel, latent: Latent) -> Iterator[None]:
    """Inside, the model computes with the latent embeddings, and its parameters are among the model's own.

    So training goes on as ever, from several threads, too. What `save_pretrained` writes inside is the plain model.

    Raises:
        BenchError: the model is called without token ids.
    """
    decoder, current = cast("Any", model).get_decoder(), threading.local()

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise BenchError("Latent embeddings need token ids, not embeddings, as the model's input.")
        # The module's, not `latent`: a deep copy of the model computes with its own.
        current.latent = cast("Any", module).latent
        current.rows = current.latent.table(ids)

    def add(layer: int) -> Any:
        return lambda _, args: (args[0] + current.latent.at(layer, current.rows), *args[1:])

    decoder.latent = latent
    ignored = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = [name for name, _ in model.named_parameters() if ".latent." in name]
    hooks = [decoder.register_forward_pre_hook(remember, with_kwargs=True)]
    hooks += [layer.register_forward_pre_hook(add(place)) for place, layer in enumerate(decoder.layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del decoder.latent
        model._keys_to_ignore_on_save = ignored
