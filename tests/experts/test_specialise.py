"""What experts are called for: the estimate against cases with a known answer, the counts against plain loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import router, routing, specialise
from tinyonn_lib.experts.student import Routed

from .conftest import Tiny
from .test_examples import START, Letters

TOKENS, WORDS = 6000, 1500


def entropy(share: float) -> float:
    return float(-share * np.log2(share) - (1 - share) * np.log2(1 - share))


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    """Like text: few words often, most of them once or twice."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, WORDS + 1)
    return np.unique(rng.choice(WORDS, TOKENS, p=weights / weights.sum()), return_inverse=True)[1]


def test_a_choice_by_chance_has_no_bits_and_one_by_the_token_all(codes: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    share = rng.uniform(0.05, 0.95, 40)
    chance = torch.from_numpy(rng.random((TOKENS, 40)) < share)
    bits = specialise.mutual_information(chance, codes)
    counted = [mutual_info_score(codes, column) / np.log(2) for column in chance.T.numpy()]
    assert np.mean(counted) > 0.1  # what is corrected
    assert abs(bits.mean()) < 0.002
    assert np.abs(bits).max() < 0.03
    decided = torch.from_numpy((rng.random((codes.max() + 1, 40)) < share)[codes])
    expected = [entropy(float(column.double().mean())) for column in decided.T]
    np.testing.assert_allclose(specialise.mutual_information(decided, codes), expected, rtol=1e-9)


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.35])
def test_a_noisy_choice_has_about_the_bits_of_its_channel(codes: np.ndarray, noise: float) -> None:
    rng = np.random.default_rng(2)
    meant = (rng.random(codes.max() + 1) < 0.5)[codes]
    on = meant ^ (rng.random(TOKENS) < noise)
    found = specialise.mutual_information(torch.from_numpy(on)[:, None], codes)[0]
    share = meant.mean() * (1 - noise) + (1 - meant.mean()) * noise
    assert found == pytest.approx(entropy(share) - entropy(noise), abs=0.05)


def test_the_adjustment_is_that_of_vinh(codes: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    on = (codes % 3 == 0) & (rng.random(TOKENS) < 0.7)
    found = specialise.mutual_information(torch.from_numpy(on)[:, None], codes)[0]
    chance = expected_mutual_information(contingency_matrix(codes, on, sparse=True), TOKENS) / np.log(2)
    high, counted = entropy(on.mean()), mutual_info_score(codes, on) / np.log(2)
    assert found == pytest.approx(high * (counted - chance) / (high - chance), abs=0.01)


def test_words_and_choices_that_come_in_bunches_are_no_dependence() -> None:
    rng = np.random.default_rng(4)
    topic, mode = np.repeat(np.arange(400), 15), np.repeat(rng.random((600, 20)) < 0.3, 10, axis=0)
    codes = np.where(rng.random(TOKENS) < 0.5, topic, 400 + rng.integers(0, 30, TOKENS))
    bits = specialise.mutual_information(torch.from_numpy(mode), codes)
    counted = [mutual_info_score(codes, column) / np.log(2) for column in mode.T]
    shuffled = [mutual_info_score(codes, rng.permutation(column)) / np.log(2) for column in mode.T]
    excess = np.mean(counted) - np.mean(shuffled)  # what shuffling would have called a dependence
    assert excess > 0.1
    assert abs(bits.mean()) < excess / 4


def constructed(codes: np.ndarray) -> specialise.Choices:
    """By word 0 or 3; never; always; by chance."""
    rng = np.random.default_rng(5)
    on = np.stack([np.isin(codes, (0, 3)), codes < 0, codes >= 0, rng.random(TOKENS) < 0.5], 1)
    words = ["<b>", "a", "␣b", "\u2581<script>", *(f"w{i}" for i in range(4, codes.max() + 1))]
    place = np.arange(TOKENS)
    return specialise.Choices([torch.from_numpy(on)] * 2, [1, 4], codes, words, place // 100, place % 100)


def test_table_names_the_tokens_that_call_an_expert_and_chance_beside_them(codes: np.ndarray) -> None:
    table = specialise.table(constructed(codes), top=3)
    assert table[["layer", "expert"]].to_numpy().tolist() == [[n, e] for n in (1, 4) for e in range(4)]
    word, never, always, chance = (row for row in table.head(4).itertuples())
    share, seen = np.isin(codes, (0, 3)).mean(), np.bincount(codes)
    assert word.share == pytest.approx(share)
    assert word.tokens == f"<b> {1 / share:.1f}× ({seen[0]:,}) · \u2581<script> {1 / share:.1f}× ({seen[3]:,})"
    assert word.bits == pytest.approx(word.entropy) == pytest.approx(entropy(share))
    assert (never.share, never.entropy, never.bits, never.tokens) == (0, 0, 0, "")
    assert (always.share, always.entropy, always.bits, always.tokens) == (1, 0, 0, "")
    assert abs(chance.bits) < 0.03
    assert table["chance_bits"].abs().max() < 0.03
    for named in (chance.tokens, word.chance_tokens):
        parts = named.split(specialise.SEPARATOR)
        assert len(parts) == 3
        assert all(int(part.split("(")[1][:-1]) >= specialise.MIN_COUNT for part in parts)


def layers(tiny: Tiny) -> list[Routed]:
    part = tiny.part("random", 4)
    made = router.build(tiny.evidence, part, "random", "sigmoid", 0, torch.device("cpu"))
    return [Routed(each, part, place, 2) for place, each in enumerate(made)]


def rows(count: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(6)
    ids = [rng.integers(1, 300, size).tolist() for size in rng.integers(1, 24, count)]
    ids[0], ids[2], ids[5] = [START, *ids[0]], [START, *ids[2], START], [START]
    return pd.DataFrame({"ids": ids})


def test_watching_notes_the_choices_of_the_divided_model_at_each_counted_token(tiny: Tiny) -> None:
    made, samples = layers(tiny), rows()
    found = specialise.watch(tiny.model, tiny.ffns, made, samples, Letters(), batch=4)
    seen: list[list[torch.Tensor]] = [[], []]
    places, words = [], []

    def scale(place: int) -> routing.Scale:
        def one(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            seen[place].append(made[place].hard(x)[0][0, skip:])
            return made[place].scale(x, h)

        return one

    for number, ids in enumerate(samples["ids"]):
        skip = int(ids[0] == START)
        with torch.no_grad(), routing.scaled(tiny.ffns, [scale(0), scale(1)]):
            tiny.model(torch.tensor([ids]))
        places += [(number, position) for position in range(skip, len(ids))]
        words += [Letters().decode([i]).replace(" ", "␣") for i in ids[skip:] if i < 200]
    assert list(zip(found.sample, found.position, strict=True)) == places
    for on, expected in zip(found.on, seen, strict=True):
        assert on.dtype == torch.bool
        assert (on.sum(-1) == 2).all()
        assert (on == torch.cat(expected).bool()).float().mean() > 0.999  # batches round differently
    shown = [found.words[code] for code in found.codes]
    assert [word for word in shown if word.startswith("␣w")] == words
    assert set(shown) - set(words) <= {"⏎", "<b>x</b>", "·"}
    assert found.layers == [0, 1]
    assert not any(m._forward_pre_hooks for m in tiny.model.modules())


def test_quotes_mark_a_token_at_which_the_expert_is_on(tiny: Tiny) -> None:
    samples = pd.DataFrame({"ids": [[5, 6, 7, 8, 9] * 4 for _ in range(20)]})
    found = specialise.watch(tiny.model, tiny.ffns, layers(tiny), samples, Letters())
    table = specialise.table(found)
    quoted = specialise.quotes(found, table, samples, Letters(), experts=3, each=2)
    best = table.loc[table.groupby("layer")["bits"].idxmax()]
    assert {(row.layer, row.expert) for row in best.itertuples()} <= set(
        quoted[["layer", "expert"]].itertuples(index=False, name=None)
    )
    assert len(quoted.groupby(["layer", "expert"])) == 3
    for row in quoted.itertuples():
        token = row.token.split(" ")[0]
        assert f"«{token.replace('␣', ' ')}»" in row.passage
        assert found.on[row.layer][:, row.expert][found.codes == found.words.index(token)].any()


def test_too_few_tokens_are_refused(tiny: Tiny) -> None:
    with pytest.raises(BenchError, match="36 tokens are too few .* at least 160"):
        specialise.watch(
            tiny.model, tiny.ffns, layers(tiny), pd.DataFrame({"ids": [[START, *range(1, 37)]]}), Letters()
        )
