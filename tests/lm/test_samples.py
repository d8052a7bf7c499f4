"""Samples: every token once, the budget kept, splits respected."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import samples, tokenizer


@pytest.fixture(scope="module")
def texts() -> pd.DataFrame:
    rows = [(f"Number {n} says that {'and so on ' * (n % 7)}it is enough.", f"file{n % 5}.py") for n in range(40)]
    return pd.DataFrame(rows, columns=["text", "source"])


@pytest.fixture(scope="module")
def tok(texts: pd.DataFrame) -> PreTrainedTokenizerFast:
    return tokenizer.train_bpe(texts["text"], 300)


def test_with_a_large_budget_every_token_comes_once(texts: pd.DataFrame, tok: PreTrainedTokenizerFast) -> None:
    drawn = samples.draw(texts, tok, tokens=10**6, length=9, seed=0)
    assert drawn["ids"].map(len).between(2, 9).all()
    starts = drawn["ids"].map(lambda ids: ids[0] == tok.bos_token_id)
    assert starts.sum() == len(texts)
    expected = sum(len(ids) + 1 for ids in tok(texts["text"].tolist())["input_ids"])
    lost = expected - drawn["ids"].map(len).sum()  # pieces of a single token have nothing to predict
    assert 0 <= lost <= len(texts)


def test_budget_and_seed(texts: pd.DataFrame, tok: PreTrainedTokenizerFast) -> None:
    one, again, other = (samples.draw(texts, tok, tokens=60, length=9, seed=s) for s in (1, 1, 2))
    sizes = one["ids"].map(len)
    assert sizes.sum() >= 60 > sizes.iloc[:-1].sum()
    assert one["ids"].tolist() == again["ids"].tolist() != other["ids"].tolist()
    assert one["text"].iloc[0] == tok.decode(one["ids"].iloc[0], skip_special_tokens=True)


def test_nothing_to_draw(texts: pd.DataFrame, tok: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BenchError, match="split is empty"):
        samples.draw(texts.iloc[:0], tok, tokens=10, length=9, seed=0)


def test_blocks_hold_the_stream(texts: pd.DataFrame, tok: PreTrainedTokenizerFast) -> None:
    drawn = samples.draw(texts, tok, tokens=100, length=9, seed=0)
    stream = [token for ids in drawn["ids"] for token in ids]
    made = samples.blocks(drawn, 8)
    assert made.flatten().tolist() == stream[: made.numel()]
    assert len(stream) - made.numel() < 8
    with pytest.raises(BenchError, match="do not fill one block of 1000"):
        samples.blocks(drawn, 1000)


def test_every_row_once_an_epoch() -> None:
    rows = torch.arange(10)[:, None]
    at = samples.shuffled(rows, batch=4, seed=3)
    stream = torch.cat([at(step) for step in range(5)]).flatten()
    assert sorted(stream[:10].tolist()) == sorted(stream[10:].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:].tolist()
    assert torch.equal(at(2), at(2))


@pytest.mark.parametrize("count", [1, 7, 10, 23])
def test_batches_of_growing_sizes_are_the_same_stream(count: int) -> None:
    """Whatever the sizes of the steps are, the rows come in one order: that of batches of one row."""
    rows = torch.arange(count)[:, None]
    sizes = [1, 1, 2, 3, 5, 8, 40, 4]
    ramp, single = samples.shuffled(rows, sizes, seed=3), samples.shuffled(rows, 1, seed=3)
    expected = torch.cat([single(step) for step in range(sum(sizes))])
    found = [ramp(step) for step in reversed(range(len(sizes)))][::-1]  # in any order of asking
    assert [len(part) for part in found] == sizes
    assert torch.equal(torch.cat(found), expected)
    steady = samples.shuffled(rows, [4] * 9, seed=3)
    plain = samples.shuffled(rows, 4, seed=3)
    assert all(torch.equal(steady(step), plain(step)) for step in range(9))


def test_the_order_depends_on_the_seed_alone() -> None:
    rows = torch.arange(50)
    one, again, other = (samples.shuffled(rows, [20, 30], seed)(1) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(samples.shuffled(10 * rows, [20, 30], 1)(1), 10 * one)


def test_splits_that_came_with_the_texts_stay(texts: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "texts.parquet"
    own = ["calibration", *["heldout"] * (len(texts) - 1)]
    texts.assign(split=own).to_parquet(file)
    assert samples.divided(file, seed=0)["split"].tolist() == own
    texts.assign(split="test").to_parquet(file)
    with pytest.raises(BenchError, match="'split' without calibration and heldout"):
        samples.divided(file, seed=0)
    texts.to_parquet(file)
    made = samples.divided(file, seed=0)
    assert set(made["split"]) == {"train", "calibration", "heldout"}


def test_text_from_another_domain_has_a_name(tmp_path: Path) -> None:
    tok = tokenizer.train_bpe(["some words to learn from", "and some more words"], 300)
    assert list(samples.other("", tok, 200, 32, 0)) == ["Python code"]
    for name, expected in (("letters.txt", "letters"), ("held-out.txt", str(tmp_path / "held-out.txt"))):
        (tmp_path / name).write_text("Dear sir, some words.\n\nYours, and some more words.")
        assert list(samples.other(str(tmp_path / name), tok, 200, 32, 0)) == [expected]
