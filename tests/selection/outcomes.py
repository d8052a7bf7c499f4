"""Made-up outcomes whose numbers can be turned round."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from tinyonn_lib.selection import judge

NAN = float("nan")
Interval = tuple[float, float, float]
WINNING = re.compile(r"\b(beats|better than|worse than|is clearly below|outperform\w*|wins?)\b")
CLEAR, BELOW, WIDE, NONE = (0.9, 0.85, 0.95), (0.5, 0.45, 0.55), (0.7, 0.5, 0.9), (0.99, NAN, NAN)
FOLLOWS = pd.DataFrame(
    [("contrastive", w, rows, s, s - 0.1, s + 0.1)
     for w, s in (("tokens", 0.31), ("perplexity", -0.42)) for rows in ("all", "clean")],
    columns=["score", "with", "rows", "spearman", "low", "high"],
)  # fmt: skip


def gains(value: Interval, over: str = judge.UNSEEN) -> pd.DataFrame:
    """Over perplexity as it is; with the same calibration nothing is gained."""
    kinds = dict.fromkeys(("all kinds", over))
    rows = [(judge.MEAN, name, "perplexity", *value) for name in kinds]
    rows += [(judge.MEAN, name, "perplexity_fitted", 0.0, -0.1, 0.1) for name in kinds]
    return pd.DataFrame(rows, columns=["corruption", "over", "other", "difference", "low", "high"])


def known_rows(kinds: list[str], groups: int, turned: bool = False) -> pd.DataFrame:
    """`contrastive` knows trash for certain, perplexity not at all; or the other way round."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"corruption": np.repeat(["", *kinds], 40)})
    table["source"] = [f"f{n % groups}" for n in range(len(table))]
    sure = (table["corruption"] == "") + rng.uniform(0, 0.5, len(table))
    chance = rng.uniform(size=len(table))
    table["contrastive"], blind = (chance, sure) if turned else (sure, chance)
    table["perplexity"], table["combined"] = np.exp(-blind), (chance if turned else sure)
    table["perplexity_fitted"] = blind
    for name in ("literal", "centred", "log_mass", "random"):
        table[name] = rng.uniform(size=len(table))
    return table.assign(tokens=rng.integers(10, 60, len(table)))
