"""The trial: all partitions × {oracle router, own router} × active shares × kinds of text, and who wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinyonn_lib import evaluate
from tinyonn_lib.experts.analytic import Linear
from tinyonn_lib.experts.judge import ORACLE, Judge, Losses, mean
from tinyonn_lib.experts.methods import Divided
from tinyonn_lib.progress import Progress


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        courts: kind of text → its judge.
        divided: method → one partition per seed.
        losses: (kind of text, active share asked for) → label → one loss per seed.
    """

    courts: Mapping[str, Judge]
    divided: Mapping[str, Sequence[Divided]]
    losses: Mapping[tuple[str, float], Losses]

    @property
    def shares(self) -> list[float]:
        """The active shares asked for, ascending."""
        return sorted({share for _, share in self.losses})

    def table(self) -> pd.DataFrame:
        """ΔNLL to the dense model, nats per token, with 95 % paired intervals.

        Returns:
            `text, active` (asked for), `share` (realised), `k` (mean experts on per layer and token), `partition,
            router, method` (the label), `mean, low, high, seeds, files`.
        """
        frames = []
        for (text, active), losses in self.losses.items():
            frame = self.courts[text].table(losses, active)
            frame.insert(0, "text", text)
            parts = frame["method"].str.extract(r"^(?P<partition>\w+)(?:, (?P<router>\w+) router| \+ (?P<more>.*))?$")
            frame["partition"] = parts["partition"]
            frame["router"] = parts["router"].fillna("static" + (" + " + parts["more"]).fillna(""))
            own = [self.divided[name][0].partition for name in frame["partition"]]
            frame["share"] = [part.share(part.k(active)) for part in own]
            frame["k"] = [
                sum(min(part.k(active), index.shape[0]) for index in part.experts) / len(part.experts) for part in own
            ]
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def storable(self, label: str) -> bool:
        """Can a standard checkpoint hold this router? Linear ones, and pruning without its bias."""
        partition, _, router = label.removesuffix(" router").partition(", ")
        if router == ORACLE or label.endswith("+ bias"):
            return False
        return not router or isinstance(self.divided[partition][0].scores[router][0], Linear)

    def best(self, text: str, active: float, *, oracle: bool) -> str:
        """The label with the lowest loss, among those under the oracle or among those that a checkpoint can hold."""
        losses = self.losses[text, active]
        fit = [label for label in losses if (f", {ORACLE} " in label if oracle else self.storable(label))]
        return min(fit, key=mean(losses))

    def between(self, text: str, active: float, one: str, other: str) -> evaluate.Difference:
        """Loss of one label minus another's, paired."""
        return self.courts[text].between(self.losses[text, active], one, other)

    def verdict(self, partition: str = "sp") -> pd.DataFrame:
        """Who wins each cell, whoever it is, and how `partition` with the ridge router stands to it and to pruning.

        Returns:
            `text, active`, `best by oracle` and `best in a checkpoint` with their ΔNLL, `behind it` (loss of
            `partition` with the ridge router minus the latter's), `pruning` (the better of FLAP's two),
            `against pruning` (the same
            minus pruning's); differences with 95 % paired intervals.
        """
        rows = []
        ours = f"{partition}, ridge router"
        for (text, active), losses in self.losses.items():
            dense, of = self.courts[text].dense.mean, mean(losses)
            oracle, best = (self.best(text, active, oracle=how) for how in (True, False))
            pruning = self.courts[text].best_static(losses)
            rows.append(
                {
                    "text": text,
                    "active": f"{active:.0%}",
                    "best by oracle": f"{oracle.partition(',')[0]} {of(oracle) - dense:+.3f}",
                    "best in a checkpoint": f"{best} {of(best) - dense:+.3f}",
                    "behind it": str(self.between(text, active, ours, best)) if ours != best else "the best",
                    "pruning": f"{pruning} {of(pruning) - dense:+.3f}",
                    "against pruning": str(self.between(text, active, ours, pruning)),
                }
            )
        return pd.DataFrame(rows)

    def counts(self, partition: str = "sp") -> str:
        """The verdict in one sentence."""
        best = [self.best(*cell, oracle=True).partition(",")[0] for cell in self.losses]
        wins = pd.Series(best).value_counts()
        ahead = [self.between(text, active, f"{partition}, ridge router",
                              self.courts[text].best_static(losses)).verdict
                 for (text, active), losses in self.losses.items()]  # fmt: skip
        named = ", ".join(f"`{name}` in {count}" for name, count in wins.items())
        return (
            f"Of {len(best)} cells (kind of text × share) the best partition under the oracle is {named}. With the "
            f"ridge router `{partition}` loses less than static pruning in {ahead.count('less than')}, more in "
            f"{ahead.count('more than')}, about as much in the rest."
        )


def trial(
    courts: Mapping[str, Judge],
    divided: Mapping[str, Sequence[Divided]],
    actives: Iterable[float],
    progress: Progress | None = None,
    resume: Path | None = None,
) -> Trial:
    """Measure every partition at each active share on each kind of text.

    Args:
        resume: private folder for what is measured already; a call that was killed goes on from it. Nothing else but
            the same call may use it.
    """
    shares = sorted(set(actives))
    cells = [(text, active, name) for text in courts for active in shares for name in divided]
    total, done = sum(len(divided[name]) for _, _, name in cells), 0
    found: dict[tuple[str, float], Losses] = {}
    for number, (text, active, name) in enumerate(cells):
        kept = None if resume is None else resume / f"trial_{number}.npz"
        losses = _restored(kept, courts[text])
        if losses is None:
            losses = {}
            for each in divided[name]:
                for label, loss in courts[text].divided(name, each, active):
                    losses.setdefault(label, []).append(loss)
            _keep(kept, losses)
        found.setdefault((text, active), {}).update(losses)
        done += len(divided[name])
        if progress:
            progress(done, total, f"{name} at {active:.0%}, {text}")
    return Trial(dict(courts), dict(divided), found)


def _keep(file: Path | None, losses: Losses) -> None:
    if file is None:
        return
    partial = file.with_suffix(".partial.npz")
    arrays: dict[str, Any] = {label: np.stack([loss.nats for loss in each]) for label, each in losses.items()}
    np.savez(partial, **arrays)
    partial.replace(file)


def _restored(file: Path | None, court: Judge) -> Losses | None:
    if file is None or not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return {label: [evaluate.Loss(nats, court.dense.tokens) for nats in arrays[label]] for label in arrays.files}
