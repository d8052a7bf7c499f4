from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import ngram


def distribution(texts: list[str], context: str, order: int) -> np.ndarray:
    """P(byte | context), (256,), by asking for every byte after the context."""
    symbols = [ngram._START] * (order - 1) + list(context.encode())
    past = 0
    for symbol in symbols[len(symbols) - (order - 1) :] if order > 1 else []:
        past = (past << 9) | symbol
    return ngram.probabilities(ngram.train(texts, order), (past << 9) | np.arange(256, dtype=np.int64))


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=5),
    context=st.text("abcd", max_size=8),
    order=st.integers(1, 6),
)
def test_probabilities_sum_to_one(texts: list[str], context: str, order: int) -> None:
    p = distribution(texts, context, order)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (p > 0).all()


def slow_kneser_ney(texts: list[str], context: str, byte: int, order: int, levels: list[ngram._Level]) -> float:
    """Chen & Goodman's formula by sets and loops (discounts taken from the tested model)."""
    grams = [set() for _ in range(order + 1)]  # type: ignore[var-annotated]
    counts: dict[tuple[int, ...], float] = {}
    for text in texts:
        row = [256] * (order - 1) + list(text.encode())
        for end in range(order - 1, len(row)):
            gram = tuple(row[end - order + 1 : end + 1])
            counts[gram] = counts.get(gram, 0) + 1
            for n in range(1, order + 1):
                grams[n].add(tuple(row[end - n + 1 : end + 1]))
    whole = [256] * (order - 1) + list(context.encode())
    p = 1 / 256
    for n in range(1, order + 1):
        past = tuple(whole[len(whole) - n + 1 :]) if n > 1 else ()

        def count(gram: tuple[int, ...], n: int = n) -> float:
            return counts.get(gram, 0) if n == order else sum(longer[1:] == gram for longer in grams[n + 1])

        all_counts = [count((*past, b)) for b in range(256)]
        if total := sum(all_counts):
            taken = [levels[n - 1].discounts[int(min(c, 3))] for c in all_counts]
            p = (all_counts[byte] - taken[byte] + sum(taken) * p) / total
    return p


def test_equals_the_formula_written_out() -> None:
    texts, order = ["abracadabra", "abba", "cabbage", "bra"], 3
    levels = ngram.train(texts, order)
    for context, byte in [("ab", "r"), ("", "a"), ("zz", "b"), ("abb", "a"), ("a", "z")]:
        expected = slow_kneser_ney(texts, context, ord(byte), order, levels)
        assert distribution(texts, context, order)[ord(byte)] == pytest.approx(expected, rel=1e-12)


def test_bits_per_byte_adds_up_and_learns() -> None:
    texts, heldout = ["the cat sat on the mat. " * 30], ["the mat sat on the cat. "]
    costs = [ngram.bits_per_byte(texts, heldout, order) for order in (1, 3, 6)]
    assert costs[0] > max(costs[1:])
    by_hand = -sum(math.log2(distribution(texts, heldout[0][:i], 3)[ord(c)]) for i, c in enumerate(heldout[0])) / len(
        heldout[0]
    )
    assert costs[1] == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("train", "heldout", "order"), [([], ["a"], 2), (["a"], [""], 2), (["a"], ["a"], 7)])
def test_refuses(train: list[str], heldout: list[str], order: int) -> None:
    with pytest.raises(BenchError):
        ngram.bits_per_byte(train, heldout, order)
