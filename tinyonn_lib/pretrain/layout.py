"""Texts as rows of tokens to learn from: packed, packed with document masks, or one text a row, padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.texts import pack

Layout = Literal["packed", "documents", "padded"]
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """Rows of equal length.

    Attributes:
        ids: (N, length) tokens, int64.
        positions: (N, length), from 0 in each document of a row: transformers' masks then keep the documents apart.
            None: plain causal attention over the whole row.
        pad: the token that fills up and is never asked for; None: there is none.
    """

    ids: Tensor
    positions: Tensor | None = None
    pad: int | None = None

    @property
    def targets(self) -> float:
        """Tokens to predict in a row, on average."""
        return float((self.ids[:, 1:] != (IGNORED if self.pad is None else self.pad)).sum()) / max(1, len(self.ids))

    def asked(self, ids: Tensor) -> Tensor:
        """What to predict at each place but the last of some rows: (n, length − 1), `IGNORED` where nothing is."""
        return ids[:, 1:] if self.pad is None else ids[:, 1:].masked_fill(ids[:, 1:] == self.pad, IGNORED)

    def batches(
        self, sizes: int | Sequence[int], seed: int, device: torch.device | None = None
    ) -> Callable[[int], dict[str, Tensor]]:
        """A pure function step → `ids` (and `positions`) of the rows of that step; each row once per epoch.

        Args:
            sizes: rows of a step, or of every step.
        """
        order = shuffled(torch.arange(len(self.ids)), sizes, seed)
        parts = {"ids": self.ids, "positions": self.positions}
        return lambda step: {
            name: part[order(step)].to(device or part.device) for name, part in parts.items() if part is not None
        }


def lay(documents: Sequence[Sequence[int]], length: int, *, eos: int, pad: int, layout: Layout, seed: int = 0) -> Rows:
    """Rows of `length` tokens from the token ids of documents.

    Args:
        documents: token ids without special tokens.
        eos: stands before each document, where it begins it, and after the last.
        pad: fills up rows of the layout "padded".
        layout: "packed": end to end, and attention reaches back into the document before; "documents": packed, and it
            does not; "padded": every document begins a row, longer ones go on in further rows, shorter ones leave the
            rest of the row empty.
        seed: order of the documents.

    Raises:
        BenchError: unknown layout, or too little text for a row.
    """
    if layout not in get_args(Layout):
        raise BenchError(f"Unknown layout '{layout}': choose one of {', '.join(get_args(Layout))}.")
    if layout != "padded":
        ids = pack(documents, length, eos, seed)
        return Rows(ids, starts(ids, eos) if layout == "documents" else None)
    if length < 2 or not documents:
        raise BenchError(f"Rows of {length} tokens from {len(documents)} documents: nothing to predict.")
    rows = []
    for document in documents:
        stream = [eos, *document, eos]
        # A row begins with the last token of the row before, so that every token is asked for once.
        rows += [stream[begin : begin + length] for begin in range(0, len(stream) - 1, length - 1)]
    ids = torch.full((len(rows), length), pad)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return Rows(ids, None, pad)


def starts(ids: Tensor, eos: int) -> Tensor:
    """Positions within documents, (N, length): 0 at the front of a row and at every `eos`, which begins the next."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    begun = torch.where(ids == eos, places, 0).cummax(1).values
    return places - begun
