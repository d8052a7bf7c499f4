from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import _windows, bits_per_byte, sample, text_nats
from tinyonn_lib.lm.tokenizer import train_bpe

TEXTS = [f"the cat number {i} sat on the mat, and the dog ate the hat of Größe {i % 7}." for i in range(400)]
TOKENIZER = train_bpe(TEXTS, 300)


def test_bits_per_byte_is_exact(tiny: Callable[..., Any]) -> None:
    """Against a loop over single tokens: every token of every text, the first one after BOS, over UTF-8 bytes."""
    model, rows = tiny(), ["the cat Größe", "猫", "", "sat on the mat, and the dog"]
    nats = 0.0
    for row in rows:
        ids = [0, *TOKENIZER(row, add_special_tokens=False)["input_ids"]]
        for place in range(1, len(ids)):
            logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
            nats -= logits.log_softmax(-1)[ids[place]].item()
    expected = nats / math.log(2) / sum(len(row.encode()) for row in rows)
    assert bits_per_byte(model, TOKENIZER, rows) == pytest.approx(expected, rel=1e-5)
    assert bits_per_byte(model, TOKENIZER, rows, batch_tokens=1) == pytest.approx(expected, rel=1e-5)
    each = text_nats(model, TOKENIZER, rows)
    alone = [text_nats(model, TOKENIZER, [row])[0] if row else 0.0 for row in rows]
    np.testing.assert_allclose(each, alone, rtol=1e-5)
    with pytest.raises(BenchError):
        bits_per_byte(model, TOKENIZER, [""])


@pytest.mark.parametrize(("length", "overlap"), [(4, 0), (4, 2), (7, 5), (100, 3), (2, 0)])
def test_windows_score_each_token_once(length: int, overlap: int) -> None:
    for count in range(1, 30):
        ids = list(range(count))
        scored = [token for window, context in _windows(ids, length, overlap) for token in window[context:]]
        assert scored == ids[1:]
        assert all(len(window) <= length and context >= 1 for window, context in _windows(ids, length, overlap))


def test_samples_repeat_and_leave_the_random_state(tiny: Callable[..., Any]) -> None:
    model = tiny()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample(model, TOKENIZER, ["the cat", ""], seed=1, new_tokens=8)
    assert torch.equal(state, torch.get_rng_state())
    assert first[0].startswith("the cat")
    assert first == sample(model, TOKENIZER, ["the cat", ""], seed=1, new_tokens=8)
    assert first != sample(model, TOKENIZER, ["the cat", ""], seed=2, new_tokens=8)
    assert sample(model, TOKENIZER, ["the cat " * 50], new_tokens=8)[0].startswith("the cat the cat")
    with pytest.raises(BenchError):
        sample(model, TOKENIZER, ["a"], new_tokens=32)
