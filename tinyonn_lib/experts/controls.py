"""Partition methods that S_p must beat: random, by weights, by activity, static pruning, and four published splits.

Each is `(LayerEvidence, Shape, seed) → Labels` and says in its docstring where it departs from its source.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.balanced import assign_balanced, balanced_kmeans
from tinyonn_lib.experts.evidence import LayerEvidence
from tinyonn_lib.experts.partition import SHARED, Labels, Shape

Floats = NDArray[np.float64]

MARKERS = 10
"""Largest |h| that count as active on a token: K_a of the experiments of CMoE (arXiv:2502.04416)."""

BATCH = 8
"""Tokens within which two neurons fire together: MoEfication's code (arXiv:2110.01786)."""

ACTIVE = 0.05
"""Share of neurons that count as firing on a token. MoEfication's ReLU models say it themselves; SiLU has no zero."""

SUBSPACE, ROUNDS = 16, 12
"""Spare directions and rounds of the subspace iteration that finds leading eigenvectors."""

SPECIALISED = 0.6
"""Coefficient of variation above which a neuron is specialised: τ of ExpertWeaver (arXiv:2602.15521, §4.1)."""

LEAST_SHARED, MOST_SHARED = 0.2, 0.7
"""α_min and α_max of ExpertWeaver (§4.1)."""


def with_shared(values: Floats, shape: Shape, cluster: Callable[[Labels], Labels]) -> Labels:
    """Share the neurons with the highest `values` and divide the others.

    Args:
        values: one per neuron; of equal ones the first neuron counts as the higher.
        cluster: the neurons that are left, ascending → the expert of each, `shape.size` neurons per expert.
    """
    labels = np.full(len(values), SHARED, np.int64)
    rest = np.sort(np.argsort(-values, kind="stable")[shape.shared :])
    labels[rest] = cluster(rest)
    return labels


def best_first(values: Floats, shape: Shape) -> Labels:
    """Cut the neurons into slices by falling value: first the shared ones, then expert 0 and so on."""

    def cut(rest: Labels) -> Labels:
        labels = np.empty(len(rest), np.int64)
        labels[np.argsort(-values[rest], kind="stable")] = np.arange(len(rest)) // shape.size
        return labels

    return with_shared(values, shape, cut)


def random(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Shuffle and cut; the shared neurons are random, too."""
    return best_first(np.random.default_rng([seed, evidence.layer]).random(len(evidence.gate)), shape)


def weight_kmeans(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Balanced k-means of the gate rows, each of length 1 (MoEfication's parameter clustering, arXiv:2110.01786).

    The paper shares nothing. Shared here: the largest product of the neuron's three weight norms, for this control
    looks at weights only.
    """
    rows = torch.nn.functional.normalize(evidence.gate.double(), dim=1).numpy()
    norms = evidence.gate.norm(dim=1) * evidence.up.norm(dim=1) * evidence.contribution
    return with_shared(norms.double().numpy(), shape, lambda rest: balanced_kmeans(rows[rest], shape.experts, seed))


def marks(evidence: LayerEvidence, top: int) -> csr_array:
    """1 where a neuron is among the `top` largest |h| of a token, `(T, d_ffn)`."""
    columns = evidence.markers(top).sort(dim=1).values.numpy()
    tokens, width = columns.shape
    values = np.ones(columns.size)
    return csr_array((values, columns.ravel(), np.arange(tokens + 1) * width), shape=(tokens, len(evidence.gate)))


def coactivation(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Neurons that fire together (MoEfication's co-activation graph, arXiv:2110.01786); shared: those that fire most.

    The graph's parts come from a spectral embedding and balanced k-means instead of METIS and random moves, and a
    neuron fires when it is in the token's top `ACTIVE` instead of above zero.
    """
    fires = marks(evidence, max(1, round(ACTIVE * len(evidence.gate))))

    def cluster(rest: Labels) -> Labels:
        points = spectral(together(fires[:, rest]), shape.experts, seed)
        return balanced_kmeans(points, shape.experts, seed)

    return with_shared(fires.sum(0), shape, cluster)


def together(fires: csr_array) -> NDArray[np.float32]:
    """In how many batches of `BATCH` tokens two neurons fire on the same token, `(T, n) → (n, n)`, diagonal 0."""
    adjacency = np.zeros((fires.shape[1],) * 2, np.float32)
    for start in range(0, fires.shape[0], BATCH):
        batch = fires[start : start + BATCH]
        pairs = (batch.T @ batch).tocoo()
        adjacency[pairs.coords] += 1
    np.fill_diagonal(adjacency, 0)
    return adjacency


def spectral(adjacency: NDArray[np.float32], dimensions: int, seed: int) -> Floats:
    """Each node's row of the leading eigenvectors of D^-½ A D^-½, of length 1 (Ng, Jordan and Weiss 2001).

    `(n, n) → (n, dimensions)`. By subspace iteration: exact for small graphs, close enough for k-means in large ones,
    and indifferent to nodes without edges, whose rows are 0.
    """
    degree = torch.from_numpy(adjacency.sum(0))
    scale = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), 0.0)
    graph = torch.from_numpy(adjacency) * scale * scale[:, None]
    width = min(len(graph), dimensions + SUBSPACE)
    basis = torch.randn(len(graph), width, generator=torch.Generator().manual_seed(seed))
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(graph @ basis).Q
    _, rotation = torch.linalg.eigh(basis.T @ graph @ basis)
    leading = (basis @ rotation).flip(1)[:, :dimensions] * (degree > 0)[:, None]
    return torch.nn.functional.normalize(leading.double(), dim=1).numpy()


def wanda(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Best first by ‖h_i‖₂·‖W_down[:, i]‖₂ over the scan's tokens (Wanda, arXiv:2306.11695, per neuron)."""
    squares = evidence.rows["act_sq"].to_numpy(np.float64)
    return best_first(np.sqrt(squares) * evidence.contribution.double().numpy(), shape)


def fluctuation(rows: pd.DataFrame, squares: Floats) -> Floats:
    """Var(h_i)·‖W_down[:, i]‖² over the scan's tokens: FLAP's WIFV metric (An et al. 2024, arXiv:2312.11983).

    Args:
        rows: the scan's statistics of a layer, in the neurons' order.
        squares: ‖W_down[:, i]‖², `(d_ffn,)`, as is the result.
    """
    mean = rows["act_mean"].to_numpy(np.float64)
    return (rows["act_sq"].to_numpy(np.float64) - mean**2).clip(min=0) * squares


def flap_static(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Best first by FLAP's `fluctuation`."""
    return best_first(fluctuation(evidence.rows, evidence.contribution.double().numpy() ** 2), shape)


def cmoe(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Shared: most often among the `MARKERS` largest |h|; experts: neurons marked on the same tokens (CMoE,
    arXiv:2502.04416).

    The most often marked of the others are the centroids of one balanced assignment at Hamming distance: the paper
    iterates, its code does not.
    """
    marked = marks(evidence, MARKERS)
    counts = marked.sum(0)

    def cluster(rest: Labels) -> Labels:
        leaders = rest[np.argsort(-counts[rest], kind="stable")[: shape.experts]]
        both = (marked[:, rest].T @ marked[:, leaders]).toarray()
        return assign_balanced(counts[rest, None] + counts[leaders] - 2.0 * both, shape.size)

    return with_shared(counts, shape, cluster)


def profiles(evidence: LayerEvidence) -> Floats:
    """Each neuron's mean |act(gate)| per sample, `(d_ffn, samples)` (ExpertWeaver, §3.1 and Fig. 3)."""
    return evidence.by_sample(evidence.gates.abs()).T.double().numpy()


def expertweaver(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Shared: the highest mean |act(gate)|; experts: balanced k-means of the profiles (ExpertWeaver,
    arXiv:2602.15521, §3.3). How much is shared is `shape`'s; what the paper would share says `expertweaver_shared`.
    """
    rows = profiles(evidence)
    return with_shared(rows.mean(1), shape, lambda rest: balanced_kmeans(rows[rest], shape.experts, seed))


def expertweaver_shared(evidence: LayerEvidence) -> float:
    """The share of the layer that ExpertWeaver makes shared: the less, the more neurons vary between samples (§3.2)."""
    rows = profiles(evidence)
    variation = rows.std(1) / (rows.mean(1) + 1e-12)
    return MOST_SHARED - (MOST_SHARED - LEAST_SHARED) * float((variation > SPECIALISED).mean())


def token_clusters(evidence: LayerEvidence, experts: int, seed: int) -> Tensor:
    """Centres of balanced k-means of the FFN's inputs, `(experts, d_model)`: LLaMA-MoE v2's router (arXiv:2411.15708).

    The authors let clusters differ by 40 %; here they are equal.

    Raises:
        BenchError: fewer tokens than experts.
    """
    if (experts, seed) in evidence.token_centres:
        return evidence.token_centres[experts, seed]
    x = evidence.x
    if len(x) < experts:
        raise BenchError(
            f"{len(x)} calibration tokens cannot be divided among {experts} experts: use more tokens or fewer experts."
        )
    labels = torch.from_numpy(balanced_kmeans(x.numpy(), experts, seed))
    centres = torch.stack([x[labels == e].double().mean(0) for e in range(experts)])
    return evidence.token_centres.setdefault((experts, seed), centres)


def importance(evidence: LayerEvidence, centres: Tensor) -> Floats:
    """Mean |h·∂L/∂h| of each neuron over the tokens that each centre's router row wins, `(experts, d_ffn)`."""
    winner = (evidence.x.double() @ centres.T).argmax(1)
    chosen = torch.nn.functional.one_hot(winner, len(centres)).float()
    sums = chosen.T @ evidence.tokens.saliency.float()
    return (sums / chosen.sum(0).clamp(min=1)[:, None]).double().numpy()


def llama_moe_v2(evidence: LayerEvidence, shape: Shape, seed: int) -> Labels:
    """Each expert takes the neurons that matter most to its cluster of tokens (LLaMA-MoE v2, arXiv:2411.15708).

    As in the authors' code: the largest importance of all is served first, while its expert has room; shared are
    the neurons that most experts would want among their first `size`.
    """
    scores = importance(evidence, token_clusters(evidence, shape.experts, seed))

    def deal(rest: Labels) -> Labels:
        labels = np.full(len(rest), -1, np.int64)
        room = [shape.size] * shape.experts
        for pair in np.argsort(-scores[:, rest], axis=None, kind="stable").tolist():
            expert, neuron = divmod(pair, len(rest))
            if room[expert] and labels[neuron] < 0:
                labels[neuron] = expert
                room[expert] -= 1
        return labels

    return with_shared(_wanted(scores, shape), shape, deal)


def _wanted(scores: Floats, shape: Shape) -> Floats:
    """1 for the `shape.shared` neurons that are shared, else 0: round by round those in the most experts' best `size`
    that are still free, in order of their numbers where fewer are needed."""
    order = np.argsort(-scores, axis=1, kind="stable")
    shared = np.zeros(scores.shape[1])
    while left := shape.shared - int(shared.sum()):
        free = shared[order] == 0
        votes = np.bincount(order[free & (free.cumsum(1) <= shape.size)], minlength=len(shared))
        shared[np.flatnonzero(votes == votes.max())[:left]] = 1
    return shared
