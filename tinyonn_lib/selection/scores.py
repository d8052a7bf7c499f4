"""Scores of a text from the raw logits of its routers: the document's own, and ones that a model determines.

Some experts are declared trash, the others good. Document 001 sums the good ones' raw logits. But one vector added to
all rows of a router changes no gate of a softmax, only that sum (ERRATA 001): the other scores do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError

SCORES = ("literal", "centred", "log_mass", "contrastive")

RANKINGS: dict[str, tuple[str, int]] = {
    "literal": ("literal", 1),
    "centred": ("centred", 1),
    "log_mass": ("log_mass", 1),
    "contrastive": ("contrastive", 1),
    "combined": ("combined", 1),
    "random": ("random", 1),
    "length": ("tokens", -1),
    "longest": ("tokens", 1),
    "perplexity": ("perplexity", -1),
    "perplexity_fitted": ("perplexity_fitted", 1),
    "ifd": ("ifd", 1),
}
"""Name of a ranking → the column it sorts by, and the sign that makes greater better."""


def token_scores(logits: Tensor, trash: Tensor, unit: float) -> dict[str, Tensor]:
    """Scores of every token in one layer, of the same shape without the last dimension.

    `literal` is Σ_good z, document 001. With l = (z − mean z) / unit: `centred` is Σ_good l, `log_mass` the log
    probability of the good experts under a softmax, `contrastive` their log odds against trash.

    Args:
        logits: raw, z, `(…, E)`.
        trash: which experts are trash, `(E,)`, boolean; at least one is and one is not.
        unit: the layer's logits are measured in it (`calibrate.units_of`): the softmax meant here is sharper than that
            of a model whose gates are one. 1 gives the model's own.
    """
    good = (~trash).to(logits.dtype)
    level = logits - logits.mean(-1, keepdim=True)
    scaled = level / unit
    # Centred first: a common part, however large, then costs no digits.
    contrastive = _among(scaled, ~trash) - _among(scaled, trash)
    return {
        "literal": logits @ good,
        "centred": scaled @ good,
        "log_mass": F.logsigmoid(contrastive),  # log(g / (g + t)) of log(g / t)
        "contrastive": contrastive,
    }


def _among(logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.masked_fill(~chosen, -torch.inf).logsumexp(-1)


def text_scores(
    logits: Sequence[Tensor], mask: Tensor, trash: Sequence[Tensor], units: Sequence[float]
) -> dict[str, Tensor]:
    """Scores of every text, `(B,)`: the mean over its tokens, then over layers. Differentiable.

    Args:
        logits: per layer, raw, `(B·T, E)`.
        mask: which positions are tokens of the text, neither padding nor start, `(B, T)`, boolean. A text without any
            is NaN.
        trash: per layer, `(E,)`, boolean.
        units: per layer.
    """
    tokens = mask.sum(1)
    totals: dict[str, Tensor] = {}
    for layer, chosen, unit in zip(logits, trash, units, strict=True):
        for name, score in token_scores(layer, chosen.to(layer.device), unit).items():
            # Sums in float64: a long text's last tokens count as much as its first. NaN of padding goes nowhere.
            total = torch.where(mask, score.view(mask.shape), 0).sum(1, dtype=torch.float64) / tokens
            totals[name] = totals[name] + total if name in totals else total
    return {name: (total / len(logits)).float() for name, total in totals.items()}


def trash_experts(experts: Sequence[int], ratio: float, gap: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Which experts of each layer are trash, `(E,)`, boolean: ⌊ratio · E⌋ of them.

    Args:
        experts: E of each layer.
        ratio: share of trash; document 001: 0.125.
        gap: per layer `(E,)`, how much more an expert is called on corrupted text: those with the greatest are trash.
            None: the last ones, as the document has it.

    Raises:
        BenchError: no expert would be trash, or none good.
    """
    found = []
    for layer, count in enumerate(experts):
        trash = math.floor(ratio * count + 1e-9) if math.isfinite(ratio) else 0  # 0.29 · 100 is 28.999…
        if not 0 < trash < count:
            raise BenchError(
                f"trash_expert_ratio {ratio} of {count} experts (layer {layer}) leaves no trash or no good expert: "
                f"choose between {1 / count:.3g} and {(count - 1) / count:.3g}."
            )
        chosen = torch.zeros(count, dtype=torch.bool)
        if gap is None:
            chosen[-trash:] = True
        else:
            chosen[gap[layer].detach().cpu().argsort(descending=True, stable=True)[:trash]] = True
        found.append(chosen)
    return found
