"""Every score equals a slow loop in float64; padding, batches and common shifts do not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection.scores import RANKINGS, SCORES, text_scores, token_scores, trash_experts


def slow(z: list[float], trash: list[bool], unit: float) -> dict[str, float]:
    """The definitions, one token."""
    middle = sum(z) / len(z)
    levels = [(value - middle) / unit for value in z]
    good = [level for level, bad in zip(levels, trash, strict=True) if not bad]
    bad = [level for level, bad in zip(levels, trash, strict=True) if bad]
    mass = {name: math.log(sum(math.exp(v) for v in part)) for name, part in (("g", good), ("t", bad), ("a", levels))}
    return {
        "literal": sum(value for value, is_bad in zip(z, trash, strict=True) if not is_bad),
        "centred": sum(good),
        "log_mass": mass["g"] - mass["a"],
        "contrastive": mass["g"] - mass["t"],
    }


def case(scale: float = 1.0, texts: int = 4, length: int = 6) -> tuple[list[Tensor], Tensor, list[Tensor], list[float]]:
    make = torch.Generator().manual_seed(0)
    logits = [scale * torch.randn(texts * length, experts, generator=make) for experts in (8, 5)]
    mask = torch.arange(1, length + 1) <= torch.tensor([6, 1, 4, 3])[:texts, None]
    mask[:, 0] &= torch.tensor([True, True, False, True])[:texts]
    trash = [torch.tensor([0, 0, 1, 0, 0, 0, 0, 1]).bool(), torch.tensor([0, 1, 0, 0, 0]).bool()]
    return logits, mask, trash, [0.7 * scale, 1.3 * scale]


@pytest.mark.parametrize("scale", [1.0, 0.009, 30.0])
def test_equal_the_definitions(scale: float) -> None:
    logits, mask, trash, units = case(scale)
    found = text_scores(logits, mask, trash, units)
    assert tuple(found) == SCORES
    for text in range(4):
        layers = []
        for layer, chosen, unit in zip(logits, trash, units, strict=True):
            rows = layer.view(4, 6, -1)[text][mask[text]].double().tolist()
            each = [slow(row, chosen.tolist(), unit) for row in rows]
            layers.append({name: sum(token[name] for token in each) / len(each) for name in SCORES})
        for name in SCORES:
            expected = sum(layer[name] for layer in layers) / 2
            assert abs(float(found[name][text]) - expected) <= 2e-6 * max(1.0, abs(expected)), (name, text)


def test_padding_and_the_order_of_texts_do_not_matter() -> None:
    logits, mask, trash, units = case()
    whole = text_scores(logits, mask, trash, units)
    order = torch.tensor([2, 0, 3, 1])
    dirty = [layer.view(4, 6, -1).clone() for layer in logits]
    for layer in dirty:
        layer[~mask] = torch.nan
    moved = text_scores([layer[order].flatten(0, 1) for layer in dirty], mask[order], trash, units)
    wider = [torch.cat([layer, torch.full((4, 3, layer.shape[-1]), 1e30)], 1).flatten(0, 1) for layer in dirty]
    padded = text_scores(wider, torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1), trash, units)
    alone = [text_scores([x.view(4, 6, -1)[i] for x in logits], mask[i : i + 1], trash, units) for i in range(4)]
    for name in SCORES:
        assert torch.equal(moved[name], whole[name][order])
        assert torch.equal(padded[name], whole[name])
        assert (torch.cat([one[name] for one in alone]) - whole[name]).abs().max() < 1e-6


def test_a_common_part_of_all_logits_is_seen_by_the_literal_score_alone() -> None:
    _, mask, trash, units = case()
    make = torch.Generator().manual_seed(1)
    inputs, rows = torch.randn(24, 16, generator=make), [torch.randn(n, 16, generator=make) for n in (8, 5)]
    vector = 3 * torch.randn(16, generator=make)
    plain = text_scores([inputs @ row.T for row in rows], mask, trash, units)
    moved = text_scores([inputs @ (row + vector).T for row in rows], mask, trash, units)
    assert (moved["literal"] - plain["literal"]).abs().min() > 0.5
    for name in SCORES[1:]:
        assert (moved[name] - plain[name]).abs().max() < 1e-4


def test_log_mass_keeps_its_digits_where_the_mass_is_almost_one() -> None:
    logits = torch.tensor([[20.0, 20.0, 0.0], [-60.0, -60.0, 0.0]])
    found = token_scores(logits, torch.tensor([False, False, True]), 1.0)["log_mass"]
    exact = torch.tensor([-math.log1p(math.exp(-20) / 2), math.log(2) - 60], dtype=torch.float64)
    assert ((found - exact) / exact).abs().max() < 1e-5


def test_are_differentiable() -> None:
    logits, mask, trash, units = case(texts=2)
    doubles = [layer.double().requires_grad_() for layer in logits]
    for name in SCORES:

        def one(*layers: Tensor, name: str = name) -> Tensor:
            parts = [token_scores(x, t, u)[name] for x, t, u in zip(layers, trash, units, strict=True)]
            return sum((part.view(2, 6) * mask).sum(1) / mask.sum(1) for part in parts)

        assert torch.autograd.gradcheck(one, tuple(doubles))
    floats = [layer.clone().requires_grad_() for layer in logits]
    text_scores(floats, mask, trash, units)["contrastive"].sum().backward()
    exact = torch.autograd.grad(
        sum(
            (token_scores(x, t, u)["contrastive"].view(2, 6) * mask / mask.sum(1, keepdim=True)).sum() / 2
            for x, t, u in zip(doubles, trash, units, strict=True)
        ),
        doubles,
    )
    assert all((x.grad - y).abs().max() < 1e-6 for x, y in zip(floats, exact, strict=True))


def test_trash_is_the_last_eighth_or_where_the_gap_is_greatest() -> None:
    assert [mask.nonzero().flatten().tolist() for mask in trash_experts([64, 28], 0.125)] == [
        list(range(56, 64)), [25, 26, 27]
    ]  # fmt: skip
    assert int(trash_experts([100], 0.29)[0].sum()) == 29
    gap = [torch.tensor([0.1, 0.9, -1.0, 0.9, 0.2, 0.0, 0.0, 0.5])]
    assert trash_experts([8], 0.25, gap)[0].nonzero().flatten().tolist() == [1, 3]
    assert trash_experts([8], 0.4, gap)[0].nonzero().flatten().tolist() == [1, 3, 7]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0, 1.5, -0.2, math.nan, math.inf])
def test_a_ratio_that_leaves_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(
        BenchError, match=r"layer \d\) leaves no trash or no good expert: choose between 0.125 and 0.875"
    ):
        trash_experts([8, 8] if not 0 < ratio < 1 else [64, 8], ratio)


def test_rankings_name_columns() -> None:
    plain = {"random", "tokens", "perplexity", "perplexity_fitted", "ifd"}
    assert {column for column, _ in RANKINGS.values()} == {*SCORES, "combined", *plain}
    assert {name for name, (_, sign) in RANKINGS.items() if sign < 0} == {"length", "perplexity"}
