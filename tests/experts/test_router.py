"""A router in training chooses and weighs as its exported rows and biases do, in the library and in a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import analytic, export, router, running
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import INITS, Router
from tinyonn_lib.experts.routing import GATES, scaled, top_mask
from tinyonn_lib.experts.student import Routed

from .conftest import Tiny
from .references import linear_router

WIDTH = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(experts: int, gates: str, *, gain: float = 0.01, seed: int = 0) -> Router:
    start = analytic.Linear(normal(experts, WIDTH, seed=seed), normal(experts, seed=seed + 1))
    return Router(start, normal(200, WIDTH, seed=9), gates, gain)


def moved(made: Router, seed: int) -> Router:
    """As if it had been trained: rows, biases and gain far from where they began."""
    with torch.no_grad():
        made.weight += 0.3 * made.weight.std() * normal(*made.weight.shape, seed=seed)
        made.gain += 0.7
        if made.bias is not None:
            made.bias += normal(*made.bias.shape, seed=seed + 1)
    return made


def clear(order: Tensor, k: int, least: float) -> Tensor:
    """Where the k-th and the next are further apart than rounding."""
    if k == order.shape[-1]:
        return torch.ones(order.shape[:-1], dtype=torch.bool)
    ranked = order.sort(-1, descending=True).values
    return ranked[..., k - 1] - ranked[..., k] > least


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("gain", [0.01, 1.0])
def test_exported_rows_choose_and_weigh_as_the_router(tiny: Tiny, gates: str, gain: float) -> None:
    part = tiny.part(experts=8)
    made = [moved(some(8, gates, gain=gain, seed=seed), seed) for seed in (0, 5)]
    rows, biases = router.exported(made)
    assert (biases is None) == (gates == "softmax")
    x, h = normal(3, 100, WIDTH, seed=3), torch.ones(3, 100, 32)
    for k in range(1, 9):
        for place, scale in enumerate(linear_router(rows, part, k, gates, biases)):
            on, factors = Routed(made[place], part, place, k).hard(x)
            assert torch.equal(on.sum(-1), torch.full((3, 100), float(k)))
            neurons = torch.stack([index[0] for index in part.experts[place]])  # one of each expert
            found = scale(x, h)[..., neurons]
            sure = clear(made[place](x)[0], k, 1e-3)
            assert sure.float().mean() > 0.98
            torch.testing.assert_close(found[sure], (on * factors)[sure], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(factors, GATES[gates](x @ rows[place].T), rtol=1e-5, atol=1e-6)


def test_biases_matter_for_the_choice_and_not_for_the_factors() -> None:
    made = some(4, "sigmoid")
    x = normal(50, WIDTH, seed=4)
    before = made(x)
    with torch.no_grad():
        assert made.bias is not None
        made.bias[2] += 100
    choice, gates, logits = made(x)
    assert bool((choice.argmax(-1) == 2).all())
    assert not bool((before[0].argmax(-1) == 2).all())
    assert torch.equal(gates, before[1])
    assert torch.equal(logits, before[2])


def test_near_a_gain_of_zero_the_choice_is_the_score_plus_the_bias() -> None:
    """σ is straight there: what is learned at the default gain is in units of the scores."""
    made = some(4, "sigmoid")
    x = normal(50, WIDTH, seed=4)
    assert made.bias is not None
    torch.testing.assert_close(made(x)[0], x @ made.weight.T + made.bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gates", GATES)
def test_it_begins_in_units_of_its_own_spread_and_with_gates_of_about_one(gates: str) -> None:
    start = analytic.Linear(1000 * normal(6, WIDTH) + 50, 100 * normal(6, seed=1) + 7)
    x = normal(300, WIDTH, seed=2) + 0.5
    made = Router(start, x, gates)
    choice, factors, logits = made(x)
    assert float(choice.detach().std(-1).mean()) == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(factors, torch.ones_like(factors), rtol=0, atol=0.05)
    torch.testing.assert_close(made.weight.mean(0), torch.zeros(WIDTH), rtol=0, atol=1e-5)
    bias = start.bias if gates == "sigmoid" else torch.zeros(6)
    original = x @ start.weight.T + bias
    # Nothing but scale and a common constant has changed.
    linear = x @ made.weight.T + (0 if made.bias is None else made.bias)
    ratio = (original - original.mean(-1, keepdim=True)) / linear
    assert float(ratio.detach().median()) == pytest.approx(float(original.std(-1).mean()), rel=1e-3)
    torch.testing.assert_close(
        linear * float(ratio.detach().median()), original - original.mean(-1, keepdim=True), rtol=1e-3, atol=0.5
    )
    assert math.exp(float(made.gain.detach())) == pytest.approx(router.GAIN)
    assert float(logits.detach().std()) < 0.1


def test_its_precision_does_not_depend_on_the_models() -> None:
    """Under autocast, too: bfloat16 has 3 digits, and what is trained would not be what is judged and exported."""
    made, x = some(8, "sigmoid"), normal(300, WIDTH, seed=3)
    expected = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert made(x.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("gates", GATES)
def test_a_threshold_of_the_choice_is_one_of_the_exported_order(gates: str) -> None:
    made = moved(some(6, gates, gain=0.5), 2)
    rows, biases = made.exported()
    x = normal(400, WIDTH, seed=5)
    order = x @ rows.T if biases is None else (x @ rows.T).sigmoid() + biases
    choice = made(x)[0]
    for threshold in (-1.3, 0.0, 0.8):
        sure = (choice - threshold).abs() > 1e-4
        assert 0.02 < float((choice > threshold).float().mean()) < 0.98
        assert torch.equal((order > made.exported_threshold(threshold))[sure], (choice > threshold)[sure])
        assert made.exported_threshold(torch.tensor(threshold)) == pytest.approx(made.exported_threshold(threshold))


def shares(made: Router, x: Tensor, k: int) -> Tensor:
    return top_mask(made(x)[0], k).mean(0)


@pytest.mark.parametrize(("gates", "k", "mean"), [("sigmoid", 1, 0.1), ("sigmoid", 3, 1), ("softmax", 1, 0.1),
                                                 ("softmax", 1, 1), ("softmax", 3, 1)])  # fmt: skip
def test_revive_puts_an_expert_at_its_share(gates: str, k: int, mean: float) -> None:
    x, made = normal(600, WIDTH, seed=6) + mean, some(6, gates)  # what an RMSNorm leaves may have hardly a mean
    with torch.no_grad():
        if made.bias is not None:
            made.bias[4] -= 30
        elif mean == 1:
            made.weight[4] = -10 * x.mean(0) / x.mean(0).square().sum()
        else:
            made.weight[4] = 0
    assert float(shares(made, x, k)[4]) < 0.05
    others, kept = [0, 1, 2, 3, 5], made.weight.clone()
    made.revive(4, x, k)
    assert float(shares(made, x, k)[4]) == pytest.approx(k / 6, abs=0.02)
    assert torch.equal(made.weight[others], kept[others])


def test_revived_one_after_the_other_all_are_back() -> None:
    x, made = normal(600, WIDTH, seed=6), some(8, "sigmoid")
    with torch.no_grad():
        assert made.bias is not None
        made.bias[:3] -= 30
    assert float(shares(made, x, 2)[:3].max()) == 0
    for expert in range(3):
        made.revive(expert, x, 2)
    assert float(shares(made, x, 2).min()) > 0.05


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("init", INITS)
def test_every_init_is_linear_and_finite(tiny: Tiny, init: str, gates: str) -> None:
    part = tiny.part("sp")
    made, again = (router.build(tiny.evidence, part, init, gates, 3, torch.device("cpu")) for _ in range(2))
    assert [tuple(each.weight.shape) for each in made] == [(4, WIDTH)] * 2
    for one, two, layer in zip(made, again, tiny.evidence, strict=True):
        start = INITS[init](layer, part.experts[layer.layer], 3)
        assert isinstance(start, analytic.Linear)
        assert all(bool(p.isfinite().all()) for p in one.parameters())
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
        wanted = start if gates == "sigmoid" else analytic.Linear(start.weight, torch.zeros(4))
        sure = clear(wanted(layer.x), 2, 1e-4 * float(wanted(layer.x).std()))
        assert sure.float().mean() > 0.9
        assert torch.equal(top_mask(one(layer.x)[0], 2)[sure], top_mask(wanted(layer.x), 2)[sure])


def test_inits_and_seeds_differ(tiny: Tiny) -> None:
    part = tiny.part("sp")
    named = {
        (n, s): router.build(tiny.evidence, part, n, "sigmoid", s, torch.device("cpu")) for n in INITS for s in (0, 1)
    }
    for one in INITS:
        assert torch.equal(named[one, 0][0].weight, named[one, 1][0].weight) == (one != "random")  # type: ignore[arg-type]
        assert [n for n in INITS if torch.allclose(named[n, 0][0].weight, named[one, 0][0].weight)] == [one]  # type: ignore[arg-type]


def test_errors(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="Unknown init 'magic' of a router: choose one of random, centroid") as caught:
        router.build(tiny.evidence, tiny.part(), "magic", "sigmoid", 0, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    x = normal(50, WIDTH)
    nan = normal(4, WIDTH)
    nan[1, 2] = math.nan
    for rows in (torch.zeros(4, WIDTH), nan, normal(4, WIDTH) * math.inf, normal(1, WIDTH)):
        with pytest.raises(BenchError, match="scores all experts alike, or not finitely: choose another init"):
            Router(analytic.Linear(rows, torch.zeros(len(rows))), x, "sigmoid")
    for broken in (x * math.nan, x * 0):
        with pytest.raises(BenchError, match="alike, or not finitely"):
            Router(analytic.Linear(normal(4, WIDTH), torch.zeros(4)), broken, "softmax")


@pytest.mark.parametrize("experts", [2, 3, 5, 7, 64])
def test_equal_rows_are_told_although_their_mean_is_rounded(experts: int) -> None:
    for seed in range(5):
        rows = normal(1, WIDTH, seed=seed).expand(experts, WIDTH)
        with pytest.raises(BenchError, match="scores all experts alike"):
            Router(analytic.Linear(rows, torch.ones(experts) / 3), normal(50, WIDTH), "sigmoid")


def test_the_loaded_checkpoint_chooses_and_says_the_same(tiny: Tiny, tmp_path: Path) -> None:
    cases: tuple[tuple[str, Partition, str], ...] = (
        ("softmax", tiny.part(), "Qwen3MoeForCausalLM"),
        ("sigmoid", tiny.part(shared=0.25), "Glm4MoeForCausalLM"),
    )
    ids = tiny.ids
    for gates, part, name in cases:
        made = [moved(some(4, gates, gain=0.3, seed=seed), seed) for seed in (2, 7)]
        rows, biases = router.exported(made)
        folder = export.export(tiny.model, part, tmp_path / gates, k=1, routers=rows, biases=biases)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(loaded).__name__ == name
        for k in (1, 2, 3, 4):
            layers = [Routed(each, part, place, k) for place, each in enumerate(made)]
            seen: list[Tensor] = []

            def watched(x: Tensor, h: Tensor, layer: Routed, seen: list[Tensor] = seen) -> Tensor:
                seen.append(layer.hard(x)[0].flatten(0, 1))
                return layer.scale(x, h)

            scales = [lambda x, h, layer=layer: watched(x, h, layer) for layer in layers]
            with torch.no_grad(), scaled(tiny.ffns, scales):
                ours = tiny.model(ids).logits
            with torch.no_grad(), running.running(loaded, k, "eager"), running.choices(loaded) as found:
                theirs = loaded(ids).logits
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
            for on, (chosen, experts) in zip(seen, found, strict=True):
                assert experts == 4
                assert torch.equal(torch.zeros(len(on), 4).scatter_(1, chosen, 1.0), on)
