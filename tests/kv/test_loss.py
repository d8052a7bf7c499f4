"""The distance of two caches against loops in float64; whom its gradient reaches; what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV
from tinyonn_lib.kv.loss import compute_kv_loss

BATCH, LAYERS, TOKENS, HEADS, DIM = 3, 2, 5, 2, 3
LENGTHS = (5, 2, 4)
MASK = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]


def cache(seed: int) -> KV:
    """Layers and heads of different scales and places."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, LAYERS, TOKENS, HEADS * DIM)
    scale = torch.tensor([0.1, 0.1, 0.1, 5, 5, 5]) * torch.tensor([1.0, 3.0])[:, None, None]
    return KV(*(torch.randn(shape, generator=generator) * scale + number for number in (1, -2)))


def by_hand(own: KV, other: KV, measure: str, heads: int, lengths: tuple[int, ...]) -> float:
    total = 0.0
    for mine, theirs in ((own.keys, other.keys), (own.values, other.values)):
        one, two = (
            t.double().numpy().reshape(BATCH, LAYERS, TOKENS, heads, -1) for t in (mine.detach(), theirs.detach())
        )
        found = []
        for layer in range(LAYERS):
            for head in range(heads):
                pairs = [
                    (one[b, layer, t, head], two[b, layer, t, head])
                    for b, length in enumerate(lengths)
                    for t in range(length)
                ]
                spread = np.var([number for vector, _ in pairs for number in vector])
                for a, b in pairs:
                    if measure == "cosine":
                        found.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
                    else:
                        found.append(np.mean((a - b) ** 2) / (spread if measure == "normalised" else 1))
        total += float(np.mean(found))
    return total


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("measure", ["mse", "cosine", "normalised"])
def test_equals_the_formula(measure: str, heads: int) -> None:
    own, other = cache(0), cache(1)
    for mask, lengths in ((None, (TOKENS,) * 3), (MASK, LENGTHS)):
        found = float(compute_kv_loss(own, other, measure, heads=heads, mask=mask))
        assert found == pytest.approx(by_hand(own, other, measure, heads, lengths), rel=1e-5)


@pytest.mark.parametrize("measure", ["mse", "cosine", "normalised"])
def test_nothing_between_a_cache_and_itself(measure: str) -> None:
    assert float(compute_kv_loss(cache(0), cache(0), measure, heads=2)) == pytest.approx(0, abs=1e-6)


def test_mean_squared_error_as_the_document_calls_it() -> None:
    own, other = cache(0), cache(1)
    expected = torch.nn.functional.mse_loss(own.keys, other.keys) + torch.nn.functional.mse_loss(
        own.values, other.values
    )
    torch.testing.assert_close(compute_kv_loss(own, other), expected)
    pairs = [
        [t[:, layer].unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (own.keys, own.values)]
        for layer in range(LAYERS)
    ]
    filled = DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        filled.update(keys, values, layer)
    for form in (pairs, filled):  # as a model gives it
        torch.testing.assert_close(compute_kv_loss(form, other), expected)


def test_units_do_not_count_for_cosine_and_normalised() -> None:
    own, other = cache(0), cache(1)
    factor = torch.tensor([7.0, 0.01]).repeat_interleave(DIM)  # per head
    longer = [KV(kv.keys * factor, kv.values * factor) for kv in (own, other)]
    for measure in ("cosine", "normalised"):
        expected = float(compute_kv_loss(own, other, measure, heads=2))
        assert float(compute_kv_loss(*longer, measure, heads=2)) == pytest.approx(expected, rel=1e-4)
        assert float(compute_kv_loss(*longer, measure, heads=1)) != pytest.approx(expected, rel=1e-2)
    with_itself = KV(3 * own.keys, 3 * own.values)
    assert float(compute_kv_loss(own, with_itself, "cosine", heads=2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", ["mse", "cosine", "normalised"])
def test_padding_is_neither_counted_nor_touched(measure: str) -> None:
    own, other = cache(0), cache(1)
    expected = compute_kv_loss(own, other, measure, heads=2, mask=MASK)
    padding = ~MASK[:, None, :, None]
    spoilt = KV(*(t.masked_fill(padding, float("nan")) for t in (other.keys, other.values)))
    spoilt.keys.requires_grad_(True)
    found = compute_kv_loss(KV(own.keys.masked_fill(padding, 1e9), own.values), spoilt, measure, heads=2, mask=MASK)
    torch.testing.assert_close(found, expected)
    found.backward()
    grad: Any = spoilt.keys.grad
    assert not grad[padding.expand_as(grad)].any()
    assert grad[~padding.expand_as(grad)].abs().min() > 0


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_of_numbers_is_a_mask(kind: torch.dtype) -> None:
    """A tokenizer's `attention_mask` holds integers, which as an index would pick texts 0 and 1."""
    own, other = cache(0), cache(1)
    expected = compute_kv_loss(own, other, mask=MASK)
    torch.testing.assert_close(compute_kv_loss(own, other, mask=MASK.to(kind)), expected)


@pytest.mark.parametrize("measure", ["mse", "cosine", "normalised"])
def test_gradient_reaches_the_student_unless_detached(measure: str) -> None:
    def gradients(detach: bool) -> list[Tensor | None]:
        sides = [t.detach().clone().requires_grad_(True) for kv in (cache(0), cache(1)) for t in (kv.keys, kv.values)]
        own, other = KV(*sides[:2]), KV(*sides[2:])
        compute_kv_loss(own.detach() if detach else own, other, measure, heads=2).backward()
        return [t.grad for t in sides]

    kept, cut = gradients(detach=False), gradients(detach=True)
    assert all(grad is not None and grad.abs().min() > 0 for grad in kept)
    assert cut[:2] == [None, None]
    for one, other in zip(kept[2:], cut[2:], strict=True):
        torch.testing.assert_close(one, other)
    if measure != "cosine":  # the variance is a unit, not a way to make the loss smaller
        for mine, theirs in zip(kept[:2], kept[2:], strict=True):
            torch.testing.assert_close(mine, -theirs)


def test_half_precision_is_summed_in_float32() -> None:
    own, other = (KV(kv.keys.bfloat16(), kv.values.bfloat16()) for kv in (cache(0), cache(1)))
    found = compute_kv_loss(own, other, heads=2)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(by_hand(KV(own.keys.float(), own.values.float()),
                                                 KV(other.keys.float(), other.values.float()),
                                                 "mse", 2, (TOKENS,) * 3), rel=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"aligned_kvs": cache(1)[:2]}, r"differ in .*\(3, 2, 5, 6\) and \(2, 2, 5, 6\)"),
        ({"aligned_kvs": KV(*(t[:, :1] for t in (cache(1).keys, cache(1).values)))}, r"\(3, 1, 5, 6\)"),
        ({"aligned_kvs": KV(*(t[:, :, :1] for t in (cache(1).keys, cache(1).values)))}, r"\(3, 2, 1, 6\)"),
        ({"aligned_kvs": KV(*(t[..., :1] for t in (cache(1).keys, cache(1).values)))}, r"\(3, 2, 5, 1\)"),
        ({"measure": "l1"}, "Unknown measure 'l1': choose one of mse, cosine, normalised"),
        ({"heads": 4}, "width of 6 does not divide into 4 heads"),
        ({"heads": 0}, "0 heads"),
        ({"heads": -2}, "-2 heads"),
        ({"mask": torch.zeros(3, 5, dtype=torch.bool)}, "No real token"),
        ({"mask": MASK[:2]}, r"mask .*\(2, 5\).*\(3, 5\)"),
        ({"mask": MASK[:, :4]}, r"mask .*\(3, 4\).*\(3, 5\)"),
        ({"mask": MASK[:, 0]}, r"mask .*\(3,\).*\(3, 5\)"),
    ],
)
def test_what_it_refuses_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BenchError, match=says) as caught:
        compute_kv_loss(**({"student_kv": cache(0), "aligned_kvs": cache(1)} | change))
    assert "\n" not in str(caught.value)
