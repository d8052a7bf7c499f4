"""The scan: one text at a time through the model, exact statistics of every neuron, resumable at any moment."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.audit import input_embedding
from tinyonn_lib.scan.layer import FFNLike
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.statistics import Totals
from tinyonn_lib.scan.store import Store

# Progress is told at most this often.
_TELL_SECONDS = 0.1


def scan_samples(
    model: nn.Module,
    ffns: Sequence[FFNLike],
    samples: Sequence[Sequence[int]],
    store: Store,
    *,
    rho: float,
    worker: str = "0",
    flush_seconds: float = 5.0,
    fingerprint: Mapping[str, object],
    progress: Callable[[int, int, str], None] | None = None,
) -> Totals:
    """Scan samples in the order given, batch size 1, and commit totals to the store as it goes.

    The loss of a sample is its mean next-token NLL in fp32. The model is frozen and in eval mode meanwhile and
    gets both back afterwards. A scan that was killed goes on from the last commit; its totals
    then equal those of an uninterrupted scan to the last bit (same machine, same number of threads).

    Args:
        model: causal LM: `model(input_ids=...)` with `.logits` (1, T, vocabulary).
        ffns: FFN layers to count.
        samples: token ids per sample, at least two each. This worker's share, when there are several.
        store: where totals go; one scan per store.
        rho: share of a layer's neurons that count as top on a token.
        worker: name of this worker in the store.
        flush_seconds: seconds between commits; at most this much work is repeated after a kill.
        fingerprint: JSON-able facts on model, data and parameters that a resume must share. A hash of the
            samples and the layout are added per worker.
        progress: called with (samples done, samples, text), about ten times a second at most.

    Returns:
        This worker's totals; `store.totals()` adds all workers.

    Raises:
        BenchError: no samples, or one of fewer than two tokens, another fingerprint, a silent target, NaN or
            infinity (naming layer and sample; nothing of it is committed), lost server.
    """
    _check(samples)
    total = len(samples)
    with _frozen_eval(model):
        observer = Observer(model, ffns, rho)
        store.begin(observer.layout, fingerprint, worker=worker, share=_digest(samples))
        state = store.resume(worker)
        position = state[1] if state else 0
        if state:
            observer.load(state[0], position)
        device = _device(model)
        if progress is not None and position:
            progress(position, total, "going on from the last commit")
        if state and position == total:
            return state[0]
        first, started = position, time.monotonic()
        flushed = told = started
        with observer:
            while position < total:
                ids = torch.tensor([samples[position]], dtype=torch.long, device=device)
                next_token_loss(model, ids).backward()
                observer.end_sample()
                position += 1
                now = time.monotonic()
                if progress is not None and (now - told >= _TELL_SECONDS or position == total):
                    told = now
                    progress(position, total, f"{(position - first) / max(now - started, 1e-9):.1f} samples/s")
                if now - flushed >= flush_seconds and position < total:
                    store.commit(worker, observer.totals(), position)
                    flushed = time.monotonic()
            result = observer.totals()
            store.commit(worker, result, position)
    return result


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token NLL of one sample in fp32. ids: (1, T). Returns a scalar, nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits
    # The last position has nothing to predict: ignoring it spares the two full copies that slicing it off costs.
    targets = F.pad(ids[0, 1:], (0, 1), value=-100).to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100)


@contextmanager
def _frozen_eval(model: nn.Module) -> Iterator[None]:
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


def _check(samples: Sequence[Sequence[int]]) -> None:
    if not samples:
        raise BenchError("nothing to scan: the list of samples is empty")
    for number, sample in enumerate(samples):
        if len(sample) < 2:
            raise BenchError(f"sample {number} has {len(sample)} tokens: a next-token loss needs two; drop short texts")


def _digest(samples: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        ids = np.asarray(sample, dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()


def _device(model: nn.Module) -> torch.device:
    embedding = input_embedding(model)
    parameter = next((embedding or model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
