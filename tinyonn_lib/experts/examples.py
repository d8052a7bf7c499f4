"""What neurons fire on: the tokens with the largest |h| of every neuron, and what the neurons of a cluster share.

h is the input of `down_proj`. A start token that stands before a text is context and never counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.lm.models import FFN
from tinyonn_lib.progress import Progress

Passage = Callable[[int, int], tuple[str, str, str]]
"""`(sample, position) → (text before, the token, text after)`, fit for a line of text but not escaped."""

SHORT = 16
"""Tokens below which a text's mean activity is chance; shorter ones count only where none is longer."""


def visible(text: str) -> str:
    """Text on one line: line breaks and tabs as signs, other characters that print nothing as a dot."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in text)


@dataclass(frozen=True)
class _Tokens:
    """All samples end to end.

    Attributes:
        begins: Place of each sample's first token, `(samples,)`.
        codes: Index into `words` of each token, `(tokens,)`.
        words: The distinct token strings, a blank as ␣.
        counted: Which tokens count, `(tokens,)`: all but a start token in first place.
    """

    begins: NDArray[np.int64]
    codes: NDArray[np.int64]
    words: pd.Index
    counted: NDArray[np.bool_]

    @classmethod
    def of(cls, samples: pd.DataFrame, tokenizer: Any) -> _Tokens:
        rows = samples["ids"].tolist()
        if not rows:
            raise BenchError("No sample to look for examples in: draw at least one.")
        begins = np.concatenate([[0], np.cumsum([len(ids) for ids in rows])[:-1]]).astype(np.int64)
        ids, place = np.unique(np.concatenate(rows), return_inverse=True)
        shown, words = pd.factorize(np.array([visible(tokenizer.decode([i])).replace(" ", "␣") for i in ids], object))
        counted = np.ones(len(place), bool)
        counted[begins[[row[0] == start_token(tokenizer) for row in rows]]] = False
        return cls(begins, shown[place], pd.Index(words), counted)

    def where(self, place: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample and position in it of each place."""
        sample = np.searchsorted(self.begins, place, side="right") - 1
        return sample, place - self.begins[sample]


def passages(samples: pd.DataFrame, tokenizer: Any, before: int = 12, after: int = 8) -> Passage:
    """A function that gives the text around one token, decoded when asked for; lengths in tokens."""
    rows = samples["ids"].tolist()

    def passage(sample: int, position: int) -> tuple[str, str, str]:
        ids = list(rows[sample])
        cut = (ids[max(0, position - before) : position], [ids[position]], ids[position + 1 : position + 1 + after])
        left, token, right = (visible(tokenizer.decode(part, skip_special_tokens=True)) for part in cut)
        return left, token, right

    return passage


@torch.no_grad()
def _watch(
    model: Any,
    ffns: Sequence[FFN],
    samples: pd.DataFrame,
    tokens: _Tokens,
    see: Callable[[int, Tensor, Tensor], None],
    batch: int,
    progress: Progress | None = None,
) -> None:
    """Call `see(i, h, places)` for every FFN i and batch: h `(n, d_ffn)` of the counted tokens at `places` `(n,)`."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # the head's logits are not needed
    device = next(model.parameters()).device
    rows = samples["ids"].tolist()
    real = places = torch.empty(0)

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(index, args[0][real].float(), places)

    handles = [ffn.down.register_forward_pre_hook(hook(index)) for index, ffn in enumerate(ffns)]
    try:
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            # Right padding needs no mask: causal attention never looks at it.
            ids, place = (torch.zeros(len(part), max(map(len, part)), dtype=torch.long) for _ in range(2))
            counted = torch.zeros(ids.shape, dtype=torch.bool)
            for row, (each, begin) in enumerate(zip(part, tokens.begins[first:], strict=False)):
                own = slice(begin, begin + len(each))
                ids[row, : len(each)] = torch.tensor(each)
                place[row, : len(each)] = torch.arange(own.start, own.stop)
                counted[row, : len(each)] = torch.from_numpy(tokens.counted[own])
            real, places = counted.to(device), place[counted].to(device)
            decoder(input_ids=ids.to(device), use_cache=False)
            if progress:
                progress(first + len(part), len(rows), "")
    finally:
        for handle in handles:
            handle.remove()


def top_examples(
    model: Any,
    ffns: Sequence[FFN],
    samples: pd.DataFrame,
    tokenizer: Any,
    per_neuron: int = 5,
    batch: int = 8,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The tokens with the largest |h| of every neuron.

    Memory on the device is 12 bytes per neuron and example, whatever the number of samples.

    Args:
        samples: Column `ids`, token ids of each sample.
        batch: Samples per forward pass.

    Returns:
        `layer, neuron, rank` (0: largest), `sample` (row of `samples`), `position` (in its `ids`), `token`
        (categorical, as `visible` shows it, a blank as ␣) and `h` (signed), ordered by the first three. A token where
        h is 0 is no example.
    """
    tokens = _Tokens.of(samples, tokenizer)
    device = next(model.parameters()).device
    best = [torch.zeros(per_neuron, ffn.neurons, device=device) for ffn in ffns]
    place = [torch.zeros(per_neuron, ffn.neurons, dtype=torch.long, device=device) for ffn in ffns]

    def see(index: int, h: Tensor, at: Tensor) -> None:
        rows = h.abs().topk(min(per_neuron, len(h)), dim=0).indices
        values = torch.cat([best[index], h.gather(0, rows)])
        places = torch.cat([place[index], at[rows]])
        kept = values.abs().topk(per_neuron, dim=0).indices
        best[index], place[index] = values.gather(0, kept), places.gather(0, kept)

    _watch(model, ffns, samples, tokens, see, batch, progress)
    h = np.concatenate([each.T.flatten().cpu().numpy() for each in best])
    at = np.concatenate([each.T.flatten().cpu().numpy() for each in place])
    sample, position = tokens.where(at)
    found = pd.DataFrame(
        {
            "layer": np.repeat([f.layer for f in ffns], [f.neurons * per_neuron for f in ffns]).astype(np.int32),
            "neuron": np.concatenate([np.repeat(np.arange(f.neurons, dtype=np.int32), per_neuron) for f in ffns]),
            "rank": np.tile(np.arange(per_neuron, dtype=np.int16), sum(f.neurons for f in ffns)),
            "sample": sample.astype(np.int32),
            "position": position.astype(np.int32),
            "token": pd.Categorical.from_codes(tokens.codes[at], tokens.words),
            "h": h,
        }
    )
    return found[h != 0].reset_index(drop=True)


def cluster_examples(
    model: Any,
    ffns: Sequence[FFN],
    labels: pd.DataFrame,
    samples: pd.DataFrame,
    tokenizer: Any,
    tokens: int = 8,
    texts: int = 3,
    min_count: int = 5,
    batch: int = 8,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What the neurons of each cluster fire on together.

    A cluster's activity on a token is the mean over its neurons of |h| divided by the neuron's own mean |h|, so loud
    neurons do not rule; over all tokens it averages 1, and a mean over some of them is their lift. Two passes over the
    samples, the first for the means.

    Args:
        labels: `layer, neuron, cluster`; clusters may span layers, neurons may be left out.
        tokens, texts: How many of each to name per cluster.
        min_count: Occurrences below which a token is not named.

    Returns:
        `cluster, kind` (token or text), `rank`, `shown` (the token, or a passage with its strongest token in «»),
        `lift`, `seen` (occurrences of the token, counted tokens of the text), `sample` and `position` (of the strongest
        occurrence).
    """
    found = _Tokens.of(samples, tokenizer)
    total = [torch.zeros(f.neurons, dtype=torch.float64, device=f.down.weight.device) for f in ffns]

    def add(index: int, h: Tensor, at: Tensor) -> None:
        total[index] += h.abs().sum(0, dtype=torch.float64)

    _watch(model, ffns, samples, found, add, batch, progress)
    clusters, weights = _weights(ffns, labels, [each / found.counted.sum() for each in total])
    activity = torch.zeros(len(found.codes), len(clusters), device=next(model.parameters()).device)

    def weigh(index: int, h: Tensor, at: Tensor) -> None:
        activity[at] += (h.abs() @ weights[index]).to(activity)

    _watch(model, ffns, samples, found, weigh, batch, progress)
    passage = passages(samples, tokenizer)
    owner, position = found.where(np.arange(len(found.codes)))
    kinds = (("token", found.codes, tokens, min_count), ("text", owner, texts, SHORT))
    rows: list[tuple[Any, ...]] = []
    for cluster, each in zip(clusters, activity.T.double().cpu().numpy(), strict=True):
        for kind, group, count, least in kinds:
            for rank, (member, seen, lift) in enumerate(_best(each, group, found.counted, least)[:count]):
                places = np.flatnonzero((group == member) & found.counted)
                at = places[each[places].argmax()]
                quoted = "{}«{}»{}".format(*passage(owner[at], position[at])) if kind == "text" else found.words[member]
                rows.append((cluster, kind, rank, quoted, lift, seen, int(owner[at]), int(position[at])))
    return pd.DataFrame(rows, columns=["cluster", "kind", "rank", "shown", "lift", "seen", "sample", "position"])


def _weights(ffns: Sequence[FFN], labels: pd.DataFrame, means: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]]:
    """The clusters and per FFN a matrix `(d_ffn, clusters)` that turns |h| into its share of their activity.

    A neuron that never fires has no scale; it is left out of its cluster's mean.
    """
    known = {ffn.layer: ffn.neurons for ffn in ffns}
    strange = labels[labels["neuron"] >= labels["layer"].map(known).fillna(0)]
    if len(strange):
        raise BenchError(
            f"The clusters name {len(strange)} neurons that the model has not, first layer {strange['layer'].iloc[0]} "
            f"neuron {strange['neuron'].iloc[0]}: they belong to another model; scan and cluster this one."
        )
    codes, clusters = pd.factorize(labels["cluster"], sort=True)
    masks = []
    for ffn, mean in zip(ffns, means, strict=True):
        own = (labels["layer"] == ffn.layer).to_numpy()
        mask = torch.zeros(ffn.neurons, len(clusters), dtype=torch.float64, device=mean.device)
        mask[labels["neuron"].to_numpy()[own], codes[own]] = 1.0
        masks.append(mask * (mean > 0)[:, None])
    members = sum(mask.sum(0).cpu() for mask in masks)
    assert isinstance(members, Tensor)
    return list(clusters), [
        (mask / mean.clamp(min=1e-300)[:, None] / members.clamp(min=1).to(mask)).float()
        for mask, mean in zip(masks, means, strict=True)
    ]


def _best(
    activity: NDArray[np.float64], group: NDArray[np.int64], counted: NDArray[np.bool_], least: int
) -> list[tuple[int, int, float]]:
    """Groups of at least `least` tokens (or as many as the largest has): number, tokens, mean; highest first."""
    sizes = np.bincount(group[counted])
    mean = np.bincount(group[counted], activity[counted]) / np.maximum(sizes, 1)
    enough = np.flatnonzero(sizes >= min(least, sizes.max()))
    return [(int(i), int(sizes[i]), float(mean[i])) for i in enough[np.argsort(-mean[enough], kind="stable")]]


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """One row per cluster for a notebook: its tokens with lift and count, its passages. The text is not escaped."""
    rows = []
    for cluster, each in found.groupby("cluster"):
        token, text = each[each["kind"] == "token"], each[each["kind"] == "text"]
        named = [f"{r.shown} {r.lift:.1f}× ({r.seen:,})" for r in token.itertuples()]
        quoted = [f"… {r.shown} … ({r.lift:.1f}×)" for r in text.itertuples()]
        rows.append((cluster, ", ".join(named), " / ".join(quoted)))
    return pd.DataFrame(rows, columns=["cluster", "tokens: lift (times seen)", "texts with the strongest token marked"])
