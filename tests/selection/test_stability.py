"""Which selectors are compared, under which names, and what each would keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import stability
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.scores import RANKINGS
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import Selector

OPTIONS = {"trash": "last", "ratio": 0.25, "seed": 0}


def made(moe: Any, tokenizer: Any, gap: int) -> Selector:
    gaps = torch.zeros(8)
    gaps[gap : gap + 2] = 1
    return Selector(
        moe, tokenizer, (1.0, 1.0), (gaps, gaps), {"combined": {"contrastive": 1.0, "log_perplexity": -0.1}}
    )


@pytest.fixture(scope="module")
def selectors(make_moe: Callable[..., Any], tokenizer: Any) -> dict[str, Selector]:
    return {name: made(make_moe(seed=seed), tokenizer, seed) for seed, name in enumerate(("main", "late", "seed"))}


@pytest.fixture
def loaded(selectors: dict[str, Selector], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def load(folder: Path, **how: Any) -> Selector:
        calls.append((Path(folder).name, how))
        return selectors[Path(folder).name]

    monkeypatch.setattr(stability, "load_selector", load)
    return calls


def chosen(
    selectors: dict[str, Selector], texts: list[str], ranking: str, options: dict[str, Any] | None = None, **more: Any
) -> dict[str, set[int]]:
    options = options or OPTIONS
    table, _ = Scorer(selectors["main"], **options)([Row("pool", n, text) for n, text in enumerate(texts)])
    return stability.selections(
        table, texts, ranking, 0.25, main=Path("main"), selectors={"epoch 1": Path("late"), "seed 1": Path("seed")},
        options=options, load={"dtype": "float32", "device": "cpu"}, **more,
    )  # fmt: skip


def best(selector: Selector, texts: list[str], ranking: str, trash: str) -> set[int]:
    """Slowly, sorted in Python."""
    table, _ = Scorer(selector, **OPTIONS | {"trash": trash})([Row("some", n, text) for n, text in enumerate(texts)])
    column, sign = RANKINGS[ranking]
    return set(sorted(range(len(table)), key=lambda n: -sign * table[column][n])[: round(0.25 * len(table))])


@pytest.mark.parametrize(
    ("ranking", "trash"),
    [("contrastive", "last"), ("contrastive", "calibrated"), ("literal", "last"), ("combined", "last")],
)
def test_each_selector_chooses_by_its_own_scores(
    ranking: str, trash: str, selectors: dict[str, Selector], make_texts: Callable[..., list[str]],
    loaded: list[tuple[str, dict[str, Any]]],
) -> None:  # fmt: skip
    texts = make_texts(60)
    told: list[tuple[int, int, str]] = []
    found = chosen(
        selectors, texts, ranking, OPTIONS | {"trash": trash}, against=["random", ranking, "longest"],
        progress=lambda *n: told.append(n),
    )  # fmt: skip
    other = "calibrated" if trash == "last" else "last"
    # With perplexity in it the ranking would hide how selectors differ: then they are compared by `contrastive`.
    own = "contrastive" if ranking == "combined" else ranking
    named = ["selected", own, f"trash {other}", "epoch 1", "seed 1", "random", "longest"]
    assert list(found) == named
    assert found["selected"] == best(selectors["main"], texts, ranking, trash)
    assert found[own] == best(selectors["main"], texts, own, trash)
    assert found[f"trash {other}"] == best(selectors["main"], texts, own, other)
    assert found["epoch 1"] == best(selectors["late"], texts, own, trash)
    assert found["seed 1"] == best(selectors["seed"], texts, own, trash)
    assert all(len(places) == 15 for places in found.values())
    assert len({frozenset(found[name]) for name in named[1:]}) == len(named) - 1
    assert [name for name, _ in loaded] == ["main", "late", "seed"]
    assert all(how == {"dtype": "float32", "device": "cpu"} for _, how in loaded)
    assert told == [(1, 3, f"trash {other}"), (2, 3, "epoch 1"), (3, 3, "seed 1")]


@pytest.mark.parametrize("ranking", ["perplexity", "length", "longest", "random"])
def test_rankings_without_a_router_load_no_other_selector(
    ranking: str, selectors: dict[str, Selector], make_texts: Callable[..., list[str]],
    loaded: list[tuple[str, dict[str, Any]]],
) -> None:  # fmt: skip
    texts = make_texts(40)
    found = chosen(selectors, texts, ranking, against=["contrastive", "perplexity"])
    assert loaded == []
    assert list(found) == ["selected", *(name for name in ("contrastive", "perplexity") if name != ranking)]
    if ranking != "random":
        assert found["selected"] == best(selectors["main"], texts, ranking, "last")


def test_what_has_no_score_is_kept_last(selectors: dict[str, Selector], make_texts: Callable[..., list[str]]) -> None:
    table, _ = Scorer(selectors["main"], ratio=0.25)([Row("p", n, text) for n, text in enumerate(make_texts(8))])
    table["perplexity"] = [float("nan"), 5, 4, 3, 2, float("nan"), 1, 6]
    found = stability.selections(
        table.set_index(pd.Index(range(100, 108))), make_texts(8), "perplexity", 0.5, main=Path("x"), selectors={},
        options=OPTIONS, load={},
    )  # fmt: skip
    assert found == {"selected": {6, 4, 3, 2}}


def test_a_row_that_another_selector_leaves_out_moves_no_place(
    selectors: dict[str, Selector], make_texts: Callable[..., list[str]], loaded: list[Any],
    monkeypatch: pytest.MonkeyPatch, make_moe: Callable[..., Any], tokenizer: Any,
) -> None:  # fmt: skip
    texts = ["token " * 40, *make_texts(39, most=4)]
    small = made(make_moe(seed=2, max_position_embeddings=32), tokenizer, 1)
    monkeypatch.setitem(selectors, "seed", small)
    found = chosen(selectors, texts, "contrastive")
    table, bad = Scorer(small, **OPTIONS)([Row("some", n, text) for n, text in enumerate(texts)])
    assert len(bad) == 1
    wanted = table.sort_values("contrastive", ascending=False)["source_index"].head(10)
    assert found["seed 1"] == set(wanted)


def test_an_unknown_ranking_is_refused(
    selectors: dict[str, Selector], make_texts: Callable[..., list[str]], loaded: list[Any]
) -> None:
    with pytest.raises(BenchError, match="Unknown ranking 'beauty'"):
        chosen(selectors, make_texts(8), "contrastive", against=["beauty"])


def test_others_are_all_but_the_one_that_selects(tmp_path: Path) -> None:
    for name in ("epoch_1", "epoch_2", "epoch_3", "seed_1/epoch_1", "seed_1/epoch_2", "seed_2/epoch_2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "history.parquet").touch()
    found = stability.others(tmp_path, 2)
    assert found == {
        "epoch 1": tmp_path / "epoch_1", "epoch 3": tmp_path / "epoch_3",
        "seed 1": tmp_path / "seed_1/epoch_2", "seed 2": tmp_path / "seed_2/epoch_2",
    }  # fmt: skip
    assert set(stability.others(tmp_path, 1)) == {"epoch 2", "epoch 3", "seed 1"}
    assert stability.others(tmp_path / "none", 1) == {}
