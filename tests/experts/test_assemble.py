"""Experts from fp32, bf16 and NF4, from folders and models; the artefact of experts and the partition beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import assemble, export, weights
from tinyonn_lib.lm import load, models

from .dense import dense, divide

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # NF4 wants multiples of 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain float32 checkpoint in several shards."""
    path = tmp_path_factory.mktemp("dense") / "plain"
    dense("qwen3", **WIDE).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture(scope="module")
def nf4(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    return load.load_model(str(folder), "nf4", "cpu")


@pytest.fixture(scope="module")
def nf4_folder(nf4: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "nf4"
    nf4.save_pretrained(path)
    return path


def rebuilt(found: list[assemble.TinyONNExpert], index: torch.Tensor, part: str) -> torch.Tensor:
    """The dense matrix, from the experts' parts put back in their places."""
    pieces = [getattr(expert, part).weight for expert in found]
    matrix = torch.cat([p.T if part == "down_proj" else p for p in pieces])
    back = torch.empty_like(matrix)
    back[index.reshape(-1)] = matrix
    return back.T if part == "down_proj" else back


def test_experts_hold_exactly_the_dense_weights(folder: Path) -> None:
    part = divide(neurons=128, counts=(4, 8))
    source = weights.open_weights(folder)
    plain = models.load_model(str(folder))
    for origin in (source, weights.open_weights(plain), models.ffns(plain)):
        for layer, found in enumerate(assemble.assemble(origin, part)):
            for name in weights.FFN_PARTS:
                want = plain.get_parameter(weights.ffn_name(layer, name))
                assert torch.equal(rebuilt(found, part.experts[layer], name), want)


def test_shared_and_dropped_neurons_are_in_no_routed_expert(folder: Path) -> None:
    part = divide(neurons=128, shared=24, dropped=8)
    found = next(assemble.assemble(weights.open_weights(folder), part))
    gate = weights.open_weights(folder).read(weights.ffn_name(0, "gate_proj"))
    held = torch.cat([expert.gate_proj.weight for expert in found])
    assert torch.equal(held, gate[part.experts[0].reshape(-1)])
    assert len(held) == 128 - 24 - 8


def nf4_by_hand(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """NF4 with doubly quantised scales, written out: code[nibble] · (code₂[scale] · scale₂ + offset)."""
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    packed = tensors[name].flatten()
    nibbles = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
    inner = tensors[f"{name}.nested_quant_map"][tensors[f"{name}.absmax"].long()]
    scales = (
        inner.view(-1) * tensors[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(inner)]
    )
    values = tensors[f"{name}.quant_map"][nibbles].view(-1, state["blocksize"])
    return (values * (scales + state["nested_offset"])[:, None]).view(state["shape"])


def test_nf4_is_dequantised_exactly_from_a_folder_and_a_model(nf4: Any, nf4_folder: Path) -> None:
    source, loaded = weights.open_weights(nf4_folder), weights.open_weights(nf4)
    assert source.packed
    assert loaded.packed
    tensors = load_file(nf4_folder / "model.safetensors")
    names = [name for name in source.shapes if f"{name}.absmax" in tensors]
    assert len(names) == 2 * (4 + 3)  # attention and FFN of each layer
    for name in names:
        tensor = source.read(name)
        torch.testing.assert_close(tensor, nf4_by_hand(tensors, name), atol=1e-7, rtol=1e-6)
        layer = nf4.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            torch.testing.assert_close(layer(torch.eye(layer.in_features)).T, tensor, atol=0, rtol=0)
        assert torch.equal(tensor, loaded.read(name))
        assert tuple(tensor.shape) == source.shapes[name]


def test_nf4_is_exported_from_a_folder_and_a_model(nf4: Any, nf4_folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(0))
    part = divide(neurons=128, shared=16)
    paths = [export.export(nf4, part, tmp_path / "a"), export.export(nf4_folder, part, tmp_path / "b")]
    for path, proof in zip(paths, export.verify_all([(path, nf4, ids) for path in paths]), strict=True):
        assert proof["missing"] == proof["unexpected"] == []
        assert proof["relative_error"] <= 1e-5
        assert "quantization_config" not in json.loads((path / "config.json").read_text())
        assert "| weights of the base model | 4-bit (NF4), dequantised |" in (path / "README.md").read_text()
    assert (paths[0] / "model.safetensors").read_bytes() == (paths[1] / "model.safetensors").read_bytes()


def test_repacked_4_bit_weights_are_refused(nf4: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nf4.get_submodule("model.layers.0.mlp.gate_proj")
    monkeypatch.setattr(layer.weight.quant_state, "packing_format_for_cpu", True, raising=False)
    with pytest.raises(BenchError, match="repacked the 4-bit weights: load the model again"):
        assemble.dense_weight(layer)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_the_artefact_comes_back(folder: Path, tmp_path: Path, shard_bytes: int) -> None:
    """A pool: ten experts over two layers, numbered through, with shared and dropped neurons."""
    part = divide(neurons=128, counts=(3, 7), sizes=(30, 12), dropped=6)
    path = assemble.save_experts(weights.open_weights(folder), part, tmp_path / "experts", shard_bytes=shard_bytes)
    back = assemble.load_experts(path)
    want = [expert for layer in assemble.assemble(weights.open_weights(folder), part) for expert in layer]
    assert len(back.experts) == len(want) == 10
    assert back.layers == [0] * 3 + [1] * 7
    x = torch.randn(5, 64)
    for found, expert in zip(back.experts, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expert.parameters(), strict=True))
        assert torch.equal(found(x), expert(x))
    assert [None if s is None else s.gate_proj.out_features for s in back.shared] == [32, 38]
    assert back.partition.method == "random"
    assert all(torch.equal(a, b) for a, b in zip(back.partition.dropped, part.dropped, strict=True))
    table = back.partition.table()
    assert table.equals(part.table())


def test_the_artefact_is_as_documented(folder: Path, tmp_path: Path) -> None:
    import pandas as pd

    part = divide(neurons=128, counts=(3, 7), sizes=(30, 12))
    path = assemble.save_experts(models.ffns(models.load_model(str(folder))), part, tmp_path / "experts")
    assert sorted(file.name for file in path.iterdir()) == ["experts.safetensors", "partition.parquet"]
    tensors = load_file(path / "experts.safetensors")
    assert tensors["experts.3.down_proj.weight"].shape == (64, 12)  # the second layer's first
    assert tensors["shared.1.up_proj.weight"].shape == (128 - 84, 64)
    table = pd.read_parquet(path / "partition.parquet")
    row = table[(table["layer"] == 1) & (table["expert"] == 4) & (table["position"] == 2)].iloc[0]
    assert row["number"] == 7
    assert row["neuron"] == part.experts[1][4][2]
    assert set(table.loc[table["expert"] < 0, "number"]) == {-1}


def test_partition_of_another_model(folder: Path) -> None:
    for part, message in (
        (divide(neurons=64), "each of layer 0's 128 neurons exactly once"),
        (divide(3, 128, counts=(4, 4, 4)), "3 layers and the model 2"),
    ):
        with pytest.raises(BenchError, match=message):
            next(assemble.assemble(weights.open_weights(folder), part))


def copied(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_damaged_folders_are_named(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    for damage, message in ((whole[:-100], rf"Cannot read .*{shard.name}: .*cut off"), (b"", rf"{shard.name}")):
        shard.write_bytes(damage)
        with pytest.raises(BenchError, match=message) as caught:
            export.export(path, divide(neurons=128), tmp_path / "moe")
        assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(BenchError, match=rf"Cannot read .*{shard.name}: it is missing"):
        weights.open_weights(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(BenchError, match="index.json is damaged: a shard outside the folder"):
        weights.open_weights(path)
    index.unlink()
    with pytest.raises(BenchError, match="holds no model.safetensors"):
        weights.open_weights(path)
    (path / "config.json").write_text("{")
    with pytest.raises(BenchError, match="Cannot read the configuration"):
        weights.open_weights(path)
    assert not (tmp_path / "moe").exists()


def test_tensors_that_are_not_the_models(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path)
    tensors = {name: weights.open_weights(folder).read(name) for name in weights.open_weights(folder).shapes}
    for file in path.glob("*.safetensors*"):
        file.unlink()
    name = weights.ffn_name(1, "up_proj")
    for wrong, message in (
        (None, f"copy holds no tensor {name}"),
        (torch.zeros(3, 64), rf"copy holds {name} as \(3, 64\), its config says \(128, 64\)"),
        (tensors[name].to(torch.int8), f"{name} in copy is I8"),
    ):
        changed = {key: value for key, value in {**tensors, name: wrong}.items() if value is not None}
        save_file(changed, path / "model.safetensors")
        with pytest.raises(BenchError, match=message):
            weights.open_weights(path)


def test_damaged_4_bit_tensors_are_named(nf4_folder: Path, tmp_path: Path) -> None:
    path = copied(nf4_folder, tmp_path)
    name = weights.ffn_name(0, "gate_proj")
    tensors = load_file(nf4_folder / "model.safetensors")
    state = f"{name}.quant_state.bitsandbytes__nf4"
    wrong = bytes(tensors[state].tolist()).replace(b"[128, 64]", b"[64, 128]")
    for key, value, message in (
        (state, torch.tensor(list(b"{}"), dtype=torch.uint8), f"The 4-bit tensor {name} is damaged"),
        (state, torch.tensor(list(wrong), dtype=torch.uint8), rf"copy holds {name} as \(64, 128\)"),
    ):
        save_file({**tensors, key: value}, path / "model.safetensors")
        with pytest.raises(BenchError, match=message):
            weights.open_weights(path).read(name)


def test_adapters_and_models_without_gated_ffns_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = weights.open_weights(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)))
    with pytest.raises(BenchError, match="Layer 0 of this 'gpt2' model has no gate_proj"):
        gpt2.neurons()
    adapted = dense("qwen2")
    attention = adapted.model.layers[0].self_attn
    attention.q_proj = torch.nn.ModuleDict({"base_layer": attention.q_proj})  # as adapters do
    with pytest.raises(BenchError, match="The loaded model holds no tensor .*merge its adapter first"):
        weights.open_weights(adapted)


def test_ffns_with_biases_are_refused(tmp_path: Path) -> None:
    """Their experts would come out without the biases, as another model."""
    model = dense("llama", mlp_bias=True)
    for source in (weights.open_weights(model), models.ffns(model)):
        with pytest.raises(BenchError, match=r"FFNs have biases \(mlp_bias\)"):
            next(assemble.assemble(source, divide()))
        with pytest.raises(BenchError, match=r"FFNs have biases \(mlp_bias\)"):
            assemble.save_experts(source, divide(), tmp_path / "experts")
    with pytest.raises(BenchError, match=r"FFNs have biases \(mlp_bias\)"):
        weights.open_weights(model).neurons()
    assert not list(tmp_path.iterdir())


def test_norms_in_float32_do_not_make_a_float32_checkpoint(tmp_path: Path) -> None:
    model = dense("qwen3").to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    model.save_pretrained(tmp_path / "dense")
    for source in (weights.open_weights(model), weights.open_weights(tmp_path / "dense")):
        assert source.read("model.norm.weight").dtype == torch.float32
        assert source.dtype == torch.bfloat16
    path = export.export(tmp_path / "dense", divide(), tmp_path / "moe")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"


def test_missing_experts_folder(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="holds no experts.safetensors"):
        assemble.load_experts(tmp_path)
