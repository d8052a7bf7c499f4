from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import bits_per_byte
from tinyonn_lib.lm.models import new_model
from tinyonn_lib.lm.tokenizer import END, train_bpe
from tinyonn_lib.pretrain import tokenizers, trial
from tinyonn_lib.pretrain.tokenizers import by_loss, candidates, compare
from tinyonn_lib.pretrain.train import pretrain
from tinyonn_lib.pretrain.trial import entries, prepared

TEXTS = [f"the cat number {i} sat on the mat, and the dog ate the hat of Größe {i % 7}." for i in range(200)]
SPLITS = {"train": TEXTS, "heldout": TEXTS[:10]}
BYTES = train_bpe(["ab"], 258)  # too little text for a single merge: one token per byte
LARGER = train_bpe(TEXTS, 300)
BUILD = partial(new_model, width=16, layers=1, heads=1, kv_heads=1, head_dim=16, ffn=16, max_length=16)


def words(vocabulary: dict[str, int], **special: str) -> Any:
    """Splits at blanks; what it does not know is lost."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


WORDS = words({"[UNK]": 0, "the": 1, "cat": 2, "sat": 3})


def test_compare_by_hand() -> None:
    splits = {"train": ["the the cat"], "heldout": ["the cat sat", "", "cat"]}
    table = compare(splits, {"bytes": BYTES, "words": WORDS}, width=10, other_parameters=120)
    first, second = table.iloc[0], table.iloc[1]
    assert list(table["tokenizer"]) == ["bytes", "words"]
    assert first["vocabulary"] == 258
    assert first["bytes_per_token"] == 1.0
    assert first["vocabulary_used"] == len(set("the cat")) / 258
    assert second["vocabulary"] == 4
    assert second["bytes_per_token"] == (11 + 3) / 4
    assert second["tokens_per_1000_bytes"] == pytest.approx(1000 * 4 / 14)
    assert second["embedding_parameters"] == 40
    assert second["embedding_share"] == 40 / 160
    assert second["vocabulary_used"] == 2 / 4
    assert first["covers"]
    assert second["covers"]


@pytest.mark.parametrize("text", ["the  cat", "the dog", "the\ncat "])
def test_compare_sees_what_does_not_come_back(text: str) -> None:
    table = compare({"train": ["the"], "heldout": ["cat", text]}, {"w": WORDS}, width=1, other_parameters=0)
    assert not table["covers"].iloc[0]


def test_special_tokens_that_a_tokenizer_adds_are_not_counted() -> None:
    from tokenizers.processors import TemplateProcessing

    adding = words({"[UNK]": 0, "the": 1, "<s>": 2})
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    assert adding("the")["input_ids"] == [2, 1]
    row = compare({"train": ["the"], "heldout": ["the"]}, {"s": adding}, width=1, other_parameters=0).iloc[0]
    assert row["bytes_per_token"] == 3
    assert row["vocabulary_used"] == 1 / 3
    assert row["covers"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1).filter(any))
def test_bytes_and_tokens_agree(texts: list[str]) -> None:
    table = compare({"train": TEXTS, "heldout": texts}, {"1": BYTES, "2": LARGER}, width=3, other_parameters=5)
    size = sum(len(text.encode()) for text in texts)
    tokens = size / table["bytes_per_token"]
    plain = [sum(len(one.tokenize(text)) for text in texts) for one in (BYTES, LARGER)]
    assert list(tokens.round(6)) == plain
    assert (table["bytes_per_token"] * table["tokens_per_1000_bytes"]).to_numpy() == pytest.approx(1000)
    assert table["covers"].all()
    assert table["embedding_share"].between(0, 1).all()


def test_compare_refuses() -> None:
    with pytest.raises(BenchError, match="split 'heldout'"):
        compare({"train": ["a"], "heldout": [""]}, {"1": BYTES}, width=1, other_parameters=0)
    with pytest.raises(BenchError, match="split 'train'"):
        compare({"heldout": ["a"]}, {"1": BYTES}, width=1, other_parameters=0)
    with pytest.raises(BenchError, match="width=0"):
        compare(SPLITS, {"1": BYTES}, width=0, other_parameters=0)
    with pytest.raises(BenchError, match="no token"):
        compare({"train": ["a"], "heldout": [" "]}, {"w": WORDS}, width=1, other_parameters=0)


def test_candidates_from_sizes_and_folders(tmp_path: Path) -> None:
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    LARGER.save_pretrained(alone)
    LARGER.save_pretrained(beside)
    BUILD(vocab_size=300).save_pretrained(beside)
    found = candidates(TEXTS, f" 258  300 {alone}\n{beside}")
    assert list(found) == ["bpe 258", "bpe 300", str(alone), str(beside)]
    assert [entries(one) for one in found.values()] == [258, 300, 300, 300]
    ids = [one(TEXTS[0])["input_ids"] for one in found.values()]
    assert ids[0] != ids[1] == ids[2] == ids[3]


def test_what_cannot_be_loaded_is_told_before_any_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokenizers, "train_bpe", lambda *_: pytest.fail("a vocabulary was trained"))
    with pytest.raises(BenchError, match="No such file or folder: /no/such"):
        candidates(TEXTS, "258 300 /no/such")
    LARGER.save_pretrained(tmp_path)
    monkeypatch.setattr(tokenizers, "train_bpe", lambda texts, size: f"{len(texts)} texts, {size}")
    found = candidates(TEXTS, f"0258 {tmp_path} 300")
    assert list(found) == ["bpe 258", str(tmp_path), "bpe 300"]
    assert (found["bpe 258"], found["bpe 300"]) == ("200 texts, 258", "200 texts, 300")


@pytest.mark.parametrize("number", ["100", "257", "1000001", "0", "-5", "3.5", "300.0", "1e3", "nan"])
def test_a_number_is_a_size_and_no_hub_id(number: str) -> None:
    with pytest.raises(BenchError, match=f"^'{number}' is no size of a vocabulary: give a whole number from 258 to 1"):
        candidates(TEXTS, f"300 {number}")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (" ", "No tokenizer"),
        ("/nowhere/at/all", "No such file or folder"),
        ("empty", "holds no config.json and no tokenizer.json"),
        ("damaged", "Cannot load a tokenizer"),
        ("owner/name", "hub"),
    ],
)
def test_candidates_refuse_in_one_line(spec: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(BenchError, match=said) as failed:
        candidates(TEXTS, spec)
    assert "\n" not in str(failed.value)


def test_entries_count_the_gaps_between_ids() -> None:
    assert entries(words({"[UNK]": 0, "a": 9})) == 10


@pytest.mark.parametrize(
    ("special", "eos"),
    [
        ({"bos_token": "the", "eos_token": "sat"}, 3),
        ({"bos_token": "the"}, 1),
        ({"sep_token": "cat"}, 2),
        ({}, 4),
    ],
)
def test_prepared_parts_documents_with_one_token(special: dict[str, str], eos: int) -> None:
    foreign = words(WORDS.get_vocab(), **special)
    own = prepared(foreign)
    assert own.eos_token_id == own.bos_token_id == eos
    assert foreign.eos_token == special.get("eos_token")
    assert entries(own) == max(4, eos + 1)
    assert (own.eos_token == END) == (eos == 4)


class Clock:
    """A trainer that takes as long as it is told, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_per_token: dict[int, float]) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.now, self.per_token, self.busy = 0.0, seconds_per_token, lambda call: 1.0
        monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def __call__(self, model: Any, blocks: Tensor, tokens: int, seed: int) -> None:
        vocabulary = model.config.vocab_size
        assert blocks.shape[1] == 16
        assert int(blocks.max()) < vocabulary
        self.calls.append((vocabulary, tokens, seed))
        self.now += tokens * self.per_token[vocabulary] * self.busy(len(self.calls))


def test_equal_time_is_speed_times_seconds_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {258: 0.001, 300: 0.004})
    # The second round of looks is slow, the third quick: the median passes both over.
    clock.busy = lambda call: {5: 10.0, 6: 10.0, 7: 0.5, 8: 0.5}.get(call, 1.0)
    given = {"small": BYTES, "large": LARGER}
    told: list[tuple[int, int, str]] = []
    table = by_loss(
        SPLITS, given, build=BUILD, train=clock, seconds=8.0, length=16, step_tokens=64, seeds=(0, 5),
        progress=lambda *news: told.append(news),
    )  # fmt: skip
    # 64 tokens take 0.064 s: a second holds 16 steps; 0.256 s: 4 steps.
    looks = [(258, 1024, 0), (300, 256, 0)]
    tokens = {258: 8000, 300: 31 * 64}
    assert clock.calls[:8] == [(258, 64, 0), (300, 64, 0), *looks, *looks, *looks]
    assert clock.calls[8:] == [(v, n, seed) for seed in (0, 5) for v, n in tokens.items()]
    assert list(table["tokenizer"]) == ["small", "small", "large", "large"]
    assert list(table["seed"]) == [0, 5, 0, 5]
    assert list(table["tokens"]) == [8000, 8000, 1984, 1984]
    assert list(table["tokens_per_second"]) == pytest.approx([1000, 1000, 250, 250])
    assert list(table["seconds"]) == pytest.approx([8.0, 8.0, 7.936, 7.936])
    assert list(table["note"]) == [""] * 4
    for name, seed, judged in zip(table["tokenizer"], table["seed"], table["bits_per_byte"], strict=True):
        untrained = BUILD(vocab_size=entries(given[name]), seed=seed)
        assert judged == pytest.approx(bits_per_byte(untrained, given[name], SPLITS["heldout"]), rel=1e-6)
    assert [done for done, *_ in told] == [0, 1, 2, 3, 4]


def test_who_cannot_take_part_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    many = words({"[UNK]": 0, **{f"w{i}": i for i in range(1, 150_000)}, **dict.fromkeys(["cat"], 150_000)})
    clock = Clock(monkeypatch, {258: 1.0, 150_002: 1.0})
    splits = {"train": ["cat " * 40], "heldout": ["cat cat"]}
    options: Any = {"build": BUILD, "train": clock, "seconds": 64.0, "length": 16, "step_tokens": 64, "seeds": (3,)}
    given = {"bytes": BYTES, "many": many, "lossy": WORDS}
    table = by_loss({**splits, "heldout": ["cat cat", "w1  w2"]}, given, **options).set_index("tokenizer")
    assert table.loc["bytes", "tokens"] == 64
    assert "unchanged" in table.loc["many", "note"]
    assert "unchanged" in table.loc["lossy", "note"]
    assert math.isnan(table.loc["lossy", "bits_per_byte"])
    # 16 bytes for each of 64 · 150,002 logits, and 24 for each weight
    needed = 16 * 64 * 150_002 + 24 * BUILD(vocab_size=150_002).num_parameters()
    for limit, tokens in ((needed - 1, []), (needed, [64, 64, 64, 64, 64])):
        clock.calls.clear()
        table = by_loss(splits, {"many": many}, limit=limit, **options)
        assert [n for _, n, _ in clock.calls] == tokens
        assert bool(tokens) == math.isfinite(table["bits_per_byte"].iloc[0])
        assert bool(tokens) != ("GB are allowed" in table["note"].iloc[0])


def test_a_model_never_pads_with_the_token_that_it_must_learn() -> None:
    asked: list[dict[str, Any]] = []

    def build(**options: Any) -> Any:
        asked.append(options)
        return BUILD(**options)

    vocabulary = {"[UNK]": 0, "a": 1, "</s>": 2, "<pad>": 3}
    given = {
        "same": words(vocabulary, eos_token="</s>", pad_token="</s>"),
        "none": words(vocabulary, eos_token="</s>"),
        "own": words(vocabulary, eos_token="</s>", pad_token="<pad>"),
    }
    options: Any = {"seconds": 1e-9, "length": 8, "step_tokens": 16, "seeds": (0,), "rounds": 1}
    by_loss({"train": ["a " * 20], "heldout": ["a a"]}, given, build=build, train=lambda *_: None, **options)
    pads = [found["pad_token_id"] for found in asked]
    assert set(pads[:2]) == {None}
    assert pads[2] == 3
    assert {found["eos_token_id"] for found in asked} == {2}


def test_by_loss_with_the_real_trainer() -> None:
    def train(model: Any, blocks: Tensor, tokens: int, seed: int) -> pd.DataFrame:
        return pretrain(blocks, model, tokens=tokens, seed=seed, shards=1)

    given = candidates(TEXTS, "258 300")
    table = by_loss(
        SPLITS, given, build=BUILD, train=train, seconds=0.3, length=16, step_tokens=256, seeds=(0,), rounds=1
    )
    assert (table["tokens"] % 256 == 0).all()
    assert (table["seconds"] > 0).all()
    for name, judged in zip(table["tokenizer"], table["bits_per_byte"], strict=True):
        untrained = BUILD(vocab_size=entries(given[name]))
        assert judged < bits_per_byte(untrained, given[name], SPLITS["heldout"])


def test_by_loss_refuses() -> None:
    options: Any = {"build": BUILD, "train": lambda *_: None, "length": 16, "step_tokens": 16}
    with pytest.raises(BenchError, match="seconds=0"):
        by_loss(SPLITS, {"1": BYTES}, seconds=0, **options)
    with pytest.raises(BenchError, match="one seed"):
        by_loss(SPLITS, {"1": BYTES}, seconds=1, seeds=(), **options)
    with pytest.raises(BenchError, match="do not fill one block"):
        by_loss({**SPLITS, "train": ["ab"]}, {"1": BYTES}, seconds=1, **options)
