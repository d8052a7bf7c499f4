"""Selections against each other: a LoRA on each, at equal tokens, judged by its loss on the same held-out text."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from torch import Tensor

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import Difference, Loss
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.load import Dtype, load_model
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection.packing import pack, steps_for
from tinyonn_lib.selection.target import Tuned, train_blocks

BASE = "base"


@dataclass(frozen=True)
class Contender:
    """One selection.

    Attributes:
        kind: as the caller named it.
        rows: selected; tokens: in their blocks; epochs: how often training saw these.
        losses: on the held-out samples, of the training with each seed.
    """

    kind: str
    rows: int
    tokens: int
    epochs: float
    losses: tuple[Loss, ...]


@dataclass(frozen=True)
class Contest:
    """What `contest` found.

    Attributes:
        base: loss of the model before any training.
        contenders: by label, in the order given.
        groups: source of each held-out sample: samples of one source are not independent.
        tokens: that each training saw.
        history: `fit`'s of all trainings, with the columns label and seed.
    """

    base: Loss
    contenders: Mapping[str, Contender]
    groups: Sequence[str]
    tokens: int
    history: pd.DataFrame

    def between(self, one: str, other: str = BASE) -> Difference:
        """Held-out loss after one selection minus that after another, or minus the base's: below 0, one is better."""
        return evaluate.paired(self._losses(one), self._losses(other), self.groups)

    def table(self) -> pd.DataFrame:
        """One row per selection, the lowest loss first, and the base.

        Returns:
            label, kind, rows, tokens (in the selection), epochs, loss (nats per token, mean over the seeds), delta (to
            the base) with low and high (95 %, NaN for few sources), spread (largest loss of a seed minus the smallest).
        """
        rows: list[dict[str, Any]] = [
            {"label": BASE, "kind": BASE, "rows": 0, "tokens": 0, "epochs": 0.0, "loss": self.base.mean, "delta": 0.0}
        ]
        for label, it in self.contenders.items():
            seeds, gap = [loss.mean for loss in it.losses], self.between(label)
            rows.append({
                "label": label, "kind": it.kind, "rows": it.rows, "tokens": it.tokens, "epochs": it.epochs,
                "loss": float(np.mean(seeds)), "delta": gap.mean, "low": gap.low, "high": gap.high,
                "spread": max(seeds) - min(seeds),
            })  # fmt: skip
        columns = ["label", "kind", "rows", "tokens", "epochs", "loss", "delta", "low", "high", "spread"]
        return pd.DataFrame(rows, columns=columns).sort_values("loss", kind="stable", ignore_index=True)

    def _losses(self, label: str) -> Sequence[Loss]:
        return [self.base] if label == BASE else self.contenders[label].losses


def contest(
    model: Any, tokenizer: Any, selections: Mapping[str, pd.DataFrame], held: pd.DataFrame, *, tokens: int,
    seeds: Sequence[int] = (0, 1, 2), length: int = 128, batch: int = 8, kinds: Mapping[str, str] | None = None,
    trained: Mapping[tuple[str, int], Tuned] | None = None, dtype: Dtype = "float32", device: str = "auto",
    folder: Path | None = None, progress: Progress | None = None, **options: Any,
) -> Contest:  # fmt: skip
    """Train a LoRA on each selection with each seed, always for as many tokens, and judge it.

    The model is loaded once: an adapter is taken out again and leaves no trace. A selection with fewer tokens is seen
    more often; all the data is just another selection.

    Args:
        model: folder or hub id, or the model itself.
        selections: label → rows, see `target.pack`.
        held: `source, ids`, from `samples.draw`, of texts that no selection holds.
        tokens: of each training.
        length: of a training block; held-out samples have their own.
        kinds: of some labels, for the table.
        trained: (label, seed) → what `target.train` made of it with the same options: judged, not trained again.
        dtype, device: of a model that is loaded; see `load_model`.
        folder: for what is done and for the checkpoint: after a kill the same call goes on. Delete it when the result
            is safe.
        progress: called with (steps done, steps of all trainings that are left, label and seed).
        options: of `target.train_blocks`, without an early stop.

    Raises:
        BenchError: as `target.pack` and `train_blocks`, two contenders called alike, no seed, nothing to compare, or a
            `trained` one of other rows or another number of steps.
    """
    if not selections or not len(seeds) or BASE in selections:
        raise BenchError(f"A contest needs selections, none of them called '{BASE}', and at least one seed.")
    packed = {label: _packed(label, rows, tokenizer, length) for label, rows in selections.items()}
    loaded = load_model(model, dtype, device) if isinstance(model, str) else model
    samples = held["ids"].tolist()
    steps = steps_for(next(iter(packed.values())), batch, tokens)
    options |= {"batch": batch, "steps": steps}
    start = [resume.fingerprint({}, list(loaded.parameters()), ()), [list(map(int, ids)) for ids in samples]]
    common = hashlib.sha256(json.dumps([*start, _plain(options)]).encode()).hexdigest()
    results = {pair: _judged(*pair, tuned, packed, steps, samples) for pair, tuned in (trained or {}).items()}
    left = [pair for pair in itertools.product(packed, seeds) if pair not in results]
    for number, (label, seed) in enumerate(left):
        told = None if progress is None else _told(progress, number, steps, len(left), f"{label} {seed}")
        blocks = packed[label]
        key = hashlib.sha256(f"{common} {seed}".encode() + blocks.numpy().tobytes()).hexdigest()[:24]
        done = folder / f"{key}.npz" if folder else None
        checkpoint = done and done.with_suffix(".pt")
        found = _read(done)
        if found is None:
            adapted, history = train_blocks(loaded, blocks, seed=seed, checkpoint=checkpoint, progress=told, **options)
            found = evaluate.loss(adapted, samples), history
            adapted.unload()
            _write(done, *found)
        elif told:
            told(steps, steps, "")
        if checkpoint:
            checkpoint.unlink(missing_ok=True)
        results[label, seed] = found
    contenders = {
        label: Contender(
            (kinds or {}).get(label, ""), len(selections[label]), blocks[:, 0].numel(),
            steps * batch / len(blocks), tuple(results[label, seed][0] for seed in seeds),
        )
        for label, blocks in packed.items()
    }  # fmt: skip
    histories = [
        results[label, seed][1].assign(label=label, seed=seed) for label, seed in itertools.product(packed, seeds)
    ]
    base = evaluate.loss(loaded, samples)
    return Contest(
        base, contenders, held["source"].tolist(), steps * batch * length, pd.concat(histories, ignore_index=True)
    )


def _packed(label: str, rows: pd.DataFrame, tokenizer: Any, length: int) -> Tensor:
    try:
        return pack(rows, tokenizer, length)
    except BenchError as error:
        raise BenchError(f"Selection '{label}': {error}") from error


def _judged(
    label: str, seed: int, tuned: Tuned, packed: Mapping[str, Tensor], steps: int, samples: Sequence[Sequence[int]]
) -> tuple[Loss, pd.DataFrame]:
    """What a training would bring that was done before."""
    if label not in packed or (len(tuned.history), tuned.tokens) != (steps, packed[label][:, 0].numel()):
        raise BenchError(f"The training given for '{label} {seed}' is not one of this contest's: give its own rows.")
    return evaluate.loss(tuned.model, samples), tuned.history


def _plain(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in sorted(options.items())}


def _told(progress: Progress, number: int, steps: int, trainings: int, name: str) -> Progress:
    """The steps of one training as some of those of all."""

    def told(done: int, _: int, note: str) -> None:
        said = f"{note}, {name}" if note.startswith("going on") else f"{name}, {note}" if note else name
        progress(number * steps + done, steps * trainings, said)

    return told


def _write(path: Path | None, loss: Loss, history: pd.DataFrame) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    columns: dict[str, Any] = {f"history_{name}": history[name].to_numpy() for name in history}
    with temporary.open("wb") as file:
        np.savez(file, nats=loss.nats, tokens=loss.tokens, **columns)
    temporary.replace(path)


def _read(path: Path | None) -> tuple[Loss, pd.DataFrame] | None:
    """What `_write` wrote; None if there is nothing, or it is damaged."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path) as file:
            history = {name.removeprefix("history_"): file[name] for name in file if name.startswith("history_")}
            return Loss(file["nats"], file["tokens"]), pd.DataFrame(history)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
