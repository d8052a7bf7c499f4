"""Loss against a loop over samples; the interval against what it must cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyonn_lib import evaluate
from tinyonn_lib.lm import models


def test_loss_equals_one_sample_at_a_time() -> None:
    torch.manual_seed(0)
    model = models.new_model(vocab_size=300, width=32, layers=1, ffn=24, head_dim=16, max_length=64)
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.weight)
    model.eval()
    samples = [torch.randint(0, 300, (n,)).tolist() for n in (9, 2, 30, 17, 5)]
    found = evaluate.loss(model, samples, batch=2)
    for row, ids in enumerate(samples):
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = -sum(float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1))
        assert found.nats[row] == pytest.approx(expected, rel=1e-5)
        assert found.tokens[row] == len(ids) - 1
    assert found.mean == pytest.approx(found.nats.sum() / found.tokens.sum())


def fake(nats: np.ndarray) -> evaluate.Loss:
    return evaluate.Loss(nats, np.full(len(nats), 10, np.int64))


def test_paired_difference_ignores_what_both_share() -> None:
    rng = np.random.default_rng(0)
    hard = rng.gamma(2, 20, 200)
    gap = evaluate.paired([fake(hard + 1.0)], fake(hard), groups=range(200))
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = evaluate.paired([fake(rng.normal(2.0, 5.0, 60))], fake(np.zeros(60)), range(60), draws=400, seed=trial)
        hits += found.low <= 0.2 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_groups_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    files = np.repeat(np.arange(20), 10)
    nats = np.repeat(rng.normal(0, 5, 20), 10)  # ten copies of twenty independent numbers
    loose, tight = (evaluate.paired([fake(nats)], fake(0 * nats), groups) for groups in (files, np.arange(200)))
    assert (loose.high - loose.low) > 2 * (tight.high - tight.low)


def test_too_few_files_give_no_interval() -> None:
    rng = np.random.default_rng(3)
    files = np.repeat(np.arange(evaluate.MIN_GROUPS - 1), 30)
    found = evaluate.paired([fake(rng.normal(-5, 1, len(files)))], fake(np.zeros(len(files))), files)
    assert np.isnan(found.low)
    assert np.isnan(found.high)
    assert found.verdict == "about as much as"
    assert "7 source files" in str(found)


@pytest.mark.parametrize(("shift", "verdict"), [(-9.0, "less than"), (9.0, "more than"), (0.0, "about as much as")])
def test_verdict_follows_the_interval(shift: float, verdict: str) -> None:
    nats = np.random.default_rng(4).normal(shift, 5, 50)
    assert evaluate.paired([fake(nats - nats.mean() + shift)], fake(np.zeros(50)), range(50)).verdict == verdict


def test_different_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples"):
        evaluate.paired([fake(np.zeros(3))], evaluate.Loss(np.zeros(3), np.array([1, 2, 3])), range(3))


@pytest.mark.parametrize(("ours", "theirs"), [(3, 3), (3, 1), (1, 3)])
def test_seeds_are_drawn_in_pairs(ours: int, theirs: int) -> None:
    """Against all draws one by one: files and seeds, the same seeds on both sides."""
    rng = np.random.default_rng(5)
    one, two = ([fake(rng.normal(5 + seed, 3, 40)) for seed in range(count)] for count in (ours, theirs))
    files = np.arange(40) % 10
    found = evaluate.paired(one, two, files, draws=200, seed=7, over_seeds=True)
    drawn = np.random.default_rng(7)
    counts = drawn.multinomial(10, np.full(10, 0.1), size=200)
    seeds = drawn.multinomial(3, np.full(3, 1 / 3), size=200)
    means = []
    for often, taken in zip(counts, seeds, strict=True):
        gaps = [one[min(s, ours - 1)].nats - two[min(s, theirs - 1)].nats for s in range(3)]
        sums = [sum(often[f] * gap[files == f].sum() for f in range(10)) for gap in gaps]
        means.append(sum(n * s for n, s in zip(taken, sums, strict=True)) / 3 / 400)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    plain = evaluate.paired(one, two, files, draws=200, seed=7)
    assert found.mean == pytest.approx(plain.mean)
    assert found.high - found.low > 1.2 * (plain.high - plain.low)


def test_one_seed_has_nothing_to_draw() -> None:
    rng = np.random.default_rng(6)
    one, two = ([fake(rng.normal(5, 3, 40))] for _ in range(2))
    assert evaluate.paired(one, two, range(40), over_seeds=True) == evaluate.paired(one, two, range(40))


def test_seeds_without_a_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="as many on both sides"):
        evaluate.paired([fake(np.zeros(9))] * 3, [fake(np.zeros(9))] * 2, range(9), over_seeds=True)
