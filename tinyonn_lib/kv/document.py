"""What document 003 says of its projector in figures, to stand next to what `sweep` measures."""

from __future__ import annotations

import pandas as pd

_NAN = float("nan")
_SAID = (5120, 1536)
_TRUE = (1024, 256)
"""Widths of the cache: the document's for Qwen-14B → Qwen-1.5B, and Qwen2.5's: KV heads × head_dim."""

_LAYERNORM = (
    "Run again, 0.19 without and 0.026 with it, at one learning rate for both, on a target that was noise. "
    "The ratio is not said."
)


def document() -> pd.DataFrame:
    """The document's benchmark (003, §Benchmark) and its test of LayerNorm (§Why LayerNorm).

    Returns:
        `configuration, kind, mlp_ratio, layernorm` as in the table of `sweep`, `parameters`, `steps_to_target` (NaN:
        "40+", or not said), `loss`, `slower` (its "training speed"), and `fact`: what is known of the claim.
    """
    rows = [
        ("Linear", "linear", _NAN, None, 7.9e6, _NAN, 6.09, 1.0, _fact(None)),
        ("MLP 0.5x", "mlp", 0.5, True, 17e6, 25.0, 0.12, 1.2, _fact(0.5)),
        ("MLP 1.0x", "mlp", 1.0, True, 34e6, 15.0, 0.05, 1.5, _fact(1.0)),
        ("MLP 2.0x", "mlp", 2.0, True, 68e6, 12.0, 0.03, 2.0, _fact(2.0)),
        ("MLP without LayerNorm, step 40", "mlp", _NAN, False, _NAN, _NAN, 6.09, _NAN, _LAYERNORM),
        ("MLP with LayerNorm, step 40", "mlp", _NAN, True, _NAN, _NAN, 0.05, _NAN, _LAYERNORM),
    ]
    names = ("configuration", "kind", "mlp_ratio", "layernorm", "parameters", "steps_to_target", "loss", "slower")
    return pd.DataFrame(rows, columns=[*names, "fact"])


def _fact(ratio: float | None) -> str:
    one, true = (_weights(*widths, ratio) / 1e6 for widths in (_SAID, _TRUE))
    slower = "" if ratio is None else " Its training speed is a step's time: a higher figure is slower."
    return (
        f"{one:.1f} M is one adapter; keys and values need {2 * one:.1f} M. Qwen2.5's caches are {_TRUE[0]} and "
        f"{_TRUE[1]} wide, not {_SAID[0]} and {_SAID[1]}: {2 * true:.2f} M.{slower}"
    )


def _weights(width: int, student: int, ratio: float | None) -> int:
    """Of one adapter's matrices; no ratio: a linear one."""
    return width * student if ratio is None else round(ratio * width) * (width + student)
