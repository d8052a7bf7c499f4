"""Exact row norms of a weight gradient that is never built: W.grad = G^T X, from the layer's X and G.

Three ways to the same number (DESIGN §4, ERRATA 000 "gradients of NF4 weights", PEERS §3):

- `gram`: K = X X^T (T x T, fp32), then r_i^2 = g_i^T K g_i. 2 T^2 (d_in + d_out) FLOP; good for short texts. K is
  shared by all layers that read the same X (gate and up).
- `tiles`: rows of G^T X, a tile at a time. 2 T d_in d_out FLOP, never more than one tile in memory.
- `grad`: from `.grad`, where the training step leaves one anyway.

Gram has a weakness that the other two do not: r^2 comes out as a difference of large numbers when the rows of
G^T X nearly cancel (|g_i| |X| much larger than r_i), and fp32 then loses digits of r_i twice as fast.
`row_squares_gram` therefore looks for such rows and computes them again by tiles.

Only bf16/fp16 *inputs* are narrow: they are widened to fp32 first, products are then exact and sums are
fp32. (Gram in bf16 has 0.8 % median error.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError

# A tile of G^T X holds at most this many fp32 values (32 MiB): big enough for full matmul speed, and it stays
# out of the way of the model's own memory.
TILE_VALUES = 8 * 1024 * 1024
# Independent gradients cancel by about T, which is in the hundreds where Gram is chosen: beyond this it is no accident.
CANCELLATION = 512.0


@dataclass(frozen=True)
class Cost:
    """FLOP of one weight's row norms by each method (multiply and add count as two)."""

    gram: float
    tiles: float


def cost(tokens: int, d_in: int, d_out: int, sharing: float = 1) -> Cost:
    """FLOP for one of `sharing` weights [d_out, d_in] that read the same X of `tokens` rows.

    With sharing=1 the two meet at T = d_in*d_out / (d_in+d_out) (DESIGN §4); sharing K moves it up, and infinity
    stands for a K that is there already.
    """
    gram = 2.0 * tokens * tokens * (d_in / sharing + d_out)
    return Cost(gram=gram, tiles=2.0 * tokens * d_in * d_out)


def choose(tokens: int, d_in: int, d_out: int, sharing: float = 1) -> str:
    """`"gram"` or `"tiles"`, whichever costs fewer FLOP (ties go to gram: it needs less memory)."""
    price = cost(tokens, d_in, d_out, sharing)
    return "gram" if price.gram <= price.tiles else "tiles"


def gram(x: Tensor) -> Tensor:
    """K = X X^T in fp32 (fp64 stays fp64). x: (T, d). Returns (T, T)."""
    x = _wide(x)
    return x @ x.t()


def row_squares_gram(k: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """Squared row norms of G^T X with K = `gram(X)` at hand; rows that cancel are computed again by tiles.

    k: (T, T), x: (T, d_in), g: (T, d_out). Returns (d_out,), >= 0. On the CPU every row whose squares cancel by
    more than `CANCELLATION` is repaired; on other devices the worst 1/64 of the rows, because asking how many
    there are would stall the step.
    """
    g = _wide(g)
    squares = (k @ g).mul_(g).sum(0)
    # r_i^2 <= |g_i|^2 |X|^2, and the rounding error of r_i^2 is a few eps of that bound.
    bound = (g * g).sum(0) * k.diagonal().sum()
    if g.device.type == "cpu":
        rows = (squares * CANCELLATION < bound).nonzero().flatten()
    else:
        rows = (squares / bound).topk(max(1, g.shape[1] // 64), largest=False).indices
    if rows.numel():
        squares[rows] = row_squares_tiles(x, g[:, rows])
    return squares.clamp_(min=0.0)  # a root must not become NaN


def row_squares_tiles(x: Tensor, g: Tensor, tile_values: int = TILE_VALUES) -> Tensor:
    """Squared row norms of G^T X, built a tile of rows at a time. x: (T, d_in), g: (T, d_out). Returns (d_out,)."""
    x, g = _wide(x), _wide(g)
    rows = max(1, tile_values // max(1, x.shape[1]))
    # X^T G, the transpose: long rows of the result run along the neurons, which is a tenth faster here.
    if rows >= g.shape[1]:
        return _squares(x.t() @ g, 0)
    return torch.cat([_squares(x.t() @ g[:, i : i + rows], 0) for i in range(0, g.shape[1], rows)])


def row_squares_grad(grad: Tensor) -> Tensor:
    """Squared row norms of a gradient that exists. grad: (d_out, ...), any float type. Returns (d_out,)."""
    # Twice as fast as squaring first along contiguous rows (and ten times slower along columns).
    return torch.linalg.vector_norm(_wide(grad).flatten(1), dim=1).square_()


def column_squares_grad(grad: Tensor) -> Tensor:
    """Squared column norms of a gradient that exists. grad: (d_out, d_in). Returns (d_in,)."""
    return _squares(_wide(grad), 0)


def embedding_squares(ids: Tensor, g: Tensor, rows: int, head: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Squared row norms of an embedding's gradient, scatter(G) + H, without building it.

    Args:
        ids: (T,) token ids.
        g: (T, d), gradient of the embedding's output.
        rows: vocabulary.
        head: where the weight is tied to the head: the head's (T', d) input X and (T', vocabulary) output gradient G',
            whose H = G'^T X is added *before* the norm (PEERS §3), and the squared row norms of H alone.

    Returns:
        (rows,) in fp32 or fp64. Asks the device nothing: there are T slots for token ids, however many occur.
    """
    g = _wide(g)
    if not len(ids):
        return g.new_zeros(rows) if head is None else head[2]
    ids, order = ids.sort()
    slot = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).long()]).cumsum(0)
    scattered = torch.zeros_like(g).index_add_(0, slot, g[order])
    row = torch.zeros_like(ids).scatter_(0, slot, ids)  # slots left over are zero and add nothing to row 0
    squares = _squares(scattered, 1)
    if head is None:
        return g.new_zeros(rows).index_add_(0, row, squares)
    x, g_head, own = head
    # |s + h|^2 = |h|^2 + s (s + 2 h), and h is needed only where s is not zero.
    mixed = _wide(g_head[:, row]).t() @ _wide(x)
    squares = (scattered * (scattered + 2.0 * mixed)).sum(1)
    return own.clone().index_add_(0, row, squares.to(own)).clamp_(min=0.0)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 or bf16 inside fp32 products, whatever the caller has allowed for his own."""
    kind = device.type
    backends: Any = torch.backends
    backend = backends.cuda.matmul if kind == "cuda" else backends.mkldnn.matmul
    allowed = backend.fp32_precision
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        if allowed in ("ieee", "none"):
            yield
            return
        backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            backend.fp32_precision = allowed


def row_norms(x: Tensor, g: Tensor, method: str = "auto") -> Tensor:
    """Norm of each row of dL/dW for y = x W^T, given X and G = dL/dY.

    Args:
        x: input of the layer, (..., d_in). All leading axes are tokens of one sample.
        g: gradient of the loss with respect to the layer's output, (..., d_out).
        method: `"auto"` (cheapest), `"gram"` or `"tiles"`.

    Returns:
        (d_out,) in fp32 (fp64 for fp64 inputs), units of the loss per weight.

    Raises:
        BenchError: unknown method, or X and G with different numbers of tokens.
    """
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if x.shape[0] != g.shape[0]:
        raise BenchError(f"X has {x.shape[0]} tokens and G {g.shape[0]}: both must come from the same forward")
    if method == "auto":
        method = choose(x.shape[0], x.shape[1], g.shape[1])
    if method == "gram":
        return row_squares_gram(gram(x), x, g).sqrt_()
    if method == "tiles":
        return row_squares_tiles(x, g).sqrt_()
    raise BenchError(f"method={method!r} for row norms: choose auto, gram or tiles")


def _squares(w: Tensor, dim: int) -> Tensor:
    return (w * w).sum(dim)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()
