"""Layers by depth and by likeness, and tokens by the characters they share."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.align import by_depth, by_similarity, cka, onto_tokens, token_weights
from tinyonn_lib.kv.cache import KV

Cut = list[tuple[int, int]]

# Layers ---------------------------------------------------------------------------------------------------------------

DEPTHS = st.integers(1, 80)


@settings(deadline=None)
@given(DEPTHS, DEPTHS)
def test_first_meets_first_and_last_meets_last(teacher: int, student: int) -> None:
    found = by_depth(teacher, student)
    assert len(found) == student
    assert found[0] == [0]
    assert student == 1 or found[-1] == [teacher - 1]


@settings(deadline=None)
@given(DEPTHS, DEPTHS, st.integers(1, 90))
def test_layers_by_depth(teacher: int, student: int, sources: int) -> None:
    found = by_depth(teacher, student, sources)
    for layer, chosen in enumerate(found):
        assert len(chosen) == min(sources, teacher)
        assert chosen == list(range(chosen[0], chosen[-1] + 1))  # neighbours
        assert chosen[0] >= 0
        assert chosen[-1] < teacher
        # None that is left out is nearer than one that is taken: in exact arithmetic, so ties may go either way.
        place, scale = layer * (teacher - 1), max(1, student - 1)
        far = [abs(other * scale - place) for other in range(teacher)]
        left = [far[other] for other in range(teacher) if other not in chosen]
        assert not left or max(far[other] for other in chosen) <= min(left)
    assert all(one[0] <= two[0] and one[-1] <= two[-1] for one, two in pairwise(found))


def test_layers_by_depth_written_out() -> None:
    assert by_depth(5, 3) == [[0], [2], [4]]
    assert by_depth(3, 5) == [[0], [0], [1], [1], [2]]
    assert by_depth(5, 3, 3) == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert by_depth(4, 4) == [[0], [1], [2], [3]]


def test_layers_by_similarity() -> None:
    likeness = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.8]])
    assert by_similarity(likeness) == [[1], [2]]
    assert by_similarity(likeness, 2) == [[1, 2], [0, 2]]
    assert by_similarity(likeness, 9) == [[0, 1, 2]] * 2


# Likeness -------------------------------------------------------------------------------------------------------------


def some_kv(texts: int, layers: int, tokens: int, width: int, seed: int = 0) -> KV:
    draw = torch.Generator().manual_seed(seed)
    return KV(*(torch.randn(texts, layers, tokens, width, generator=draw) for _ in range(2)))


def kernel_alignment(one: Tensor, other: Tensor) -> float:
    """Of two `(n, width)`, by the definition with kernels: HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L))."""
    n = len(one)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    kernels = [centre @ (x.double() @ x.double().T) @ centre for x in (one, other)]
    cross, first, second = (
        torch.trace(a @ b) for a, b in ((kernels[0], kernels[1]), (kernels[0],) * 2, (kernels[1],) * 2)
    )
    return float(cross / (first * second).sqrt())


def test_alignment_of_kernels() -> None:
    teacher, student = some_kv(3, 4, 7, 6), some_kv(3, 2, 7, 5, seed=1)
    student.keys[:, 1] += 3 * teacher.keys[:, 2, :, :5] + 10
    found = cka(teacher, student)
    assert found.shape == (2, 4)
    assert found.dtype == torch.float64
    for mine in range(2):
        for theirs in range(4):
            each = [
                kernel_alignment(one[:, mine].flatten(0, 1), other[:, theirs].flatten(0, 1))
                for one, other in ((student.keys, teacher.keys), (student.values, teacher.values))
            ]
            assert float(found[mine, theirs]) == pytest.approx(sum(each) / 2, abs=1e-12)
    assert int(found[1].argmax()) == 2


def test_alignment_does_not_care_for_turns_scales_and_shifts() -> None:
    kv = some_kv(4, 3, 9, 6)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    other = KV(*((3.0 * t.double() @ turn - 5.0) for t in (kv.keys, kv.values)))
    found = cka(kv, other)
    assert (found.diagonal() - 1).abs().max() < 1e-9
    assert ((found >= 0) & (found <= 1 + 1e-9)).all()
    assert (found - found.T).abs().max() < 1e-9


def test_a_layer_that_never_changes_is_like_none() -> None:
    kv = some_kv(2, 2, 5, 3)
    still = KV(torch.ones(2, 1, 5, 3), torch.zeros(2, 1, 5, 3))
    assert torch.equal(cka(kv, still), torch.zeros(1, 2, dtype=torch.float64))


def test_alignment_looks_at_no_more_tokens_than_told() -> None:
    """Two points always lie on a line: of two tokens, all is alike."""
    teacher, student = some_kv(1, 1, 3, 4), some_kv(1, 1, 3, 4, seed=1)
    assert float(cka(teacher, student)) < 0.999
    assert float(cka(teacher, student, tokens=3)) == float(cka(teacher, student))
    assert float(cka(teacher, student, tokens=2)) == pytest.approx(1)


def test_tokens_looked_at_stand_everywhere_in_their_texts() -> None:
    """Every eighth token of texts of eight is their first one, which all texts share."""
    kv = some_kv(64, 1, 8, 3)
    kv.keys[:, :, 0], kv.values[:, :, 0] = 1, 1
    assert float(cka(kv, kv, tokens=64)) == pytest.approx(1)


# Tokens ---------------------------------------------------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn, length: int) -> Cut:
    """How a tokenizer might cut a text: start token, spaces trimmed off, several byte tokens for one character."""
    spans, place = [(0, 0)] if draw(st.booleans()) else [], 0
    while place < length:
        end = min(length, place + draw(st.integers(1, 4)))
        kind = draw(st.sampled_from(["token", "token", "token", "bytes", "trimmed", "nothing"]))
        if kind == "bytes":
            end = place + 1
            spans += [(place, end)] * draw(st.integers(2, 3))
        elif kind == "trimmed":  # the space in front is in no token's span
            spans.append((min(place + 1, end), end))
        elif kind == "token":
            spans.append((place, end))
        else:
            spans.append((end, end))
        place = end
    return spans


BOTH = st.integers(1, 14).flatmap(lambda length: st.tuples(cuts(length), cuts(length)))


def by_characters(student: Cut, teacher: Cut) -> Tensor:
    """The definition, character by character."""
    weights = torch.zeros(len(student), len(teacher), dtype=torch.float64)
    reached = 0
    for mine, (begin, end) in enumerate(student):
        reached = max(reached, end)
        for theirs, (first, last) in enumerate(teacher):
            if last <= end:
                weights[mine, theirs] = len(set(range(begin, end)) & set(range(first, last)))
        if weights[mine].sum() == 0:
            ended = [theirs for theirs, (_, last) in enumerate(teacher) if last <= reached]
            if ended:
                weights[mine, ended[-1]] = 1
        if weights[mine].sum() > 0:
            weights[mine] /= weights[mine].sum()
    return weights


@settings(max_examples=300, deadline=None)
@given(BOTH)
def test_weights_character_by_character(both: tuple[Cut, Cut]) -> None:
    student, teacher = both
    torch.testing.assert_close(
        token_weights(student, teacher), by_characters(student, teacher).float(), rtol=0, atol=1e-7
    )


@settings(max_examples=200, deadline=None)
@given(BOTH)
def test_no_token_stands_for_what_is_still_to_come(both: tuple[Cut, Cut]) -> None:
    student, teacher = both
    weights = token_weights(student, teacher)
    reached = torch.tensor([end for _, end in student]).cummax(0).values
    ends = torch.tensor([end for _, end in teacher])
    assert not ((weights > 0) & (ends[None] > reached[:, None])).any()
    sums = weights.double().sum(1)
    nothing = ~(ends[None] <= reached[:, None]).any(1)
    torch.testing.assert_close(sums, (~nothing).double(), rtol=0, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=9))
def test_the_same_cut_is_token_for_token(lengths: list[int]) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(0, 0), *zip([0, *ends], ends, strict=False)]
    assert torch.equal(token_weights(spans, spans), torch.eye(len(spans)))


def test_weights_written_out() -> None:
    # "<s> un do ing" for the student, "<s> u ndo i ng" for the teacher.
    student, teacher = [(0, 0), (0, 2), (2, 4), (4, 7)], [(0, 0), (0, 1), (1, 4), (4, 5), (5, 7)]
    expected = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1 / 3, 2 / 3]]
    torch.testing.assert_close(token_weights(student, teacher), torch.tensor(expected))
    # The teacher's first token is longer than the student's: nothing has been said yet.
    assert token_weights([(0, 1), (1, 3)], [(0, 3)]).tolist() == [[0.0], [1.0]]
    # A token at the end that stands for no character has seen all of the text.
    assert token_weights([(0, 0), (0, 2), (0, 0)], [(0, 0), (0, 2)]).tolist() == [[1, 0], [0, 1], [0, 1]]


def test_a_side_without_tokens() -> None:
    for student, teacher in (([], [(0, 1)]), ([(0, 1)], []), ([], [])):
        with pytest.raises(BenchError, match="without tokens cannot be aligned"):
            token_weights(student, teacher)


def test_entries_are_mixed_by_their_weights() -> None:
    kv = some_kv(2, 3, 4, 5)
    weights = torch.rand(2, 6, 4)
    found = onto_tokens(kv, weights)
    assert found.shape == (2, 3, 6, 5)
    for text in range(2):
        for layer in range(3):
            torch.testing.assert_close(found.keys[text, layer], weights[text] @ kv.keys[text, layer])
            torch.testing.assert_close(found.values[text, layer], weights[text] @ kv.values[text, layer])
    same = onto_tokens(kv, torch.eye(4).expand(2, -1, -1))
    assert torch.equal(same.keys, kv.keys)
    assert torch.equal(same.values, kv.values)
    assert onto_tokens(KV(kv.keys.bfloat16(), kv.values.bfloat16()), weights).keys.dtype == torch.bfloat16
