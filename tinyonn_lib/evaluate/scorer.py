"""lm-eval's Hugging Face model with our threads and progress. Imports lm_eval: import it inside functions only."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tinyonn_lib.lm.threads import default_shards, threads

Request = tuple[Any, list[int], list[int]]  # the strings, or None; context; continuation, as token ids


class Scorer(HFLM):
    """A model object for `lm_eval`; on a CPU its requests run in one thread per core."""

    def __init__(
        self, model: Any, tokenizer: Any, batch: int, documents: Counter[str], progress: Callable[[int, int], None]
    ) -> None:
        """Wrap model and tokenizer as they are; afterwards `cut` holds the prompts that were too long for the model.

        Args:
            documents: how many documents each kind of request will bring, for `progress(done, all)`.
        """
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")
        self._documents, self._report, self._lock = documents, progress, threading.Lock()
        self.cut: set[str] = set()
        self._before, self._kind, self._rows, self._of, self._told = 0, "", 0, 1, 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._begin("loglikelihood")
        return self._end(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As in `HFLM`, with two differences: windows are batched by length, and the text gets no special tokens.

        A tokenizer that adds BOS by itself would otherwise pay for a second one after the prefix token.
        """
        self._begin("loglikelihood_rolling")
        windows: list[Request] = []
        owner: list[int] = []
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            owner += [place] * (len(windows) - len(owner))
        sums = [0.0] * len(requests)
        for place, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            sums[place] += value
        return self._end(sums)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._begin("generate_until")
        return self._end(super().generate_until(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.cut |= {text[0] for text, head, tail in requests if text and len(head) + len(tail) > self.max_length + 1}
        # HFLM answers requests that differ in the last token only with one forward: they must share a thread.
        passes: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            passes.setdefault((*context, *continuation[:-1]), []).append(place)
        longest_first = [passes[key] for key in sorted(passes, key=lambda key: (-len(key), key))]
        self._of = len(passes)
        shards = default_shards(self.device)
        parts = [part for n in range(shards) if (part := list(chain(*longest_first[n::shards])))]
        score = super()._loglikelihood_tokens
        found: list[Any] = [None] * len(requests)

        def answer(part: list[int]) -> None:
            for place, value in zip(part, score([requests[i] for i in part], True, override_bs), strict=True):
                found[place] = value

        with threads(shards) as each:
            each(answer, parts)
        return found

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, attn_mask, labels)
        with self._lock:
            self._rows += len(inps)
            share = self._documents[self._kind] * min(self._rows / self._of, 1.0)
            self._tell(self._before + int(share))
        return logits

    def _begin(self, kind: str) -> None:
        self._kind, self._rows, self._of = kind, 0, 1

    def _end(self, found: Any) -> Any:
        self._before += self._documents[self._kind]
        self._tell(self._before)
        return found

    def _tell(self, done: int) -> None:
        """Once: the last batch of a kind has brought its documents, and so has its end."""
        if done > self._told:
            self._told = done
            self._report(done, self._documents.total())
