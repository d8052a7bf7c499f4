"""Seconds from turns, by a clock of our own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tinyonn_lib.pretrain.turns import in_turns


def test_those_of_one_turn_are_compared_with_each_other() -> None:
    """The machine is ten times slower in the second half, and stumbles once within a turn."""
    busy, called = [1, 1, 1, 10, 10], []

    def arm(name: str, takes: float, stumble: int) -> Callable[[], float]:
        def run() -> float:
            called.append(name)
            turn = called.count(name) - 1
            return takes * busy[turn] * (50 if turn == stumble else 1)

        return run

    news: list[tuple[int, int, str]] = []
    found = in_turns({"one": arm("one", 2.0, 1), "two": arm("two", 6.0, 0)}, 5, lambda *each: news.append(each))
    assert found == pytest.approx({"one": 20.0, "two": 60.0})  # the median of 2, 100, 2, 20, 20 and three times that
    assert called == ["one", "two"] * 5
    assert news == [(turn, 5, "") for turn in range(1, 6)]
