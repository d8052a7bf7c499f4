"""Along texts: the norms of every piece of each, as steps of one sequence per text, for ΔSC and ∫ΔSC."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import mscan
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.scan import device_of, frozen_eval


def along(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    path: Path,
    *,
    piece: int = 32,
    length: int = 128,
    targets: str | Sequence[str] = "linears",
) -> list[list[int]]:
    """Scan texts piece by piece into an `.mscan` file, one step per piece, one sequence per text.

    The loss of a step is the mean next-token NLL of the piece's tokens given what stands before them, so its gradient
    is the pull of this piece alone; activations are counted on the piece's tokens only. Pieces of one length compare,
    pieces and whole samples do not: z-scores belong to the pieces of this file.

    Args:
        model: causal LM that takes `labels`.
        texts: token ids of each text; several, because the z-scores of a single one sum to nothing.
        path: the file to write.
        piece: tokens per piece; what is left at the end and fills no piece is dropped.
        length: tokens that the model sees at most, context and piece together.
        targets: what is watched, as in `Observer`.

    Returns:
        The token ids of every piece, in the order of the steps.

    Raises:
        BenchError: fewer than two pieces, or a piece that leaves no room for context.
    """
    if piece >= length:
        raise BenchError(f"piece={piece} leaves no room for context in length={length}: choose it smaller")
    # The first token of a text has nothing to be predicted from.
    ends = [(number, end) for number, ids in enumerate(texts) for end in range(1 + piece, len(ids) + 1, piece)]
    if len(ends) < 2:
        raise BenchError(f"{len(texts)} texts have fewer than two pieces of {piece} tokens: take longer texts")
    with frozen_eval(model):
        observer = Observer(model, targets, rows=False)
        meta = {"texts": len(texts), "piece": piece, "length": length}
        with mscan.Writer(path, observer.layout.targets, meta) as file, observer:
            for step, (number, end) in enumerate(ends):
                observer.record = partial(_write, file, step, number)
                window = torch.tensor([texts[number][max(0, end - length) : end]], device=device_of(model))
                labels = window.clone()
                labels[:, :-piece] = -100
                model(input_ids=window, labels=labels, use_cache=False).loss.backward()
                observer.end_sample()
    return [list(texts[number][end - piece : end]) for number, end in ends]


def _write(
    file: mscan.Writer, step: int, sequence: int, _: int, tokens: int | Tensor, norms: Tensor, methods: np.ndarray
) -> None:
    file.write(step, sequence, tokens, norms, methods)
