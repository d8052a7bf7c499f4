"""Every token is asked for once, after the one before it; positions and padding against loops over single tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain.layout import IGNORED, Layout, Rows, lay, starts

EOS, PAD = 0, 1
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which no token comes twice: it says its document and place."""
    return [[100 * (1 + number) + place for place in range(length)] for number, length in enumerate(lengths)]


def asked(rows: Rows) -> list[list[tuple[int, int]]]:
    """(token at a place, what is asked for there) of each row."""
    wanted = rows.asked(rows.ids)
    return [
        [(int(ids[place]), int(row[place])) for place in range(len(row)) if row[place] != IGNORED]
        for ids, row in zip(rows.ids, wanted, strict=True)
    ]


@given(LENGTHS, st.integers(2, 12))
def test_padded_asks_for_every_token_once_and_knows_the_one_before(lengths: list[int], length: int) -> None:
    documents = numbered(lengths)
    rows = lay(documents, length, eos=EOS, pad=PAD, layout="padded")
    streams = [[EOS, *document, EOS] for document in documents]
    pairs = [pair for stream in streams for pair in itertools.pairwise(stream)]
    assert [pair for row in asked(rows) for pair in row] == pairs
    assert rows.ids.shape == (sum(-(-(len(s) - 1) // (length - 1)) for s in streams), length)
    assert rows.positions is None
    assert rows.targets == pytest.approx(len(pairs) / len(rows.ids))
    filled = rows.ids != PAD  # padding is at the end only, so that the causal mask hides it
    assert torch.equal(filled, filled.long().cummin(1).values.bool())


@given(LENGTHS, st.integers(2, 12), st.sampled_from(["packed", "documents"]), st.integers(0, 3))
def test_packed_rows_are_one_stream_of_all_documents(
    lengths: list[int], length: int, layout: Layout, seed: int
) -> None:
    documents = numbered(lengths)
    size = sum(lengths) + len(lengths) + 1
    if size < length:
        with pytest.raises(BenchError, match="do not fill one block"):
            lay(documents, length, eos=EOS, pad=PAD, layout=layout, seed=seed)
        return
    rows = lay(documents, length, eos=EOS, pad=PAD, layout=layout, seed=seed)
    stream = rows.ids.flatten().tolist()
    assert len(stream) == size // length * length  # the rest that fills no row is dropped, no more
    found, last = [], []
    for token in stream[1:]:
        if token == EOS:
            found.append(last)
            last = []
        else:
            last.append(token)
    left = sorted(documents)
    for document in found:
        left.remove(document)  # each whole, and once
    assert not last or any(document[: len(last)] == last for document in left)
    assert stream[0] == EOS
    assert rows.pad is None
    assert rows.targets == length - 1
    assert torch.equal(rows.asked(rows.ids), rows.ids[:, 1:])
    assert (rows.positions is None) == (layout == "packed")


@given(st.lists(st.lists(st.sampled_from([EOS, 5, 6]), min_size=7, max_size=7), min_size=1, max_size=5))
def test_positions_count_from_the_last_eos_of_the_row(ids: list[list[int]]) -> None:
    for row, found in zip(ids, starts(torch.tensor(ids), EOS).tolist(), strict=True):
        place = 0
        for column, token in enumerate(row):
            place = 0 if token == EOS or column == 0 else place + 1
            assert found[column] == place


def test_documents_at_the_borders_of_rows() -> None:
    """By hand: an EOS that ends a row begins nothing there, and the next row goes on from 0 within a document."""
    rows = lay([[7, 8, 9], [7, 8, 9]], 4, eos=EOS, pad=PAD, layout="documents")
    assert rows.ids.tolist() == [[0, 7, 8, 9], [0, 7, 8, 9]]
    assert rows.positions is not None
    assert rows.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert starts(torch.tensor([[5, 6, 7, EOS], [8, EOS, EOS, 9]]), EOS).tolist() == [[0, 1, 2, 0], [0, 0, 0, 1]]


def test_a_long_document_goes_on_in_further_rows() -> None:
    rows = lay([[5, 6, 7, 8, 9], [], [4, 3]], 4, eos=EOS, pad=PAD, layout="padded")
    assert rows.ids.tolist() == [[0, 5, 6, 7], [7, 8, 9, 0], [0, 0, 1, 1], [0, 4, 3, 0]]
    assert rows.asked(rows.ids).tolist() == [[5, 6, 7], [8, 9, 0], [0, -100, -100], [4, 3, 0]]
    assert rows.targets == 10 / 4
    # Full rows: the last token of a document that ends with the row is not asked for again in one of padding alone.
    assert lay([[5, 6]], 4, eos=EOS, pad=PAD, layout="padded").ids.tolist() == [[0, 5, 6, 0]]


def test_the_order_of_packed_documents_is_the_seed() -> None:
    documents = numbered([3] * 20)
    one, again, other = (lay(documents, 8, eos=EOS, pad=PAD, layout="packed", seed=seed).ids for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("sizes", [3, [1, 2, 5, 4, 3, 7]])
def test_batches_visit_every_row_once_an_epoch_with_its_own_positions(sizes: int | list[int]) -> None:
    ids = torch.arange(11 * 4).view(11, 4)
    rows = Rows(ids, positions=ids + 1000)
    batch = rows.batches(sizes, seed=4)
    steps = range(22 // 3 + 1) if isinstance(sizes, int) else range(len(sizes))
    found = [batch(step) for step in steps]
    for step, part in zip(steps, found, strict=True):
        assert len(part["ids"]) == (sizes if isinstance(sizes, int) else sizes[step])
        assert torch.equal(part["positions"], part["ids"] + 1000)
        assert torch.equal(batch(step)["ids"], part["ids"])  # a pure function of the step
    first = torch.cat([part["ids"] for part in found])[:, 0] // 4
    assert sorted(first[:11].tolist()) == sorted(first[11:22].tolist()) == list(range(11))
    assert first[:11].tolist() != first[11:22].tolist()
    assert set(Rows(ids).batches(sizes, seed=4)(0)) == {"ids"}


@pytest.mark.parametrize(
    ("length", "documents", "layout", "said"),
    [
        (8, [[5]], "diagonal", "Unknown layout 'diagonal'"),
        (1, [[5]], "padded", "nothing to predict"),
        (8, [], "padded", "0 documents"),
        (1, [[5]], "packed", "nothing to predict"),
        (8, [], "documents", "do not fill"),
    ],
)
def test_refuses(length: int, documents: list[list[int]], layout: Layout, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        lay(documents, length, eos=EOS, pad=PAD, layout=layout)
