"""Norms as 16 bits: a code per value, even in the logarithm, so that the *relative* error is bounded.

The document's int16 of `x * 32767` saturates above 1 and turns 1e-7 into 0 (ERRATA 004); norms span many decades.
Here code `c` in 1 … 65534 means `LOW * (HIGH / LOW) ** ((c - 1) / 65533)`, code 0 means exactly 0, code 65535 means
"not measured". Neighbours differ by a factor of 1 + 6.33e-4, so rounding is off by 3.163e-4 at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyonn_lib.errors import BenchError

LOW, HIGH = 1e-10, 1e8  # 18 decades
RELATIVE_ERROR = 3.2e-4
ZERO, FIRST, LAST, MISSING = 0, 1, 65534, 65535

_LOG_LOW = float(np.log(LOW))
_STEP = float(np.log(HIGH / LOW)) / (LAST - FIRST)

CODING: dict[str, Any] = {
    "name": "log-uint16",
    "formula": "low * (high / low) ** ((code - first) / (last - first))",
    "low": LOW,
    "high": HIGH,
    "first": FIRST,
    "last": LAST,
    "zero": ZERO,
    "not_measured": MISSING,
    "relative_error": RELATIVE_ERROR,
}
"""The coding as it stands in file headers."""


class Unstorable(BenchError):
    """A value has no code.

    Attributes:
        index: its place in the array.
    """

    def __init__(self, index: tuple[int, ...], value: float) -> None:
        why = "negative" if value < 0 else "infinite" if np.isinf(value) else f"above {HIGH:g}, the largest storable"
        super().__init__(f"is {value:g}, which is {why}")
        self.index = index


def encode(values: np.ndarray) -> np.ndarray:
    """Codes of norms.

    Args:
        values: any shape; norms >= 0, NaN where nothing was measured.

    Returns:
        uint16 of the same shape. From `LOW` to `HIGH` the relative error is at most `RELATIVE_ERROR`. 0 stays 0; what
        is above 0 and below `LOW` becomes `LOW`, because "small" must not turn into "no gradient at all".

    Raises:
        Unstorable: a value is negative, infinite or above `HIGH`.
    """
    values = np.asarray(values, dtype=np.float64)
    refused = (values < 0) | (values > HIGH)
    if refused.any():
        index = tuple(int(i) for i in np.argwhere(refused)[0])
        raise Unstorable(index, float(values[index]))
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0 and NaN: replaced below
        codes = np.clip(np.rint((np.log(values) - _LOG_LOW) / _STEP) + FIRST, FIRST, LAST)
    codes = np.where(np.isnan(values), MISSING, np.where(values == 0, ZERO, codes))
    return np.asarray(codes.astype(np.uint16))


def decode(codes: np.ndarray) -> np.ndarray:
    """Norms back from codes: float64 of the same shape, NaN where nothing was measured."""
    return np.asarray(_TABLE[codes])


def _table() -> np.ndarray:
    table = np.exp(_LOG_LOW + _STEP * (np.arange(MISSING + 1) - FIRST))
    table[ZERO], table[FIRST], table[LAST], table[MISSING] = 0.0, LOW, HIGH, np.nan
    return table


_TABLE = _table()
