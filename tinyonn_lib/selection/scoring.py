"""Scores and baselines of texts, in one forward pass each.

Baselines: perplexity, and IFD (Cherry LLM, arXiv 2308.12032), how much an answer's perplexity falls when its prompt is
given; that needs a second pass over the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.lm.threads import default_shards, threads
from tinyonn_lib.selection.head import find_head
from tinyonn_lib.selection.routers import Watch
from tinyonn_lib.selection.rows import Bad, Row
from tinyonn_lib.selection.scores import SCORES, text_scores, trash_experts
from tinyonn_lib.selection.selector import Selector

CALLED = "called_"
"""How the columns begin that tell which experts a text calls."""

CPU_TOKENS = 1024
"""A CPU's batches are no larger: what a layer hands on then stays in its cache."""


@dataclass(frozen=True)
class _Text:
    """Token ids with the start token in front; the first `given` of the tokens behind it are the prompt."""

    ids: list[int]
    given: int


class Scorer:
    """Scores rows with a selector.

    On a CPU batches run in one thread per core.

    Attributes:
        room: tokens of a forward pass at most, padding included.
    """

    def __init__(
        self,
        selector: Selector,
        *,
        trash: str = "last",
        ratio: float = 0.125,
        length: int = 0,
        batch_tokens: int = 8192,
        seed: int = 0,
        baselines: bool = True,
        calls: bool = False,
    ) -> None:
        """Prepare.

        Args:
            trash: "last": the last experts, as in document 001; "calibrated": those that corrupted text calls.
            ratio: share of the experts that are trash.
            length: longest text in tokens; 0: what the model takes.
            batch_tokens: of a forward pass, padding included; a longer text is one alone.
            seed: of the random baseline.
            baselines: perplexity and IFD; without them there are no such columns, and no `combined`.
            calls: tell which experts a text calls: `called_LAYER_EXPERT`, see `called`.

        Raises:
            BenchError: a dense model, or an argument out of range.
        """
        model = selector.model
        limit = int(model.config.get_text_config().max_position_embeddings) - 1  # the start token takes a place
        if not 0 <= length <= limit:
            raise BenchError(
                f"length={length} is more than fits, for this model takes 1 to {limit} tokens of text: choose 1 to "
                f"{limit}, or 0 for all of it."
            )
        if batch_tokens < 1:
            raise BenchError(f"batch_tokens={batch_tokens} holds no token: choose at least 1.")
        if trash not in ("last", "calibrated"):
            raise BenchError(f"trash={trash} is unknown: choose last or calibrated.")
        if trash == "calibrated" and not selector.gap:
            raise BenchError("This selector was not warmed up, so no expert is known as trash: choose trash=last.")
        self._head = find_head(model)
        self._watch = Watch(self._head.body if self._head else model, inputs=False)
        experts = [layer.experts for layer in self._watch.layers]
        device = self._watch.layers[0].weight.device
        gap = selector.gap if trash == "calibrated" else None
        self._trash = [chosen.to(device) for chosen in trash_experts(experts, ratio, gap)]
        self._selector, self._device, self._seed, self._baselines = selector, device, seed, baselines
        every = [f"{CALLED}{layer}_{expert}" for layer, count in enumerate(experts) for expert in range(count)]
        self._columns = [*SCORES, *(every if calls else ())]
        # Weights of scores hold for the trash experts that they were measured with.
        about = selector.about
        alike = trash == "last" and about.get("ratio", ratio) == ratio
        self._combined = {n: w for n, w in selector.combined.items() if alike or n == "perplexity_fitted"}
        self._length = length or limit
        self.room = min(batch_tokens, CPU_TOKENS) if device.type == "cpu" else batch_tokens
        self._batch_tokens = batch_tokens

    def __call__(self, rows: Sequence[Row]) -> tuple[pd.DataFrame, list[Bad]]:
        """Score rows.

        Returns:
            A table with one row per scored row, in the order given: `source_dataset, source_index, tokens, literal,
            centred, log_mass, contrastive, random, perplexity, ifd` (NaN without a prompt or an answer), and, if the
            selector has them, `combined` (only with the trash experts of the warm-up) and `perplexity_fitted`; and the
            rows that could not be scored. All tokens of a text count, its prompt's, too, except in IFD.

        Raises:
            BenchError: not a number in a model's output, or too little memory.
        """
        texts, bad = [], []
        kept: list[Row] = []
        for row, text in zip(rows, self._tokenised(rows), strict=True):
            tokens = len(text.ids) - 1
            if 0 < tokens <= self._length:
                kept.append(row)
                texts.append(text)
            else:
                reason = f"too long: {tokens} tokens" if tokens else "empty: 0 tokens"
                bad.append(Bad(row.source_dataset, row.source_index, reason))
        counts = np.array([len(text.ids) - 1 for text in texts], np.int64)
        given = np.array([text.given for text in texts], np.int64)
        measured = self._measured(texts)
        if not (sound := np.isfinite(measured).all(1)).all():
            first = kept[int(sound.argmin())]
            raise BenchError(
                f"The model's output for row {first.source_index} of {first.source_dataset!r} is not a number: its "
                "weights are damaged, or its precision is too low (choose dtype=float32)."
            )
        table = pd.DataFrame(
            {
                "source_dataset": pd.Series([row.source_dataset for row in kept], dtype="str"),
                "source_index": np.array([row.source_index for row in kept], np.int64),
                "tokens": counts,
            }
            | dict(zip(self._columns, measured.T, strict=False))
        )
        whole, answer, alone = measured.T[len(self._columns) :]
        table["random"] = [uniform(self._seed, row.source_dataset, row.source_index) for row in kept]
        if self._baselines:
            likely = whole / counts
            values = table.assign(log_perplexity=likely, log_perplexity_squared=likely**2, intercept=1.0)
            for name, weights in self._combined.items():
                table[name] = sum(weight * values[key] for key, weight in weights.items())
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                table["perplexity"] = np.exp(whole / counts)
                table["ifd"] = np.where(alone > 0, np.exp((answer - alone) / (counts - given)), np.nan)
        return table, bad

    def _tokenised(self, rows: Sequence[Row]) -> list[_Text]:
        tokenizer = self._selector.tokenizer
        start = start_token(tokenizer)

        def ids(texts: list[str]) -> list[list[int]]:
            if not texts:
                return []
            return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

        prompts = iter(ids([row.prompt for row in rows if row.prompt]))
        found = []
        for row, whole in zip(rows, ids([row.text for row in rows]), strict=True):
            given = 0
            if row.prompt:
                # A token that begins in the prompt and ends in the answer is of the answer.
                for one, other in zip(whole, next(prompts), strict=False):
                    if one != other:
                        break
                    given += 1
            found.append(_Text([start, *whole], given))
        return found

    def _measured(self, texts: Sequence[_Text]) -> NDArray[np.float64]:
        """Per text: `_columns`, nats of all its tokens, of its answer, and of the answer without its prompt, which is
        0 where there is no prompt or no answer."""
        shards = default_shards(self._device)
        pairs = [place for place, text in enumerate(texts) if 0 < text.given < len(text.ids) - 1]
        alone = {place: [texts[place].ids[0], *texts[place].ids[1 + texts[place].given :]] for place in pairs}
        whole = batches({place: len(text.ids) for place, text in enumerate(texts)}, self.room, shards)
        short = batches({place: len(ids) for place, ids in alone.items()}, self.room, shards) if self._baselines else []

        def measure(job: tuple[list[int], bool]) -> Tensor:
            places, again = job
            with torch.no_grad():  # here, because the mode belongs to a thread
                return self._forward([_Text(alone[i], 0) if again else texts[i] for i in places], again)

        jobs = [(places, False) for places in whole] + [(places, True) for places in short]
        try:
            with self._watch, threads(max(1, min(shards, len(jobs)))) as each:
                results = [result.cpu().double().numpy() for result in each(measure, jobs)]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise BenchError(
                f"Not enough memory to score {self._batch_tokens} tokens at a time: lower batch_tokens."
            ) from error
        found = np.zeros((len(texts), len(self._columns) + 3))
        for (places, again), values in zip(jobs, results, strict=True):
            if again:
                found[places, -1] = values[:, -1]
            else:
                found[places, :-1] = values
        return found

    def _forward(self, texts: Sequence[_Text], answers_only: bool) -> Tensor:
        """`_columns`, nats of the text and nats of the answer, side by side per text, float64, on the device."""
        lengths = torch.tensor([len(text.ids) for text in texts])
        width = int(lengths.max())
        ids = torch.tensor([text.ids + [text.ids[0]] * (width - len(text.ids)) for text in texts])
        real = torch.arange(width) < lengths[:, None]
        predicts = torch.arange(width) < lengths[:, None] - 1
        places = predicts.flatten().nonzero()[:, 0]  # found on the CPU: on a GPU it would make the CPU wait
        targets = ids.roll(-1, 1).flatten()[places].to(self._device)
        given = torch.tensor([text.given for text in texts])
        answer = (torch.arange(width) >= given[:, None]).to(self._device)
        places, inputs = places.to(self._device), ids.to(self._device)
        if self._head:
            # Right padding needs no mask: `find_head` saw that the model never looks at it.
            hidden = self._head.body(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            nats = self._head.nats(hidden[places], targets) if self._baselines else None
        else:
            mask = real.long().to(self._device)
            logits = self._watch.model(input_ids=inputs, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
            nats = F.cross_entropy(logits[places].float(), targets, reduction="none") if self._baselines else None
        costs = torch.zeros(inputs.shape, dtype=torch.float64, device=self._device)
        if nats is not None:
            costs.view(-1)[places] = nats.double()
        columns = [costs.sum(1), (costs * answer).sum(1)]
        if answers_only:
            return torch.stack(columns, 1)
        real[:, 0] = False  # the start token is no token of the text
        logits, mask, units = self._watch.logits, real.to(self._device), self._selector.units
        scores = text_scores(logits, mask, self._trash, units)
        found = torch.stack([scores[name].double() for name in SCORES], 1)
        if len(self._columns) > len(SCORES):
            found = torch.cat([found, *called(logits, mask, units)], 1)
        return torch.cat([found, torch.stack(columns, 1)], 1)


def called(logits: Sequence[Tensor], mask: Tensor, units: Sequence[float]) -> list[Tensor]:
    """Per layer the share of probability that each expert has in a text, the mean over its tokens, `(B, E)`, float64.

    Args:
        logits, mask, units: as of `text_scores`; the softmax is over logits in units.
    """
    shares = [(layer / unit).softmax(-1).view(*mask.shape, -1) for layer, unit in zip(logits, units, strict=True)]
    totals = [torch.where(mask[..., None], share, 0).sum(1, dtype=torch.float64) for share in shares]
    return [total / mask.sum(1, keepdim=True) for total in totals]


def batches(lengths: Mapping[int, int], room: int, shards: int = 1) -> list[list[int]]:
    """Places of texts for each forward pass, longest first.

    Args:
        lengths: place → tokens.
        room: tokens of a pass at most, padding included; a longer text is one alone.
        shards: threads; there is enough for each.
    """
    order = sorted(lengths, key=lambda place: -lengths[place])
    room = min(room, -(-sum(lengths.values()) // shards))
    found, begin = [], 0
    while begin < len(order):
        end = begin + max(1, room // lengths[order[begin]])
        found.append(order[begin:end])
        begin = end
    return found


def uniform(seed: int, source: str, index: int) -> float:
    """A number in [0, 1) that depends on these three alone, not on the order or number of rows."""
    digest = hashlib.blake2b(f"{seed}\0{source}\0{index}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
