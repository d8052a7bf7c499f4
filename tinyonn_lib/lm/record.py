"""What a training did, step by step: the table that `fit` returns, spikes, the held-out loss, tensorboard's log."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from tinyonn_lib.errors import BenchError

_SPIKE_WINDOW = 50
_LOGGED = {"loss": "loss", "lr": "learning_rate", "grad_norm": "gradient_norm"}


@dataclass(frozen=True)
class HeldOut:
    """A look at held-out text every so often, and an end when it no longer helps.

    Attributes:
        loss: the loss on text that is not trained on. With several processes each computes it (all on the same text,
            or each on its share): their mean counts.
        every: steps between two looks; there is one after the last step, too.
        patience: looks in a row without a new best after which the training ends.
    """

    loss: Callable[[], float]
    every: int = 100
    patience: int = 5

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 1:
            raise BenchError(f"every={self.every} and patience={self.patience} of HeldOut must be at least 1.")


class Record:
    """The rows of a training as they come in.

    Attributes:
        rows: column → values, one per finished step: what a checkpoint keeps.
    """

    def __init__(self, spike_factor: float, held_out: HeldOut | None) -> None:
        names = ["step", "tokens", "loss", "lr", "grad_norm", *(["held_out"] if held_out else [])]
        self.rows: dict[str, list[float]] = {name: [] for name in names}
        self._factor, self._patience = spike_factor, held_out.patience if held_out else 0
        self._spiked: list[int] = []
        self._pending: list[tuple[int, int, Tensor, float, Tensor]] = []
        self._writer: Any = None

    def go_on(self, rows: dict[str, list[float]]) -> None:
        """From the rows of a checkpoint."""
        self.rows = rows
        self._spiked = spikes(self.table())["step"].tolist()

    def log_to(self, folder: Path) -> None:
        """Write a log for tensorboard, too; what an earlier attempt wrote behind the last checkpoint disappears.

        Raises:
            BenchError: the package is missing.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BenchError("A log for tensorboard needs its package: pip install 'tinyonn[train]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=len(self.rows["step"]) + 1)

    def add(self, step: int, tokens: int, loss: Tensor, lr: float, norm: Tensor) -> int:
        """One more step, not looked at yet: that would wait for a GPU. Returns how many are waiting."""
        self._pending.append((step, tokens, loss, lr, norm))
        return len(self._pending)

    def flush(self) -> None:
        """Look at the waiting steps.

        Raises:
            BenchError: a loss or gradient that is not finite.
        """
        if not self._pending:
            return
        for step, tokens, loss, lr, norm in self._pending:
            row = (float(step), float(tokens), float(loss), lr, float(norm), math.nan)
            if not (math.isfinite(row[2]) and math.isfinite(row[4])):
                what = "loss" if not math.isfinite(row[2]) else "gradient"
                raise BenchError(
                    f"The {what} is not finite at step {step} (learning rate {lr:.3g}): lower the learning rate, warm "
                    "up longer, or look for broken data in that batch."
                )
            for values, value in zip(self.rows.values(), row, strict=False):
                values.append(value)
        fresh = self.table(_SPIKE_WINDOW + len(self._pending)).tail(len(self._pending))
        self._pending.clear()
        if self._writer is not None:
            for row in fresh.to_dict("records"):
                for column, name in _LOGGED.items():
                    self._writer.add_scalar(name, row[column], row["step"])
                if row["spike"]:
                    self._writer.add_scalar("spike", 1.0, row["step"])
            self._writer.flush()
        self._spiked += fresh.loc[fresh["spike"], "step"].tolist()

    def note(self) -> str:
        """The last loss that was looked at, and the spikes so far."""
        told = f"loss {self.rows['loss'][-1]:.3f}" if self.rows["loss"] else ""
        if not (count := len(self._spiked)):
            return told
        return f"{told}, {count} spike{'s' if count > 1 else ''}, the last at step {self._spiked[-1]}"

    def look(self, loss: float) -> bool:
        """The held-out loss after the last flushed step. Returns whether it is the best so far.

        Raises:
            BenchError: not finite.
        """
        step = int(self.rows["step"][-1])
        if not math.isfinite(loss):
            raise BenchError(f"The held-out loss is not finite at step {step}: lower the learning rate.")
        earlier = self._looks()
        self.rows["held_out"][-1] = loss
        if self._writer is not None:
            self._writer.add_scalar("held_out_loss", loss, step)
            self._writer.flush()
        return not earlier or loss < min(earlier)

    def exhausted(self) -> bool:
        """Have the last looks brought nothing new? Follows from the rows, so a resumed training answers alike."""
        looks = self._looks()
        return bool(self._patience and looks) and len(looks) - 1 - looks.index(min(looks)) >= self._patience

    def _looks(self) -> list[float]:
        return [value for value in self.rows.get("held_out", []) if not math.isnan(value)]

    def table(self, last: int | None = None) -> pd.DataFrame:
        """All rows or the last ones, with the spikes marked."""
        rows = {name: values if last is None else values[-last:] for name, values in self.rows.items()}
        table = pd.DataFrame(rows).astype({"step": "int64", "tokens": "int64"})
        usual = table["grad_norm"].rolling(_SPIKE_WINDOW, min_periods=5).median().shift(1)
        return table.assign(spike=(table["grad_norm"] > self._factor * usual))

    def close(self) -> None:
        """No more rows."""
        if self._writer is not None:
            self._writer.close()


def spikes(history: pd.DataFrame) -> pd.DataFrame:
    """The steps of `fit`'s history whose gradient was far above the usual: step, tokens, loss, lr, grad_norm."""
    return history.loc[history["spike"], ["step", "tokens", "loss", "lr", "grad_norm"]].reset_index(drop=True)
