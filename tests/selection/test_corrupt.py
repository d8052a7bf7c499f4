"""Corruptions change every text, repeat themselves from a seed, and keep its length."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import corrupt

TEXT = (
    "Return the number of unique elements in the array.\n\nParameters\n----------\n"
    "a : array_like\n    Input array, flattened if it is not already one-dimensional.\n"
)
OTHERS = (
    "Decode a byte string with the codec that is registered for the encoding. The default is utf-8.\n"
    "Errors may be given to set a different scheme of handling; see the table of codecs for what is allowed.",
    "Open a database connection with the parameters below and begin a transaction on it at once.\n"
    "A connection that is idle for longer than its limit is closed by the pool, which opens a new one.",
)
names = pytest.mark.parametrize("name", corrupt.CORRUPTIONS)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    [
        "word",
        "a",
        " ",
        "\n",
        "   \t ",
        "🙂",
        "👩‍👩‍👧 🙂 é",
        "aaaaaaaaaa",
        "a a a a a a a a",
        "x " * 90,
        "中文没有空格的一句话" * 9,
        TEXT,
    ]
)


@names
@settings(max_examples=150, deadline=None)
@given(
    text=texts, prompt=st.sampled_from(["", "Q: ", "question? " * 9]), others=st.lists(texts), seed=st.integers(0, 9)
)
def test_any_text_changes_repeatably_and_keeps_its_length(
    name: str, text: str, prompt: str, others: list[str], seed: int
) -> None:
    spoil = corrupt.CORRUPTIONS[name]
    given = prompt + text
    made = spoil(given, prompt, Random(seed), others)
    assert made != given
    assert made == spoil(given, prompt, Random(seed), tuple(others))
    assert abs(len(made) - len(given)) <= corrupt.TOLERANCE * len(given)
    assert made.strip()
    made.encode("utf-8")  # no lone surrogates


@names
def test_length_is_no_clue_on_average(name: str) -> None:
    made = [corrupt.CORRUPTIONS[name](TEXT, "", Random(seed), OTHERS) for seed in range(200)]
    assert sum(map(len, made)) / len(made) == pytest.approx(len(TEXT), rel=0.015)
    assert len(set(made)) > 1


def test_byte_noise_replaces_a_known_share_by_printable_characters() -> None:
    for seed in range(30):
        made = corrupt.byte_noise(TEXT, "", Random(seed), ())
        changed = [new for old, new in zip(TEXT, made, strict=True) if old != new]
        assert len(changed) == round(corrupt.NOISE * len(TEXT))
        assert all(33 <= ord(new) <= 126 for new in changed)


def test_word_shuffle_keeps_words_and_separators() -> None:
    made = corrupt.word_shuffle(TEXT, "", Random(0), ())
    assert Counter(made.split()) == Counter(TEXT.split())
    assert [c for c in made if c.isspace()] == [c for c in TEXT if c.isspace()]
    assert sorted(corrupt.word_shuffle("word", "", Random(0), ())) == sorted("word")


def test_repetition_repeats_a_phrase_of_the_text() -> None:
    for seed in range(20):
        words = corrupt.repetition(TEXT, "", Random(seed), ()).split()
        period = next(n for n in range(1, len(words)) if words[n:-1] == words[: -n - 1])  # the last may be cut
        assert 4 <= period <= 9
        assert " ".join(words[:period]) in " ".join(TEXT.split())


def test_boilerplate_begins_like_the_text_and_ends_like_the_web() -> None:
    for seed in range(20):
        made = corrupt.boilerplate(TEXT, "", Random(seed), ())
        shared = next(n for n in range(len(made), -1, -1) if TEXT.startswith(made[:n]))
        assert shared <= 0.6 * len(TEXT)
        tail = made[shared:].lstrip("\n").split("\n")
        assert all(line in corrupt.BOILERPLATE for line in tail[:-1])
        assert any(line.startswith(tail[-1]) for line in corrupt.BOILERPLATE)
    assert len(set(corrupt.BOILERPLATE)) == len(corrupt.BOILERPLATE) == 40


def test_wrong_answer_keeps_the_prompt_and_takes_another_answer() -> None:
    prompt, answers = (
        "Question: how many? Answer: ",
        ["There are nine of them in all.", "Nobody knows how many there are."],
    )
    made = {corrupt.wrong_answer(prompt + answers[0], prompt, Random(seed), answers) for seed in range(9)}
    assert all(each.startswith(prompt) and answers[1].startswith(each[len(prompt) :].split("\n")[0]) for each in made)


def test_wrong_answer_splices_documents_at_words() -> None:
    made = corrupt.wrong_answer(TEXT, "", Random(0), OTHERS)
    shared = next(n for n in range(len(made), -1, -1) if TEXT.startswith(made[:n]))
    assert shared == pytest.approx(len(TEXT) / 2, abs=corrupt.TOLERANCE * len(TEXT))
    assert made[shared - 1].isspace()
    tail = made[shared:].split()
    other = next(other for other in OTHERS if made[shared:] in other)
    assert set(tail) <= set(other.split())
    assert other.index(made[shared:]) > 0.3 * len(other)


def test_names_are_checked() -> None:
    assert corrupt.parse("byte_noise  word_shuffle byte_noise") == ("byte_noise", "word_shuffle")
    assert corrupt.parse(" ".join(corrupt.CORRUPTIONS)) == tuple(corrupt.CORRUPTIONS)
    with pytest.raises(BenchError, match="Unknown corruption: bytes.*byte_noise word_shuffle"):
        corrupt.parse("bytes repetition")
    with pytest.raises(BenchError, match="No corruption given"):
        corrupt.parse(" ")
    with pytest.raises(BenchError, match="empty"):
        corrupt.byte_noise("", "", Random(0), ())
