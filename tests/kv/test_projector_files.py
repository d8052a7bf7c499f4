"""A projector's files, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from projectors import TEACHERS, cache, caches, disturbed

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV
from tinyonn_lib.kv.projector import KVDimensionProjector

VARIANTS: list[dict[str, Any]] = [
    {},
    {"kind": "residual", "shared": False, "sources": 2, "joint": True, "mlp_ratio": 0.5, "dropout": 0.0},
    {"kind": "linear", "init_method": "normal", "trainable": False, "student_layers": 4},
    {"layernorm": False, "activation": "gelu", "init_method": "kaiming", "dropout": 0.3, "student_layers": 2,
     "layer_maps": {"Qwen2-7B": [[3, 1], [0, 4]], "Qwen2-14B": [[2], [0]]}},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS)
def test_round_trip(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    projector = disturbed(KVDimensionProjector(TEACHERS, 4, **options)).to(dtype)
    projector.save_pretrained(tmp_path / "new" / "deep")
    assert sorted(path.name for path in (tmp_path / "new" / "deep").iterdir()) == ["config.json", "model.safetensors"]
    read = KVDimensionProjector.from_pretrained(str(tmp_path / "new" / "deep"))
    assert read.options == projector.options
    assert read.teachers == projector.teachers
    assert read.layer_maps == projector.layer_maps
    assert all(value.requires_grad == options.get("trainable", True) for value in read.parameters())
    given = caches(dtype=dtype)
    one, two = (each.project_multi_teacher_kv(given) for each in (projector, read))
    assert one.keys.dtype == dtype
    assert torch.equal(one.keys, two.keys)  # dropout is off, too
    assert torch.equal(one.values, two.values)


def test_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    KVDimensionProjector(TEACHERS, 4).save_pretrained(tmp_path)
    other = KVDimensionProjector({"t": {"d_model": 2, "num_layers": 1}}, 3)
    other.save_pretrained(tmp_path)
    assert KVDimensionProjector.from_pretrained(tmp_path).teachers == other.teachers
    assert len(list(tmp_path.iterdir())) == 2


def test_names_are_only_names(tmp_path: Path) -> None:
    names = ["Qwen/Qwen2.5-7B", "../../etc", "keys", "own", "a.b.c", "", " ", "日本 <b>", "x\ny", "\ud800"]
    torch.manual_seed(0)
    projector = KVDimensionProjector({name: {"d_model": 6, "num_layers": 2} for name in names}, 4).eval()
    given = {name: cache(6, 2, number, torch.float32) for number, name in enumerate(names)}
    expected = projector.project_multi_teacher_kv(given)
    projector.save_pretrained(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert len(list((tmp_path / "here").iterdir())) == 2
    read = KVDimensionProjector.from_pretrained(tmp_path / "here")
    assert list(read.teachers) == names
    assert torch.equal(read.project_multi_teacher_kv(given).keys, expected.keys)


def one_line(caught: pytest.ExceptionInfo[BenchError], folder: Path) -> str:
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said
    assert len(said) < 500
    return said


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_files(name: str, share: float, tmp_path: Path) -> None:
    KVDimensionProjector(TEACHERS, 4).save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    cut = content[: int(share * len(content)) - (share > 0.9)]
    (tmp_path / name).write_bytes(cut.rstrip(b"}\n") if name == "config.json" else cut)
    with pytest.raises(BenchError, match="damaged") as caught:
        KVDimensionProjector.from_pretrained(tmp_path)
    one_line(caught, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        b"\xff\xfe\x00", b"[]", b"null", b"3", b'"text"', b"{}", b"[" * 100_000,
        {"teacher_configs": []}, {"teacher_configs": {}}, {"teacher_configs": {"t": 3}}, {"teacher_configs": None},
        {"teacher_configs": {"Qwen2-7B": {"d_model": 6, "num_layers": 5}}},
        {"student_d_model": "4"}, {"student_d_model": -4}, {"student_d_model": 5}, {"student_d_model": 10**12},
        {"layer_maps": [1]}, {"layer_maps": {"Qwen2-7B": 3}}, {"layer_maps": {"Qwen2-7B": [[0], [2], ["x"]]}},
        {"layer_maps": {"Qwen2-7B": [[], [], []], "Qwen2-14B": [[], [], []]}},
        {"kind": "foo"}, {"kind": []}, {"kind": "linear"}, {"mlp_ratio": None}, {"mlp_ratio": 2.0},
        {"shared": False}, {"sources": 0}, {"unheard of": 1}, {"student_layers": 4},
    ],
)  # fmt: skip
def test_garbage_in_the_config(change: Any, tmp_path: Path) -> None:
    KVDimensionProjector(TEACHERS, 4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(
        change if isinstance(change, bytes) else json.dumps(json.loads(path.read_text()) | change).encode()
    )
    with pytest.raises(BenchError, match="damaged") as caught:
        KVDimensionProjector.from_pretrained(tmp_path)
    one_line(caught, tmp_path)


def test_another_projector_s_weights(tmp_path: Path) -> None:
    KVDimensionProjector(TEACHERS, 4).save_pretrained(tmp_path / "a")
    KVDimensionProjector(TEACHERS, 4, kind="linear").save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(BenchError, match=r"damaged \(.*[Mm]issing") as caught:
        KVDimensionProjector.from_pretrained(tmp_path / "a")
    one_line(caught, tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    KVDimensionProjector(TEACHERS, 4).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BenchError, match=f"holds no projector: {name} is missing") as caught:
        KVDimensionProjector.from_pretrained(tmp_path)
    one_line(caught, tmp_path)
    with pytest.raises(BenchError, match=r"holds no projector: config\.json is missing"):
        KVDimensionProjector.from_pretrained(tmp_path / "nowhere")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(BenchError, match="Cannot write the projector") as caught:
            KVDimensionProjector(TEACHERS, 4).save_pretrained(folder)
        one_line(caught, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("which", ["weights", "config", "rename"])
def test_a_disk_that_fills_up_leaves_the_old_one(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projector = KVDimensionProjector(TEACHERS, 4)
    projector.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if which == "weights":
            patch.setattr("tinyonn_lib.kv.projector.save_file", full)
        else:
            patch.setattr(Path, "write_text" if which == "config" else "replace", full)
        with pytest.raises(BenchError, match="No space left") as caught:
            disturbed(projector).save_pretrained(tmp_path)
    one_line(caught, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_config_that_json_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    projector = KVDimensionProjector({"t": {"d_model": 2, "num_layers": 1, "dtype": torch.float16}}, 3)
    with pytest.raises(BenchError, match="dtype is not JSON serializable"):
        projector.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_cache_that_is_not_finite(side: str, bad: float) -> None:
    projector, given = KVDimensionProjector(TEACHERS, 4), caches(dtype=torch.float32)
    getattr(given["Qwen2-14B"], side)[1, 2, 6, 9] = bad
    for call in (lambda: projector.project_teacher_kv("Qwen2-14B", given["Qwen2-14B"]),
                 lambda: projector.project_multi_teacher_kv(given)):  # fmt: skip
        with pytest.raises(BenchError, match="'Qwen2-14B' holds NaN or infinite"):
            call()


def test_infinities_of_both_signs_do_not_cancel() -> None:
    kv = cache(6, 5, dtype=torch.float32)
    kv.keys[0, 0, 0, 0], kv.values[0, 0, 0, 0], kv.keys[0, 1, 0, 0] = math.inf, -math.inf, -math.inf
    with pytest.raises(BenchError, match="NaN or infinite"):
        KVDimensionProjector(TEACHERS, 4).project_teacher_kv("Qwen2-7B", kv)


def test_large_values_in_half_precision_are_finite() -> None:
    kv = KV(*(torch.full((2, 5, 7, 6), 6e4, dtype=torch.float16) for _ in range(2)))
    assert KVDimensionProjector(TEACHERS, 4).eval().project_teacher_kv("Qwen2-7B", kv).keys.isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"Qwen2-7B": cache(7, 5)}, r"'Qwen2-7B' has 5 layers of width 7; .* for 5 of 6"),
        ({"Qwen2-7B": cache(6, 4)}, r"'Qwen2-7B' has 4 layers of width 6; .* for 5 of 6"),
        ({"Qwen2-14B": cache(6, 5)}, r"'Qwen2-14B' has 5 layers of width 6; .* for 3 of 10"),
        ({"Qwen2-7B": cache(6, 5)[:1]}, "differ in batch or tokens .*Qwen2-7B: 1 × 7, Qwen2-14B: 2 × 7"),
        ({"Qwen2-7B": KV(*(t[:, :, :3] for t in (cache(6, 5).keys, cache(6, 5).values)))}, "2 × 3, Qwen2-14B: 2 × 7"),
        ({"GPT-5": cache(6, 5)}, "Unknown teacher 'GPT-5': .* Qwen2-7B, Qwen2-14B"),
        ({"Qwen2-14B": None}, "No cache of the teacher 'Qwen2-14B': .* Qwen2-7B, Qwen2-14B"),
    ],
)
def test_caches_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    given = {name: kv for name, kv in (caches() | change).items() if kv is not None}
    with pytest.raises(BenchError, match=says) as caught:
        KVDimensionProjector(TEACHERS, 4).double().project_multi_teacher_kv(given)
    assert "\n" not in str(caught.value)


def test_a_teacher_unheard_of() -> None:
    with pytest.raises(BenchError, match="Unknown teacher 'qwen2-7b'"):
        KVDimensionProjector(TEACHERS, 4).project_teacher_kv("qwen2-7b", cache(6, 5))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher_configs": {}}, "at least one teacher"),
        ({"teacher_configs": {"t": {"num_layers": 3}}}, "'t' needs d_model, .* got None"),
        ({"teacher_configs": {"t": {"d_model": 3}}}, "'t' needs num_layers"),
        ({"teacher_configs": {"t": {"d_model": 0, "num_layers": 3}}}, "'t' needs d_model, .* got 0"),
        ({"teacher_configs": {"t": {"d_model": 3.5, "num_layers": 3}}}, "got 3.5"),
        ({"student_d_model": 0}, "student_d_model is 0"),
        ({"student_d_model": 2.0}, "student_d_model is 2.0"),
        ({"student_layers": -1}, "student_layers is -1"),
        ({"sources": 0}, "sources is 0"),
        ({"init_method": "xaver"}, "Unknown init_method 'xaver': choose one of xavier, kaiming, normal"),
        ({"kind": "transformer"}, "Unknown kind 'transformer'"),
        ({"activation": "tanh"}, "Unknown activation 'tanh'"),
        ({"mlp_ratio": -1}, "mlp_ratio is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"layer_maps": {"x": [[0]] * 3}}, r"map of 'Qwen2-7B' .* got \[\]"),
        *(({"layer_maps": {"Qwen2-7B": m, "Qwen2-14B": [[0]] * 3}}, "map of 'Qwen2-7B' .* 3 student layers.* 0 to 4")
          for m in ([[0]] * 2, [[0], [1], [5]], [[0], [1], [-1]], [[0], [1], [2, 3]], [[], [], []], [["a"]] * 3)),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BenchError, match=says) as caught:
        KVDimensionProjector(**({"teacher_configs": TEACHERS, "student_d_model": 4} | change))
    assert "\n" not in str(caught.value)
