"""Made-up totals of every kind of target, for what keeps and shows them."""

from __future__ import annotations

import numpy as np

from tinyonn_lib.scan.shards import Cut
from tinyonn_lib.scan.statistics import Layout, Target, Totals

TARGETS = (
    Target("model.layers.0.mlp", "neurons", 5, 0),
    Target("model.layers.0.self_attn.q_proj", "linear", 3, 0),
    Target("model.embed_tokens", "embedding", 7, -1),
    Target("lm_head", "linear", 0, -1),
)
LAYOUT = Layout(TARGETS, rho=0.05)
CUT = Cut(samples=10, samples_sha256="x", shards=3)


def totals(seed: int) -> Totals:
    filled = Totals.zeros(LAYOUT)
    draw = np.random.default_rng(seed)
    for part in filled.sums:
        part[:] = draw.standard_normal(part.shape) * 10.0 ** draw.integers(-30, 30, (len(part), 1))
    filled.counts[:] = draw.integers(0, 10**9, filled.counts.shape)
    filled.norms[:] = draw.standard_normal(filled.norms.shape)
    return filled


def bits(found: Totals) -> bytes:
    return b"".join(part.tobytes() for part in (*found.sums, found.counts, found.norms))
