"""07_select in words: turn the numbers round, and the words turn round."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import judge, outcome_select
from tinyonn_lib.selection.cut import Cut

from .outcomes import FOLLOWS, NAN, known_rows

DONE = Cut(scored=1200, kept=300, rejected={"too long": 20, "empty": 3}, duplicates=0, nan=0, nan_kept=0)
SHARED = judge.overlap({"selected": {1, 2, 3}, "epoch 1": {2, 3, 4}, "random": {9, 8, 7}}, 12)


@pytest.mark.parametrize("turned", [False, True])
def test_what_was_selected(turned: bool) -> None:
    table = known_rows(["byte_noise", "repetition"], 20, turned)
    text = outcome_select.selected(DONE, table, FOLLOWS, SHARED, "contrastive", 0.3)
    assert text.startswith("300 of 1,200 rows are kept, by `contrastive`; 23 were rejected.")
    numbers = outcome_select.selected_metrics(DONE, table, FOLLOWS, SHARED, "contrastive", 0.3)
    assert f"Of the kept rows **{numbers['corrupted_kept']:.1%}** are corrupted; of the pool 66.7%" in text
    cleaner = re.search(r"It is cleaner than by (.*?)\.", text)
    dirtier = re.search(r"It is dirtier than by (.*?)\.", text)
    for name in ("perplexity", "longest", "random"):
        other = numbers[f"corrupted_by_{name}"]
        assert (cleaner is not None and name in cleaner[1]) == (numbers["corrupted_kept"] < other)
        assert (dirtier is not None and name in dirtier[1]) == (numbers["corrupted_kept"] > other)
    assert (dirtier is not None and "perplexity" in dirtier[1]) == turned
    assert (numbers["corrupted_kept"] < 0.01) != turned
    assert "Among clean rows its Spearman correlation is +0.31 with length, -0.42 with perplexity." in text
    assert "Overlap (Jaccard; chance 0.14)" in text
    assert text.endswith("epoch 1 0.50, random 0.00.")
    assert (numbers["overlap_epoch_1"], numbers["overlap_random"]) == (0.5, 0.0)
    assert (numbers["spearman_tokens"], numbers["spearman_perplexity"]) == (0.31, -0.42)
    label, value = outcome_select.selected_headline(numbers, DONE)
    assert (label, value) == ("corrupted rows kept (pool 67%)", f"{numbers['corrupted_kept']:.1%}")


def test_rows_of_which_nothing_is_known() -> None:
    table = known_rows([], 20)
    text = outcome_select.selected(DONE, table, FOLLOWS, SHARED[SHARED["one"] == SHARED["other"]], "contrastive", 0.3)
    assert "corrupted" not in text
    assert "clean" not in text
    assert "Jaccard" not in text
    numbers = outcome_select.selected_metrics(DONE, table, FOLLOWS, SHARED, "contrastive", 0.3)
    assert outcome_select.selected_headline(numbers, DONE) == ("rows kept of 1,200", "300")
    assert outcome_select.counts(DONE) == {
        "rows scored": 1200,
        "kept": 300,
        "rejected, too long": 20,
        "rejected, empty": 3,
    }
    plain = Cut(5, 2, {}, 4, 0, 0)
    assert outcome_select.counts(plain) == {
        "rows scored": 5, "kept": 2, "rejected": 0, "left out as near-duplicates": 4
    }  # fmt: skip


@pytest.mark.parametrize(("ranking", "first"), [("contrastive", "d"), ("perplexity", "a")])
def test_best_and_worst(ranking: str, first: str) -> None:
    rows = pd.DataFrame({"text": list("abcde"), "contrastive": [1.0, 2, 3, 4, NAN], "perplexity": [1.0, 2, 3, 4, NAN]})
    order = list("dcba") if first == "d" else list("abcd")
    assert list(outcome_select.ends(rows, ranking).values()) == order
    for count in range(4):
        assert len(outcome_select.ends(rows.head(count), ranking)) == count
    assert next(iter(outcome_select.ends(rows, ranking))).startswith("1 of 4, ")


def test_epochs_are_counted_not_sorted_as_words(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"epoch_{number}").mkdir()
    assert [outcome_select.epoch_folder(tmp_path, n) for n in (0, 1, 2, 10)] == [
        "epoch_10",
        "epoch_1",
        "epoch_2",
        "epoch_10",
    ]
    for missing in (3, 11, -1):
        with pytest.raises(BenchError, match=f"^epoch={missing}: 06_selector left epoch_1, epoch_2, epoch_10; choose"):
            outcome_select.epoch_folder(tmp_path, missing)
    with pytest.raises(BenchError, match="left none"):
        outcome_select.epoch_folder(tmp_path / "nothing", 0)
    assert [outcome_select.epoch_of(name) for name in ("epoch_3", "a/b/epoch_12", "a/model")] == [3, 12, 0]
