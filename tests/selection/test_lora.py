"""Adapters: which layers get one, and their files."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import load_model
from tinyonn_lib.selection.lora import Lora, adapt, load_adapter, merge, save_adapter
from tinyonn_lib.selection.target import train

from .target_parts import adapted, dense, rows


def test_saved_adapter_is_peft_s_own(tokenizer: Any, tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path / "base")
    base, ids = str(tmp_path / "base"), torch.randint(0, 300, (2, 20))
    for name in ("one", "two"):
        tuned = train(base, tokenizer, rows(), tokens=600, batch=4, length=16, lr=5e-3, lora=Lora(4, 12.0))
        save_adapter(tuned.model, tmp_path / name)
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json"}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (base, 4, 12.0)
    assert config["target_modules"] == sorted(config["target_modules"])
    expected = tuned.model(ids).logits
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "one"))
    assert torch.equal(plain(ids).logits, expected)
    merged = merge(load_model(base), tmp_path / "one")
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="holds no adapter"):
        merge(dense(), tmp_path)
    save_adapter(adapt(dense(), Lora(), 0), tmp_path)
    with pytest.raises(BenchError, match="does not fit this model"):
        load_adapter(dense(width=32), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(BenchError, match="does not fit this model"):
        load_adapter(dense(), tmp_path)


@pytest.mark.parametrize("how", ["adapt", "load"])
def test_bitsandbytes_is_quiet_before_peft_imports_it(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    monkeypatch.setitem(sys.modules, "peft", None)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(ImportError):
            adapt(dense(), Lora(), 0) if how == "adapt" else load_adapter(dense(), tmp_path)
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)


def test_targets() -> None:
    found = adapted(adapt(dense(), Lora(targets="q_proj v_proj"), 0).get_base_model())
    assert found == {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"}
    one = adapted(adapt(dense(), Lora(targets="layers.1.mlp.up_proj"), 0).get_base_model())
    assert one == {"model.layers.1.mlp.up_proj"}
    for wrong, line in (
        ("q_proj wq", "^LoRA target 'wq' is no linear layer .*: choose from down_proj gate_proj k_proj o_proj q_proj"),
        ("lm_head", "^LoRA target 'lm_head'"),
        (" ", "^No LoRA target is given: choose all-linear, or"),
    ):
        model = dense()
        with pytest.raises(BenchError, match=line) as caught:
            adapt(model, Lora(targets=wrong), 0)
        assert "\n" not in str(caught.value)
        assert not adapted(model)
    for shape in ({"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(BenchError, match="^LoRA needs r ≥ 1"):
            Lora(**shape)  # type: ignore[arg-type]


SHARED = ("gate", "up", "down")


@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe", "glm4_moe", "granitemoe", "gpt_oss"])
def test_mixtures_keep_their_routers_and_experts(
    make_moe: Callable[..., Any], tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    model = make_moe(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = model.config.num_hidden_layers
    tuned = train(model, tokenizer, rows(), tokens=512, batch=4, length=16, lr=5e-3)
    names = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(layers) for name in "qkvo"}
    found = adapted(tuned.model.get_base_model())
    # Shared experts only where PEFT does not take their names for those of the fused experts.
    shared = {f"model.layers.{layer}.mlp.shared_expert.{name}_proj" for layer in range(layers) for name in SHARED}
    assert found - names == (shared if kind == "qwen2_moe" else set())
    save_adapter(tuned.model, tmp_path)
    ids = torch.randint(0, 300, (2, 20))
    expected = tuned.model(ids).logits
    tuned.model.unload()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(model(ids).logits, expected)
    assert torch.equal(load_adapter(model, tmp_path)(ids).logits, expected)


def test_a_router_that_is_a_linear_layer() -> None:
    config = AutoConfig.for_model(
        "jetmoe", vocab_size=300, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16,
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    routing = {name for name in linear if ".router." in name}
    assert routing
    assert adapted(adapt(model, Lora(), 0).get_base_model()) == linear - routing - {"lm_head"}
