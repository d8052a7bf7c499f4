"""`selection_throughput` compares like with like: the same texts, batches and model."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import selection_throughput as bench


def test_whole_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**bench.LARGE, "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    fields |= {"intermediate_size": 16, "num_hidden_layers": 1}
    plan = replace(bench.QUICK[1], name="tiny", fields=fields, tokens=600, longest=60, rounds=2)
    monkeypatch.setattr(bench, "QUICK", (plan,))
    monkeypatch.setattr(bench, "VOCABULARY", 300)
    rows, bars = bench.measure(argparse.Namespace(quick=True, device="cpu"))
    assert [row["variant"] for row in rows] == [
        "bare again", "all scores", "all scores, perplexity", "all scores, perplexity, IFD"
    ]  # fmt: skip
    for row in rows:
        assert 400 < row["tokens"] <= 800
        assert row["low"] <= row["ratio"] <= row["high"]
    assert [(bar.value, bar.bound) for bar in bars] == [(rows[1]["ratio"], 0.95), (rows[2]["ratio"], 0.95)]
