"""Near-duplicates that a cut leaves out: those that comparing all pairs finds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tinyonn_lib.selection import ranking
from tinyonn_lib.selection.dedupe import jaccard, shingles
from tinyonn_lib.selection.select import score

from .cuts import FILES, contents, cut_to, write
from .select_fakes import Told


def families(count: int, seed: int = 0) -> list[str]:
    """Texts of 60 words, many with twins of which one word is another, or none."""
    make = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        words = [f"w{n}" for n in make.integers(0, 5_000, 60)]
        for _ in range(int(make.integers(1, 5))):
            changed = list(words)
            if make.random() < 0.7:
                changed[int(make.integers(0, 60))] = f"x{make.integers(0, 9_999)}"
            texts.append(" ".join(changed))
    return [texts[place] for place in make.permutation(len(texts))]


def brute_force(texts: list[str], least: float, wanted: int) -> tuple[list[int], dict[int, tuple[int, float]]]:
    """Which of the texts, best first, to keep; dropped ones → (most similar kept one, similarity)."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[place : place + 5]) for place in range(max(1, len(words) - 4))}

    sets, kept, dropped = [grams(text) for text in texts], [], {}
    for place, own in enumerate(sets):
        if len(kept) == wanted:
            break
        near = [(len(own & sets[other]) / len(own | sets[other]), -number) for number, other in enumerate(kept)]
        similarity, number = max(near, default=(0.0, 0))
        if similarity >= least:
            dropped[place] = (kept[-number], similarity)
        else:
            kept.append(place)
    return kept, dropped


@pytest.mark.parametrize(("least", "share"), [(0.6, 0.3), (0.8, 0.2), (1.0, 0.3), (0.6, 1.0)])
def test_unique_is_the_brute_force(tmp_path: Path, least: float, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_BUCKET", 30_000)
    texts = families(100)
    told = Told({f"{text} t{n}" if n < 0 else text: {"random": -n / 7} for n, text in reversed([*enumerate(texts)])})
    # Equal texts have equal scores: those of the first one, and the order of the file settles the rest.
    ordered = sorted(range(len(texts)), key=lambda n: (-told.scores[texts[n]]["random"], n))
    score(write(tmp_path / "data", a=texts), told, tmp_path / "scored", settings={}, chunk=16)
    found = cut_to(tmp_path / "scored", tmp_path / "out", share=share, unique=least)
    wanted = math.floor(share * len(texts) + 0.5)
    kept, dropped = brute_force([texts[n] for n in ordered], least, wanted)
    assert dropped
    assert (found.kept, found.duplicates) == (len(kept), len(dropped))
    assert found.kept < wanted if share == 1 else found.kept == wanted
    chosen = pd.read_parquet(tmp_path / "out" / "selected.parquet")
    assert chosen["source_index"].tolist() == [ordered[place] for place in kept]
    listed = pd.read_parquet(tmp_path / "out" / "duplicates.parquet")
    assert listed["source_index"].tolist() == [ordered[place] for place in dropped]
    assert listed["kept_index"].tolist() == [ordered[twin] for twin, _ in dropped.values()]
    np.testing.assert_allclose(listed["similarity"], [similarity for _, similarity in dropped.values()], rtol=1e-12)
    assert set(listed["source_dataset"]) == set(listed["kept_dataset"]) == {"a.jsonl"}
    cut_to(tmp_path / "scored", tmp_path / "out", share=share)
    assert sorted(contents(tmp_path / "out")) == sorted(FILES)  # no list of duplicates that this cut did not look for


def test_shingles() -> None:
    assert len(shingles("a b c d e f g")) == 3
    assert np.array_equal(shingles("One, two!"), shingles("one two"))
    assert len(shingles("!!!")) == len(shingles("one")) == 1
    assert not np.array_equal(shingles("!!!"), shingles("???"))
    assert len(shingles("猫が魚を食べたから")) == 5  # nine characters, no spaces
    assert jaccard(shingles("a b c d e f"), shingles("b c d e f g")) == pytest.approx(1 / 3)
