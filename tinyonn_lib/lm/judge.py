"""Judge a language model: held-out bits per byte, and samples for the eye."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
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

    Every token of every text counts, the first one given BOS (or EOS) alone. Longer texts go through in windows.

    Args:
        max_length: window in tokens; None takes the model's.
        overlap: tokens at the front of a later window that are context only; None takes half of the window.
        batch_tokens: tokens per forward pass; on a CPU the passes run in one thread per core.

    Raises:
        BenchError: no text, or a tokenizer with neither BOS nor EOS.
    """
    rows = [text for text in texts if text]
    if not rows:
        raise BenchError("No text to judge the model on.")
    length = max_length or int(model.config.get_text_config().max_position_embeddings)
    kept = length // 2 if overlap is None else overlap
    if length < 2 or not 0 <= kept < length - 1:
        raise BenchError(f"A window of {length} tokens with {kept} of context scores nothing: widen it.")
    start = start_token(tokenizer)
    ids = tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"]
    # Longest first: a batch then holds windows of about one length, and little padding is computed.
    windows = sorted(
        (window for row in ids for window in _windows([start, *row], length, kept)), key=lambda window: -len(window[0])
    )
    device = next(model.parameters()).device
    batches, place = [], 0
    while place < len(windows):
        count = max(1, batch_tokens // len(windows[place][0]))
        batches.append(windows[place : place + count])
        place += count
    with threads(default_shards(device)) as each:
        nats = sum(each(lambda batch: _nats(model, batch, device), batches))
    return nats / math.log(2) / sum(len(text.encode("utf-8")) for text in rows)


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


def _nats(model: PreTrainedModel, windows: Sequence[tuple[Sequence[int], int]], device: torch.device) -> float:
    """Sum of −log p over the scored tokens. Right padding needs no mask: causal attention never looks at it."""
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
        return float(losses.double().sum())


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
