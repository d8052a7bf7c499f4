"""Writing an `.mscan` file beside a running model: `write` copies and returns, a thread encodes and writes.

A step waits for nothing: device values go to pinned memory without blocking, and the thread waits for the copy. Steps
strictly increase within a file, so that what a resumed scan will do again is always the end of the file.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import lognorm
from tinyonn_lib.scan.mscan_frames import Header
from tinyonn_lib.scan.mscan_sink import SEGMENT_ROWS, open_sink
from tinyonn_lib.scan.statistics import METHODS, Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NORMS = ("activation", "gradient")


class _Copy(NamedTuple):
    """A value of its own, on the host once `ready` has passed."""

    value: Any
    ready: torch.cuda.Event | None = None

    def get(self) -> np.ndarray:
        if self.ready is not None:
            self.ready.synchronize()
        return np.asarray(self.value.double() if hasattr(self.value, "double") else self.value)  # bf16 has no numpy


class _Step(NamedTuple):
    step: int
    sequence: int
    tokens: _Copy
    norms: _Copy
    methods: np.ndarray


class _Mark(NamedTuple):
    """A request to the thread: everything before it goes to the disk, then `done` is set."""

    done: threading.Event
    last: bool = False  # nothing comes after it
    finish: bool = False  # write the index


class Writer:
    """Writes one `.mscan` file, one call of `write` per observed step.

    As a context manager it closes the file properly; after an exception in the block everything written stays in it,
    but without the end marker, so that readers see that the scan did not finish.

    Args:
        path: the file; one that exists is replaced unless `append`.
        targets: what is watched, in the order of the rows of `norms`.
        meta: JSON-able facts about the scan. The bench adds no time stamp: same records, same bytes.
        methods: names of the ways to get at a gradient norm.
        rows_per_segment: rows that are gathered before they go to the file; `flush` does not wait for them.
        append: go on with a file that exists, finished or torn: its torn end and its index are dropped first.
        before_step: with `append`, records of this and later steps are dropped as well: the step a resumed scan
            goes on with.

    Raises:
        BenchError: the file cannot be written, or (`append`) is damaged or has another header. From every method
            when the thread failed: disk full, or a norm that is negative, infinite or above `lognorm.HIGH`. The line
            says up to which step the file is good.
    """

    def __init__(
        self,
        path: str | Path,
        targets: Sequence[Target],
        meta: Mapping[str, Any],
        *,
        methods: Sequence[str] = METHODS,
        rows_per_segment: int = SEGMENT_ROWS,
        append: bool = False,
        before_step: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.header = Header(tuple(targets), tuple(methods), dict(meta))
        self._rows = rows_per_segment
        self._pending: list[tuple[_Step, int, np.ndarray]] = []
        self._failure: Exception | None = None
        self._closed = False
        try:
            self._sink = open_sink(self.path, self.header, append=append, before_step=before_step)
        except OSError as error:
            raise BenchError(f"cannot write {path}: {error.strerror or error}") from None
        self._last = self._sink.segments[-1].last if self._sink.segments else -1
        self._queue: SimpleQueue[_Step | _Mark] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"mscan {self.path.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(BenchError):  # the error in the block is the one to see
                self._stop(finish=False)

    def write(
        self,
        step: int,
        sequence: int,
        tokens: int | Tensor,
        norms: Tensor | np.ndarray,
        methods: Sequence[int] | np.ndarray,
    ) -> None:
        """Hand over one step; returns without waiting for device, encoding or disk.

        Args:
            step: number of the step, above all earlier ones, below 2**32.
            sequence: id of the text, int64.
            tokens: tokens of the step; an int or a 0-dim tensor on any device.
            norms: (targets, 2), any float type and device: norm of the module's input, norm of its weight gradient.
                NaN means not measured. Copied at once: the caller may reuse it.
            methods: (targets,) how each gradient was got at, positions in the header's `methods`.
        """
        self._check()
        count = len(self.header.targets)
        if tuple(norms.shape) != (count, 2) or len(methods) != count:
            raise BenchError(
                f"{self.path}: step {step} has norms {tuple(norms.shape)} and {len(methods)} methods; with {count} "
                f"targets they are ({count}, 2) and {count}"
            )
        if not self._last < step < 2**32 or not -(2**63) <= sequence < 2**63:
            raise BenchError(
                f"{self.path}: step {step} of sequence {sequence} cannot follow step {self._last}: steps increase and "
                "stay below 2**32, sequence ids fit in int64"
            )
        self._last = step
        self._queue.put(_Step(step, sequence, _copy(tokens), _copy(norms), np.array(methods, dtype=np.int64)))

    def flush(self) -> None:
        """Return when everything written so far is in the file, as complete frames, and on the disk."""
        self._check()
        self._wait(_Mark(threading.Event()))

    def close(self) -> None:
        """Write the rest, the index and the end marker. A second call does nothing."""
        self._stop(finish=True)

    def _stop(self, finish: bool) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._wait(_Mark(threading.Event(), last=True, finish=finish))
            finally:
                self._thread.join()
                self._sink.file.close()

    def _wait(self, mark: _Mark) -> None:
        self._queue.put(mark)
        mark.done.wait()
        self._check(closing=mark.last)

    def _check(self, closing: bool = False) -> None:
        if self._closed and not closing:
            raise BenchError(f"{self.path} was closed: open it again with append=True")
        if self._failure is None:
            return
        good = self._sink.segments
        safe = f"steps up to {good[-1].last} are safe in the file" if good else "no step is in the file yet"
        if isinstance(self._failure, OSError):
            reason = f"cannot write: {self._failure.strerror or self._failure}; make room and run the same again"
        elif isinstance(self._failure, BenchError):
            reason = str(self._failure)
        else:
            raise RuntimeError(f"{self.path}: the writing thread failed; {safe}") from self._failure
        raise BenchError(f"{self.path}: {reason}; {safe}")

    # From here on: the thread.

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if self._failure is None:  # else only let those go who wait
                    self._do(item)
            except Exception as error:  # shown by the next call from outside
                self._failure = error
            if isinstance(item, _Mark):
                item.done.set()
                if item.last:
                    return

    def _do(self, item: _Step | _Mark) -> None:
        if isinstance(item, _Step):
            try:
                self._pending.append(self._encode(item))
            except BenchError:
                self._emit()  # the steps before it are good
                raise
            if len(self._pending) * len(self.header.targets) >= self._rows:
                self._emit()
        else:
            self._emit()
            if item.finish:
                self._sink.finish()
            self._sink.sync()

    def _encode(self, item: _Step) -> tuple[_Step, int, np.ndarray]:
        tokens = int(item.tokens.get())
        if not 0 <= tokens < 2**32 or item.methods.min() < 0 or item.methods.max() >= len(self.header.methods):
            raise BenchError(f"step {item.step} has {tokens} tokens, or a method that the header does not name")
        try:
            return item, tokens, lognorm.encode(item.norms.get())
        except lognorm.Unstorable as error:
            row, column = error.index
            name = self.header.targets[row].name
            raise BenchError(f"the {_NORMS[column]} norm of {name} in step {item.step} {error}") from None

    def _emit(self) -> None:
        if not self._pending:
            return
        count = len(self.header.targets)
        steps, tokens, codes = zip(*self._pending, strict=True)
        norms = np.concatenate(codes)
        self._sink.add(
            {
                "step": np.repeat(np.array([item.step for item in steps], dtype=np.uint32), count),
                "sequence": np.repeat(np.array([item.sequence for item in steps], dtype=np.int64), count),
                "tokens": np.repeat(np.array(tokens, dtype=np.uint32), count),
                "target": np.tile(np.arange(count, dtype=np.uint16), len(steps)),
                "method": np.concatenate([item.methods for item in steps]).astype(np.uint8),
                "act": np.ascontiguousarray(norms[:, 0]),
                "grad": np.ascontiguousarray(norms[:, 1]),
            }
        )
        self._pending.clear()


def _copy(value: Any) -> _Copy:
    if not hasattr(value, "detach"):
        return _Copy(np.array(value))
    import torch

    value = value.detach()
    if not value.is_cuda:
        return _Copy(value.to("cpu", copy=True))
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    ready = torch.cuda.Event(blocking=True)  # sleeps instead of spinning on a core that the step may need
    ready.record(torch.cuda.current_stream(value.device))
    return _Copy(host, ready)
