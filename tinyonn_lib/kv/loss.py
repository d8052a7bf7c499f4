"""How far a projected cache is from the student's own."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import as_kv

Measure = Literal["mse", "cosine", "normalised"]


def compute_kv_loss(
    student_kv: Any, aligned_kvs: Any, measure: str = "mse", heads: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Distance of two caches of the student's shape, keys plus values (document 003, §Training script).

    Args:
        student_kv: the student's own, which is what is aimed at; detach it unless the student trains, too.
        aligned_kvs: of `KVDimensionProjector.project_multi_teacher_kv`.
        measure: "mse": mean squared error; "cosine": 1 − cosine of each head's vector, mean; "normalised": squared
            error in units of the own cache's variance within each layer and head, so that all heads count alike.
        heads: KV heads of the student, for the last two.
        mask: `(batch, tokens)`, True (or 1) where a token is real.

    Raises:
        BenchError: shapes that do not match, an unknown measure, heads that do not divide the width, or no real token.
    """
    own, other = as_kv(student_kv), as_kv(aligned_kvs)
    if own.shape != other.shape:
        raise BenchError(
            f"The caches differ in (batch, layers, tokens, width): {tuple(own.shape)} and {tuple(other.shape)}."
        )
    if measure not in get_args(Measure):
        raise BenchError(f"Unknown measure '{measure}': choose one of {', '.join(get_args(Measure))}.")
    if heads < 1 or own.shape[-1] % heads:
        raise BenchError(f"A width of {own.shape[-1]} does not divide into {heads} heads.")
    wanted = (own.shape[0], own.shape[2])
    # A tokenizer's mask holds numbers, which as an index would pick texts.
    real = torch.ones(wanted, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != wanted:
        raise BenchError(f"The mask is {tuple(real.shape)} for caches of {wanted} (batch, tokens).")
    if not real.any():
        raise BenchError("No real token in this batch: the mask is False everywhere.")
    total = own.keys.new_zeros(())
    for mine, theirs in ((own.keys, other.keys), (own.values, other.values)):
        # (tokens, layers, heads, head_dim), real ones alone
        one, two = (t.transpose(1, 2)[real.to(t.device)].unflatten(-1, (heads, -1)).float() for t in (mine, theirs))
        if measure == "cosine":
            total = total + (1 - torch.cosine_similarity(one, two, dim=-1)).mean()
        elif measure == "mse":
            total = total + (one - two).square().mean()
        else:
            spread = one.detach().var((0, 3), correction=0, keepdim=True).clamp_min(1e-12)
            total = total + ((one - two).square() / spread).mean()
    return total
