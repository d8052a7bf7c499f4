"""Both sides' caches of the same texts."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from kv_families import family, some_ids, tiny

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV, KVModel
from tinyonn_lib.kv.data import Batch, Caches, foreign, own_of, teachers_of
from tinyonn_lib.lm.samples import draw

SENTENCE = "the router feeds a neuron and the expert reads the token café naïve 日本 router tokens under the layer"
Cut = list[tuple[int, int]]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-5}


def texts(count: int = 7) -> pd.DataFrame:
    """Of 2 to some 14 words, with characters of several bytes."""
    words = SENTENCE.split() * 2
    rows = [" ".join(words[n : n + 2 + 2 * n % 13]) for n in range(count)]
    return pd.DataFrame({"text": rows, "source": [f"file {n % 3}" for n in range(count)]})


def trained(words: int, spaces: bool = False) -> Any:
    """A byte-level BPE of about `words` tokens; with `spaces` off, no token's span has the space in front of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=not spaces)
    made.train_from_iterator(
        texts(20)["text"], trainers.BpeTrainer(vocab_size=words, special_tokens=["<s>"], show_progress=False)
    )
    assert made.get_vocab_size() <= 64
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.fixture(scope="module")
def fine() -> Any:
    return trained(40, spaces=True)


@pytest.fixture(scope="module")
def coarse() -> Any:
    return trained(64)


def other_model(**options: Any) -> KVModel:
    return KVModel(tiny("Llama", num_hidden_layers=2, **options))


def assert_same(one: Batch, other: Batch) -> None:
    assert list(one) == list(other)
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], **CLOSE)


def cut(tokenizer: Any, text: str) -> tuple[list[int], Cut]:
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [tokenizer.bos_token_id, *read["input_ids"]], [(0, 0), *read["offset_mapping"]]


def assert_mixed(said: KV, read: KV, spans: Cut, places: Cut) -> None:
    """Each student token has the mean of the teacher's entries by the characters that they share, or the last ended."""
    for mine, (begin, end) in enumerate(spans):
        shared = {
            n: len(set(range(begin, end)) & set(range(first, last)))
            for n, (first, last) in enumerate(places)
            if last <= end
        }
        if not sum(shared.values()):
            reached = max(last for _, last in spans[: mine + 1])
            shared = {max(n for n, (_, last) in enumerate(places) if last <= reached): 1}
        total = sum(shared.values())
        for side in ("keys", "values"):
            expected = sum(count / total * getattr(read, side)[0, :, n] for n, count in shared.items())
            torch.testing.assert_close(getattr(said, side)[0, :, mine], expected, **CLOSE)


# One tokenizer --------------------------------------------------------------------------------------------------------


def test_both_caches_of_the_same_tokens(student: KVModel, teacher: KVModel, fine: Any) -> None:
    samples = draw(texts(), fine, 10_000, 12, 0)
    caches = Caches(student, {"big": teacher, "other": other_model()}, samples, batch=3)
    assert caches.names == ["big", "other"]
    assert caches.source == samples["source"].tolist()
    assert len(caches) == len(samples)
    for place, ids in enumerate(samples["ids"]):
        row, real = caches[torch.tensor([place])], len(ids)
        assert row["ids"][0, :real].tolist() == ids
        assert row["mask"][0].tolist() == [n < real for n in range(caches.ids.shape[1])]
        read = torch.tensor([ids])
        said = teachers_of(row, caches.names)
        for kv, model in (
            (own_of(row), student), (said["big"], teacher), (said["other"], caches.teachers["other"])
        ):  # fmt: skip
            expected = model.read(read)
            torch.testing.assert_close(kv.keys[:, :, :real], expected.keys, **CLOSE)
            torch.testing.assert_close(kv.values[:, :, :real], expected.values, **CLOSE)


@pytest.mark.parametrize("foreign", [False, True])
def test_kept_or_computed_anew_is_the_same(
    student: KVModel, teacher: KVModel, fine: Any, coarse: Any, foreign: bool
) -> None:
    samples = draw(texts(9), fine, 10_000, 60, 0)
    # Keys of the second one depend on how long a batch is: beyond 16 tokens, other frequencies.
    teachers = {"big": teacher, "long": KVModel(family("LongRoPE"))}
    options: dict[str, Any] = {"batch": 4}
    if foreign:
        options |= {"tokenizer": fine, "tokenizers": {"big": coarse, "long": coarse}}
    kept, anew = (Caches(student, teachers, samples, keep=keep, **options) for keep in (2**31, 0))
    assert kept._kept is not None
    assert anew._kept is None
    assert kept.source == anew.source
    for rows in (torch.arange(len(kept)), torch.tensor([5, 0, 5, 3, 1, 2]), torch.tensor([2])):
        assert_same(kept[rows], anew[rows])
    both = zip(kept.batches(), anew.batches(), strict=True)
    for one, other in both:
        assert_same(one, other)
    assert [len(batch["ids"]) for batch in kept.batches()][:-1] == [4] * (len(list(kept.batches())) - 1)
    assert torch.equal(torch.cat([batch["ids"] for batch in kept.batches()]), kept.ids)


def test_texts_of_one_token_are_left_out(student: KVModel, teacher: KVModel) -> None:
    samples = pd.DataFrame({"ids": [[1, 2, 3], [4], [5, 6]], "text": "", "source": ["a", "b", "c"]})
    caches = Caches(student, {"big": teacher}, samples)
    assert caches.source == ["a", "c"]
    assert caches.ids.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert caches.mask.tolist() == [[True] * 3, [True, True, False]]
    with pytest.raises(BenchError, match="No text of two tokens or more"):
        Caches(student, {"big": teacher}, samples.iloc[[1]])


def test_no_texts_at_all(student: KVModel, teacher: KVModel, fine: Any, coarse: Any) -> None:
    empty = pd.DataFrame({"ids": [], "text": [], "source": []})
    for options in ({}, {"tokenizer": fine, "tokenizers": {"big": coarse}}):
        with pytest.raises(BenchError, match="No text of two tokens or more"):
            Caches(student, {"big": teacher}, empty, **options)


def test_nothing_is_differentiated(student: KVModel) -> None:
    learning = other_model()
    learning.model.requires_grad_(True)
    samples = pd.DataFrame({"ids": some_ids(2, 5).tolist(), "text": "", "source": "a"})
    batch = Caches(learning, {"small": student}, samples)[torch.arange(2)]
    assert not any(tensor.requires_grad for tensor in batch.values())


@pytest.mark.parametrize("keep", [0, 2**31])
def test_the_same_texts_for_another_student(student: KVModel, teacher: KVModel, keep: int) -> None:
    samples = pd.DataFrame({"ids": some_ids(5, 7).tolist(), "text": "", "source": list("abcde")})
    caches = Caches(student, {"big": teacher}, samples, batch=2, keep=keep)
    before = list(caches.batches())
    other = other_model()
    other.model.requires_grad_(True)
    moved, anew = caches.of_student(other), Caches(other, {"big": teacher}, samples, batch=2, keep=keep)
    assert moved.student is other
    assert moved.source == anew.source
    for one, two in zip(moved.batches(), anew.batches(), strict=True):
        assert_same(one, two)
        assert not any(tensor.requires_grad for tensor in one.values())
    assert caches.student is student
    for one, two in zip(caches.batches(), before, strict=True):
        assert_same(one, two)
    with pytest.raises(BenchError, match=r"context of 'student' \(6\)"):
        caches.of_student(other_model(max_position_embeddings=6))


# Other tokenizers -----------------------------------------------------------------------------------------------------


def test_a_teacher_that_cuts_texts_otherwise(student: KVModel, teacher: KVModel, fine: Any, coarse: Any) -> None:
    """Each student token: the teacher's entries of the characters it shares, read by themselves, mean by characters."""
    samples = draw(texts(), fine, 10_000, 60, 0)
    caches = Caches(student, {"big": teacher}, samples, tokenizer=fine, tokenizers={"big": coarse}, batch=3)
    assert len(caches) == len(samples)
    differ = 0
    for place, text in enumerate(samples["text"]):
        row = caches[torch.tensor([place])]
        (ids, spans), (theirs, places) = cut(fine, text), cut(coarse, text)
        differ += len(ids) != len(theirs)
        assert row["ids"][0][row["mask"][0]].tolist() == ids
        torch.testing.assert_close(row["own.keys"][:, :, : len(ids)], student.read(torch.tensor([ids])).keys, **CLOSE)
        read, said = teacher.read(torch.tensor([theirs])), teachers_of(row, ["big"])["big"]
        assert_mixed(said, read, spans, places)
        assert (said.keys[0, :, len(ids) :] == 0).all()
    assert differ == len(samples)


def test_texts_are_cut_to_what_every_teacher_can_read(student: KVModel, fine: Any, coarse: Any) -> None:
    """The first one reads on, and is not asked for what the second one cannot read."""
    samples = draw(texts(), fine, 10_000, 60, 0)
    short = {"long": other_model(), "short": other_model(max_position_embeddings=6)}
    for order in (["long", "short"], ["short", "long"]):
        teachers = {name: short[name] for name in order}
        caches = Caches(student, teachers, samples, tokenizer=fine, tokenizers=dict.fromkeys(order, coarse), batch=3)
        for place, text in enumerate(samples["text"]):
            (ids, spans), (theirs, places) = cut(fine, text), cut(coarse, text)
            end = places[:6][-1][1]
            kept = [n for n, (_, last) in zip(ids, spans, strict=True) if last <= end]
            assert caches.ids[place][caches.mask[place]].tolist() == kept
            row = caches[torch.tensor([place])]
            for name, kv in teachers_of(row, caches.names).items():
                seen = places[: 6 if name == "short" else None]
                read = teachers[name].read(torch.tensor([theirs[: len(seen)]]))
                assert_mixed(kv, read, spans[: len(kept)], seen)
    assert caches.mask.sum(1).max() < max(map(len, samples["ids"]))


def test_pieces_cut_anew_do_not_outgrow_the_longest(student: KVModel, teacher: KVModel, fine: Any, coarse: Any) -> None:
    """A later piece of a text gets a start token when it is read anew: one token more than was drawn."""
    samples = draw(texts(), fine, 10_000, 8, 0)
    caches = Caches(student, {"big": teacher}, samples, tokenizer=fine, tokenizers={"big": coarse})
    assert caches.ids.shape[1] == max(map(len, samples["ids"])) == 8
    assert (caches.ids[:, 0] == fine.bos_token_id).all()


def test_one_teacher_of_each_kind(student: KVModel, teacher: KVModel, fine: Any, coarse: Any) -> None:
    samples = draw(texts(), fine, 10_000, 60, 0)
    teachers = {"same": other_model(), "big": teacher}
    both = Caches(student, teachers, samples, tokenizer=fine, tokenizers={"big": coarse})
    everything = both[torch.arange(len(both))]
    said = teachers_of(everything, both.names)
    alone = Caches(student, {"big": teacher}, samples, tokenizer=fine, tokenizers={"big": coarse})
    expected = teachers_of(alone[torch.arange(len(alone))], ["big"])["big"]
    torch.testing.assert_close(said["big"].keys, expected.keys, **CLOSE)
    torch.testing.assert_close(said["same"].values, teachers["same"].read(both.ids).values, **CLOSE)
    assert isinstance(said["same"], KV)


def test_which_tokenizers_are_foreign(fine: Any, coarse: Any) -> None:
    tokenizers = {"student": fine, "same": trained(40), "other": coarse}
    assert foreign(tokenizers) == {"other": coarse}
    assert foreign(tokenizers, "other") == {"student": fine, "same": tokenizers["same"]}


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_texts_longer_than_a_context(student: KVModel, teacher: KVModel) -> None:
    samples = pd.DataFrame({"ids": some_ids(2, 9).tolist(), "text": "", "source": "a"})
    small = other_model(max_position_embeddings=8)
    with pytest.raises(BenchError, match=r"Texts of 9 tokens are longer than the context of 'tiny' \(8\): cut them"):
        Caches(student, {"big": teacher, "tiny": small}, samples)
    with pytest.raises(BenchError, match="longer than the context of 'student'"):
        Caches(small, {"student": teacher}, samples)
    assert len(Caches(student, {"tiny": other_model(max_position_embeddings=9)}, samples)) == 2


def test_a_teacher_that_does_not_know_the_tokens(student: KVModel, fine: Any, coarse: Any) -> None:
    samples = pd.DataFrame({"ids": [[1, 63], [3, 4]], "text": "", "source": "a"})
    small = other_model(vocab_size=40)
    with pytest.raises(BenchError, match="hold token 63, and 'small' knows 40: give its own tokenizer"):
        Caches(student, {"small": small}, samples)
    with pytest.raises(BenchError, match="hold token 63, and 'small' knows 63"):
        Caches(student, {"small": other_model(vocab_size=63)}, samples)
    assert len(Caches(student, {"small": other_model(vocab_size=64)}, samples)) == 2
    read = draw(texts(), coarse, 10_000, 12, 0)
    assert len(Caches(student, {"small": small}, read, tokenizer=coarse, tokenizers={"small": fine})) == len(read)


def test_tokenizers_that_cannot_be_aligned(student: KVModel, teacher: KVModel, fine: Any, coarse: Any) -> None:
    samples = draw(texts(), fine, 100, 12, 0)
    with pytest.raises(BenchError, match="'bigg', which is no teacher: choose from big"):
        Caches(student, {"big": teacher}, samples, tokenizer=fine, tokenizers={"bigg": coarse})
    with pytest.raises(BenchError, match="give fast tokenizers .* the student's, too"):
        Caches(student, {"big": teacher}, samples, tokenizers={"big": coarse})
    with pytest.raises(BenchError, match="give fast tokenizers"):
        Caches(student, {"big": teacher}, samples, tokenizer=fine, tokenizers={"big": object()})


def test_a_tokenizer_without_a_start_token(student: KVModel, teacher: KVModel, fine: Any) -> None:
    nameless = trained(40)
    nameless.bos_token = None
    with pytest.raises(BenchError, match="neither a BOS nor an EOS token"):
        Caches(student, {"big": teacher}, draw(texts(), fine, 100, 12, 0), tokenizer=fine, tokenizers={"big": nameless})
