"""Random texts for tiny models."""

from __future__ import annotations

import pandas as pd
import torch


def drawn(count: int, seed: int = 0, longest: int = 12, groups: int = 3) -> pd.DataFrame:
    """Of 2 to `longest` tokens, from `groups` files in turn: rows of `lm.samples.draw`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]
    return pd.DataFrame({"ids": ids, "text": "", "source": [f"file {n % groups}" for n in range(count)]})
