"""A router as a trainable module: how it begins, what it computes, what a checkpoint holds of it (document 000 §3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import analytic
from tinyonn_lib.experts.evidence import LayerEvidence
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.routing import GATES

INITS: dict[str, analytic.Router] = {
    "random": analytic.random,
    "centroid": analytic.gate_mean,
    "analytic": analytic.ridge,
    "cmoe": analytic.representative_gate,
}
"""How a router may begin: as the document has it, ExpertWeaver's mean gate rows, ridge regression in closed form, and
the gate rows of CMoE's representative neurons."""

GAIN = 0.01
"""How much of a router's logits its gates see at first: they begin close to 1."""


class Router(nn.Module):
    """One layer's linear router, as its family of checkpoints computes it.

    The choice is by `x Wᵀ + b`, in units of its own spread over a token's experts, so that temperatures and learning
    rates mean the same in every model. The gates see `gain · x Wᵀ`; classes with softmax gates have no b.

    Attributes:
        weight: `(experts, d_model)`.
        bias: `(experts,)`, or None.
        gain: logarithm of the gain, `()`.
        gates: key of `routing.GATES`.
    """

    def __init__(self, start: analytic.Linear, x: Tensor, gates: str, gain: float = GAIN) -> None:
        """
        Args:
            start: what to begin with; what all its experts have in common changes no choice and is taken out.
            x: inputs of the layer on calibration text, `(tokens, d_model)`, by which the spread is measured.

        Raises:
            BenchError: a router that tells no expert from another, or is not finite.
        """
        super().__init__()
        weight, bias = (t.detach().float().cpu() - t.detach().float().cpu().mean(0) for t in (start.weight, start.bias))
        if gates != "sigmoid":
            bias = torch.zeros_like(bias)
        spread = float((x.float().cpu() @ weight.T + bias).std(-1).mean())
        level = float((x.float().cpu() @ start.weight.detach().float().cpu().T).abs().mean())
        if not (math.isfinite(spread) and spread > 1e-6 * level):
            raise BenchError("The initial router scores all experts alike, or not finitely: choose another init.")
        self.gates = gates
        self.weight = nn.Parameter(weight / spread)
        self.bias = nn.Parameter(bias / spread) if gates == "sigmoid" else None
        self.gain = nn.Parameter(torch.tensor(math.log(gain)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `(…, d_model)` → what to choose by, the gates' factors, and the logits they see, each `(…, experts)`."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would choose others than the exported router
            score, gain = x.float() @ self.weight.T, self.gain.exp()
        logits = gain * score
        if self.bias is None:
            return score, GATES[self.gates](logits), logits
        # The family orders by σ(logit) + bias; in units of the score that is this.
        choice = (logits.sigmoid() - 0.5) * (4 / gain) + self.bias
        return choice, GATES[self.gates](logits), logits

    def exported(self) -> tuple[Tensor, Tensor | None]:
        """Rows `(experts, d_model)` and selection biases `(experts,)`, as `export` writes them."""
        gain = self.gain.detach().exp()
        return gain * self.weight.detach(), None if self.bias is None else gain / 4 * self.bias.detach()

    def exported_threshold(self, threshold: Tensor | float) -> float:
        """A threshold of the choice, as one of what the exported router orders by: σ(logit) + bias, or the logit."""
        gain = float(self.gain.detach().exp())
        return float(threshold) * gain if self.bias is None else 0.5 + float(threshold) * gain / 4

    @torch.no_grad()
    def revive(self, expert: int, x: Tensor, k: int) -> None:
        """Move an expert so that it is chosen on an average share, k/experts, of these inputs `(tokens, d_model)`."""
        choice = self(x)[0]
        border = choice.topk(k, dim=-1).values[:, -1]
        missing = border - choice[:, expert]
        rank = max(1, round(len(x) * k / choice.shape[1]))
        if self.bias is not None:
            self.bias[expert] += missing.kthvalue(rank).values
        else:
            mean = x.float().mean(0)
            along = x.float() @ mean
            reach = torch.where(along > 0, missing / along, torch.inf)
            self.weight[expert] += reach.kthvalue(min(rank, int((along > 0).sum()))).values * mean


def build(
    evidence: Iterable[LayerEvidence], partition: Partition, init: str, gates: str, seed: int, device: torch.device
) -> nn.ModuleList:
    """A `Router` per layer that begins as `INITS[init]` says.

    Raises:
        BenchError: unknown init.
    """
    if init not in INITS:
        raise BenchError(f"Unknown init '{init}' of a router: choose one of {', '.join(INITS)}.")
    made = []
    for layer, index in zip(evidence, partition.experts, strict=True):
        start = INITS[init](layer, index, seed)
        assert isinstance(start, analytic.Linear)
        made.append(Router(start, layer.x, gates))
    return nn.ModuleList(made).to(device)


def exported(made: Iterable[Any]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Rows and selection biases of all layers, for `export(routers=…, biases=…)`."""
    both = [router.exported() for router in made]
    biases = [bias for _, bias in both if bias is not None]
    return [rows for rows, _ in both], biases or None
