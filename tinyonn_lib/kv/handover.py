"""A student that goes on from a cache it did not compute, and what that costs in loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV, KVModel


def nats(student: KVModel, kv: KV | None, ids: Tensor, mask: Tensor) -> Tensor:
    """Loss of every next token when the text before it was handed over at that very place.

    At position i the student reads token i alone; keys and values of the tokens before it are `kv`'s. So every position
    is a hand-over, and one forward pass measures all of them: each token is a query of its own that sees `kv` before
    its position and itself. With the student's own cache this is the student's usual loss.

    Args:
        kv: `(batch, layers, tokens, width)` of the student's shape; entry i is seen from position i + 1 on. None: no
            cache at all, every token by itself.
        ids: `(batch, tokens)`, padded at the end.
        mask: `(batch, tokens)`, True where a token is real.

    Returns:
        `(batch, tokens - 1)`, nats; 0 where there is nothing to predict. Differentiable in `kv`.

    Raises:
        BenchError: a cache of other texts than `ids`, or that does not fit the student.
    """
    tokens = ids.shape[1]
    if kv is not None and (kv.shape[0], kv.shape[2]) != ids.shape:
        raise BenchError(
            f"This cache is of {kv.shape[0]} texts of {kv.shape[2]} tokens, to be read are {ids.shape[0]} of {tokens}: "
            "align them to the same tokens."
        )
    ids, mask = ids.to(student.device), mask.to(student.device)
    places = torch.arange(tokens, device=student.device).expand(len(ids), -1)
    logits = student.model(
        input_ids=ids,
        past_key_values=student.empty() if kv is None else student.cache(kv),
        position_ids=places,
        attention_mask=_masks(student, ids, seen=0 if kv is None else tokens),
        use_cache=True,
    ).logits
    return _cost(logits, ids, mask)


def nats_after(student: KVModel, kv: KV, ids: Tensor, mask: Tensor, at: int) -> Tensor:
    """Loss when one place hands over: `kv` holds the first `at` tokens, the student reads all others itself.

    Where RoPE's frequencies depend on the length (dynamic NTK, LongRoPE), `kv` is placed as in a text of `at` tokens.

    Returns:
        `(batch, tokens - at - 1)`, nats: of the tokens at + 1 and later; 0 where there is nothing to predict.

    Raises:
        BenchError: a place that leaves nothing to read or to predict.
    """
    if not 1 <= at <= ids.shape[1] - 2 or at > kv.shape[2]:
        raise BenchError(
            f"A hand-over after {at} of {ids.shape[1]} tokens leaves nothing to predict: choose another place."
        )
    ids, mask = ids.to(student.device), mask.to(student.device)
    places = torch.arange(at, ids.shape[1], device=student.device).expand(len(ids), -1)
    front = KV(kv.keys[:, :, :at], kv.values[:, :, :at])
    logits = student.model(
        input_ids=ids[:, at:], past_key_values=student.cache(front), position_ids=places, use_cache=True
    ).logits
    return _cost(logits, ids[:, at:], mask[:, at:])


@torch.no_grad()
def generate(student: KVModel, kv: KV, ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuation of one text of which all but the last token come from a foreign cache.

    Args:
        kv: of at least the first tokens - 1 of `ids`.
        ids: `(1, tokens)`, without padding.

    Returns:
        The new token ids, `(new_tokens,)`.
    """
    front = KV(kv.keys[:, :, : ids.shape[1] - 1], kv.values[:, :, : ids.shape[1] - 1])
    given: Any = ids.to(student.device)
    written = student.model.generate(
        given, attention_mask=torch.ones_like(given), past_key_values=student.cache(front), max_new_tokens=new_tokens,
        min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return written[0, ids.shape[1] :].cpu()


def _cost(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    logits = logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _masks(student: KVModel, ids: Tensor, seen: int) -> Any:
    """What a query may see: the foreign cache before its position (sliding layers: within the window), and itself."""
    (batch, tokens), device, dtype = ids.shape, ids.device, student.dtype
    place = torch.arange(tokens, device=device)
    behind = place[:, None] - place[None]
    window = getattr(student.config, "sliding_window", None)
    kinds = set(getattr(student.config, "layer_types", None) or ())
    wanted = {"full_attention": behind > 0}
    if window:
        wanted["sliding_attention"] = (behind > 0) & (behind < window)
    masks = {}
    for kind, allowed in wanted.items():
        both = torch.cat((allowed[:, :seen], torch.eye(tokens, dtype=torch.bool, device=device)), 1)
        blocked = torch.zeros(both.shape, dtype=dtype, device=device).masked_fill(~both, torch.finfo(dtype).min)
        masks[kind] = blocked.expand(batch, 1, -1, -1)
    if len(kinds) > 1:
        return masks
    # A model of one kind of layer, all of them sliding if it has a window (Mistral) and does not say otherwise.
    sliding = kinds == {"sliding_attention"} or (not kinds and bool(window))
    return masks["sliding_attention" if sliding else "full_attention"]
