"""A selector's folder: small, movable, checked against its base, and a plain model if it is a full one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import load
from tinyonn_lib.selection.routers import Watch, routers
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import FILE, WEIGHTS, Selector, in_float32, load_selector, save

from .warmed_selectors import based, warmed

FAMILIES = ("olmoe", "granitemoe", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "lfm2_moe")
IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def rows(make_texts: Callable[..., list[str]]) -> list[Row]:
    return [Row("a", place, text, text[:9] if place % 2 else "") for place, text in enumerate(make_texts(14))]


def assert_same(one: Selector, other: Selector, given: list[Row]) -> None:
    for trash in ("last", "calibrated"):
        mine, _ = Scorer(one, ratio=0.25, trash=trash)(given)
        theirs, _ = Scorer(other, ratio=0.25, trash=trash)(given)
        assert mine.equals(theirs)
        assert mine["perplexity_fitted"].notna().all()
        assert ("combined" in mine) == (trash == "last")
    assert (one.units, one.combined, one.about) == (other.units, other.combined, other.about)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["olmoe", "glm4_moe", "gpt_oss", "qwen2_moe"])
def test_what_is_loaded_scores_as_what_was_saved(
    kind: str, full: bool, dtype: load.Dtype, tmp_path: Path, make_moe: Callable[..., Any], tokenizer: Any,
    make_texts: Callable[..., list[str]],
) -> None:  # fmt: skip
    base = based(tmp_path / "base", make_moe, tokenizer, kind)
    selector = warmed(base, dtype)
    save(selector, tmp_path / "run/epoch_1", str(base), full)
    if full:
        shutil.rmtree(base)
    found = load_selector(tmp_path / "run/epoch_1", dtype, "cpu")
    assert_same(selector, found, rows(make_texts))
    for mine, theirs in zip(selector.layers, found.layers, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert theirs.weight.dtype == torch.float32
    if full:
        from transformers import AutoModelForCausalLM

        plain, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "run/epoch_1", output_loading_info=True, dtype=getattr(torch, dtype)
        )
        assert not any(info[what] for what in ("missing_keys", "mismatched_keys", "unexpected_keys"))
        own = selector.model(input_ids=IDS).logits
        if dtype == "float32":
            assert torch.equal(plain(input_ids=IDS).logits, own)
        for mine, theirs in zip(selector.layers, routers(plain), strict=True):
            assert torch.equal(mine.weight.to(theirs.weight.dtype), theirs.weight)


def test_routers_alone_are_small(base: Path, tmp_path: Path) -> None:
    selector = warmed(base)
    save(selector, tmp_path / "epoch_1", str(base))
    files = sorted(path.name for path in (tmp_path / "epoch_1").iterdir())
    assert files == [WEIGHTS, FILE]
    size = sum(path.stat().st_size for path in (tmp_path / "epoch_1").iterdir())
    rows_alone = sum(4 * layer.weight.numel() for layer in selector.layers)
    assert rows_alone < size < rows_alone + 4096
    kept = load_file(tmp_path / "epoch_1" / WEIGHTS)
    assert {name for name in kept if not name.startswith("gap.")} == {f"{x.name}.weight" for x in selector.layers}


def test_both_folders_may_move_together(
    base: Path, tmp_path: Path, make_texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    selector = warmed(base)
    save(selector, Path("runs/selector/epoch_1"), "models/base")  # relative to where the user is
    (tmp_path / "elsewhere/deeper").mkdir(parents=True)
    for name in ("models", "runs"):
        (tmp_path / name).rename(tmp_path / "elsewhere/deeper" / name)
    monkeypatch.chdir("/")
    assert_same(selector, load_selector(tmp_path / "elsewhere/deeper/runs/selector/epoch_1"), rows(make_texts))


def test_folders_behind_links_are_found(base: Path, tmp_path: Path, make_texts: Callable[..., list[str]]) -> None:
    (tmp_path / "disk/a/b").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk/a/b")
    selector = warmed(base)
    save(selector, tmp_path / "runs/epoch_1", str(base))
    assert_same(selector, load_selector(tmp_path / "runs/epoch_1"), rows(make_texts))
    (tmp_path / "model").symlink_to(base)
    save(selector, tmp_path / "runs/epoch_2", str(tmp_path / "model"))
    assert_same(selector, load_selector(tmp_path / "runs/epoch_2"), rows(make_texts))


def test_a_base_that_went_away_is_named_and_may_be_given(
    base: Path, tmp_path: Path, make_texts: Callable[..., list[str]]
) -> None:
    selector, folder = warmed(base), tmp_path / "epoch_1"
    save(selector, folder, str(base))
    base.rename(tmp_path / "away")
    with pytest.raises(BenchError, match=rf"{base}, which is not there: .*move it back.*full=true"):
        load_selector(folder)
    assert_same(selector, load_selector(folder, base=str(tmp_path / "away")), rows(make_texts))


def test_another_base_is_refused(
    base: Path, tmp_path: Path, make_moe: Callable[..., Any], tokenizer: Any
) -> None:  # fmt: skip
    folder = tmp_path / "epoch_1"
    save(warmed(base), folder, str(base))
    other = based(tmp_path / "other", make_moe, tokenizer, seed=1)
    wider = based(tmp_path / "wider", make_moe, tokenizer, "qwen2_moe")
    for model in (other, wider):
        with pytest.raises(BenchError, match=rf"warmed up on another model than {model}"):
            load_selector(folder, base=str(model))
    # The base was overwritten by the same kind of model, trained anew.
    shutil.rmtree(base)
    other.rename(base)
    with pytest.raises(BenchError, match="warmed up on another model"):
        load_selector(folder)
    dense = tmp_path / "dense"
    make_moe("qwen3").save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    with pytest.raises(BenchError, match="02_scan to 05_router"):
        load_selector(folder, base=str(dense))


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_the_base_is_known_in_any_precision(saved: load.Dtype, base: Path, tmp_path: Path) -> None:
    save(warmed(base, saved), tmp_path / "epoch_1", str(base))
    for dtype in ("float32", "bfloat16"):
        assert len(load_selector(tmp_path / "epoch_1", dtype).layers) == 2  # type: ignore[arg-type]


def test_a_selector_that_was_loaded_can_be_saved_again(
    base: Path, tmp_path: Path, make_texts: Callable[..., list[str]]
) -> None:
    selector = warmed(base)
    save(selector, tmp_path / "one", str(base))
    save(load_selector(tmp_path / "one"), tmp_path / "two", str(base))
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "one" / FILE).read_text()) == json.loads((tmp_path / "two" / FILE).read_text())
    assert_same(selector, load_selector(tmp_path / "two"), rows(make_texts))


@pytest.mark.parametrize("kind", FAMILIES)
def test_routers_in_float32_in_a_bfloat16_model(kind: str, make_moe: Callable[..., Any]) -> None:
    model = make_moe(kind).to(torch.bfloat16)
    plain = model(input_ids=IDS).logits
    layers = in_float32(model)
    assert all(layer.weight.dtype == torch.float32 for layer in layers)
    hooks = [len(layer.module._forward_hooks) for layer in layers]
    in_float32(model)
    assert [len(layer.module._forward_hooks) for layer in layers] == hooks  # a second time changes nothing
    gates: list[torch.Tensor] = []
    for layer in layers:
        layer.module.register_forward_hook(lambda _, __, out: gates.extend(out if isinstance(out, tuple) else ()))
    with Watch(model) as watch:
        told = model(input_ids=IDS).logits
        for logits, inputs, layer in zip(watch.logits, watch.inputs, watch.layers, strict=True):
            bias = None if layer.bias is None else layer.bias.double()
            exact = torch.nn.functional.linear(inputs.double(), layer.weight.double(), bias)
            assert (logits - exact).abs().max() < 1e-5  # far finer than bfloat16's 1/256
    assert told.dtype == plain.dtype == torch.bfloat16
    floats = [gate.dtype for gate in gates if gate.is_floating_point()]
    assert floats.count(torch.float32) == len(layers) * (len(gates) > 0)  # the logits; weights of experts are narrow
    assert (told - plain).abs().max() < 0.25 * plain.abs().max()
    own = {id(weight) for layer in layers for weight in layer.module.parameters()}
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters() if id(weight) not in own)


def test_hub_ids_are_kept_as_they_are(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(warmed(base), tmp_path / "epoch_1", "allenai/OLMoE-1B-7B-0924")
    note = json.loads((tmp_path / "epoch_1" / FILE).read_text())
    assert (note["base"], note["base_is_folder"]) == ("allenai/OLMoE-1B-7B-0924", False)
