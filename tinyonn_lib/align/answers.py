"""What a model answers: many prompts at once, the same answers for the same seed, on all cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.align.seeds import seed_of
from tinyonn_lib.align.tasks import right
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import context_length
from tinyonn_lib.lm.threads import default_shards, threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 256  # answers written side by side


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    n: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Let the model answer and check every answer.

    Prompts of equal length in tokens share a batch, so that nothing is padded; each batch has its own random numbers,
    so that the answers do not depend on the number of threads.

    Args:
        prompts: columns task, prompt, solution.
        n: answers per prompt.
        temperature: of the sampling; 0 takes the likeliest token, and n is then 1.
        seed: of the sampling.

    Returns:
        `n` rows per prompt in the order of the prompts: prompt (row number), task, completion (None if it did not
        end), right (bool), tokens (written, the end token included).

    Raises:
        BenchError: n or temperature out of range, a tokenizer without an end token, or a prompt that leaves no room
            for its answer in the model's context.
    """
    if n < 1 or temperature < 0 or (temperature == 0 and n > 1):
        raise BenchError(f"n={n} and temperature={temperature}: at least 1, and exactly 1 at temperature 0.")
    ids, room = encoded(model, tokenizer, prompts)
    lengths = np.array([len(row) for row in ids])
    jobs: list[np.ndarray] = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        jobs += np.array_split(rows, min(len(rows), -(-len(rows) * n // _ROWS)))
    written: dict[int, list[list[int]]] = {}

    def write(job: tuple[int, np.ndarray]) -> None:
        number, rows = job
        given = torch.tensor([ids[row] for row in rows]).repeat_interleave(n, 0)
        made = _generate(model, given, room, temperature, seed_of(seed, number))
        for place, row in enumerate(rows):
            written[row] = made[place * n : (place + 1) * n]

    was_training = model.training
    model.eval()
    with threads(default_shards(next(model.parameters()).device)) as each:
        each(write, list(enumerate(jobs)))
    model.train(was_training)
    table = []
    for row, (task, prompt) in enumerate(zip(prompts["task"], prompts["prompt"], strict=True)):
        for made in written[row]:
            text, tokens = read(tokenizer, made)
            table.append((row, task, text, right(task, prompt, text), tokens))
    return pd.DataFrame(table, columns=["prompt", "task", "completion", "right", "tokens"])


def encoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: pd.DataFrame
) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, and how many tokens an answer may have: the longest solution, its end, and two more.

    Raises:
        BenchError: no prompts, no end token, or no room in the context.
    """
    if not len(prompts):
        raise BenchError("No prompts: draw some with tasks.prompts.")
    if tokenizer.eos_token_id is None:
        raise BenchError("The tokenizer has no end token, so no answer would ever end: set tokenizer.eos_token.")
    ids = tokenizer(prompts["prompt"].tolist(), add_special_tokens=True, verbose=False)["input_ids"]
    if any(row and row[-1] == tokenizer.eos_token_id for row in ids):
        raise BenchError("The tokenizer puts the end token behind every prompt: switch that off (add_eos_token=False).")
    solutions = tokenizer(prompts["solution"].tolist(), add_special_tokens=False, verbose=False)["input_ids"]
    room = max(len(row) for row in solutions) + 3
    limit = limit_of(model)
    longest = max(len(row) for row in ids)
    if longest + room > limit:
        raise BenchError(
            f"A prompt of {longest} tokens and an answer of {room} exceed the model's {limit}: make the task smaller."
        )
    return ids, room


def limit_of(model: PreTrainedModel) -> int:
    """Tokens that a model takes at once.

    Raises:
        BenchError: its config names no limit; recurrent models have no cache to answer with, either.
    """
    limit = context_length(model)
    if limit is None:
        raise BenchError(
            f"A {model.config.model_type} names no longest context (max_position_embeddings), which is needed to cut "
            "texts and answers: choose another model."
        )
    return limit


def read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str | None, int]:
    """The text of an answer up to its end token, and its tokens with that one.

    The text is None if the end token never came, or another special token stands in between: decoding would drop it
    silently, and a wrong answer would look right.
    """
    ids = list(ids)
    if tokenizer.eos_token_id not in ids:
        return None, len(ids)
    end = ids.index(tokenizer.eos_token_id)
    if set(ids[:end]) & set(tokenizer.all_special_ids):
        return None, end + 1
    return str(tokenizer.decode(ids[:end])), end + 1


@torch.no_grad()
def _generate(model: Any, given: Tensor, room: int, temperature: float, seed: int) -> list[list[int]]:
    """Continue `(rows, length)` by at most `room` tokens. Own loop: `generate` draws from the global random state."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.as_tensor(model.config.get_text_config().eos_token_id, device=device)
    step, cache, made = given.to(device), None, []
    done = torch.zeros(len(given), dtype=torch.bool, device=device)
    for _ in range(room):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits[:, -1].float(), out.past_key_values
        if temperature == 0:
            step = logits.argmax(-1, keepdim=True)
        else:
            step = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        made.append(step)
        done |= torch.isin(step[:, 0], ends)
        if bool(done.all()):
            break
    return torch.cat(made, 1).tolist()
