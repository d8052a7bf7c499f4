"""Which steps to observe so that observing costs no more than a given share of the time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

# Steps of each kind whose times are remembered: few, because a machine changes its speed, and what was plain long ago
# says nothing about now.
_MEMORY = 8
_WARM_UP = 2  # the first steps of all fill caches
_PLAIN_FIRST = 5
_ODD = 5.0  # times the median: not a step, but a pause
# Of the share that is spent: hooks that look away cost a little, too, and the time of a step is only known roughly.
_MARGIN = 0.8
# One step in so many stays plain even when observing seems free, or nobody would notice that it no longer is.
_PLAIN_EVERY = 16


class Budget:
    """A step-sampling controller.

    It keeps the time that observed steps took beyond plain ones under `share` of the time of plain ones, over the whole
    run: a step is observed only when its expected cost fits into what has been saved up. The clock runs from the
    beginning of one step to the beginning of the next, optimiser and data included, and never waits for the device.

    Args:
        share: slowdown allowed, such as 0.05.
        clock: seconds; replaced in tests.

    Attributes:
        steps: steps seen.
        observed: steps observed.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self._clock = share, clock
        self.steps = self.observed = 0
        self._plain: deque[float] = deque(maxlen=_MEMORY)
        self._watched: deque[float] = deque(maxlen=_MEMORY)
        self._saved = 0.0  # seconds that may be spent
        self._began: float | None = None
        self._sampled = False

    def begin(self) -> bool:
        """A step begins: whether to observe it."""
        self.pause()
        self._began = self._clock()
        self._sampled = self._affordable()
        self.steps += 1
        self.observed += self._sampled
        return self._sampled

    def pause(self) -> None:
        """The step is over, and the time until the next one begins is nobody's."""
        if self._began is not None and self.steps > _WARM_UP:
            self._learn(self._clock() - self._began)
        self._began = None

    @property
    def cost(self) -> float:
        """Seconds that observing adds to a step, as measured so far; 0 before the first comparison."""
        if not self._plain or not self._watched:
            return 0.0
        return max(0.0, _mean(self._watched) - _mean(self._plain))

    def _learn(self, seconds: float) -> None:
        times = self._watched if self._sampled else self._plain
        times.append(seconds)
        plain = _mean(self._plain) if self._plain else 0.0
        self._saved += _MARGIN * self.share * plain
        if self._sampled:
            # As it was; what the next one will cost is a guess. An evaluation after the step is not our cost.
            odd = seconds > _ODD * median(times) if len(times) > 2 else seconds > 20.0 * plain
            usual = _mean(times) if len(times) > 2 else plain
            self._saved -= (usual if odd else seconds) - plain
        # Nothing is hoarded: a slow spell among plain steps looks like a gain, and must not buy many observed ones.
        self._saved = min(self._saved, max(plain, self.cost))

    def _affordable(self) -> bool:
        if len(self._plain) < _PLAIN_FIRST or self.steps % _PLAIN_EVERY == 0:
            return False
        if not self._watched:
            return True  # one has to be observed to know what it costs
        free = self.cost <= _MARGIN * self.share * _mean(self._plain)
        # Unless it is free, a plain step between two observed ones keeps the comparison fresh.
        return self._saved >= self.cost and (free or not self._sampled)


def _mean(times: Sequence[float]) -> float:
    """Without the odd pause. Not the median: lengths of texts are skewed, and time adds up, so sums must come out."""
    limit = _ODD * median(times)
    kept = [seconds for seconds in times if seconds <= limit]
    return sum(kept) / len(kept)
