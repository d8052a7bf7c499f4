"""Passages next to their corrupted copies: the same at each step, whenever it is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.selection.pairs import Pairs

from .warmups import RECIPE, passages


def test_batches_are_a_pure_function_of_their_step(tokenizer: Any, make_texts: Callable[..., list[str]]) -> None:
    texts, recipe = passages(make_texts, 19), replace(RECIPE, batch=4)
    one, other = Pairs(tokenizer, texts, recipe), Pairs(tokenizer, texts, recipe)
    seen = []
    for step in (5, 0, 3, 1, 2):
        for name, value in one(step).items():
            assert torch.equal(value, other(step)[name])
        if step < 4:
            seen += [tuple(row.tolist()) for row in one(step)["clean"]]
    stripped = {tuple(token for token in row if token != start_token(tokenizer)) for row in seen}
    assert len(stripped) == 16  # an epoch of four steps shows 16 of 19, none twice
    assert any(not torch.equal(one(step)["clean"], one(step + 4)["clean"]) for step in range(4))
    batch = one(0)
    assert batch["bad_mask"].sum(1).max() <= one._longest  # noise has more tokens: it is cut
    assert not torch.equal(batch["clean"][:, :9], batch["bad"][:, :9])


def test_prompts_are_kept_for_wrong_answers(tokenizer: Any) -> None:
    answers = ["router", "neuron", "expert", "layer", "token", "model"]
    texts = pd.DataFrame({"prompt": [f"{n} scans splits " for n in range(6)]})
    texts["text"] = texts["prompt"] + answers
    pairs = Pairs(tokenizer, texts, replace(RECIPE, corruptions=("wrong_answer",), batch=6))
    for step in range(5):
        batch = pairs(step)
        clean, bad = (
            [tokenizer.decode(ids[mask]) for ids, mask in zip(batch[name], batch[f"{name}_mask"], strict=True)]
            for name in ("clean", "bad")
        )
        for good, worse in zip(clean, bad, strict=True):
            assert good != worse
            assert good.rsplit(" ", 1)[0] == worse.rsplit(" ", 1)[0]


def test_an_epoch_is_put_in_order_once(
    tokenizer: Any, make_texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, orders = Pairs(tokenizer, passages(make_texts, 19), replace(RECIPE, batch=4)), 0

    class Counted(random.Random):
        def sample(self, population: Any, *args: Any, **named: Any) -> list[Any]:
            nonlocal orders
            orders += population == range(19)
            return super().sample(population, *args, **named)

    monkeypatch.setattr("tinyonn_lib.selection.pairs.random.Random", Counted)
    for step in range(8):
        pairs(step)
    assert orders == 2
