"""Passages have as many tokens as they should, and a pool's corruption is known."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import pool
from tinyonn_lib.selection.corrupt import CORRUPTIONS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, but two line ends in a row are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate([*alphabet, "ĊĊ"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def cut(tokenizer: PreTrainedTokenizerFast, text: str, longest: int, shortest: int) -> list[str]:
    table = pd.DataFrame({"text": [text], "source": ["a.py"]})
    return pool.passages(table, tokenizer, longest, shortest)["text"].tolist()


def test_passages_are_cut_at_line_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(f"line {n}\n" for n in range(5))  # 7 tokens each
    assert cut(tokenizer, text, 15, 3) == ["line 0\nline 1", "line 2\nline 3", "line 4"]
    assert cut(tokenizer, text, 15, 7) == ["line 0\nline 1", "line 2\nline 3"]
    assert cut(tokenizer, text, 100, 1) == [text.strip()]
    assert cut(tokenizer, text, 14, 7) == ["line 0\nline 1", "line 2\nline 3"]  # 14 tokens are not too many


def test_long_lines_are_cut_at_words(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "short\none two three four five six\nend"
    assert cut(tokenizer, text, 14, 2) == ["short\none two", " three four", " five six\nend"]
    assert cut(tokenizer, "a " + "x" * 50 + " b c d", 9, 3) == [" b c d"]


def test_every_passage_is_within_the_lengths_and_of_its_source(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [("a\n\n\n" * n + "word " * (n % 7) * n + "ünï\n  code\n") * 3 for n in range(1, 30)]
    table = pd.DataFrame({"text": texts, "source": [f"{n}.py" for n in range(len(texts))]})
    found = pool.passages(table, tokenizer, 40, 12)
    lengths = [len(ids) for ids in tokenizer(found["text"].tolist(), add_special_tokens=False)["input_ids"]]
    assert 12 <= min(lengths) <= max(lengths) <= 40
    assert max(lengths) > 35
    for row in found.itertuples():
        assert row.text in table.set_index("source")["text"][row.source]


def test_impossible_passages_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BenchError, match="Passages of 9 to 3 tokens"):
        cut(tokenizer, "text", 3, 9)
    with pytest.raises(BenchError, match="No passage of 8 to 9 tokens in 1 texts"):
        cut(tokenizer, "text", 9, 8)


def test_a_known_share_of_the_pool_is_corrupted_in_equal_numbers(tmp_path: Path) -> None:
    texts = [f"passage number {n} says some words about the value {n * 7919} of its own" for n in range(100)]
    clean = pd.DataFrame({"text": texts, "source": [f"{n // 4}.py" for n in range(100)]})
    found = pool.mixed(clean, 0.3, 5, tuple(CORRUPTIONS))
    assert found["corruption"].value_counts().to_dict() == {"": 70} | dict.fromkeys(CORRUPTIONS, 6)
    kept = found[found["corruption"] == ""]
    assert set(kept["text"]) < set(texts)
    assert not set(found.loc[found["corruption"] != "", "text"]) & set(texts)
    assert list(kept["text"]) != sorted(kept["text"], key=texts.index)  # shuffled
    # A copy stands in the place of its own file's passage.
    assert found["source"].value_counts().to_dict() == clean["source"].value_counts().to_dict()
    pd.testing.assert_frame_equal(found, pool.mixed(clean, 0.3, 5, tuple(CORRUPTIONS)))
    assert not found.equals(pool.mixed(clean, 0.3, 6, tuple(CORRUPTIONS)))
    assert set(pool.mixed(clean, 0.0, 5, ("byte_noise",))["text"]) == set(texts)
    odd = found.assign(text=[f"{text} ü \u2028 \n" for text in found["text"]])
    pool.write(odd, tmp_path / "pool.jsonl")
    with (tmp_path / "pool.jsonl").open(encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == odd.to_dict("records")


def test_too_many_tokens_are_cut_off_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["a\n\n\nb" * 9, "ü" * 40, "short", "x" * 20, "🙂" * 6]
    found = pool.fitted(pd.DataFrame({"text": texts, "source": list("abcde")}), tokenizer, 20)
    assert found["text"].tolist() == ["a\n\n\nb" * 5, "ü" * 10, "short", "x" * 20, "🙂" * 5]
    assert found["source"].tolist() == list("abcde")


@pytest.mark.parametrize(("share", "kinds"), [(1.0, ("byte_noise",)), (-0.1, ("byte_noise",)), (0.3, ())])
def test_impossible_mixtures_are_refused(share: float, kinds: tuple[str, ...]) -> None:
    with pytest.raises(BenchError, match="cannot be mixed in"):
        pool.mixed(pd.DataFrame({"text": ["a"], "source": ["b"]}), share, 0, kinds)
