"""What it costs to go on from a foreign cache, against the model reading one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_families import FAMILIES, family, some_ids, tiny
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv import handover
from tinyonn_lib.kv.cache import KV, KVModel

TOKENS = 12


def plain(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """The usual loss of every next token, `(batch, tokens - 1)`; 0 where there is none."""
    with torch.no_grad():
        logits = model(ids, **options).logits.double()
    each = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where(mask[:, 1:], each, 0.0).float()


def padded(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Two texts, the second one shorter."""
    ids, mask = some_ids(2, tokens), torch.ones(2, tokens, dtype=torch.bool)
    ids[1, tokens - 4 :], mask[1, tokens - 4 :] = 0, False
    return ids, mask


def random_kv(model: KVModel, texts: int = 2, tokens: int = TOKENS, seed: int = 0) -> KV:
    torch.manual_seed(seed)
    shape = (texts, model.widths.layers, tokens, model.widths.width)
    return KV(torch.randn(shape), torch.randn(shape))


# Of all positions at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [TOKENS, 40])
@pytest.mark.parametrize("name", FAMILIES)
def test_ones_own_cache_costs_what_reading_costs(name: str, tokens: int) -> None:
    model = KVModel(family(name))
    ids, mask = padded(tokens)
    own = handover.nats(model, model.read(ids), ids, mask)
    torch.testing.assert_close(own, plain(model.model, ids, mask), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["default", "sliding", "two kinds", "some sliding", "NoPE where full", "sinks"])
def test_each_position_is_a_handover_of_its_own(name: str) -> None:
    """By definition: token i read alone after the first i entries of a cache that has nothing to do with the text."""
    model = KVModel(family(name))
    ids, mask = padded()
    kv = random_kv(model)
    found = handover.nats(model, kv, ids, mask)
    for place in range(TOKENS - 1):
        front = KV(kv.keys[:, :, :place], kv.values[:, :, :place])
        cache = model.cache(front) if place else model.empty()
        with torch.no_grad():
            logits = model.model(
                ids[:, place : place + 1], past_key_values=cache, position_ids=torch.full((2, 1), place)
            ).logits[:, 0]
        expected = F.cross_entropy(logits, ids[:, place + 1], reduction="none") * mask[:, place + 1]
        torch.testing.assert_close(found[:, place], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["default", "sliding", "two kinds", "positions embedded", "shared caches"])
def test_without_a_cache_every_token_stands_alone(name: str) -> None:
    model = KVModel(family(name))
    ids, mask = padded()
    places = torch.arange(TOKENS).expand(2, -1)
    with torch.no_grad():
        logits = model.model(ids.reshape(-1, 1), position_ids=places.reshape(-1, 1)).logits.view(2, TOKENS, -1)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
    torch.testing.assert_close(handover.nats(model, None, ids, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "window"), [("default", TOKENS), ("two kinds", TOKENS), ("sliding", 5)])
@pytest.mark.parametrize("entry", [0, 3, TOKENS - 1])
def test_an_entry_is_seen_after_its_position_only(name: str, window: int, entry: int) -> None:
    """Not at it: there the student reads the token itself. In sliding layers no longer than the window reaches."""
    model = KVModel(family(name))
    ids, mask = some_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.bool)
    kv = random_kv(model)
    before = handover.nats(model, kv, ids, mask)
    for keys, values in ((5.0, 0.0), (0.0, 5.0)):
        moved = KV(kv.keys.clone(), kv.values.clone())
        moved.keys[:, :, entry] += keys * torch.randn(model.widths.width)
        moved.values[:, :, entry] += values * torch.randn(model.widths.width)
        changed = (handover.nats(model, moved, ids, mask) - before).abs() > 1e-5
        expected = [entry < place < entry + window for place in range(TOKENS - 1)]
        assert changed.tolist() == [expected, expected]


def test_texts_of_a_batch_do_not_see_each_other(student: KVModel) -> None:
    ids, mask = padded()
    kv = random_kv(student)
    together = handover.nats(student, kv, ids, mask)
    alone = torch.cat([handover.nats(student, kv[row : row + 1], ids[row : row + 1], mask[:1]) for row in (0, 1)])
    torch.testing.assert_close(together, alone * mask[:, 1:], rtol=0, atol=1e-5)


def test_padding_costs_nothing_and_teaches_nothing(student: KVModel) -> None:
    ids, mask = padded()
    kv = random_kv(student)
    kv.keys.requires_grad_(True)
    kv.values.requires_grad_(True)
    found = handover.nats(student, kv, ids, mask)
    assert found.shape == (2, TOKENS - 1)
    assert (found[1, TOKENS - 5 :] == 0).all()
    assert (found[mask[:, 1:]] > 0).all()
    for slope in torch.autograd.grad(found.sum(), (kv.keys, kv.values)):
        # Of the last token, and of what stands before padding alone, nothing is ever predicted.
        assert (slope[0, :, -2:] == 0).all()
        assert (slope[1, :, TOKENS - 6 :] == 0).all()
        assert (slope[0, :, :-2].abs().amax(-1) > 0).all()
        assert (slope[1, :, : TOKENS - 6].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", ["YaRN", "sliding", "two kinds"])
def test_the_slope_is_that_of_finite_differences(name: str) -> None:
    model = KVModel(family(name))
    ids, mask = padded()
    kv = random_kv(model)
    torch.manual_seed(1)
    way = (torch.randn_like(kv.keys), torch.randn_like(kv.values))

    def cost(step: float) -> Tensor:
        return handover.nats(model, KV(kv.keys + step * way[0], kv.values + step * way[1]), ids, mask).double().sum()

    at = torch.zeros((), requires_grad=True)
    moved = KV(kv.keys + at * way[0], kv.values + at * way[1])
    (slope,) = torch.autograd.grad(handover.nats(model, moved, ids, mask).sum(), at)
    numeric = (cost(1e-3) - cost(-1e-3)) / 2e-3
    assert float(slope) == pytest.approx(float(numeric), rel=2e-2, abs=2e-2)
    assert abs(float(slope)) > 0.1


def test_the_frozen_student_gets_no_gradient(student: KVModel) -> None:
    ids, mask = padded()
    kv = random_kv(student)
    kv.keys.requires_grad_(True)
    handover.nats(student, kv, ids, mask).sum().backward()
    assert kv.keys.grad is not None
    assert all(p.grad is None for p in student.model.parameters())


def test_half_precision() -> None:
    """A projector may answer in float32: the student takes it as its own precision."""
    model = KVModel(tiny("Llama", initializer_range=0.1).bfloat16())
    ids, mask = padded()
    kv = model.read(ids)
    own = handover.nats(model, kv, ids, mask)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, plain(model.model, ids, mask), rtol=0, atol=0.05)
    wide = KV(kv.keys.float(), kv.values.float())
    torch.testing.assert_close(handover.nats(model, wide, ids, mask), own, rtol=0, atol=0.05)


def test_a_cache_of_other_texts_is_refused(student: KVModel) -> None:
    ids, mask = padded()
    for texts, tokens in ((2, TOKENS + 1), (2, TOKENS - 1), (1, TOKENS)):
        with pytest.raises(BenchError, match=f"of {texts} texts of {tokens} tokens, to be read are 2 of {TOKENS}"):
            handover.nats(student, random_kv(student, texts, tokens), ids, mask)


# At one place ---------------------------------------------------------------------------------------------------------


WITHIN = [name for name in FAMILIES if name not in ("dynamic NTK", "LongRoPE")]
"""The others place keys by how long the text is when they are made: another length, another cache."""


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("at", [1, 7, TOKENS - 2])
def test_going_on_from_ones_own_cache_is_going_on(name: str, at: int) -> None:
    model = KVModel(family(name))
    ids, mask = padded()
    found = handover.nats_after(model, model.read(ids), ids, mask, at)
    torch.testing.assert_close(found, plain(model.model, ids, mask)[:, at:], rtol=0, atol=2e-5)


def test_after_the_handover_the_student_reads_by_itself(student: KVModel) -> None:
    """Two entries of a foreign cache, the rest of the text in one go or token by token."""
    ids, mask = some_ids(1, TOKENS), torch.ones(1, TOKENS, dtype=torch.bool)
    kv = random_kv(student, texts=1)
    cache, expected = student.cache(KV(kv.keys[:, :, :2], kv.values[:, :, :2])), []
    with torch.no_grad():
        for place in range(2, TOKENS - 1):
            logits = student.model(ids[:, place : place + 1], past_key_values=cache).logits[:, 0]
            expected.append(F.cross_entropy(logits, ids[:, place + 1]))
    found = handover.nats_after(student, kv, ids, mask, 2)
    torch.testing.assert_close(found[0], torch.stack(expected), rtol=0, atol=1e-5)


def test_only_what_is_handed_over_counts(student: KVModel) -> None:
    ids, mask = padded()
    kv = random_kv(student)
    before = handover.nats_after(student, kv, ids, mask, 5)
    behind = KV(kv.keys.clone(), kv.values.clone())
    behind.keys[:, :, 5:] = torch.nan
    assert torch.equal(handover.nats_after(student, behind, ids, mask, 5), before)
    short = KV(kv.keys[:, :, :5], kv.values[:, :, :5])
    assert torch.equal(handover.nats_after(student, short, ids, mask, 5), before)
    short.values[:, :, 4] += 1
    assert (handover.nats_after(student, short, ids, mask, 5)[0] - before[0]).abs().min() > 0


@pytest.mark.parametrize(("at", "kept"), [(0, TOKENS), (-1, TOKENS), (TOKENS - 1, TOKENS), (5, 4)])
def test_a_place_that_leaves_nothing(student: KVModel, at: int, kept: int) -> None:
    ids, mask = padded()
    with pytest.raises(BenchError, match=f"after {at} of {TOKENS} tokens"):
        handover.nats_after(student, random_kv(student, tokens=kept), ids, mask, at)


# Writing --------------------------------------------------------------------------------------------------------------


def greedy(model: Any, ids: Tensor, new_tokens: int) -> list[int]:
    """The likeliest next token, again and again, the whole text read anew each time; never the end of the text."""
    text = ids
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(text).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf
            text = torch.cat((text, logits.argmax(-1)[:, None]), 1)
    return text[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", WITHIN)
def test_writing_on_from_ones_own_cache_is_writing(name: str) -> None:
    model, ids = KVModel(family(name)), some_ids(1, 9)
    written = handover.generate(model, model.read(ids), ids, 10)
    assert written.tolist() == greedy(model.model, ids, 10)


def test_writing_on_from_a_foreign_cache(student: KVModel) -> None:
    """The last token of the text is read, all before it are the cache's."""
    ids, kv, written = some_ids(1, 9), random_kv(student, 1, 9), []
    cache, token = student.cache(KV(kv.keys[:, :, :8], kv.values[:, :, :8])), ids[:, -1:]
    with torch.no_grad():
        for _ in range(10):
            token = student.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            written.append(int(token))
    assert handover.generate(student, kv, ids, 10).tolist() == written


def test_what_is_written_depends_on_the_cache_but_not_on_its_last_entry(student: KVModel) -> None:
    ids = some_ids(1, 9)
    written = handover.generate(student, random_kv(student, 1, 9), ids, 10)
    shorter, other = random_kv(student, 1, 9), random_kv(student, 1, 9, seed=1)
    assert written.shape == (10,)
    assert torch.equal(
        written, handover.generate(student, KV(shorter.keys[:, :, :8], shorter.values[:, :, :8]), ids, 10)
    )
    assert not torch.equal(written, handover.generate(student, other, ids, 10))
