"""The same adapter from two processes on a CPU: DDP, ZeRO-2, ZeRO-3."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from peft.utils import get_peft_model_state_dict

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import load_model
from tinyonn_lib.selection import target_worker
from tinyonn_lib.selection.lora import Lora, load_adapter, save_adapter
from tinyonn_lib.selection.packing import pack
from tinyonn_lib.selection.target import train
from tinyonn_lib.selection.target_worker import together

from .target_parts import dense, rows

PLAN: dict[str, Any] = {
    "tokens": 768, "batch": 8, "length": 16, "accumulate": 2, "lr": 5e-3, "look_every": 2, "patience": 9, "seed": 3,
    "lora": Lora(4, 8.0, targets="q_proj o_proj down_proj"), "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    dense().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_processes_learn_what_one_does(
    base: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    if strategy != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'tinyonn[train]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table, plan = rows(), PLAN | {"held_out": rows(20, seed=5)}
    alone = train(base, tokenizer, table, **plan)
    told, timing = list[tuple[int, int, str]](), dict[str, float]()
    plan |= {"checkpoint": tmp_path / "c.pt", "tensorboard": tmp_path / "log"}
    found = train(
        base, tokenizer, table, processes=2, strategy=strategy, progress=lambda *news: told.append(news),
        timing=timing, **plan,
    )  # fmt: skip
    assert found.history.dtypes.equals(alone.history.dtypes)
    assert len(found.history) == 6
    pd.testing.assert_frame_equal(found.history, alone.history, rtol=0, atol=1e-5)
    assert found.history["loss"].iloc[-1] < found.history["loss"].iloc[0] - 0.02
    expected = get_peft_model_state_dict(alone.model)
    state = get_peft_model_state_dict(found.model)
    assert set(state) == set(expected)
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-4, msg=name)
        assert "lora_A" in name or value.abs().max() > 1e-3
    save_adapter(found.model, tmp_path / "adapter")
    assert found.model.peft_config["default"].base_model_name_or_path == base
    ids = torch.randint(0, 300, (2, 20))
    reloaded = load_adapter(load_model(base, device="cpu"), tmp_path / "adapter")
    assert torch.equal(reloaded(ids).logits, found.model(ids).logits)
    untouched = load_model(base, device="cpu").state_dict()
    kept = found.model.unload().state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in untouched.items())
    assert told[-1][:2] == (6, 6)
    assert timing["tokens_per_second"] > 0
    assert list((tmp_path / "log").iterdir())
    assert not list(tmp_path.glob("together-*"))


def test_what_cannot_be_trained_together(
    base: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = pack(rows(), tokenizer, 16)

    def refused(line: str, **changes: Any) -> None:
        plan = {"model": base, "dtype": "float32", "device": "auto", "processes": 2, "strategy": "ddp", "batch": 4}
        with pytest.raises(BenchError, match=line) as caught:
            together(blocks=blocks, steps=1, **plan | changes)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused("^2 processes load the model themselves: give its folder", model=dense())
    refused("^dtype=nf4 trains in one process", dtype="nf4")
    refused("^Unknown strategy 'fsdp': choose one of ddp, zero2, zero3", strategy="fsdp")
    refused("^A batch of 3 rows cannot be cut into equal pieces", batch=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused("^2 processes train on GPUs where there are any", device="cpu")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"^DeepSpeed is not installed: pip install 'tinyonn\[train\]'", strategy="zero3")


@pytest.mark.parametrize(
    ("dtype", "stage", "rounded"), [("bfloat16", 3, True), ("float32", 3, False), ("bfloat16", 2, False)]
)
def test_zero3_loads_bfloat16_as_such(monkeypatch: pytest.MonkeyPatch, dtype: Any, stage: int, rounded: bool) -> None:
    config, seen = {"zero_optimization": {"stage": stage}}, list[dict[str, Any]]()
    monkeypatch.setattr("transformers.integrations.deepspeed_config", lambda: config)
    monkeypatch.setattr(target_worker, "load_model", lambda *where: seen.append(dict(config)))
    plugin = SimpleNamespace(zero_stage=stage)
    target_worker._load("m", dtype, SimpleNamespace(device="cpu", state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert [one.get("bf16") for one in seen] == [{"enabled": True} if rounded else None]
    assert "bf16" not in config  # or the adapter would be trained in bfloat16
