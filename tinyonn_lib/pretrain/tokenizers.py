"""Tokenizers side by side: what a vocabulary saves in tokens, costs in parameters, and brings at equal time.

Document 002 §2 wants a large vocabulary, its log of 2025-07-19 a small one; here both are measured. Loss is compared in
bits per byte, which does not depend on how a text is cut.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, cast

import pandas as pd
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import bits_per_byte
from tinyonn_lib.lm.load import load_tokenizer
from tinyonn_lib.lm.texts import pack
from tinyonn_lib.lm.tokenizer import END, train_bpe
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAIN, HELDOUT = "train", "heldout"
_PROBE_SECONDS, _PROBE_STEPS = 1.0, 16  # of one look at a speed: about so long, at most so many steps
_JUDGED_LOGITS = 2**26  # held at once while judging, per thread: a quarter of a GB
_BYTES_PER_LOGIT, _BYTES_PER_WEIGHT = 16, 24
"""Of a training step in float32: logits, their log-softmax, both gradients; a weight, its gradient, the optimiser's
moments and scratch. A step with 30,000 entries was measured at two thirds of it."""


class Build(Protocol):
    """Makes a fresh model; `functools.partial(architectures.new, "qwen3", width=…, …)` is one."""

    def __call__(
        self, *, vocab_size: int, eos_token_id: int | None, pad_token_id: int | None, seed: int
    ) -> PreTrainedModel: ...


class Train(Protocol):
    """Trains a model in place on `tokens` tokens of blocks (N, length); the seed orders the blocks."""

    def __call__(self, model: PreTrainedModel, blocks: Tensor, tokens: int, seed: int) -> object: ...


def candidates(train_texts: Sequence[str], spec: str) -> dict[str, PreTrainedTokenizerBase]:
    """Tokenizers by a list such as "1024 4096 /path/to/folder owner/name".

    Args:
        train_texts: what our own are trained on.
        spec: parted by blanks; a number trains a byte-level BPE of so many entries, named "bpe 4096"; anything else is
            a folder or hub id.

    Raises:
        BenchError: an empty list, a folder without a tokenizer, a hub that is not reachable, a vocabulary too small.
    """
    if not spec.split():
        raise BenchError("No tokenizer to compare: give sizes, folders or hub ids, for example '1024 4096'.")
    return {
        f"bpe {item}" if item.isdecimal() else item: (
            train_bpe(train_texts, int(item)) if item.isdecimal() else _load(item)
        )
        for item in spec.split()
    }


def compare(
    texts_by_split: Mapping[str, Sequence[str]],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    *,
    width: int,
    other_parameters: int,
) -> pd.DataFrame:
    """What each tokenizer makes of the texts, and what it costs a model of this width.

    Args:
        texts_by_split: "train" and "heldout".
        tokenizers: by name; their special tokens are not counted.
        width: of the embedding, one table for input and output.
        other_parameters: of the model beside its embedding.

    Returns:
        One row per tokenizer: tokenizer; vocabulary (entries); bytes_per_token and tokens_per_1000_bytes on held-out
        text (UTF-8); embedding_parameters; embedding_share of all parameters; vocabulary_used, the share of the
        entries that occur in the training texts; covers, whether all held-out texts come back unchanged.

    Raises:
        BenchError: a split without text, or sizes that are not positive.
    """
    if width < 1 or other_parameters < 0:
        raise BenchError(f"width={width} must be at least 1 and other_parameters={other_parameters} at least 0.")
    held_out = _texts(texts_by_split, HELDOUT)
    size = sum(len(text.encode()) for text in held_out)
    rows = []
    for name, tokenizer in tokenizers.items():
        ids = _encode(tokenizer, held_out)
        tokens, vocabulary = sum(map(len, ids)), entries(tokenizer)
        if not tokens:
            raise BenchError(f"The tokenizer {name} makes no token of the held-out texts: it is empty or damaged.")
        used = {token for row in _encode(tokenizer, _texts(texts_by_split, TRAIN)) for token in row}
        rows.append(
            {
                "tokenizer": name,
                "vocabulary": vocabulary,
                "bytes_per_token": size / tokens,
                "tokens_per_1000_bytes": 1000 * tokens / size,
                "embedding_parameters": vocabulary * width,
                "embedding_share": vocabulary * width / (vocabulary * width + other_parameters),
                "vocabulary_used": len(used) / vocabulary,
                "covers": _covers(tokenizer, held_out, ids),
            }
        )
    return pd.DataFrame(rows)


def by_loss(
    texts_by_split: Mapping[str, Sequence[str]],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    *,
    build: Build,
    train: Train,
    seconds: float,
    length: int,
    step_tokens: int,
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = 3,
    memory: float | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train the same architecture with each tokenizer for equal time, and judge it on held-out text.

    Equal time is equal computation: every contender's speed is measured first, in turns, so that a machine that is
    busy for a while slows all of them; each then gets speed × `seconds` tokens.

    Args:
        texts_by_split: "train" and "heldout".
        tokenizers: by name. Their special tokens are put aside: EOS (else BOS or SEP, else a new one) parts documents.
        build, train: see there.
        seconds: of one training.
        length: tokens in a block.
        step_tokens: of one optimiser step of `train`, `batch` × `length`.
        seeds: of weights and order of the blocks.
        rounds: looks at every speed, after a first one that does not count; the median is taken.
        memory: bytes that a training step may take; None is half of what is free now. Vocabularies that need more are
            named, not tried.
        progress: called with (trainings done, all, note).

    Returns:
        One row per tokenizer and seed: tokenizer, seed, vocabulary, parameters, tokens_per_second (measured before),
        tokens, seconds (that the training took), bits_per_byte; note says why a tokenizer was left out, then with NaN.

    Raises:
        BenchError: a split without text, no time, or texts too short for a block.
    """
    if seconds <= 0 or rounds < 1 or not seeds:
        raise BenchError(f"seconds={seconds} must be positive, rounds={rounds} at least 1, and one seed is needed.")
    held_out, learned = _texts(texts_by_split, HELDOUT), _texts(texts_by_split, TRAIN)
    given = {name: prepared(tokenizer) for name, tokenizer in tokenizers.items()}
    notes = {name: _obstacle(one, held_out, build, step_tokens, memory) for name, one in given.items()}
    runners = [
        _Runner(name, one, pack(_encode(one, learned), length, _id(one.eos_token_id), seed=0), build, train)
        for name, one in given.items()
        if not notes[name]
    ]
    rates = _speeds(runners, step_tokens, rounds)
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in seeds:
        for runner in runners:
            if progress is not None:
                progress(len(measured), len(runners) * len(seeds), f"{runner.name}, seed {seed}")
            tokens = step_tokens * max(1, round(rates[runner.name] * seconds / step_tokens))
            model, took = runner.run(tokens, seed)
            vocabulary = entries(runner.tokenizer)
            judged = bits_per_byte(
                model, runner.tokenizer, held_out, batch_tokens=min(4096, _JUDGED_LOGITS // vocabulary)
            )
            measured[runner.name, seed] = {
                "parameters": model.num_parameters(), "tokens_per_second": rates[runner.name], "tokens": tokens,
                "seconds": took, "bits_per_byte": judged,
            }  # fmt: skip
    if progress is not None:
        progress(len(measured), len(measured), "")
    nothing = dict.fromkeys(("parameters", "tokens_per_second", "tokens", "seconds", "bits_per_byte"), math.nan)
    return pd.DataFrame(
        {"tokenizer": name, "seed": seed, "vocabulary": entries(one)}
        | measured.get((name, seed), nothing)
        | {"note": notes[name]}
        for name, one in given.items()
        for seed in seeds
    )


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding for this tokenizer needs: some have gaps between their ids."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy for training from scratch: with an EOS, which also starts a text, as `judge.bits_per_byte` takes it."""
    own = copy.deepcopy(tokenizer)
    if own.eos_token_id is None:
        own.add_special_tokens({"eos_token": own.bos_token or own.sep_token or END})
    own.bos_token = own.eos_token
    return own


@dataclass(frozen=True)
class _Runner:
    name: str
    tokenizer: PreTrainedTokenizerBase
    blocks: Tensor
    build: Build
    train: Train

    def run(self, tokens: int, seed: int) -> tuple[PreTrainedModel, float]:
        """A model after so many tokens, and the seconds of its training."""
        model = _new(self.build, self.tokenizer, seed)
        began = time.perf_counter()
        self.train(model, self.blocks, tokens, seed)
        return model, time.perf_counter() - began


def _new(build: Build, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    eos, pad = _id(tokenizer.eos_token_id), tokenizer.pad_token_id
    # The embedding of a model's pad token never learns: EOS must not be it.
    return build(
        vocab_size=entries(tokenizer),
        eos_token_id=eos,
        pad_token_id=None if pad in (None, eos) else _id(pad),
        seed=seed,
    )


def _speeds(runners: Sequence[_Runner], step_tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each, medians over rounds that go through all of them."""
    steps: dict[str, int] = {}
    for runner in runners:
        _, first = runner.run(step_tokens, 0)
        steps[runner.name] = max(1, min(_PROBE_STEPS, round(_PROBE_SECONDS / max(first, 1e-9))))
    looks: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for _ in range(rounds):
        for runner in runners:
            tokens = steps[runner.name] * step_tokens
            looks[runner.name].append(tokens / max(runner.run(tokens, 0)[1], 1e-9))
    return {name: median(found) for name, found in looks.items()}


def _obstacle(
    tokenizer: PreTrainedTokenizerBase, held_out: Sequence[str], build: Build, step_tokens: int, memory: float | None
) -> str:
    """Why a tokenizer cannot take part; empty if it can."""
    import psutil

    if not _covers(tokenizer, held_out, _encode(tokenizer, held_out)):
        return "held-out texts do not come back unchanged: their bits per byte would not be comparable"
    weights = sum(param.numel() for param in _new(build, tokenizer, 0).parameters())
    needed = _BYTES_PER_LOGIT * step_tokens * entries(tokenizer) + _BYTES_PER_WEIGHT * weights
    allowed = psutil.virtual_memory().available / 2 if memory is None else memory
    if needed <= allowed:
        return ""
    return f"a step needs about {needed / 1e9:.1f} GB, {allowed / 1e9:.1f} GB are allowed: take smaller batches"


def _load(name: str) -> PreTrainedTokenizerBase:
    """From a folder with or without a model in it, or the hub."""
    folder = Path(name).expanduser()
    if not (folder / "tokenizer.json").is_file() or (folder / "config.json").exists():
        return load_tokenizer(name)
    from transformers import PreTrainedTokenizerFast

    try:
        return cast("PreTrainedTokenizerBase", PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = " ".join(str(error).split())[:200]
        raise BenchError(f"Cannot load a tokenizer from {name}: {reason}; save or copy it again.") from error


def _texts(texts_by_split: Mapping[str, Sequence[str]], split: str) -> list[str]:
    found = [text for text in texts_by_split.get(split, ()) if text]
    if not found:
        raise BenchError(f"No text in the split '{split}': give texts under 'train' and 'heldout'.")
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


def _covers(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> bool:
    return all(
        tokenizer.decode(list(row), skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
        for text, row in zip(texts, ids, strict=True)
    )


def _id(token: object) -> int:
    return int(cast("int", token))
