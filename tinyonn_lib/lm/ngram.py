"""The baseline that a language model must beat: an interpolated modified Kneser–Ney model over bytes.

Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1999), §3: the strongest of
the classical n-gram models, so the comparison is with the strongest control and not with a straw man.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyonn_lib.errors import BenchError

MAX_ORDER = 6
_BITS = 9  # 256 bytes and the start symbol
_START = 256
_LN2 = float(np.log(2.0))

Keys = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """Counts of one order. A key holds n symbols of nine bits, the predicted byte last; keys are sorted."""

    keys: Keys  # (n_grams,)
    counts: Floats  # (n_grams,) counts, below the highest order continuation counts
    contexts: Keys  # (n_contexts,) sorted keys without their last symbol
    totals: Floats  # (n_contexts,) sum of counts
    reserved: Floats  # (n_contexts,) sum of the discounts: the mass that the lower order gets
    discounts: Floats  # (4,) by min(count, 3); 0 for count 0


def _symbols(texts: Iterable[str], order: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """All texts as one row of symbols, each text after order−1 start symbols; True where a byte is predicted."""
    start = np.full(order - 1, _START, dtype=np.int64)
    pieces: list[NDArray[np.int64]] = []
    for text in texts:
        pieces += [start, np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)]
    symbols = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    return symbols, symbols != _START


def _keys(symbols: NDArray[np.int64], predicted: NDArray[np.bool_], order: int) -> Keys:
    """(bytes,) keys of the n-grams that end at each predicted byte."""
    keys = np.zeros(len(symbols), dtype=np.int64)
    for back in range(order):
        keys[back:] |= symbols[: len(symbols) - back] << (_BITS * back)
    return keys[predicted]


def _level(keys: Keys, counts: Floats) -> _Level:
    seen = [float(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4)]
    share = seen[0] / (seen[0] + 2 * seen[1]) if seen[0] else 0.5
    discounts = np.zeros(4)
    for k in (1, 2, 3):
        raw = k - (k + 1) * share * seen[k] / seen[k - 1] if seen[k - 1] else 0.5 * k
        discounts[k] = min(max(raw, 0.1 * k), 0.95 * k)  # small corpora can put the estimate out of range
    context_of = keys >> _BITS
    starts = np.flatnonzero(np.r_[True, context_of[1:] != context_of[:-1]])
    taken = discounts[np.minimum(counts, 3).astype(np.int64)]
    return _Level(
        keys, counts, context_of[starts], np.add.reduceat(counts, starts), np.add.reduceat(taken, starts), discounts
    )


def train(texts: Iterable[str], order: int = MAX_ORDER) -> list[_Level]:
    """Count n-grams of bytes: one level per order, 1 to `order` (at most 6).

    Raises:
        BenchError: order out of range, or no text.
    """
    if not 1 <= order <= MAX_ORDER:
        raise BenchError(f"The n-gram order is {order}: choose 1 to {MAX_ORDER}.")
    symbols, predicted = _symbols(texts, order)
    if not predicted.any():
        raise BenchError("No text to count n-grams in.")
    keys, raw = np.unique(_keys(symbols, predicted, order), return_counts=True)
    counts = raw.astype(np.float64)
    levels = []
    for n in range(order, 0, -1):
        levels.append(_level(keys, counts))
        if n > 1:  # how many different symbols precede the shorter n-gram
            keys, raw = np.unique(keys & ((1 << (_BITS * (n - 1))) - 1), return_counts=True)
            counts = raw.astype(np.float64)
    return levels[::-1]


def probabilities(levels: list[_Level], keys: Keys) -> Floats:
    """P(last byte | the order−1 symbols before), (n,), for keys of the highest order; sums to 1 over 256 bytes."""
    result = np.full(len(keys), 1.0 / 256)
    for n, level in enumerate(levels, start=1):
        short = keys & ((1 << (_BITS * n)) - 1)
        count = _look_up(level.keys, level.counts, short)
        context = short >> _BITS
        total = _look_up(level.contexts, level.totals, context)
        reserved = _look_up(level.contexts, level.reserved, context)
        own = count - level.discounts[np.minimum(count, 3).astype(np.int64)]
        known = total > 0
        result[known] = (own[known] + reserved[known] * result[known]) / total[known]
    return result


def _look_up(keys: Keys, values: Floats, wanted: Keys) -> Floats:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0.0)


def bits_per_byte(train_texts: Iterable[str], heldout_texts: Iterable[str], order: int = MAX_ORDER) -> float:
    """Held-out cost in bits per UTF-8 byte of a byte n-gram model trained on `train_texts`.

    Every byte of every text counts, the first one too; the end of a text does not.

    Raises:
        BenchError: order out of range, or no text on either side.
    """
    levels = train(train_texts, order)
    symbols, predicted = _symbols(heldout_texts, order)
    if not predicted.any():
        raise BenchError("No held-out text to judge the n-gram model on.")
    # Sorting makes the look-ups run along memory: several times faster on millions of bytes.
    keys, repeats = np.unique(_keys(symbols, predicted, order), return_counts=True)
    return float(-(np.log(probabilities(levels, keys)) * repeats).sum() / repeats.sum() / _LN2)
