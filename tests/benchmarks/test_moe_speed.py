"""The parts of `moe_speed` that its numbers rest on: the models that it compares, and what its bars say."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import moe_speed
import pandas as pd
import pytest
import torch
from steps import Size

from tinyonn_lib.experts import running
from tinyonn_lib.lm import models

TINY = moe_speed.Plan(
    Size(layers=2, width=32, ffn=800, heads=2, kv_heads=1, head_dim=16, vocabulary=64), length=20, seconds=0.0
)  # fmt: skip


def test_the_models_are_the_same_but_for_their_ffns(tmp_path: Path) -> None:
    dense, variants = moe_speed.models(TINY, "float32", "cpu", tmp_path)
    assert [(one.label, dict(one.active)) for one in variants] == [
        ("100 experts of 8", {25: 0.25, 50: 0.5, 75: 0.75}),
        ("8 experts of 100", {2: 0.25, 4: 0.5, 6: 0.75}),
        ("dense, 25% of the FFN", {0: 0.25}),
        ("dense, 50% of the FFN", {0: 0.5}),
        ("dense, 75% of the FFN", {0: 0.75}),
    ]
    assert [one.model.config.model_type for one in variants] == ["qwen3_moe"] * 2 + ["qwen3"] * 3
    assert [models.ffns(one.model)[0].neurons for one in variants[2:]] == [200, 400, 600]
    names = {name: part.shape for name, part in dense.named_parameters() if ".mlp." not in name}
    for one in variants:
        assert {name: part.shape for name, part in one.model.named_parameters() if ".mlp." not in name} == names
        assert moe_speed.speed.conditions(one.model) == "float32 on cpu, sdpa attention"
    for one in variants[:2]:
        assert all(gate.weight.abs().min() > 0 for gate in running.routers(one.model))


@pytest.mark.parametrize("plan", [moe_speed.CPU, moe_speed.GPU, moe_speed.QUICK])
def test_every_share_is_exact_and_no_expert_is_padded(plan: moe_speed.Plan) -> None:
    for experts in moe_speed.EXPERTS:
        assert plan.size.ffn % experts == 0
        assert plan.size.ffn // experts % 8 == 0
        assert all((experts * share).is_integer() for share in moe_speed.SHARES)


def test_bars_take_the_fastest_implementation_at_the_least_share() -> None:
    rows = [
        {"model": "few", "k": k, "active": k / 4, "stage": stage, "batch": batch, "ratio": ratio}
        for stage, batch in (("prefill", 1), ("prefill", 16), ("decode", 1), ("decode", 16))
        for k, ratio in ((1, 0.5), (1, 0.8 + batch / 10), (1, math.nan), (2, 9.0))
    ]
    rows.append({"model": "narrow", "k": 0, "active": 0.25, "stage": "decode", "batch": 1, "ratio": 7.0})
    found = moe_speed.bars(pd.DataFrame(rows), "CPU with 1 thread")
    assert [(bar.value, bar.holds) for bar in found] == [(pytest.approx(2.4), True), (pytest.approx(0.9), False)]
    assert found[1].name == (
        "few, 25% of the FFN active, decode, batch 1, CPU with 1 thread: tokens/s of the fastest implementation / dense"
    )


def test_whole_measurement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(moe_speed, "QUICK", replace(TINY, size=replace(TINY.size, ffn=64)))
    monkeypatch.setattr(moe_speed, "EXPERTS", (8, 4))
    monkeypatch.setattr(moe_speed.speed, "FEWEST", 1)
    rows, bars = moe_speed.measure(argparse.Namespace(quick=True, device="cpu"))
    assert len(rows) == 4 * (1 + 2 * 3 * 3 + 3)
    assert all(row["tokens_per_second"] > 0 or row["note"] for row in rows)
    assert {row["threads"] for row in rows} == {torch.get_num_threads()}
    assert [bar.name.split(",")[0] for bar in bars] == ["8 experts of 8"] * 2 + ["4 experts of 16"] * 2
    assert all(bar.value > 0 for bar in bars)
    assert capsys.readouterr().out.startswith("Next to the dense model, 24 settings")
