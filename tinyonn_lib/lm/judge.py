"""Judge a language model: held-out bits per byte, and samples for the eye."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.threads import default_shards, threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_IGNORED = -100


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int | None = None,
    overlap: int | None = None,
    batch_tokens: int = 4096,
) -> float:
    """Cost of the texts in bits per UTF-8 byte: comparable between tokenizers, and with n-gram models.

    Args and errors: as of `text_nats`.
    """
    rows = [text for text in texts if text]
    nats = text_nats(model, tokenizer, rows, max_length, overlap, batch_tokens)
    return float(nats.sum()) / math.log(2) / sum(len(text.encode("utf-8")) for text in rows)


def text_nats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int | None = None,
    overlap: int | None = None,
    batch_tokens: int = 4096,
) -> NDArray[np.float64]:
    """−log p of each whole text, (texts,), nats.

    Every token of every text counts, the first one given BOS (or EOS) alone. Longer texts go through in windows.

    Args:
        max_length: window in tokens; None takes the model's.
        overlap: tokens at the front of a later window that are context only; None takes half of the window.
        batch_tokens: tokens per forward pass; on a CPU the passes run in one thread per core.

    Raises:
        BenchError: no text, or a tokenizer with neither BOS nor EOS.
    """
    if not any(texts):
        raise BenchError("No text to judge the model on.")
    length = max_length or int(model.config.get_text_config().max_position_embeddings)
    kept = length // 2 if overlap is None else overlap
    if length < 2 or not 0 <= kept < length - 1:
        raise BenchError(f"A window of {length} tokens with {kept} of context scores nothing: widen it.")
    start = start_token(tokenizer)
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    # Longest first: a batch then holds windows of about one length, and little padding is computed.
    windows = sorted(
        (
            (place, window, context)
            for place, row in enumerate(ids)
            for window, context in _windows([start, *row], length, kept)
        ),
        key=lambda found: -len(found[1]),
    )
    device = next(model.parameters()).device
    batches, begin = [], 0
    while begin < len(windows):
        count = max(1, batch_tokens // len(windows[begin][1]))
        batches.append(windows[begin : begin + count])
        begin += count
    nats = np.zeros(len(ids))
    with threads(default_shards(device)) as each:
        found = each(lambda batch: _nats(model, [window[1:] for window in batch], device), batches)
    for batch, values in zip(batches, found, strict=True):
        np.add.at(nats, [place for place, _, _ in batch], values)
    return nats


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a text's first one: BOS, else EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(cast("int", token))
    raise BenchError("The tokenizer has neither a BOS nor an EOS token: set tokenizer.eos_token.")


def _windows(ids: Sequence[int], length: int, overlap: int) -> list[tuple[Sequence[int], int]]:
    """(token ids, how many at the front are context only): together the windows score each token but the first once."""
    found, scored, begin = [], 1, 0
    while scored < len(ids):
        end = min(begin + length, len(ids))
        found.append((ids[begin:end], scored - begin))
        scored, begin = end, max(end - max(overlap, 1), begin + 1)
    return found


def _nats(
    model: PreTrainedModel, windows: Sequence[tuple[Sequence[int], int]], device: torch.device
) -> NDArray[np.float64]:
    """Sum of −log p over each window's scored tokens. Right padding needs no mask: causal attention never sees it."""
    longest = max(len(ids) for ids, _ in windows)
    inputs = torch.zeros(len(windows), longest, dtype=torch.long)
    labels = torch.full((len(windows), longest), _IGNORED)
    for row, (ids, context) in enumerate(windows):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, context : len(ids)] = inputs[row, context : len(ids)]
    with torch.inference_mode():  # here, because the mode belongs to a thread
        logits: Tensor = model(input_ids=inputs.to(device), use_cache=False).logits
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].reshape(-1).to(device),
            ignore_index=_IGNORED,
            reduction="none",
        )
        return losses.view(len(windows), -1).double().sum(1).cpu().numpy()


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int = 0,
    new_tokens: int = 80,
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> list[str]:
    """Continue each prompt (an empty one starts a new document); prompt and continuation as one text.

    The same seed gives the same text; the global random state is left as it was. Prompts keep their last tokens if
    they and `new_tokens` exceed the model's length.

    Raises:
        BenchError: temperature or length out of range.
    """
    limit = int(model.config.get_text_config().max_position_embeddings)
    if temperature <= 0 or not 0 < top_p <= 1 or not 1 <= new_tokens < limit:
        raise BenchError(
            f"Sampling needs temperature > 0, top_p in (0, 1] and new_tokens in [1, {limit}); "
            f"got {temperature}, {top_p}, {new_tokens}."
        )
    start = start_token(tokenizer)
    device = next(model.parameters()).device
    results = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, prompt in enumerate(prompts):
            torch.manual_seed(seed + number)
            ids = [start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]][-(limit - new_tokens) :]
            given = torch.tensor([ids], device=device)
            made = cast("Any", model).generate(
                given, attention_mask=torch.ones_like(given), do_sample=True, temperature=temperature, top_p=top_p,
                top_k=0, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id or start,
            )  # fmt: skip
            results.append(prompt + str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)))
    return results
