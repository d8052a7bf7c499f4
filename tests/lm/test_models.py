from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.models import describe, ffns, load_model, load_tokenizer, new_model


def config(kind: str, **more: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
    }  # fmt: skip
    return getattr(transformers, kind)(**(sizes | more))


def build(kind: str, **more: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config(kind, **more))


def test_new_model_is_the_identity_at_first_and_repeatable() -> None:
    model = new_model(vocab_size=50, width=32, layers=2, ffn=64, head_dim=16, max_length=16, seed=3)
    hidden = model(torch.arange(8)[None], output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0], hidden[1])  # zero o_proj and down_proj
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = new_model(vocab_size=50, width=32, layers=2, ffn=64, head_dim=16, max_length=16, seed=3)
    other = new_model(vocab_size=50, width=32, layers=2, ffn=64, head_dim=16, max_length=16, seed=4, tie=False)
    assert torch.equal(model.model.embed_tokens.weight, again.model.embed_tokens.weight)
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert other.lm_head.weight is not other.model.embed_tokens.weight


def test_new_model_leaves_the_global_random_state() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    new_model(vocab_size=50, width=32, layers=1, ffn=64)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bad", [{"layers": 0}, {"heads": 3, "kv_heads": 2}, {"head_dim": 15}])
def test_new_model_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(BenchError):
        new_model(vocab_size=50, **bad)


@pytest.mark.parametrize("kind", ["Qwen3Config", "LlamaConfig", "Qwen2Config", "MistralConfig", "Gemma2Config"])
def test_ffns_are_found(kind: str) -> None:
    model = build(kind)
    found = ffns(model)
    assert [ffn.layer for ffn in found] == [0, 1, 2]
    assert [ffn.name for ffn in found] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert all(model.get_submodule(ffn.name) is ffn.module for ffn in found)
    assert {(ffn.width, ffn.neurons) for ffn in found} == {(32, 64)}
    assert found[1].gate is model.get_submodule("model.layers.1.mlp.gate_proj")
    assert found[1].down is model.get_submodule("model.layers.1.mlp.down_proj")


def test_dense_layers_of_a_mixed_model_are_found_and_experts_are_not() -> None:
    model = build("Qwen3MoeConfig", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1])
    assert [(ffn.layer, ffn.name) for ffn in ffns(model)] == [(1, "model.layers.1.mlp")]


def test_models_without_dense_gated_ffns_are_refused() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

    moe = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50))
    opt = AutoModelForCausalLM.from_config(
        OPTConfig(num_hidden_layers=1, hidden_size=16, ffn_dim=32, num_attention_heads=2, vocab_size=50,
                  word_embed_proj_dim=16)
    )  # fmt: skip
    for model in (gpt2, opt, nn.Linear(2, 2)):
        with pytest.raises(BenchError, match="gate_proj"):
            ffns(model)
    for model in (build("Qwen3MoeConfig", **moe), build("Qwen2MoeConfig", shared_expert_intermediate_size=16, **moe)):
        with pytest.raises(BenchError, match="already experts"):
            ffns(model)


def test_describe(tiny: Callable[..., Any]) -> None:
    row = describe(tiny())
    assert row == {
        "architecture": "Qwen3ForCausalLM", "parameters": sum(p.numel() for p in tiny().parameters()), "layers": 2,
        "d_model": 64, "neurons": 256, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    json.dumps(row)


def test_saved_model_comes_back_exactly(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, ids = tiny(), torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = load_model(str(tmp_path), "bfloat16", "cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def damaged(model: Any, folder: Path) -> dict[str, tuple[Path, str]]:
    from safetensors.torch import load_file, save_file

    cases = {}
    messages = {
        "cut": "Cannot load", "noise": "Cannot load", "keys": "incomplete", "shape": "mismatch",
        "no config": "no config.json", "no weights": "Cannot load", "bad config": "Cannot load", "kind": "Cannot load",
    }  # fmt: skip
    for name, message in messages.items():
        path = folder / name.replace(" ", "_")
        model.save_pretrained(path)
        cases[name] = (path, message)
    weights = {name: path / "model.safetensors" for name, (path, _) in cases.items()}
    weights["cut"].write_bytes(weights["cut"].read_bytes()[:-1000])
    weights["noise"].write_bytes(b"\x00" * 500)
    tensors = load_file(weights["keys"])
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, weights["keys"], {"format": "pt"})
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, weights["shape"], {"format": "pt"})
    (cases["no config"][0] / "config.json").unlink()
    weights["no weights"].unlink()
    (cases["bad config"][0] / "config.json").write_text("{ not json")
    (cases["kind"][0] / "config.json").write_text('{"model_type": "nothing_we_know"}')
    return cases


def test_damaged_folders_give_one_clear_line(tiny: Callable[..., Any], tmp_path: Path) -> None:
    for name, (path, message) in damaged(tiny(), tmp_path).items():
        with pytest.raises(BenchError) as caught:
            load_model(str(path), device="cpu")
        assert message in str(caught.value), (name, str(caught.value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("./not/there/at/all", {}, "No such file or folder"),
        ("", {}, "empty"),
        ("x", {"dtype": "float16"}, "Unknown dtype 'float16'"),
        ("x", {"device": "warp9"}, "not available"),
        ("Qwen/Qwen1.5-4B", {}, "hf download Qwen/Qwen1.5-4B"),
    ],
)
def test_bad_requests(source: str, options: dict[str, Any], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(BenchError, match=message):
        load_model(source, **options)
    assert time.monotonic() - began < 8


def test_tokenizer_errors(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(BenchError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(BenchError, match="hf download"):
        load_tokenizer("Qwen/Qwen1.5-4B")


def dequantised(model: Any, reference: Any) -> Any:
    """`reference` with the weights that `model` holds in NF4."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed: Any = module.weight
            weight = dequantize_4bit(packed.data, packed.quant_state)
            reference.get_submodule(name).weight.data = weight.float().clone()
    return reference


def test_nf4_equals_its_dequantised_weights(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The traps of PEERS.md §6: repacking at the first no-grad forward, and wrong gradients afterwards."""
    import bitsandbytes as bnb

    model = tiny(width=128, ffn=192, head_dim=64)
    model.save_pretrained(tmp_path)
    quantised = load_model(str(tmp_path), "nf4", "cpu")
    count = sum(isinstance(module, bnb.nn.Linear4bit) for module in quantised.modules())
    assert count == 2 * 7
    reference = dequantised(quantised, model)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        quantised(ids)  # the forward that would repack
    grads, outputs = [], []
    for candidate in (quantised, reference):
        embedded = candidate.get_input_embeddings()(ids).detach().requires_grad_()
        logits = candidate(inputs_embeds=embedded).logits
        grads.append(torch.autograd.grad(logits.square().mean(), embedded)[0])
        outputs.append(logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-7)
    again = dequantised(quantised, load_model(str(tmp_path), device="cpu"))
    assert torch.equal(again.get_submodule("model.layers.0.mlp.up_proj").weight, ffns(reference)[0].up.weight)
    assert describe(quantised)["parameters"] == describe(reference)["parameters"]
    assert describe(quantised)["dtype"] == "nf4"
    assert ffns(quantised)[0].neurons == 192


def test_nf4_refuses_widths_it_cannot_hold(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny(width=64, ffn=96).save_pretrained(tmp_path)
    with pytest.raises(BenchError, match="multiples of 64"):
        load_model(str(tmp_path), "nf4", "cpu")
