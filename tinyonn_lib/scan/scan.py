"""The scan: one text at a time through the model, exact statistics of every target, resumable at any moment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.progress import Progress
from tinyonn_lib.scan.audit import input_embedding
from tinyonn_lib.scan.claims import Lease
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.records import Records
from tinyonn_lib.scan.shards import Cut, Shard
from tinyonn_lib.scan.statistics import Totals
from tinyonn_lib.scan.store import ShardLost, Store

# Progress is told at most this often, the other workers' is looked up at most that often.
_TELL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
# A worker that finds nothing to do looks again after so long.
_WAIT_SECONDS = 0.3


def scan_samples(
    model: nn.Module,
    samples: Sequence[Sequence[int]],
    store: Store,
    *,
    targets: str | Sequence[str] = "neurons",
    rho: float = 0.05,
    rows: bool = True,
    shards: int = 8,
    flush_seconds: float = 5.0,
    fingerprint: Mapping[str, object],
    records: Path | None = None,
    sequences: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Totals:
    """Scan samples, batch size 1, and commit totals to the store as it goes, together with whoever else does.

    The loss of a sample is its mean next-token NLL in fp32. The model is frozen and in eval mode meanwhile and
    gets both back afterwards. Any number of processes may call this with the same arguments and stores of the same
    scan: they share the shards, and one that is killed is replaced by those that live, or by the next call. The totals
    equal those of a single uninterrupted scan to the last bit (same kind of machine, same number of threads each).

    Args:
        model: causal LM: `model(input_ids=...)` with `.logits` (1, T, vocabulary).
        samples: token ids per sample, at least two each: all of the scan's, in every process.
        store: where totals go; one scan per store.
        targets, rho, rows: what is watched, as in `Observer`.
        shards: parts the samples are cut into; at most this many workers have something to do.
        flush_seconds: seconds between commits; at most this much work per worker is repeated after a kill.
        fingerprint: JSON-able facts on model, data and parameters that a resume must share. A hash of the
            samples, the shards and the layout are added.
        records: folder for the norms of every single sample, `shard-NNN.mscan`, the same for all workers; None for
            totals only. `records.merge_records` makes one file of them.
        sequences: id of the text that each sample is from, for the records; its index unless told.
        progress: called with (samples done by all workers, samples, text), about ten times a second at most.

    Returns:
        The totals of the whole scan.

    Raises:
        BenchError: no samples, or one of fewer than two tokens, another fingerprint, a silent target, NaN or
            infinity (naming target and sample; nothing of it is committed), lost server.
    """
    _check(samples, sequences)
    with frozen_eval(model):
        observer = Observer(model, targets, rho=rho, rows=rows)
        cut = Cut.of(samples, shards)
        store.begin(observer.layout, fingerprint, cut)
        facts = {**fingerprint, **asdict(cut)}
        kept = Records(records, observer.layout.targets, facts, sequences or range(cut.samples)) if records else None
        board = _Board(store, cut, progress)
        with Lease(store.claims) as lease:
            worker = _Worker(model, observer, samples, store, lease, kept, board, flush_seconds)
            worker.work()
        return store.totals()


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token NLL of one sample in fp32. ids: (1, T). Returns a scalar, nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits
    # The last position has nothing to predict: ignoring it spares the two full copies that slicing it off costs.
    targets = F.pad(ids[0, 1:], (0, 1), value=-100).to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100)


@dataclass
class _Worker:
    """One process at work on a scan."""

    model: nn.Module
    observer: Observer
    samples: Sequence[Sequence[int]]
    store: Store
    lease: Lease
    records: Records | None
    board: _Board
    flush_seconds: float

    def work(self) -> None:
        """Take shard after shard until all are complete; wait while the rest is in other hands."""
        while not all(shard.complete for shard in self.board.look()):
            free = (shard for shard in self.board.shards if shard.free)
            mine = next((shard for shard in free if self.store.claims.take(shard.number)), None)
            if mine is None:
                self.board.wait()
                continue
            try:
                self.lease.hold(mine.number)
                self._scan(mine)
            except ShardLost:
                pass  # its new owner goes on from our last commit
            finally:
                self.lease.hold(None)
                self.store.claims.release(mine.number)

    def _scan(self, shard: Shard) -> None:
        state = self.store.resume(shard.number)
        totals, position = state[:2] if state else (Totals.zeros(self.observer.layout), shard.samples.start)
        if position == shard.samples.stop:
            return
        self.observer.load(totals, position)
        device, flushed = device_of(self.model), time.monotonic()
        with ExitStack() as stack:
            writer = stack.enter_context(self.records.open(shard, position)) if self.records else None
            self.observer.record = self.records.recorder(writer) if self.records and writer else None
            stack.enter_context(self.observer)
            while position < shard.samples.stop:
                ids = torch.tensor([self.samples[position]], dtype=torch.long, device=device)
                next_token_loss(self.model, ids).backward()
                self.observer.end_sample()
                position += 1
                if self.lease.lost:
                    raise ShardLost(f"shard {shard.number} was taken over")
                if position == shard.samples.stop or time.monotonic() - flushed >= self.flush_seconds:
                    totals = self.observer.totals()  # refuses NaN, so nothing of a bad sample gets any further
                    if writer is not None:
                        writer.flush()
                    self.store.commit(shard.number, totals, position)
                    flushed = time.monotonic()
                self.board.tell(shard.number, position)


class _Board:
    """Counts the samples of all workers: the others' as committed, our own as they are done."""

    def __init__(self, store: Store, cut: Cut, progress: Progress | None) -> None:
        self._store, self._cut, self._progress = store, cut, progress
        self.shards: list[Shard] = []
        self._first = -1  # samples done before we began
        self._told = self._looked = self._began = time.monotonic()

    def look(self, patience: float | None = None) -> list[Shard]:
        """Where every shard stands on the server."""
        self.shards = self._store.shards(patience)
        self._looked = time.monotonic()
        done = self._done()
        if self._first < 0:
            self._first = done
            if done and self._progress is not None:
                self._progress(done, self._cut.samples, "going on from the last commit")
        return self.shards

    def wait(self) -> None:
        """Sleep a little; the other workers have all that is left."""
        time.sleep(_WAIT_SECONDS)
        if self._progress is not None:
            self._progress(self._done(), self._cut.samples, "waiting for the other workers")

    def tell(self, number: int, position: int) -> None:
        """Our own shard has come to `position`."""
        now = time.monotonic()
        if self._progress is None:
            return
        last = position == self._cut.range(number).stop
        if now - self._told < _TELL_SECONDS and not last:
            return
        if now - self._looked >= _LOOK_SECONDS:
            try:
                self.look(patience=0.0)
            except BenchError:
                self._looked = now  # the next commit tells if the server is gone for good
        self._told = now
        done = self._done(number, position)
        rate = (done - self._first) / max(now - self._began, 1e-9)
        self._progress(done, self._cut.samples, f"{rate:.1f} samples/s")

    def _done(self, number: int = -1, position: int = 0) -> int:
        reached = (position if shard.number == number else shard.position for shard in self.shards)
        return sum(at - shard.samples.start for at, shard in zip(reached, self.shards, strict=True))


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """No weight gradient is needed, the norms come from inputs and output gradients: this saves a third of the step."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _check(samples: Sequence[Sequence[int]], sequences: Sequence[int] | None) -> None:
    if not samples:
        raise BenchError("nothing to scan: the list of samples is empty")
    if sequences is not None and len(sequences) != len(samples):
        raise BenchError(f"{len(samples)} samples and {len(sequences)} sequence ids: give one id per sample")
    for number, sample in enumerate(samples):
        if len(sample) < 2:
            raise BenchError(f"sample {number} has {len(sample)} tokens: a next-token loss needs two; drop short texts")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's token ids go: the device of its embedding, or of its first weight."""
    embedding = input_embedding(model)
    parameter = next((embedding or model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
