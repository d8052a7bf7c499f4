"""What two models' caches look like next to each other, and how a hand-over plays out token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import Loss
from tinyonn_lib.kv.align import by_depth, by_similarity, cka
from tinyonn_lib.kv.cache import KV
from tinyonn_lib.kv.data import Caches, own_of, teachers_of
from tinyonn_lib.kv.handover import generate, nats_after
from tinyonn_lib.kv.judge import Source

STUDENT = "student"


def distributions(caches: Caches) -> pd.DataFrame:
    """How keys (before their rotation) and values are distributed, per model and layer, over real tokens.

    Returns:
        `model, side, layer, mean, std, low, high` (99.8 % lie between these two), `smallest, largest`.
    """
    rows = []
    batch = next(caches.batches())
    for model, kv in {STUDENT: own_of(batch), **teachers_of(batch, caches.names)}.items():
        for side, values in (("keys", kv.keys), ("values", kv.values)):
            for layer in range(kv.shape[1]):
                here = values[:, layer][batch["mask"]].float().cpu().numpy().ravel()
                low, high = np.quantile(here, [0.001, 0.999])
                rows.append((model, side, layer, here.mean(), here.std(), low, high, here.min(), here.max()))
    names = ["model", "side", "layer", "mean", "std", "low", "high", "smallest", "largest"]
    return pd.DataFrame(rows, columns=names)


def similarity(caches: Caches, teacher: str) -> pd.DataFrame:
    """Centred kernel alignment (`align.cka`) of the student's layers (rows) with a teacher's (columns)."""
    batch = next(caches.batches())
    real = batch["mask"]

    def tokens(kv: KV) -> KV:
        return KV(*(t.transpose(1, 2)[real].transpose(0, 1)[None] for t in (kv.keys, kv.values)))

    found = cka(tokens(teachers_of(batch, [teacher])[teacher]), tokens(own_of(batch)))
    index = pd.Index([f"student {n}" for n in range(found.shape[0])], name="student layer")
    return pd.DataFrame(found.cpu().numpy(), index, pd.Index(range(found.shape[1]), name="teacher layer"))


def layer_maps(alike: pd.DataFrame, how: str, sources: int) -> list[list[int]]:
    """Which teacher layers each student layer reads.

    Args:
        alike: of `similarity`.
        how: "depth" or "similarity".
        sources: how many.

    Raises:
        BenchError: another `how`.
    """
    if how not in ("depth", "similarity"):
        raise BenchError(f"layers={how}: choose depth or similarity.")
    if how == "similarity":
        return by_similarity(torch.tensor(alike.to_numpy()), sources)
    return by_depth(alike.shape[1], alike.shape[0], sources)


def continued(
    sources: Mapping[str, Source], caches: Caches, tokenizer: Any, at: int, new_tokens: int = 24
) -> dict[str, str]:
    """How the student goes on from each cache of one text's first `at` tokens, greedily.

    Returns:
        The text (its end), then what each cache lets the student write: label → text.
    """
    lengths = caches.mask.sum(1)
    row = int(torch.nonzero(lengths > at)[0]) if (lengths > at).any() else int(lengths.argmax())
    at = min(at, int(lengths[row]) - 1)
    batch = caches[torch.tensor([row, (row + 1) % len(caches)])]  # two: another text may be handed over
    given = batch["ids"][:1, : at + 1]
    told = {"The text so far: … ": tokenizer.decode(given[0, max(0, at - 40) :], skip_special_tokens=True)}
    for label, source in sources.items():
        kv = source(batch)
        assert kv is not None, "a hand-over hands something over"
        ids = generate(caches.student, kv.detach()[:1], given, new_tokens)
        told[f"{label} → "] = tokenizer.decode(ids, skip_special_tokens=True)
    return told


@torch.no_grad()
def by_distance(sources: Mapping[str, Source], caches: Caches, at: int) -> tuple[pd.DataFrame, dict[str, Loss]]:
    """Loss of the tokens after one hand-over: the student is given the first `at` tokens' cache and reads on by itself.

    Args:
        sources: label → what is handed over.
        at: tokens in the handed-over cache; shorter texts are left out.

    Returns:
        `cache, after, nll, tokens`: after how many tokens of its own (1, 2, 4, 8 …: the first of a range that doubles);
        and label → loss per text over all tokens after the hand-over, for `evaluate.paired`.

    Raises:
        BenchError: `at` leaves nothing to predict.
    """
    found: dict[str, list[Tensor]] = {label: [] for label in sources}
    masks = []
    for batch in caches.batches():
        masks.append(batch["mask"][:, at + 1 :].cpu())
        for label, source in sources.items():
            kv = source(batch)
            assert kv is not None, "a hand-over hands something over"
            found[label].append(nats_after(caches.student, kv, batch["ids"], batch["mask"], at).double().cpu())
    nats = {label: torch.cat(parts).numpy() for label, parts in found.items()}
    real = torch.cat(masks).numpy()
    rows = []
    for first in [2**power for power in range(int(np.log2(max(1, real.shape[1]))) + 1)]:
        places = slice(first - 1, 2 * first - 1)
        if tokens := int(real[:, places].sum()):
            rows += [(label, first, each[:, places].sum() / tokens, tokens) for label, each in nats.items()]
    table = pd.DataFrame(rows, columns=["cache", "after", "nll", "tokens"])
    return table, {label: Loss(each.sum(1), real.sum(1)) for label, each in nats.items()}
