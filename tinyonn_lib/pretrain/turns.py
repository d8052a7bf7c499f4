"""How long several trainings take for the same, measured on a machine that others use, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

from tinyonn_lib.progress import Progress


def in_turns(arms: Mapping[str, Callable[[], float]], rounds: int, told: Progress | None = None) -> dict[str, float]:
    """Seconds of each arm: they take turns, and those of one turn are compared with each other.

    A machine that is busy is slower for a while, and then for all of them. So an arm's seconds are the first one's
    median, times the median of its ratios to the first one in the same turn.

    Args:
        arms: name → runs once and returns its seconds. Should have run before, to warm caches.
        told: called with (turns done, all, "").
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name, arm in arms.items():
            seconds[name].append(arm())
        if told is not None:
            told(turn + 1, rounds, "")
    if not arms:
        return {}
    first = next(iter(seconds.values()))
    unit = median(first)
    return {
        name: unit * median(mine / theirs for mine, theirs in zip(own, first, strict=True))
        for name, own in seconds.items()
    }
