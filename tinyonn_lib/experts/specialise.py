"""What each expert is called for: how far its choice follows from the token itself, and which tokens call it most.

A start token that stands before a text is context and never counted, as in `examples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.examples import passages, visible
from tinyonn_lib.experts.routing import Scale, scaled
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.lm.models import FFN

SHIFTS = 16
"""How often a choice is moved along the tokens to learn what chance gives."""

SEPARATOR = " · "
"""Between the tokens of an expert; a blank in a token is shown as ␣, so it divides them again."""

MIN_COUNT = 8
"""Occurrences below which a token is not named."""


@dataclass(frozen=True)
class Choices:
    """Which experts the divided model had on, and at which tokens; all samples end to end.

    Attributes:
        on: per FFN which experts were on, bool `(tokens, experts)`, on the CPU.
        layers: the number of each FFN's layer.
        codes: index into `words` of each token, `(tokens,)`; one per token id.
        words: the tokens that occur, as `examples.visible` shows them, a blank as ␣; not escaped.
        sample, position: where each token stands, `(tokens,)`.
    """

    on: Sequence[Tensor]
    layers: Sequence[int]
    codes: NDArray[np.int64]
    words: Sequence[str]
    sample: NDArray[np.int64]
    position: NDArray[np.int64]


@torch.no_grad()
def watch(
    model: Any, ffns: Sequence[FFN], layers: Sequence[Any], samples: pd.DataFrame, tokenizer: Any, batch: int = 8
) -> Choices:
    """Run the divided model over the samples once and note every choice.

    Args:
        model: the dense model whose neurons are scheduled.
        layers: per FFN `hard(x) → (on, gates)` and `scale(x, h)`, such as `student.Routed`.
        samples: column `ids`, token ids of each sample.
        batch: samples per forward pass.

    Raises:
        BenchError: too few tokens to tell anything from chance.
    """
    rows = [torch.tensor(ids) for ids in samples["ids"]]
    counted = [torch.ones(len(ids), dtype=torch.bool) for ids in rows]
    for ids, keep in zip(rows, counted, strict=True):
        keep[0] = int(ids[0]) != start_token(tokenizer)
    total = sum(int(keep.sum()) for keep in counted)
    if total < 10 * SHIFTS:
        raise BenchError(f"{total} tokens are too few to see what experts are called for: draw at least {10 * SHIFTS}.")
    on: list[list[Tensor]] = [[] for _ in layers]
    real = torch.empty(0)

    def noted(place: int) -> Scale:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            on[place].append(layers[place].hard(x)[0][real].bool().cpu())
            factor: Tensor = layers[place].scale(x, h)
            return factor

        return scale

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # the head's logits are not needed
    device = next(model.parameters()).device
    with scaled(ffns, [noted(place) for place in range(len(layers))]):
        for first in range(0, len(rows), batch):
            # Right padding needs no mask: causal attention never looks at it.
            part, real = (pad_sequence(each[first : first + batch], True).to(device) for each in (rows, counted))
            decoder(input_ids=part, use_cache=False)
    kept = torch.cat(counted).numpy()
    known, codes = np.unique(torch.cat(rows).numpy()[kept], return_inverse=True)
    words = [visible(tokenizer.decode([int(i)])).replace(" ", "␣") for i in known]
    sample = np.repeat(np.arange(len(rows)), [len(each) for each in rows])[kept]
    position = np.concatenate([np.arange(len(each)) for each in rows])[kept]
    return Choices([torch.cat(each) for each in on], [f.layer for f in ffns], codes, words, sample, position)


def table(found: Choices, top: int = 6) -> pd.DataFrame:
    """What each expert is called for, and the same after its choices were moved along to other tokens: chance.

    Args:
        top: how many tokens to name.

    Returns:
        One row per layer and expert: `layer, expert, share` (of tokens on which it is on), `entropy` (of on or off,
        bits), `bits` (that the token tells of it, at most `entropy`; see `mutual_information`), `tokens` (those seen
        at least `MIN_COUNT` times with the highest lift P(on | token) / P(on), with lift and occurrences; not
        escaped), `chance_bits` and `chance_tokens` (the same of the moved choices).
    """
    offsets = _offsets(len(found.codes))
    parts = []
    for layer, on in zip(found.layers, found.on, strict=True):
        columns: dict[str, Any] = {"layer": layer, "expert": np.arange(on.shape[1])}
        columns["share"] = on.double().mean(0).numpy()
        columns["entropy"] = _entropy(on.double().mean(0)).numpy()
        for prefix, choice in (("", on), ("chance_", on.roll(int(offsets[-1]), 0))):
            columns[f"{prefix}bits"] = mutual_information(choice, found.codes, offsets[:-1])
            columns[f"{prefix}tokens"] = [
                SEPARATOR.join(label for _, label in each[:top]) for each in _lifts(choice, found)
            ]
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def quotes(
    found: Choices, table: pd.DataFrame, samples: pd.DataFrame, tokenizer: Any, experts: int = 6, each: int = 2
) -> pd.DataFrame:
    """Passages on which some experts are on, one for each of their first tokens; not escaped.

    Each layer's expert with most bits comes first, then each one's second, and so on.

    Args:
        table: of `table`.
        samples: those that were watched.
        experts, each: how many experts, and passages of each.

    Returns:
        `layer, expert, bits, token` (with lift and occurrences), `passage` (the token in «»; drawn at random from
        those where the expert is on).
    """
    passage, rng = passages(samples, tokenizer), np.random.default_rng(0)
    by_layer = dict(zip(found.layers, found.on, strict=True))
    rows = []
    rank = table.groupby("layer")["bits"].rank(ascending=False, method="first")
    picked = table.assign(rank=rank).sort_values(["rank", "bits"], ascending=[True, False]).head(experts)
    for row in picked.sort_values(["layer", "rank"]).itertuples():
        on = by_layer[row.layer][:, [row.expert]]
        for code, label in _lifts(on, found)[0][:each]:
            at = rng.choice(np.flatnonzero(on[:, 0].numpy() & (found.codes == code)))
            quoted = "{}«{}»{}".format(*passage(int(found.sample[at]), int(found.position[at])))
            rows.append((row.layer, row.expert, row.bits, label, quoted))
    return pd.DataFrame(rows, columns=["layer", "expert", "bits", "token", "passage"])


def mutual_information(on: Tensor, codes: NDArray[np.int64], offsets: NDArray[np.int64] | None = None) -> NDArray[Any]:
    """Bits that a token's identity tells about whether an expert is on, corrected for chance; `(experts,)`.

    What is counted is too high, since a rare token seems to decide whatever it meets. So the same is counted with the
    choices moved along the tokens by each of the offsets, which keeps how choices and tokens cluster in a text, and
    adjusted as in Vinh et al. 2010 (JMLR 11: 2837): H (I − E) / (H − E), with E the mean of the moved ones. It is
    0 in the mean where the token tells nothing, so single values may be below, and H where it decides. In between, on
    6,000 tokens as rare as those of text, it was right within 0.05 bits; I − E was up to 0.23 too low.

    Args:
        on: bool `(tokens, experts)`.
        codes: which token each is, from 0, `(tokens,)`.
    """
    offsets = _offsets(len(codes)) if offsets is None else offsets
    index, entropy = torch.from_numpy(codes), _entropy(on.double().mean(0))
    counts = torch.bincount(index).double()

    def counted(choice: Tensor) -> Tensor:
        called = torch.zeros(len(counts), on.shape[1], dtype=torch.float64).index_add_(0, index, choice.double())
        left = _entropy(called / counts[:, None].clamp(min=1))
        return entropy - (left * counts[:, None]).sum(0) / len(codes)

    chance = torch.stack([counted(on.roll(int(offset), 0)) for offset in offsets]).mean(0)
    room = entropy - chance
    bits = entropy * (counted(on) - chance) / room
    # Always on, never on, or no token twice: nothing can be told.
    return torch.where(room > 1e-9, bits, 0.0).numpy()


def _entropy(share: Tensor) -> Tensor:
    """Of on or off, bits."""
    return (torch.special.entr(share) + torch.special.entr(1 - share)) / np.log(2)


def _offsets(tokens: int) -> NDArray[np.int64]:
    """By how much choices are moved: `SHIFTS` offsets for the mean, and one to be looked at."""
    away = tokens // 20  # from their own text
    return np.random.default_rng(0).choice(np.arange(1 + away, tokens - away), SHIFTS + 1, replace=False)


def _lifts(on: Tensor, found: Choices) -> list[list[tuple[int, str]]]:
    """Per expert the tokens that call it more often than others do, highest lift first: code and label."""
    codes, counts = torch.from_numpy(found.codes), np.bincount(found.codes)
    called = torch.zeros(len(counts), on.shape[1]).index_add_(0, codes, on.float()).numpy()
    often = np.flatnonzero(counts >= MIN_COUNT)
    lift = called[often] / counts[often, None] / np.maximum(on.float().mean(0).numpy(), 1e-12)
    named = []
    for column in lift.T:
        order = np.lexsort((-counts[often], -column))  # of equals the more frequent first
        picked = [(int(often[i]), float(column[i])) for i in order if column[i] > 1]
        named.append([(code, f"{found.words[code]} {value:.1f}× ({counts[code]:,})") for code, value in picked])
    return named
