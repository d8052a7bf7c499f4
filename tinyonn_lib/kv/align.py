"""Which teacher layers a student layer reads, and which teacher tokens stand for a student token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV

Spans = Sequence[tuple[int, int]]
"""Per token its characters in the text, from (included) to (excluded); (n, n) where it stands for none."""


def by_depth(teacher_layers: int, student_layers: int, sources: int = 1) -> list[list[int]]:
    """For each student layer the teacher layers at the same share of the depth.

    First meets first and last meets last; with `sources` > 1 those around, as many as the teacher has at most.

    Returns:
        Per student layer its teacher layers, ascending.
    """
    scale = (teacher_layers - 1) / max(1, student_layers - 1)
    return [_around(layer * scale, teacher_layers, sources) for layer in range(student_layers)]


def by_similarity(similarity: Tensor, sources: int = 1) -> list[list[int]]:
    """For each student layer the teacher layers most like it.

    Args:
        similarity: `(student layers, teacher layers)`, from `cka`.
    """
    count = min(sources, similarity.shape[1])
    return [sorted(row.topk(count).indices.tolist()) for row in similarity]


def cka(teacher: KV, student: KV, tokens: int = 4096) -> Tensor:
    """Linear centred kernel alignment of every pair of layers (Kornblith et al. 2019), mean over keys and values.

    Args:
        teacher, student: caches of the same tokens.
        tokens: how many of them to look at, at most, evenly spread.

    Returns:
        `(student layers, teacher layers)`, float64, 0 to 1.
    """
    sides = []
    for mine, theirs in ((student.keys, teacher.keys), (student.values, teacher.values)):
        one, other = (_columns(t, tokens) for t in (mine, theirs))
        # One student layer at a time: all pairs at once take gigabytes for the caches of real models.
        cross = torch.stack([torch.einsum("nw,mnv->mwv", layer, other).square().sum((1, 2)) for layer in one])
        norms = [torch.einsum("lnw,lnv->lwv", t, t).square().sum((1, 2)).sqrt() for t in (one, other)]
        sides.append(cross / (norms[0][:, None] * norms[1][None]).clamp_min(1e-300))
    return (sides[0] + sides[1]) / 2


def _columns(side: Tensor, tokens: int) -> Tensor:
    """`(batch, layers, tokens, width)` as centred `(layers, n, width)` in float64."""
    flat = side.transpose(0, 1).flatten(1, 2)
    # Not every n-th: texts of a multiple of n tokens would show the same few positions again and again.
    places = torch.linspace(0, flat.shape[1] - 1, min(tokens, flat.shape[1]), dtype=torch.float64).round().long()
    flat = flat[:, places.to(flat.device)].double()
    return flat - flat.mean(1, keepdim=True)


def _around(place: float, layers: int, sources: int) -> list[int]:
    nearest = sorted(range(layers), key=lambda layer: (abs(layer - place), layer))
    return sorted(nearest[: min(sources, layers)])


def token_weights(student: Spans, teacher: Spans) -> Tensor:
    """How much of each teacher token goes into each student token, for texts that two tokenizers cut differently.

    A student token takes the mean of the teacher tokens that share characters with it, weighted by how many, of those
    that do not reach beyond its end: whoever has read up to there has seen no more. Where there are none (the teacher's
    token is longer, or a token stands for no character) it takes the last teacher token that ends before, and where
    the teacher has not ended any token yet, nothing. Two byte-level tokens that share one character count as one.

    Args:
        student, teacher: character spans of the tokens of one text.

    Returns:
        `(student tokens, teacher tokens)`; rows sum to 1, or to 0 for nothing.

    Raises:
        BenchError: a side without tokens.
    """
    if not student or not teacher:
        raise BenchError("A text without tokens cannot be aligned: leave empty texts out.")
    (begin, end), (first, last) = (torch.tensor(spans).T for spans in (student, teacher))
    begin, end, reached = begin[:, None], end[:, None], end.cummax(0).values[:, None]
    shared = (torch.minimum(end, last) - torch.maximum(begin, first)).clamp_min(0) * (last <= end)
    seen = (last <= reached).sum(1)  # teacher tokens end in the order in which they stand
    lonely = (shared.sum(1) == 0) & (seen > 0)
    weights = shared.double()
    weights[lonely, seen[lonely] - 1] = 1.0
    return (weights / weights.sum(1, keepdim=True).clamp_min(1.0)).float()


def onto_tokens(kv: KV, weights: Tensor) -> KV:
    """A teacher's cache as one entry per student token.

    Args:
        kv: `(batch, layers, teacher tokens, width)`.
        weights: `(batch, student tokens, teacher tokens)`, of `token_weights` padded with zeros.
    """
    each = weights.to(kv.keys)[:, None]
    return KV(each @ kv.keys, each @ kv.values)
