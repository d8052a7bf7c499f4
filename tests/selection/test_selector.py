"""A selector's folder: small, movable, checked against its base, and a plain model if it is a full one."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import load
from tinyonn_lib.selection.routers import Watch, routers
from tinyonn_lib.selection.rows import Row
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import FILE, WEIGHTS, Selector, in_float32, load_selector, of, save

FAMILIES = ("olmoe", "granitemoe", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "lfm2_moe")
COMBINED = {
    "combined": {"contrastive": 0.1 + 0.2, "log_mass": -1 / 3, "log_perplexity": -3.0, "intercept": 0.5},
    "perplexity_fitted": {"log_perplexity": -1 / 7, "log_perplexity_squared": 0.1, "intercept": 1.0},
}
IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def based(folder: Path, make_moe: Callable[..., Any], tokenizer: Any, kind: str = "olmoe", seed: int = 0) -> Path:
    """A model on disk."""
    make_moe(kind, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def warmed(base: Path, dtype: load.Dtype = "float32") -> Selector:
    """A selector of that model, its routers moved by less than bfloat16 can hold, as a training does."""
    start = of(load.load_model(str(base), dtype, "cpu"), load.load_tokenizer(str(base)))
    make = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in start.layers:
            for rows in (layer.weight, layer.bias):
                if rows is not None:
                    rows += 1e-3 * torch.randn(rows.shape, generator=make)
    gap = tuple(torch.randn(layer.experts, generator=make) for layer in start.layers)
    units = tuple(1 / (3 + place) for place in range(len(gap)))
    return replace(start, units=units, gap=gap, combined=COMBINED, about={"loss": "contrastive"})


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


@pytest.fixture
def base(tmp_path: Path, make_moe: Callable[..., Any], tokenizer: Any) -> Path:
    return based(tmp_path / "models/base", make_moe, tokenizer)


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


def edited(folder: Path, **fields: Any) -> None:
    note = json.loads((folder / FILE).read_text()) | fields
    (folder / FILE).write_text(json.dumps({name: value for name, value in note.items() if value is not ...}))


def without(folder: Path, key: str) -> None:
    save_file({name: row for name, row in load_file(folder / WEIGHTS).items() if name != key}, folder / WEIGHTS)


def truncated(path: Path, part: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no note": (lambda f: (f / FILE).unlink(), "holds no selector.json: give a selector's folder"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is damaged"),
    "weights cut off": (lambda f: truncated(f / WEIGHTS, 0.6), "is damaged"),
    "weights empty": (lambda f: truncated(f / WEIGHTS, 0), "is damaged"),
    "note cut off": (lambda f: truncated(f / FILE, 0.5), "is damaged"),
    "note no UTF-8": (lambda f: (f / FILE).write_bytes(b"\xff\xfe{}"), "is damaged"),
    "note a list": (lambda f: (f / FILE).write_text("[1]"), "is damaged"),
    "note empty": (lambda f: (f / FILE).write_text("{}"), "is damaged"),
    "format": (lambda f: edited(f, format=2), "has format 2, not 1: warm the selector up again"),
    "no units": (lambda f: edited(f, units=..., combined=...), "lacks combined, units: warm"),
    "no base": (lambda f: edited(f, base=...), "lacks base: warm"),
    "no router": (lambda f: without(f, "model.layers.1.mlp.gate.weight"), "no rows for model.layers.1.mlp.gate.weight"),
    "half of the gaps": (lambda f: without(f, "gap.0"), "warm"),
    "units of another": (lambda f: edited(f, units=[1.0]), "warm"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "holds no selector.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_folder_is_refused_in_one_line(case: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "epoch_1"
    save(warmed(base), folder, str(base))
    damage, line = BROKEN[case]
    damage(folder)
    with pytest.raises(BenchError, match=line) as error:
        load_selector(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_what_cannot_be_written_is_told_in_one_line(base: Path, tmp_path: Path) -> None:
    selector = warmed(base)
    (tmp_path / "taken").write_text("x")
    with pytest.raises(BenchError, match="Cannot write the selector"):
        save(selector, tmp_path / "taken/epoch_1", str(base))
    folder, (soft, hard) = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (500, 2000):  # in the middle of the rows
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # as if the disk were full from there on
        try:
            with pytest.raises(BenchError, match="Cannot write the selector .*disk full"):
                save(selector, folder, str(base))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(BenchError, match="holds no selector.json"):
            load_selector(folder)


def test_a_write_that_failed_leaves_no_selector_of_two_halves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved over an older one, killed in between: new rows with an old note would load and be wrong."""
    selector, folder = warmed(base), tmp_path / "epoch_1"
    save(selector, folder, str(base))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(replace(selector, units=(9.0, 9.0)), folder, str(base))
    with pytest.raises(BenchError, match="holds no selector.json"):
        load_selector(folder)


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
