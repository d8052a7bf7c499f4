"""Tokenizers side by side: what a vocabulary saves in tokens, costs in parameters, and brings at equal time.

Document 002 §2 wants a large vocabulary, its log of 2025-07-19 a small one; here both are measured. Loss is compared in
bits per byte, which does not depend on how a text is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import bits_per_byte
from tinyonn_lib.lm.load import load_tokenizer
from tinyonn_lib.lm.texts import pack
from tinyonn_lib.lm.tokenizer import MIN_VOCAB, train_bpe
from tinyonn_lib.pretrain import memory
from tinyonn_lib.pretrain.trial import Build, Train, Trial, entries, fresh, prepared, speeds
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN, HELDOUT = "train", "heldout"
MAX_VOCAB = 1_000_000  # as of the parameter vocab_size
_JUDGED_LOGITS = 2**26  # held at once while judging, per thread: a quarter of a GB


def candidates(train_texts: Sequence[str], spec: str) -> dict[str, PreTrainedTokenizerBase]:
    """Tokenizers by a list such as "1024 4096 /path/to/folder owner/name"; what is to be loaded is loaded first.

    Args:
        train_texts: what our own are trained on.
        spec: parted by blanks; a number trains a byte-level BPE of so many entries, named "bpe 4096"; anything else is
            a folder or hub id.

    Returns:
        Name → tokenizer, in the order of the list.

    Raises:
        BenchError: an empty list, a folder without a tokenizer, a hub that is not reachable, a number that is no size.
    """
    sizes = {item: _size(item) for item in spec.split()}
    if not sizes:
        raise BenchError("No tokenizer to compare: give sizes, folders or hub ids, for example '1024 4096'.")
    loaded = {item: load_tokenizer(item) for item, size in sizes.items() if size is None}
    return {
        item if size is None else f"bpe {size}": loaded[item] if size is None else train_bpe(train_texts, size)
        for item, size in sizes.items()
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
    limit: float | None = None,
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
        limit: bytes that a training may take; None is half of what is free now. Vocabularies that need more are
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
    notes = {name: _obstacle(one, held_out, build, step_tokens, limit) for name, one in given.items()}
    trials = [
        Trial(name, one, pack(_encode(one, learned), length, cast("int", one.eos_token_id), seed=0), build, train)
        for name, one in given.items()
        if not notes[name]
    ]
    rates = speeds(trials, step_tokens, rounds)
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in seeds:
        for trial in trials:
            if progress is not None:
                progress(len(measured), len(trials) * len(seeds), f"{trial.name}, seed {seed}")
            tokens = step_tokens * max(1, round(rates[trial.name] * seconds / step_tokens))
            model, took = trial.run(tokens, seed)
            at_once = min(4096, _JUDGED_LOGITS // entries(trial.tokenizer))
            measured[trial.name, seed] = {
                "parameters": model.num_parameters(), "tokens_per_second": rates[trial.name], "tokens": tokens,
                "seconds": took,
                "bits_per_byte": bits_per_byte(model, trial.tokenizer, held_out, batch_tokens=at_once),
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


def _obstacle(
    tokenizer: PreTrainedTokenizerBase, held_out: Sequence[str], build: Build, step_tokens: int, limit: float | None
) -> str:
    """Why a tokenizer cannot take part; empty if it can."""
    if not _covers(tokenizer, held_out, _encode(tokenizer, held_out)):
        return "held-out texts do not come back unchanged: their bits per byte would not be comparable"
    with torch.device("meta"):  # shapes only
        weights = fresh(build, tokenizer, 0).num_parameters()
    needed = memory.needed(weights, step_tokens * entries(tokenizer))
    allowed = memory.free() / 2 if limit is None else limit
    if needed <= allowed:
        return ""
    return f"a step needs about {needed / 1e9:.1f} GB, {allowed / 1e9:.1f} GB are allowed: take smaller batches"


def _size(item: str) -> int | None:
    """Entries of a vocabulary; None for what is no number, a folder or hub id."""
    try:
        number = float(item)
    except ValueError:
        return None
    if not item.isdecimal() or not MIN_VOCAB <= number <= MAX_VOCAB:
        raise BenchError(
            f"'{item}' is no size of a vocabulary: give a whole number from {MIN_VOCAB} to {MAX_VOCAB:,}, or a folder "
            "or hub id."
        )
    return int(item)


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
