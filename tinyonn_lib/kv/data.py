"""The same texts as both sides see them: ids, how tokens correspond, and both caches."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.align import onto_tokens, token_weights
from tinyonn_lib.kv.cache import KV, KVModel
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.lm.load import context_length

Batch = dict[str, Tensor]
"""`ids`, `mask`, `own.keys`, `own.values`, and for each teacher `name/keys`, `name/values`: rows of texts."""

Read = tuple[list[int], list[tuple[int, int]]]
"""Token ids of a text, and the characters that each stands for."""

NOT_FINITE = "The caches hold NaN or infinite values: check the models that made them."

KEEP = 2**31
"""Bytes of caches that are kept in memory; beyond that they are computed each time they are asked for."""


def teachers_of(batch: Batch, names: Sequence[str]) -> dict[str, KV]:
    """Teacher → cache, one entry per student token."""
    return {name: KV(batch[f"{name}/keys"], batch[f"{name}/values"]) for name in names}


def own_of(batch: Batch) -> KV:
    """The student's own cache."""
    return KV(batch["own.keys"], batch["own.values"])


def foreign(tokenizers: Mapping[str, Any], student: str = "student") -> dict[str, Any]:
    """Those of several tokenizers that cut texts otherwise than the student's, or may do so."""
    own = _rules(tokenizers[student])
    return {name: other for name, other in tokenizers.items() if _rules(other) != own}


def _rules(tokenizer: Any) -> Any:
    """Vocabulary, merges and all that comes before them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    told = json.loads(backend.to_str())
    return {key: told[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


class Caches:
    """Teachers' and student's caches of texts, batch by batch.

    Attributes:
        ids, mask: `(texts, tokens)`, of the student's tokenizer, padded at the end.
        source: per text where it is from.
        names: of the teachers.
    """

    def __init__(
        self,
        student: KVModel,
        teachers: Mapping[str, KVModel],
        samples: pd.DataFrame,
        *,
        tokenizer: Any = None,
        tokenizers: Mapping[str, Any] | None = None,
        batch: int = 32,
        keep: int = KEEP,
    ) -> None:
        """
        Args:
            samples: columns `ids, text, source`, of `lm.samples.draw` with the student's tokenizer.
            tokenizer: the student's; needed if a teacher has another.
            tokenizers: teacher → tokenizer, of those that cut texts otherwise than the student.
            batch: texts per forward pass.
            keep: see `KEEP`.

        Raises:
            BenchError: texts longer than a model's context, or none that all can read.
        """
        self.student, self.teachers, self.names = student, dict(teachers), list(teachers)
        self.batch = batch
        rows = samples["ids"].tolist()
        others: dict[str, list[Read]] = {}
        if tokenizers:
            if strangers := [name for name in tokenizers if name not in self.teachers]:
                raise BenchError(
                    f"A tokenizer for '{strangers[0]}', which is no teacher: choose from {', '.join(self.names)}."
                )
            # Decoded pieces need not be cut again as they were: both sides read the text anew.
            texts = samples["text"].tolist()
            longest = max(map(len, rows), default=0)  # cut anew, a piece may have a token more
            own = [_spans(tokenizer, text, longest) for text in texts]
            for name, theirs in tokenizers.items():
                limit = context_length(self.teachers[name].model)
                others[name] = [_spans(theirs, text, limit) for text in texts]
                own = [_cut(*both) for both in zip(own, others[name], strict=True)]
            rows = [ids for ids, _ in own]
        kept = [place for place, ids in enumerate(rows) if len(ids) > 1]
        if not kept:
            raise BenchError("No text of two tokens or more: give longer texts.")
        self.ids, self.mask = _padded([rows[place] for place in kept])
        self.source = samples["source"].iloc[kept].tolist()
        # A teacher's ids are padded once and for all: with LongRoPE its keys depend on how long a batch is.
        self._foreign: dict[str, tuple[Tensor, list[Tensor]]] = {
            name: (
                _padded([read[place][0] for place in kept])[0],
                [token_weights(own[place][1], read[place][1]) for place in kept],
            )
            for name, read in others.items()
        }
        self._check()
        each = sum(m.widths.layers * m.widths.width for m in (student, *teachers.values()))
        self._kept: Batch | None = None
        if 2 * 4 * each * self.ids.numel() <= keep:
            parts = [self._computed(rows) for rows in torch.arange(len(self.ids)).split(batch)]
            self._kept = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor) -> Batch:
        """The texts at places `rows`, on the student's device."""
        if self._kept is not None:
            found = {key: tensor[rows] for key, tensor in self._kept.items()}
        else:
            parts = [self._computed(part) for part in rows.split(self.batch)]
            found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return {key: tensor.to(self.student.device) for key, tensor in found.items()}

    @torch.no_grad()
    def of_student(self, student: KVModel) -> Caches:
        """The same texts as another student of the same tokenizer caches them; the teachers' stay.

        Raises:
            BenchError: texts longer than its context, or tokens that it does not know.
        """
        other = copy.copy(self)
        other.student = student
        other._check()
        if self._kept is not None:
            own = [student.read(self.ids[rows]) for rows in torch.arange(len(self)).split(self.batch)]
            sides = {"own.keys": [kv.keys for kv in own], "own.values": [kv.values for kv in own]}
            other._kept = self._kept | {key: torch.cat(parts).cpu() for key, parts in sides.items()}
        return other

    def batches(self) -> Iterator[Batch]:
        """All texts in order; where there are two, none is alone in its batch (`judge.shuffled` needs another)."""
        places = list(torch.arange(len(self)).split(max(2, self.batch)))
        if len(places) > 1 and len(places[-1]) == 1:
            places[-2:] = [torch.cat(places[-2:])]
        return (self[rows] for rows in places)

    @torch.no_grad()
    def _computed(self, rows: Tensor) -> Batch:
        ids = self.ids[rows]
        own = self.student.read(ids)
        found = {"ids": ids, "mask": self.mask[rows], "own.keys": own.keys, "own.values": own.values}
        for name in self.names:
            kv = self._teacher(name, rows, ids)
            found |= {f"{name}/keys": kv.keys, f"{name}/values": kv.values}
        return found

    def _teacher(self, name: str, rows: Tensor, ids: Tensor) -> KV:
        model = self.teachers[name]
        if name not in self._foreign:
            return model.read(ids)
        theirs, weights = self._foreign[name]
        kv = model.read(theirs[rows])
        each = torch.zeros(len(rows), ids.shape[1], theirs.shape[1])
        for place, row in enumerate(rows.tolist()):
            each[place, : weights[row].shape[0], : weights[row].shape[1]] = weights[row]
        return onto_tokens(kv, each.to(kv.keys.device))

    def _check(self) -> None:
        for name, model in [("student", self.student), *self.teachers.items()]:
            ids = self._foreign[name][0] if name in self._foreign else self.ids
            limit, known = context_length(model.model), len(model.model.get_input_embeddings().weight)
            if limit and ids.shape[1] > limit:
                raise BenchError(
                    f"Texts of {ids.shape[1]} tokens are longer than the context of '{name}' ({limit}): cut them."
                )
            if int(ids.max()) >= known:
                raise BenchError(
                    f"The texts hold token {int(ids.max())}, and '{name}' knows {known}: give its own tokenizer."
                )


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def _spans(tokenizer: Any, text: str, limit: int | None) -> Read:
    """A text as a tokenizer cuts it, the start token first; `limit` tokens at most."""
    if not getattr(tokenizer, "is_fast", False):
        raise BenchError(
            "Aligning two tokenizers needs character offsets of both: give fast tokenizers (tokenizer.json), the "
            "student's, too."
        )
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [(0, 0), *map(tuple, read["offset_mapping"])]
    return [start_token(tokenizer), *read["input_ids"]][:limit], spans[:limit]


def _cut(own: Read, theirs: Read) -> Read:
    """The student's text, cut to what the teacher has read."""
    (ids, spans), end = own, theirs[1][-1][1]
    seen = sum(last <= end for _, last in spans)
    return ids[:seen], spans[:seen]
