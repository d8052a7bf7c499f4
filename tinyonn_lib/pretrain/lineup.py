"""Who takes part in the contest of recipes: the default, and one choice changed at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from tinyonn_lib.pretrain.recipe import RECIPES, Recipe

Rates = tuple[float, float]


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
        recipe: how it is trained.
        architecture: one of `architectures.ARCHITECTURES`, with the sizes of the contest.
        matched: its FFN is made as narrow or wide as it takes for the parameters of the dense model.
        latent: "rotated" adds the document's latent per-layer embeddings, "apart" their control (`latent.Latent`).
        rates: pairs of `lr_matrix, lr_other` that are tried first; the best on other texts is taken.
        headline: runs with every seed, the others with the first alone.
    """

    recipe: Recipe = field(default_factory=Recipe)
    architecture: str = "qwen3"
    matched: bool = False
    latent: Literal["", "rotated", "apart"] = ""
    rates: tuple[Rates, ...] = ()
    headline: bool = False

    @property
    def computation(self) -> str:
        """What its steps compute, in words: entries with the same words take the same time."""
        recipe = self.recipe
        said = [self.architecture, recipe.optimizer, recipe.layout, f"batch {recipe.batch}", recipe.precision]
        said += [f"latent {self.latent}"] * bool(self.latent) + ["matched"] * self.matched + ["MTP"] * bool(recipe.mtp)
        return ", ".join(said)


_BASE, _ADAMW = RECIPES["default"], RECIPES["adamw"]
GRID = tuple((matrix, other) for matrix in (1e-3, 3e-3, 1e-2) for other in (2e-2, 5e-2, 1e-1, 2e-1))
SINGLE = tuple((rate, rate) for rate in (1e-3, 3e-3, 1e-2))

DEFAULT = "default"
LINEUP: dict[str, Entry] = {
    DEFAULT: Entry(headline=True),
    "document masks": Entry(replace(_BASE, layout="documents"), headline=True),
    "AdamW, tuned, cosine": Entry(_ADAMW, rates=GRID, headline=True),
    "AdamW, one rate, cosine, a text a row": Entry(RECIPES["plain"], rates=SINGLE, headline=True),
    "AdamW, tuned, trapezoidal": Entry(replace(_ADAMW, schedule="trapezoidal"), rates=GRID),
    "cosine": Entry(replace(_BASE, schedule="cosine"), headline=True),
    "a text a row": Entry(replace(_BASE, layout="padded")),
    "multi-token prediction": Entry(replace(_BASE, mtp=0.3)),
    "batch ramp": Entry(replace(_BASE, ramp=0.5), headline=True),
    "MoE (Qwen3-MoE, 2 of 8)": Entry(architecture="qwen3_moe"),
    "MoE without balance loss": Entry(replace(_BASE, balance=0.0), architecture="qwen3_moe"),
    "Qwen2-MoE, shared expert": Entry(architecture="qwen2_moe"),
    "DeepSeek-V3, MLA": Entry(architecture="deepseek_v3", matched=True),
    "Gemma-3n, per-layer embeddings": Entry(architecture="gemma3n", matched=True),
    "latent embeddings, rotated over depth": Entry(matched=True, latent="rotated"),
    "latent embeddings, a table per layer": Entry(matched=True, latent="apart"),
}
"""The default, and one choice of it changed at a time; AdamW with rates of its own."""


def replace_rates(entry: Entry, rates: Rates) -> Entry:
    """An entry with other learning rates of matrices and of the rest."""
    return replace(entry, recipe=replace(entry.recipe, lr_matrix=rates[0], lr_other=rates[1]))


def around(entry: Entry, rates: Rates) -> Entry:
    """An entry that chooses again near rates that were the best of its own: those, half and twice each of them.

    One rate for everything stays one rate.
    """
    matrix, other = rates
    if all(one == two for one, two in entry.rates):
        return replace(entry, rates=((matrix, other), (matrix / 2, other / 2), (2 * matrix, 2 * other)))
    near = ((matrix / 2, other), (2 * matrix, other), (matrix, other / 2), (matrix, 2 * other))
    return replace(entry, rates=((matrix, other), *near))
