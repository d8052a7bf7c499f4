"""The contest: who gets how many tokens, which rates are taken, what is compared with what, and how it goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate.losses import Loss
from tinyonn_lib.lm.judge import bits_per_byte
from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.pretrain import ablation, contest, lineup
from tinyonn_lib.pretrain.architectures import counts
from tinyonn_lib.pretrain.contest import Contest
from tinyonn_lib.pretrain.lineup import LINEUP, Entry, around
from tinyonn_lib.pretrain.recipe import RECIPES, Recipe

SIZES: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64}
TEXTS = [f"the cat number {i} sat on the mat, and the dog ate the hat {i % 7}." for i in range(120)]
SPLITS = {"train": TEXTS[:80], "validation": TEXTS[80:100], "heldout": TEXTS[100:]}
SOURCES = [f"file {place // 2}" for place in range(20)]
TOKENIZER = train_bpe(TEXTS, 270)
SMALL = Recipe(batch=4, warmup_steps=1, precision="float32")


def make(folder: Path, **change: Any) -> Contest:
    given: dict[str, Any] = {
        "texts": SPLITS, "sources": SOURCES, "tokenizer": TOKENIZER, "sizes": SIZES, "tokens": 256, "length": 16,
        "seeds": 2,
    }  # fmt: skip
    return Contest(folder=folder, **(given | change))


class Stop(Exception):
    pass


LITTLE = {
    "first": Entry(SMALL, headline=True),
    "tuned": Entry(replace(SMALL, optimizer="adamw"), rates=((1e-3, 1e-2), (3e-3, 2e-2)), headline=True),
    "apart": Entry(replace(SMALL, layout="documents", mtp=0.3), "qwen3_moe"),
    "latent": Entry(SMALL, matched=True, latent="rotated"),
}


def play(field: Contest) -> pd.DataFrame:
    seconds = {"first": 2e-3, "tuned": 1e-3, "apart": 4e-3, "latent": 2e-3}
    field.speeds = {entry.computation: seconds[name] for name, entry in LITTLE.items()}
    for name, entry in LITTLE.items():
        field.enter(name, entry, LITTLE["first"])
    return field.table("first")


def test_a_stopped_contest_goes_on_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []
    true = contest.pretrain

    def counted(*args: Any, **options: Any) -> pd.DataFrame:
        began.append(options["tokens"])
        if len(began) == stop:
            raise Stop
        return true(*args, **options)

    monkeypatch.setattr(contest, "pretrain", counted)
    stop = 0
    whole = play(make(tmp_path / "whole"))
    # At equal time: two seeds of the first and two of each headline entry; equal budgets are one training.
    assert began == [256] * 2 + [512] * 2 + [256] * 2 + [512] * 2 + [256, 128] + [256]
    stop, total = 6, len(began)
    began.clear()
    with pytest.raises(Stop):
        play(make(tmp_path / "stopped"))
    stop = 0
    table = play(make(tmp_path / "stopped"))
    assert len(began) == total + 1
    pd.testing.assert_frame_equal(table, whole, check_exact=True)
    assert whole["tokens"].tolist() == [256, 256, 256, 512, 256, 128, 256, 256]
    assert whole["seeds"].tolist() == [2, 2, 2, 2, 1, 1, 1, 1]
    assert whole["dense"].tolist() == [True] * 4 + [False] * 4
    assert whole["speed"].tolist() == [1.0, 1.0, 2.0, 2.0, 0.5, 0.5, 1.0, 1.0]
    assert whole.loc[:1, ["difference", "low", "high"]].eq(0).all(axis=None)
    assert whole["spread"].notna().tolist() == [True] * 4 + [False] * 4
    assert (whole["active"] < whole["parameters"]).tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert whole["parameters"][6] == pytest.approx(whole["parameters"][0], rel=0.03)
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["first", "latent"])
def test_losses_are_bits_per_byte_of_the_trained_model(tmp_path: Path, name: str) -> None:
    """Against the steps by hand; the latent embeddings count when it is judged."""
    field, entry = make(tmp_path, texts=SPLITS | {"heldout": ["Größe", "the cat sat", "猫 on the mat"]}), LITTLE[name]
    found = field._trained(entry, 512, 1, "heldout")
    contender = field.build(entry, 1)
    contender.train(field._laid(entry, 1), entry.recipe, tokens=512, seed=1)
    with contender.whole():
        assert found.mean == pytest.approx(bits_per_byte(contender.model, TOKENIZER, field.texts["heldout"]), rel=1e-6)
    assert found.tokens.tolist() == [7, 11, 14]
    bare = bits_per_byte(contender.model, TOKENIZER, field.texts["heldout"])
    assert (abs(bare - found.mean) > 1e-4) == (name == "latent")


@pytest.mark.parametrize(
    "change",
    [
        {"texts": SPLITS | {"heldout": TEXTS[99:119]}},
        {"texts": SPLITS | {"train": TEXTS[1:81]}},
        {"tokenizer": train_bpe(TEXTS, 280)},
        {"length": 8},
        {"sizes": SIZES | {"width": 48}},
    ],
)
def test_what_was_done_for_others_is_not_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    """Neither their losses nor their speeds: the same folder, but other texts, tokenizer or sizes."""
    fields = [make(tmp_path, tokens=64, **more) for more in ({}, change)]
    found = []
    for field in fields:
        field.speeds = {Entry(SMALL).computation: 1.0}
        field.enter("first", Entry(SMALL), Entry(SMALL), ("tokens",))
        found.append(field.losses["first", "tokens"][0])
    assert not np.array_equal(found[0].nats, found[1].nats)
    assert fields[0].folder != fields[1].folder
    assert make(tmp_path, tokens=64).folder == fields[0].folder
    assert make(tmp_path, tokens=128, seeds=1).folder == fields[0].folder  # that is no other contest


def losses(generator: np.random.Generator, seeds: int, texts: int = 20) -> list[Loss]:
    sizes = 5 + np.arange(texts) % 11
    return [Loss(generator.gamma(3.0, size=texts) * sizes, sizes) for _ in range(seeds)]


@pytest.fixture
def played(tmp_path: Path) -> Contest:
    """Losses without a training: an entry of three seeds, one of three, and one of one."""
    field, generator = make(tmp_path), np.random.default_rng(0)
    field.losses = {(name, "time"): losses(generator, seeds) for name, seeds in (("a", 3), ("b", 3), ("c", 1))}
    return field


def test_saving_is_a_ratio_of_sums_over_files_and_seeds(played: Contest) -> None:
    """The point against sums, the interval against all draws one by one."""
    for name, other, count in (("a", "b", 3), ("c", "a", 1), ("a", "c", 1)):
        one, two = (played.losses[entry, "time"][:count] for entry in (name, other))
        found = played.saving(name, other, "time", draws=300)
        assert found.mean == pytest.approx(1 - sum(x.nats.sum() for x in one) / sum(x.nats.sum() for x in two))
        random, files = np.random.default_rng(0), sorted(set(SOURCES))
        drawn = random.multinomial(10, np.full(10, 0.1), size=300)
        seeds = random.multinomial(count, np.full(count, 1 / count), size=300)
        shares = []
        for times, often in zip(drawn, seeds, strict=True):
            weight = {file: int(n) for file, n in zip(files, times, strict=True)}
            mine, theirs = (
                sum(
                    int(n) * weight[SOURCES[place]] * value
                    for n, loss in zip(often, side, strict=True)
                    for place, value in enumerate(loss.nats)
                )
                for side in (one, two)
            )
            shares.append(1 - mine / theirs)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])), rel=1e-9)
        assert found.low < found.mean < found.high
        assert found.groups == 10


def test_seeds_are_paired(played: Contest) -> None:
    """Only seeds that both have: the others would compare a lucky start with an average."""
    one, three = played.losses["c", "time"], played.losses["a", "time"]
    total = one[0].tokens.sum()
    found = played.difference("c", "a", "time")
    assert found.mean == pytest.approx((one[0].nats.sum() - three[0].nats.sum()) / total)
    assert played.difference("a", "c", "time").mean == pytest.approx(-found.mean)
    both = played.difference("a", "b", "time").mean
    each = [(x.nats.sum() - y.nats.sum()) / total for x, y in zip(three, played.losses["b", "time"], strict=True)]
    assert both == pytest.approx(np.mean(each))


def test_an_entry_saves_nothing_of_itself(played: Contest) -> None:
    found = played.saving("a", "a", "time")
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_texts_of_one_source_have_no_interval(tmp_path: Path, played: Contest) -> None:
    field = make(tmp_path, sources=["same"] * 20)
    field.losses = played.losses
    for found in (field.saving("a", "b", "time"), field.difference("a", "b", "time")):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert found.groups == 1
    assert field.saving("a", "b", "time").mean == pytest.approx(played.saving("a", "b", "time").mean)


Told = Callable[[Entry, int, int, str], float]


def answering(field: Contest, bits: Told) -> list[tuple[Entry, int, int, str]]:
    """Answers instead of trainings; what was asked for is returned."""
    asked: list[tuple[Entry, int, int, str]] = []

    def trained(entry: Entry, tokens: int, seed: int, split: str) -> Loss:
        asked.append((entry, tokens, seed, split))
        return Loss(np.full(20, bits(entry, tokens, seed, split)), np.ones(20, dtype=np.int64))

    field._trained = trained  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize("best", itertools.product((1e-3, 3e-3, 1e-2), (2e-2, 1e-1)))
def test_rates_are_chosen_on_other_texts_at_equal_time(tmp_path: Path, best: tuple[float, float]) -> None:
    """Wherever in the grid, corners among them, the best is."""
    field = make(tmp_path, tokens=10_000, seeds=3)
    tuned = Entry(RECIPES["adamw"], rates=lineup.GRID, headline=True)
    field.speeds = {Entry().computation: 3e-4, tuned.computation: 2e-4}

    def bits(entry: Entry, tokens: int, seed: int, split: str) -> float:
        away = math.hypot(math.log(entry.recipe.lr_matrix / best[0]), math.log(entry.recipe.lr_other / best[1]))
        return away if split == "validation" else -away  # on the held-out texts the best rates would be the worst

    asked = answering(field, bits)
    field.enter("tuned", tuned, Entry())
    assert field.rates["tuned"] == best
    assert [(tokens, seed, split) for _, tokens, seed, split in asked[:12]] == [(15_000, 0, "validation")] * 12
    assert [call[1:] for call in asked[12:]] == [
        (tokens, seed, "heldout") for tokens in (10_000, 15_000) for seed in range(3)
    ]
    assert {(call[0].recipe.lr_matrix, call[0].recipe.lr_other) for call in asked[12:]} == {best}
    assert field.tokens == {("tuned", "tokens"): 10_000, ("tuned", "time"): 15_000}


def test_rates_that_diverge_are_not_taken(tmp_path: Path) -> None:
    field = make(tmp_path)
    field.speeds = {Entry().computation: 1.0}

    def bits(entry: Entry, tokens: int, seed: int, split: str) -> float:
        if entry.recipe.lr_matrix > 0.1:
            raise BenchError("The loss is not finite at step 3 (learning rate 1): lower the learning rate.")
        return 1.0

    answering(field, bits)
    rates = ((1.0, 1.0), (0.01, 1.0), (0.5, 1.0))
    field.enter("first", Entry(rates=rates), Entry())
    assert field.rates["first"] == (0.01, 1.0)
    with pytest.raises(BenchError, match="not finite"):
        field.enter("first", Entry(rates=rates[:1]), Entry())


def test_one_pair_of_rates_is_taken_untried(tmp_path: Path) -> None:
    field = make(tmp_path)
    field.speeds = {Entry().computation: 1.0}
    asked = answering(field, lambda *_: 1.0)
    field.enter("first", Entry(rates=((0.3, 0.4),)), Entry())
    assert {(call[0].recipe.lr_matrix, call[0].recipe.lr_other, call[2], call[3]) for call in asked} == {
        (0.3, 0.4, 0, "heldout")
    }


def test_a_choice_is_made_again_around_the_best() -> None:
    """Finer than the grid, and beyond it where the best lay on its edge; one rate for everything stays one rate."""
    near = around(Entry(rates=lineup.GRID), (1e-2, 5e-2))
    assert near.rates == ((1e-2, 5e-2), (5e-3, 5e-2), (2e-2, 5e-2), (1e-2, 2.5e-2), (1e-2, 1e-1))
    assert around(Entry(rates=lineup.SINGLE), (3e-3, 3e-3)).rates == ((3e-3, 3e-3), (1.5e-3, 1.5e-3), (6e-3, 6e-3))


DIFFERENT: dict[str, Any] = {
    "optimizer": "adamw",
    "layout": "padded",
    "mtp": 0.1,
    "batch": 8,
    "precision": "bfloat16",
}


def test_what_computes_the_same_has_one_speed() -> None:
    """Rates, schedule, ramp and the weight of a loss cost nothing; what is in a step does."""
    same = [Entry(replace(SMALL, lr_other=1.0)), Entry(replace(SMALL, schedule="cosine", ramp=0.5, balance=1.0))]
    assert {entry.computation for entry in same} == {Entry(SMALL).computation}
    others = [
        *[Entry(replace(SMALL, **{name: value})) for name, value in DIFFERENT.items()],
        Entry(SMALL, "qwen3_moe"),
        Entry(SMALL, matched=True),
        Entry(SMALL, latent="rotated"),
        Entry(SMALL, latent="apart"),
    ]
    assert len({entry.computation for entry in [Entry(SMALL), *others]}) == len(others) + 1


def test_speeds_are_ratios_in_the_same_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: the first turn and outliers count for nothing; a later machine may be slower."""
    seconds: dict[str, list[float]] = {"muon": [0.5, 2, 20, 2, 3, 2], "adamw": [99, 6, 60, 90, 3, 6]}
    seen: list[tuple[str, float, int]] = []

    def fake(rows: Any, model: Any, recipe: Recipe, *, tokens: int, timing: dict[str, float], mtp: Any) -> None:
        seen.append((recipe.optimizer, recipe.ramp, tokens))
        timing["seconds"] = seconds[recipe.optimizer].pop(0) * tokens

    monkeypatch.setattr(contest, "pretrain", fake)
    one, two = Entry(replace(SMALL, ramp=0.5)), Entry(replace(SMALL, optimizer="adamw"))
    taking = {"one": one, "two": two, "one again": Entry(replace(SMALL, schedule="cosine"))}
    field = make(tmp_path)
    field.measure_speeds(taking, rounds=5)
    assert field.speeds == pytest.approx({one.computation: 2.0, two.computation: 6.0})
    assert seen == [("muon", 0.0, 5 * 4 * 16), ("adamw", 0.0, 5 * 4 * 16)] * 6
    again = make(tmp_path)
    again.measure_speeds(taking)  # nothing left to measure
    assert again.speeds == field.speeds
    seconds |= {"muon": [99, 20, 20], "adamw": [99, 90, 90]}  # ten times slower than the first time
    three = replace(two, matched=True)
    again.measure_speeds(taking | {"three": three}, rounds=2)
    assert again.speeds == pytest.approx({one.computation: 2.0, two.computation: 6.0, three.computation: 9.0})


@pytest.mark.parametrize("layers", [2, 5])
def test_everybody_of_the_lineup_can_be_built(tmp_path: Path, layers: int) -> None:
    """With a head where the recipe weighs it; those that are matched have the parameters of the dense model."""
    field = make(tmp_path, sizes=SIZES | {"layers": layers, "ffn": 256})
    dense = counts(field.build(LINEUP["default"], 0).model)["total"]
    for name, entry in LINEUP.items():
        found = field.build(entry, 1)
        assert (found.head is None) == (entry.recipe.mtp == 0), name
        with found.whole():
            total = counts(found.model)["total"]
        if entry.matched:
            assert total == pytest.approx(dense, rel=0.05), name
    assert next(iter(LINEUP)) == "default"
    assert LINEUP["default"].recipe == RECIPES["default"]


def test_seeds_start_elsewhere(tmp_path: Path) -> None:
    field = make(tmp_path)
    one, again, other = (field.build(Entry(), seed).model.get_input_embeddings().weight for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    rows = [field._laid(Entry(), seed).ids for seed in (0, 1)]
    assert not torch.equal(*rows)


def everything() -> ablation.Texts:
    names = [("train", 80), ("calibration", 20), ("heldout", 20)]
    split = [name for name, count in names for _ in range(count)]
    table = pd.DataFrame({"text": TEXTS, "source": [f"file {i // 2}" for i in range(120)], "split": split})
    return ablation.Texts(table, TOKENIZER, 16, SIZES)


def test_ablation_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "LINEUP", {"default": Entry(SMALL, headline=True), "other": LITTLE["apart"]})
    told: list[str] = []
    rounds: list[tuple[int, int]] = []

    def progress(what: str, unit: str) -> Callable[..., None]:
        told.append(what)
        return lambda *news: rounds.append(news[:2]) if what == "speeds" else None

    found = ablation.recipes(everything(), tmp_path, tokens=256, seeds=2, rounds=1, progress=progress)
    table = found.table()
    assert table["recipe"].tolist() == ["default", "default", "other", "other"]
    assert table["budget"].tolist() == ["tokens", "time"] * 2
    assert table["bits_per_byte"].between(1, 8).all()
    assert rounds == [(1, 1)]
    assert found.sources == [f"file {i // 2}" for i in range(100, 120)]
    assert told[:3] == ["speeds", "qwen3, muon, seed 0", "qwen3, muon, seed 1"]
    # The default's time is the equal time: one training for both budgets. The other one is slower.
    assert [told.count(f"{name}, muon, seed 0") for name in ("qwen3", "qwen3_moe")] == [1, 2]
    assert table["tokens"].iloc[3] < 256


def test_ablation_of_lessons() -> None:
    table = ablation.both_lessons(everything(), tokens=4 * 1024, seeds=1)
    assert "seconds" not in table
    best = table[table["best"]]
    assert best["setting"].tolist() == [
        "batch 1", "batch 4", "batch 16", "batch 1 at the rate of batch 16", "packed", "padded, equal computation",
        "padded, equal text",
    ]  # fmt: skip
    assert best["bits_per_byte"].between(0.2, 9).all()
    steps = table.groupby("setting", sort=False)["steps"].first()
    assert steps.tolist() == [128, 32, 8, 128, 4, 4, steps.iloc[-1]]
    assert (table["tokens_computed"] == 2048).sum() == 4 * 3 + 1
    assert (table["tokens_computed"] == 1024).sum() == 4 * 2
    assert steps.iloc[-1] > 4


def test_ablation_of_vocabularies() -> None:
    table = ablation.vocabularies(everything(), "260 300", seconds=0.2, seeds=1)
    assert table["tokenizer"].tolist() == ["bpe 260", "bpe 300"]
    assert table["vocabulary"].tolist() == [260, 300]
    assert table["bits_per_byte"].between(0.5, 9).all()
    assert table["bytes_per_token"].is_monotonic_increasing
    # Others' share: the embedding aside, all models have the same parameters.
    rest = table["embedding_parameters"] / table["embedding_share"] - table["embedding_parameters"]
    assert rest.nunique() == 1 or rest.iloc[0] == pytest.approx(rest.iloc[1])
