"""Seeds from a seed."""

from __future__ import annotations

import numpy as np


def seed_of(seed: int, number: int) -> int:
    """A seed of its own for every number (32 bits)."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
