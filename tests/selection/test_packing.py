"""Rows as blocks: what is given, what is learned."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.packing import GIVEN, pack, steps_for

from .target_parts import rows


class Letters:
    """A token per letter, but "ab" is one; 0 ends, 1 begins."""

    eos_token_id: int | None = 0
    bos_token_id: int | None = 1

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        pairs = [text.replace("ab", "\x00") for text in texts]
        return {"input_ids": [[99 if letter == "\x00" else ord(letter) for letter in text] for text in pairs]}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_packed_by_hand() -> None:
    table = pd.DataFrame({"text": ["xyz", "Q:pA:q", "cabd"], "prompt": ["", "Q:pA:", "ca"]})
    g = GIVEN
    stream = [1, *letters("xyz"), 0, 1, *letters("Q:pA:q"), 0, 1, *letters("cabd"), 0]
    wanted = [*letters("xyz"), 0, g, g, g, g, g, g, ord("q"), 0, g, g, g, *letters("bd"), 0]
    assert len(stream) == len(wanted) + 1 == 19
    # The third text's own "ab" would hold the end of its prompt: it is taken apart.
    blocks = pack(table, Letters(), 4)
    assert blocks.dtype == torch.int32
    chosen = [place for place in range(0, 16, 4) if set(wanted[place : place + 4]) != {g}]
    assert chosen == [0, 8, 12]  # [4:8] is all prompt
    assert blocks[:, 0].tolist() == [stream[place : place + 4] for place in chosen]
    assert blocks[:, 1].tolist() == [wanted[place : place + 4] for place in chosen]


def test_packed_with_one_token_for_begin_and_end() -> None:
    class One(Letters):
        bos_token_id = 0

    blocks = pack(pd.DataFrame({"text": ["ba", "dc"]}), One(), 3)
    assert blocks[:, 0].tolist() == [[0, *letters("ba")], [0, *letters("dc")]]
    assert blocks[:, 1].tolist() == [[*letters("ba"), 0], [*letters("dc"), 0]]  # the first token, too, and each end


def test_prompt_and_answer_keep_their_texts(tokenizer: Any) -> None:
    table = rows(40)
    blocks = pack(table, tokenizer, 16)
    ids, wanted = blocks[:, 0].flatten(), blocks[:, 1].flatten()
    learned = tokenizer.decode(wanted[wanted != GIVEN])
    answers = [text[len(prompt) :] for text, prompt in zip(table["text"], table["prompt"], strict=True)]
    whole = "".join(answer + tokenizer.eos_token for answer in answers)
    assert whole.startswith(learned)
    assert len(whole) - len(learned) < 80  # the rest that fills no block
    assert ((wanted == GIVEN) | (wanted == ids.roll(-1)))[:-1].all()


def test_refused_rows() -> None:
    for table, length, line in (
        ({"text": ["abc"]}, 8, "^The 1 row\\(s\\) have 4 tokens, too few for one block of 8"),
        ({"text": []}, 8, "^The 0 row\\(s\\) have"),
        ({"text": ["abc"]}, 1, "too short"),
        ({"text": ["xyzxyz"], "prompt": ["xyzxyz"]}, 3, "nothing to learn"),
        ({"text": ["xyz"], "prompt": ["z"]}, 2, "^Row 0: the prompt is not the beginning"),
    ):
        with pytest.raises(BenchError, match=line):
            pack(pd.DataFrame(table), Letters(), length)


def test_steps() -> None:
    blocks = torch.zeros(10, 2, 16, dtype=torch.int32)
    assert steps_for(blocks, 4, tokens=640) == 10
    assert steps_for(blocks, 4, epochs=2.0) == 5
    assert steps_for(blocks, 4, tokens=1) == 1
    for wrong in ({"tokens": 0}, {"epochs": 0.0}):
        with pytest.raises(BenchError, match="must be positive"):
            steps_for(blocks, 4, **wrong)  # type: ignore[arg-type]
