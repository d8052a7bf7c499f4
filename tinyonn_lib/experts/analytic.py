"""Routers that need no training: from weights, from token clusters, from calibration tokens in closed form.

A router is `(LayerEvidence, index, seed) → Score`, `index` `(experts, size)` being each expert's neurons; the k experts
with the highest scores are on, with gate 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyonn_lib.experts import controls
from tinyonn_lib.experts.evidence import LayerEvidence
from tinyonn_lib.experts.routing import energies

Score = Callable[[Tensor], Tensor]
"""FFN input x `(…, d_model)` → scores `(…, experts)`."""

Router = Callable[[LayerEvidence, Tensor, int], Score]

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 5))
"""Ridge penalties that are tried, as multiples of the inputs' mean squared singular value."""


@dataclass(frozen=True)
class Linear:
    """x Wᵀ + b: what a checkpoint's router computes.

    Attributes:
        weight: `(experts, d_model)`.
        bias: `(experts,)`.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.to(x.device).T + self.bias.to(x.device)


@dataclass(frozen=True)
class Representative:
    """|act(x·ĝ) (x·û)| of one neuron per expert.

    Attributes:
        gate, up: its weights, each row of length 1, `(experts, d_model)`.
        act: the gate's activation function.
    """

    gate: Tensor
    up: Tensor
    act: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        return (self.act(x @ self.gate.to(x.device).T) * (x @ self.up.to(x.device).T)).abs()


def random(evidence: LayerEvidence, index: Tensor, seed: int) -> Linear:
    """Normal rows, as the document has it; another draw in every layer."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + evidence.layer)  # on the CPU: every device alike
    rows = torch.randn(len(index), evidence.gate.shape[1], generator=generator)
    return Linear(rows, torch.zeros(len(index)))


def gate_mean(evidence: LayerEvidence, index: Tensor, seed: int) -> Linear:
    """The mean gate row of the expert's neurons, as it is (ExpertWeaver, arXiv:2602.15521, eq. 11)."""
    return Linear(evidence.gate[index].mean(1).float(), torch.zeros(len(index)))


def representative(evidence: LayerEvidence, index: Tensor, seed: int) -> Representative:
    """The neuron whose markers are nearest to the mean of its expert's (CMoE, arXiv:2502.04416).

    Normalised rows and the absolute value are of the authors' code; the paper's formula has neither.
    """
    chosen = _nearest(evidence, index)
    gate, up = (torch.nn.functional.normalize(w[chosen].float(), dim=1) for w in (evidence.gate, evidence.up))
    return Representative(gate, up, evidence.act)


def representative_gate(evidence: LayerEvidence, index: Tensor, seed: int) -> Linear:
    """The linear part of CMoE's router, which a checkpoint can hold: its neurons' gate rows, each of length 1."""
    rows = evidence.gate[_nearest(evidence, index)].float()
    return Linear(torch.nn.functional.normalize(rows, dim=1), torch.zeros(len(index)))


def _nearest(evidence: LayerEvidence, index: Tensor) -> Tensor:
    """Of each expert the neuron whose markers are nearest to the mean of its expert's, `(experts,)`."""
    marked = controls.marks(evidence, controls.MARKERS)
    chosen = []
    for neurons in index:
        own = marked[:, neurons.numpy()]
        # Distance to the mean, times size, less what all have in common: whole numbers, so that ties are ties.
        distance = len(neurons) * own.sum(0) - 2 * (own.T @ own.sum(1))
        chosen.append(neurons[distance.argmin()])
    return torch.stack(chosen)


def token_centres(evidence: LayerEvidence, index: Tensor, seed: int) -> Linear:
    """x · the centre of the tokens for which the expert was made (LLaMA-MoE v2, arXiv:2411.15708).

    The same centres as in `controls.llama_moe_v2` with this seed; over other partitions they mean nothing.
    """
    return Linear(controls.token_clusters(evidence, len(index), seed).float(), torch.zeros(len(index)))


def static(evidence: LayerEvidence, index: Tensor, seed: int) -> Linear:
    """Expert 0 first, whatever the token: static pruning, if the partition is sorted best first."""
    return Linear(torch.zeros(len(index), evidence.gate.shape[1]), -torch.arange(len(index)).float())


def ridge(evidence: LayerEvidence, index: Tensor, seed: int) -> Linear:
    """Ridge regression from x to √‖W_down,e h_e‖, in closed form: the linear map that best foresees the oracle router.

    The root makes few loud tokens count less: over the norm itself, its square, its logarithm, its share of the
    token's sum and a top-k indicator it loses least of the layer's output at equal k, or as little as the best.
    One penalty for all experts, the one of `STRENGTHS` with the least squared leave-one-token-out error.
    """
    middle, left, squares = evidence.spectrum
    x = evidence.x.double() - middle
    target = energies(index, evidence.down)(evidence.h).double() ** 0.25
    level = target.mean(0)
    target = target - level
    inside = left.T @ target

    def error(strength: float) -> float:
        shrunk = left * (squares / (squares + strength))
        # The intercept is fitted, too: 1/T of each token's own leverage.
        own = ((shrunk * left).sum(1) + 1 / len(x)).clamp(max=1 - 1e-9)
        return float((((target - shrunk @ inside) / (1 - own)[:, None]) ** 2).sum())

    scale = float((x**2).sum()) / min(x.shape)
    best = min((strength * scale for strength in STRENGTHS), key=error)
    weight = (x.T @ (left @ (inside / (squares + best)[:, None]))).T
    return Linear(weight.float(), (level - weight @ middle).float())
