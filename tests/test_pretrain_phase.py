"""Phase 01 with what its default leaves out: a second head, and tokenizers measured here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from tinyonn_lib import plots
from tinyonn_lib.lm import load, texts
from tinyonn_lib.pretrain import ablation, layout, mtp
from tinyonn_lib.workbench import published

from . import tiny
from .mistakes import cells, sizes


def test_mtp_and_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    shown: list[pd.DataFrame] = []
    known = published("pretrain_recipe")

    def vocabularies(bench: ablation.Texts, spec: str, **options: Any) -> pd.DataFrame:
        asked.update(options, spec=spec, length=bench.length)
        return known["tokenizer"]

    contest = SimpleNamespace(table=lambda: known["recipe"], seconds={"document masks": 9.0, "default": 0.25})
    monkeypatch.setattr(ablation, "recipes", lambda *args, **options: contest)
    monkeypatch.setattr(ablation, "both_lessons", lambda *args, **options: known["lesson"])
    monkeypatch.setattr(ablation, "vocabularies", vocabularies)
    monkeypatch.setattr(plots, "tokenizers", shown.append)
    monkeypatch.setenv("TINYONN_HOME", str(tmp_path))
    monkeypatch.delenv("TINYONN_BATCH", raising=False)
    tiny.write_texts(tmp_path / "texts.jsonl")
    options = [
        "tokens=2400",
        "student_tokens=600",
        "mtp=0.3",
        "layout=padded",
        "ablation_tokens=400",
        "ablation_seeds=2",
        "tokenizers='300 310'",
    ]
    cells("pretrain", [*sizes("pretrain", tmp_path), *options])
    assert asked == {"spec": "320 300 310", "seconds": 100.0, "seeds": 2, "length": 32}
    assert list(shown[0]["tokenizer"]) == ["this one", "bpe 300", "bpe 310"]
    assert "bits_per_byte" not in shown[0]
    assert shown[1] is known["tokenizer"]
    folder = tmp_path / "runs/default/pretrain"
    model, tok = load.load_model(str(folder / "model"), device="cpu"), load.load_tokenizer(str(folder / "model"))
    table = pd.read_parquet(folder / "texts.parquet")
    held = texts.encode(table.loc[table["split"] == "heldout", "text"], tok, max_length=None)
    rows = layout.lay(held, 32, eos=tok.eos_token_id, pad=tok.pad_token_id, layout="documents")
    share = mtp.draft_acceptance(model, mtp.load_mtp(folder / "model", model), rows.ids, rows.positions)
    assert 0 < share < 1
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["draft_acceptance"] == pytest.approx(share)
