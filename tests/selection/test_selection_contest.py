"""Selections against each other: equal tokens, a planted difference, none between equals, and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import samples
from tinyonn_lib.selection import contest as contest_module
from tinyonn_lib.selection.contest import Contest, contest
from tinyonn_lib.selection.target import train

from .target_parts import dense, rows, sentences

PLAN: dict[str, Any] = {"tokens": 1600, "seeds": (0, 1), "length": 16, "batch": 4, "lr": 5e-3, "shards": 1}


def noise(count: int, seed: int) -> pd.DataFrame:
    """The same letters in no order."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.permutation(list(text))) for text in sentences(count, seed)]
    return pd.DataFrame({"text": texts})


@pytest.fixture(scope="module")
def held(tokenizer: Any) -> pd.DataFrame:
    texts = pd.DataFrame({"text": sentences(40, seed=8), "source": [f"file{place % 12}" for place in range(40)]})
    return samples.draw(texts, tokenizer, 100_000, 32, 0)


@pytest.fixture(scope="module")
def found(tokenizer: Any, held: pd.DataFrame) -> Contest:
    selections = {"good": rows(60), "noise": noise(60, 1), "again": rows(60), "few": rows(5, seed=2)}
    return contest(dense(), tokenizer, selections, held, kinds={"noise": "control"}, **PLAN)


def test_finds_a_planted_difference_and_none_between_equals(found: Contest) -> None:
    better = found.between("good", "noise")
    assert better.high < -0.1
    assert better.verdict == "less than"
    assert found.between("good").high < -0.1
    equal = found.between("good", "again")
    assert (equal.mean, equal.low, equal.high) == (0.0, 0.0, 0.0)


def test_table(found: Contest, tokenizer: Any, held: pd.DataFrame) -> None:
    table = found.table()
    assert table["loss"].is_monotonic_increasing
    by = table.set_index("label")
    assert list(table) == ["label", "kind", "rows", "tokens", "epochs", "loss", "delta", "low", "high", "spread"]
    assert set(by.index) == {"base", "good", "noise", "again", "few"}
    assert by["kind"].to_dict() == {"base": "base", "good": "", "noise": "control", "again": "", "few": ""}
    assert by["rows"].to_dict() == {"base": 0, "good": 60, "noise": 60, "again": 60, "few": 5}
    alone = evaluate.loss(dense(), held["ids"].tolist())
    assert by.loc["base", "loss"] == pytest.approx(alone.mean, rel=1e-6)
    good = found.contenders["good"]
    means = [loss.mean for loss in good.losses]
    assert by.loc["good", "loss"] == pytest.approx(np.mean(means))
    assert by.loc["good", "spread"] == pytest.approx(abs(means[0] - means[1]))
    assert by.loc["good", "spread"] > 0
    assert by.loc["good", "delta"] == pytest.approx(np.mean(means) - alone.mean, rel=1e-4)
    assert by.loc["good", "low"] < by.loc["good", "delta"] < by.loc["good", "high"]
    assert by.loc["few", "epochs"] == pytest.approx(1600 / by.loc["few", "tokens"])
    assert by.loc["few", "epochs"] > 5 * by.loc["good", "epochs"]


def test_all_contenders_see_as_many_tokens(found: Contest) -> None:
    each = found.history.groupby(["label", "seed"])
    assert len(each) == 8
    assert set(each["tokens"].max()) == {1600} == {found.tokens}
    assert set(each.size()) == {25}
    first = found.history[found.history["step"] == 1].set_index(["label", "seed"])["loss"]
    assert first["good", 0] != first["good", 1]  # another order of the blocks
    assert first["good", 0] == first["again", 0]


def test_a_contest_leaves_its_model_as_it_was_and_does_not_depend_on_the_order(
    tokenizer: Any, held: pd.DataFrame, found: Contest
) -> None:
    model = dense()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = contest(model, tokenizer, {"few": rows(5, seed=2), "good": rows(60)}, held, **PLAN)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for label in ("few", "good"):
        for mine, theirs in zip(other.contenders[label].losses, found.contenders[label].losses, strict=True):
            assert np.array_equal(mine.nats, theirs.nats)


def test_goes_on_after_a_kill(
    tokenizer: Any, held: pd.DataFrame, found: Contest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selections, train = {"good": rows(60), "noise": noise(60, 1)}, contest_module.train_blocks
    trained: list[int] = []

    def killed(*arguments: Any, **options: Any) -> Any:
        def stop(done: int, steps: int, note: str) -> None:
            if len(trained) == 2 and done >= 10:  # the third training
                raise KeyboardInterrupt

        result = train(*arguments, **options | {"progress": stop, "every_seconds": 0.0})
        trained.append(options["seed"])
        return result

    monkeypatch.setattr(contest_module, "train_blocks", killed)
    monkeypatch.setattr("time.monotonic", iter(np.arange(0, 1e6, 0.5)).__next__)  # each step is told
    model = dense()
    with pytest.raises(KeyboardInterrupt):
        contest(model, tokenizer, selections, held, folder=tmp_path, **PLAN)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert len(list(tmp_path.glob("*.pt"))) == 1
    torn = sorted(tmp_path.glob("*.npz"))[0]
    torn.write_bytes(torn.read_bytes()[:100])
    told: list[tuple[int, int, str]] = []
    again = contest(model, tokenizer, selections, held, folder=tmp_path, progress=lambda *n: told.append(n), **PLAN)
    # In front: a progress bar knows by it where an earlier call stopped.
    assert any(note.startswith("going on from the last checkpoint") for _, _, note in told)
    ends = [note for done, _, note in told if done in (25, 50)]  # one was done before, the torn one is trained anew
    assert sum(note in ("good 0", "good 1") for note in ends) == 1
    assert told[-1][:2] == (100, 100)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert not list(tmp_path.glob("*.pt"))
    expected = found.history[found.history["label"].isin(["good", "noise"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.history, expected, check_exact=True)
    for label in selections:
        for mine, theirs in zip(again.contenders[label].losses, found.contenders[label].losses, strict=True):
            assert np.array_equal(mine.nats, theirs.nats)
    for change in ({"lr": 1e-3}, {"length": 8}):  # other settings are another contest
        names = set(tmp_path.iterdir())
        contest(model, tokenizer, {"good": rows(60)}, held, folder=tmp_path, **PLAN | {"tokens": 128} | change)
        assert len(set(tmp_path.iterdir()) - names) == 2


def test_a_training_that_was_done_is_judged_and_not_done_again(
    tokenizer: Any, held: pd.DataFrame, found: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {name: value for name, value in PLAN.items() if name != "seeds"}
    tuned = train(dense(), tokenizer, rows(60), seed=1, **options)
    once, done = contest_module.train_blocks, list[int]()
    monkeypatch.setattr(contest_module, "train_blocks", lambda *a, **k: done.append(k["seed"]) or once(*a, **k))
    told: list[tuple[int, int]] = []
    selections = {"good": rows(60), "few": rows(5, seed=2)}
    again = contest(dense(), tokenizer, selections, held, trained={("good", 1): tuned},
                    progress=lambda *n: told.append(n[:2]), **PLAN)  # fmt: skip
    assert done == [0, 0, 1]
    assert told[-1] == (75, 75)
    expected = found.history[found.history["label"].isin(["good", "few"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.history, expected, check_exact=True)
    for label in selections:
        for mine, theirs in zip(again.contenders[label].losses, found.contenders[label].losses, strict=True):
            assert np.array_equal(mine.nats, theirs.nats)
    for pair, change in ((("few", 1), {}), (("good", 1), {"tokens": 128}), (("bad", 0), {})):
        with pytest.raises(BenchError, match=f"^The training given for '{pair[0]} {pair[1]}' is not one of this"):
            contest(dense(), tokenizer, selections, held, trained={pair: tuned}, **PLAN | change)


def test_refused(tokenizer: Any, held: pd.DataFrame) -> None:
    for selections, change, line in (
        ({}, {}, "^A contest needs selections"),
        ({"base": rows(9)}, {}, "none of them called 'base'"),
        ({"good": rows(9)}, {"seeds": ()}, "at least one seed"),
        ({"good": rows(9), "bad": rows(0)}, {}, "^Selection 'bad': The 0 row\\(s\\) have .* too few"),
    ):
        with pytest.raises(BenchError, match=line):
            contest(dense(), tokenizer, selections, held, **PLAN | change)
