"""Which texts are learnt from, which choose, and which judge: whole sources, never two of it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import Texts


class Letters:
    """A tokenizer of characters."""

    bos_token_id = eos_token_id = 1
    pad_token_id = 0
    is_fast = False

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2 + ord(letter) % 60 for letter in text] for text in texts]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def table(calibration: int, heldout: int = 3) -> pd.DataFrame:
    parts = {"train": 4, "calibration": calibration, "heldout": heldout}
    rows = [
        {"text": f"{split} {number} " * 3, "source": f"{split}/{number}", "split": split}
        for split, count in parts.items()
        for number in range(count)
    ]
    return pd.DataFrame(rows)


def drawing(rows: pd.DataFrame, student: KVModel, teacher: KVModel, seed: int = 0) -> Texts:
    return Texts.draw(rows, Letters(), student, {"t": teacher}, tokens=10**6, eval_tokens=10**6, length=9, seed=seed)


@pytest.mark.parametrize(("calibration", "aside"), [(2, 1), (9, 1), (20, 2), (39, 3)])
def test_whole_sources_are_set_aside(calibration: int, aside: int, student: KVModel, teacher: KVModel) -> None:
    found = drawing(table(calibration), student, teacher)
    seen = [set(each.source) for each in (found.train, found.validation, found.heldout)]
    assert [len(each) for each in seen] == [calibration - aside, aside, 3]
    assert seen[0] | seen[1] == {f"calibration/{number}" for number in range(calibration)}
    assert seen[2] == {f"heldout/{number}" for number in range(3)}
    assert found.heldout.ids.shape[1] == 9
    again, other = (drawing(table(calibration), student, teacher, seed) for seed in (0, 5))
    assert torch.equal(again.train.ids, found.train.ids)
    assert not torch.equal(other.heldout.ids, found.heldout.ids)


def test_texts_of_a_single_source_or_none(student: KVModel, teacher: KVModel) -> None:
    with pytest.raises(BenchError, match="have one source: give texts from several"):
        drawing(table(1), student, teacher)
    with pytest.raises(BenchError, match="No text to draw samples from"):
        drawing(table(3, heldout=0), student, teacher)
    with pytest.raises(BenchError, match="No text to draw samples from"):
        drawing(table(0), student, teacher)
