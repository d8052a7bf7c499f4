"""`KVDimensionProjector`: called as the document calls it, its size, its answers by hand in float64, its files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.cache import KV
from tinyonn_lib.kv.loss import compute_kv_loss
from tinyonn_lib.kv.projector import KVDimensionProjector

TEACHERS = {"Qwen2-7B": {"d_model": 6, "num_layers": 5}, "Qwen2-14B": {"d_model": 10, "num_layers": 3}}


def cache(width: int, layers: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> KV:
    generator = torch.Generator().manual_seed(seed)
    return KV(*(torch.randn(2, layers, 7, width, generator=generator, dtype=dtype) for _ in range(2)))


def caches(**more: Any) -> dict[str, KV]:
    return {name: cache(each["d_model"], each["num_layers"], number, **more)
            for number, (name, each) in enumerate(TEACHERS.items())}  # fmt: skip


def disturbed(projector: KVDimensionProjector) -> KVDimensionProjector:
    """Away from a start in which biases and gates are 0, gains 1 and some layers silent; in float64."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in projector.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    return projector.double().eval()


# The document's calls


@pytest.mark.parametrize(
    ("teachers", "width", "ratio", "dropout"),
    [
        ({"Qwen2-7B": {"d_model": 3584, "num_layers": 28}}, 2048, 0.5, 0.1),
        ({"Qwen2-14B": {"d_model": 5120, "num_layers": 40}}, 1536, 1.0, 0.1),
        ({"Llama-3-70B": {"d_model": 8192, "num_layers": 80}}, 2048, 2.0, 0.15),
    ],
)
def test_the_document_s_three_schemes(teachers: dict[str, Any], width: int, ratio: float, dropout: float) -> None:
    with torch.device("meta"):
        projector = KVDimensionProjector(
            teacher_configs=teachers, student_d_model=width, mlp_ratio=ratio, dropout=dropout, init_method="xavier",
            trainable=True,
        )  # fmt: skip
    ((name, config),) = teachers.items()
    for side in ("keys", "values"):
        (adapter,) = projector.of(name, side)
        assert [type(part) for part in adapter] == [nn.LayerNorm, nn.Linear, nn.SiLU, nn.Dropout, nn.Linear]
        assert adapter[3].p == dropout
        assert (adapter[1].in_features, adapter[1].out_features) == (config["d_model"], ratio * config["d_model"])
        assert adapter[4].out_features == width
    assert projector.student_layers == config["num_layers"]
    assert all(value.requires_grad for value in projector.parameters())


def test_the_document_s_training_loop() -> None:
    torch.manual_seed(0)
    device, student_model = torch.device("cpu"), nn.Linear(8, 8)
    projector = KVDimensionProjector(
        teacher_configs=TEACHERS, student_d_model=8, mlp_ratio=1.0, dropout=0.1, init_method="xavier", trainable=True,
    ).to(device)  # fmt: skip
    optimizer = AdamW([
        {"params": student_model.parameters(), "lr": 5e-5},
        {"params": projector.parameters(), "lr": 1e-3},
    ])  # fmt: skip
    teacher_kvs, wanted = caches(dtype=torch.float32), cache(8, 3, 9, torch.float32)
    before = [value.detach().clone() for value in projector.parameters()]
    losses = []
    for _ in range(30):
        student_kv = KV(student_model(wanted.keys), student_model(wanted.values))
        aligned_kvs = projector.project_multi_teacher_kv(teacher_kvs)
        loss = compute_kv_loss(student_kv, aligned_kvs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(one, two) for one, two in zip(before, projector.parameters(), strict=True))


def test_frozen_by_its_argument() -> None:
    projector = KVDimensionProjector(TEACHERS, 8, trainable=False)
    assert not any(value.requires_grad for value in projector.parameters())
    assert not projector.project_multi_teacher_kv(caches(dtype=torch.float32)).keys.requires_grad


# Sizes

PAIRS = [("Qwen2-7B", 3584, 2048), ("Qwen2-14B", 5120, 1536), ("Llama-3-70B", 8192, 2048),
         ("Qwen2-14B in the example of several", 5120, 2048), ("Qwen2-72B", 8192, 2048)]  # fmt: skip


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("name", "d", "s"), PAIRS)
def test_parameters_of_the_named_pairs(name: str, d: int, s: int, ratio: float) -> None:
    with torch.device("meta"):
        projector = KVDimensionProjector({name: {"d_model": d, "num_layers": 28}}, s, mlp_ratio=ratio)
    count, h = projector.count_parameters(), int(ratio * d)
    assert count["weights_per_adapter"] == {name: d * h + h * s}
    per_adapter = d * h + h * s + h + s + 2 * d  # biases, gain and shift of LayerNorm
    assert count["per_adapter"] == {name: per_adapter}
    assert count["per_layer"] == count["per_teacher"] == {name: 2 * per_adapter}
    assert (count["gates"], count["total"]) == (0, 2 * per_adapter)
    assert count["total"] == sum(value.numel() for value in projector.parameters())


@pytest.mark.parametrize(
    ("d", "s", "ratio", "million"), [(5120, 1536, 1.0, 34.1), (3584, 2048, 0.5, 10.1), (8192, 2048, 2.0, 167.8)]
)
def test_the_corrected_figures(d: int, s: int, ratio: float, million: float) -> None:
    with torch.device("meta"):
        count = KVDimensionProjector({"t": {"d_model": d, "num_layers": 2}}, s, mlp_ratio=ratio).count_parameters()
    assert count["weights_per_adapter"]["t"] / 1e6 == pytest.approx(million, abs=0.05)
    assert 2 * count["weights_per_adapter"]["t"] / 1e6 == pytest.approx(2 * million, abs=0.1)


def test_parameters_of_several_teachers_add_up() -> None:
    """They are not adapter × teachers × 2, for the teachers differ in width."""
    widths = {"Qwen2-7B": (3584, 28), "Qwen2-14B": (5120, 40), "Qwen2-72B": (8192, 80)}
    with torch.device("meta"):
        projector = KVDimensionProjector(
            {name: {"d_model": d, "num_layers": n} for name, (d, n) in widths.items()}, 2048, mlp_ratio=1.0
        )
    count = projector.count_parameters()
    each = {name: d * d + d * 2048 + d + 2048 + 2 * d for name, (d, _) in widths.items()}
    assert count["per_adapter"] == each
    assert count["gates"] == 2 * 3 * 28 * 2048
    assert count["total"] == 2 * sum(each.values()) + count["gates"]
    assert projector.student_layers == 28


def test_parameters_of_one_adapter_per_layer() -> None:
    count = KVDimensionProjector(
        TEACHERS, 8, student_layers=4, kind="residual", mlp_ratio=0.5, shared=False, sources=3, joint=True
    ).count_parameters()
    read = {"Qwen2-7B": 6 * 3 * 2, "Qwen2-14B": 10 * 3 * 2}
    each = {n: r * 8 + 8 + 2 * r + r * (r // 2) + r // 2 + r // 2 * 8 + 8 for n, r in read.items()}
    assert count["per_adapter"] == each
    assert count["weights_per_adapter"] == {n: r * 8 + r * (r // 2) + r // 2 * 8 for n, r in read.items()}
    assert count["per_layer"] == {n: 2 * size for n, size in each.items()}
    assert count["per_teacher"] == {n: 2 * 4 * size for n, size in each.items()}
    assert count["total"] == 8 * sum(each.values()) + 2 * 2 * 4 * 8


# Widths under grouped-query attention


def qwen(**sizes: Any) -> Qwen2Config:
    return Qwen2Config(**sizes)


LIKE = {
    "Qwen2.5-7B": qwen(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    "Qwen2.5-1.5B": qwen(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
    "Qwen2.5-0.5B": qwen(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
    "Qwen3-0.6B": Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "student", "width", "own"),
    [
        ("Qwen2.5-7B", "Qwen2.5-1.5B", 512, 256),
        ("Llama-3-70B", "Qwen2.5-1.5B", 1024, 256),
        ("Qwen2.5-0.5B", "Qwen3-0.6B", 128, 1024),
    ],
)
def test_true_widths_and_depths_from_configs(teacher: str, student: str, width: int, own: int) -> None:
    with torch.device("meta"):
        projector = KVDimensionProjector.from_configs(
            {"t": LIKE[teacher]}, LIKE[student], kind="mlp", sources=1, joint=False, shared=True
        )
    (adapter,) = projector.of("t", "values")
    assert (adapter[1].in_features, adapter[4].out_features) == (width, own)
    assert projector.teachers["t"]["d_model"] == width
    assert projector.teachers["t"]["num_layers"] == LIKE[teacher].num_hidden_layers
    assert projector.student_layers == LIKE[student].num_hidden_layers == 28


def test_from_configs_keeps_each_teacher_s_rope() -> None:
    with torch.device("meta"):
        projector = KVDimensionProjector.from_configs({n: LIKE[n] for n in ("Llama-3-70B", "Qwen2.5-7B")},
                                                      LIKE["Qwen2.5-1.5B"])  # fmt: skip
    assert projector.teachers["Llama-3-70B"]["rope"]["rope_type"] == "llama3"
    assert projector.teachers["Llama-3-70B"]["rope"]["rope_theta"] == 5e5
    assert projector.teachers["Qwen2.5-7B"]["rope"]["rope_type"] == "default"


def test_smaller_than_c2c_at_its_widths() -> None:
    """Cache-to-Cache: 17.1 M parameters for each layer of Qwen3-0.6B that reads Qwen2.5-0.5B."""
    with torch.device("meta"):
        projector = KVDimensionProjector.from_configs({"t": LIKE["Qwen2.5-0.5B"]}, LIKE["Qwen3-0.6B"])
    count = projector.count_parameters()
    read = 128 * 3 * 2
    hidden = read // 2
    each = read * 1024 + 1024 + 2 * read + read * hidden + hidden + hidden * 1024 + 1024
    assert count["per_layer"]["t"] == 2 * each < 17.1e6
    assert count["total"] == 28 * count["per_layer"]["t"]
    assert projector.options["dropout"] == 0
    assert projector.layer_maps["t"][0] == [0, 1, 2]
    assert projector.layer_maps["t"][-1] == [21, 22, 23]


# What it says, by hand


def one_adapter(module: nn.Module, x: Tensor, kind: str) -> Tensor:
    """From its weights alone, in their order."""
    values = [value.detach() for value in module.parameters()]
    direct: Any = 0
    if kind != "mlp":
        weight, bias, *values = values
        direct = x @ weight.T + bias
    if kind == "linear":
        return direct
    gain, shift, up, up_bias, down, down_bias = values
    centred = x - x.mean(-1, keepdim=True)
    hidden = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift) @ up.T + up_bias
    return direct + (hidden / (1 + (-hidden).exp())) @ down.T + down_bias


def by_hand(
    projector: KVDimensionProjector,
    given: Mapping[str, KV],
    kind: str,
    read: Mapping[str, list[list[int]]],
    joint: bool,
) -> dict[str, Tensor]:
    """Token by token as far as it matters: each student layer, each teacher, then the gates."""
    found = {}
    for number, side in enumerate(("keys", "values")):
        layers = []
        for place in range(projector.student_layers):
            said = []
            for name, kv in given.items():
                sides = [kv.keys, kv.values] if joint else [getattr(kv, side)]
                x = torch.cat([part[:, layer] for part in sides for layer in read[name][place]], -1)
                modules = projector.of(name, side)
                said.append(one_adapter(modules[place if len(modules) > 1 else 0], x, kind))
            if len(said) > 1:
                assert projector.gates is not None
                scores = [(answer * gate[place]).sum(-1) for answer, gate in
                          zip(said, projector.gates.detach()[number], strict=True)]  # fmt: skip
                whole = sum(score.exp() for score in scores)
                said = [answer * (score.exp() / whole)[..., None] for answer, score in zip(said, scores, strict=True)]
            layers.append(sum(said))
        found[side] = torch.stack(layers, 1)
    return found


# Of 5 and of 3 teacher layers for 3 student layers, nearest in depth; of two as near the lower one.
NEAREST = {
    1: {"Qwen2-7B": [[0], [2], [4]], "Qwen2-14B": [[0], [1], [2]]},
    2: {"Qwen2-7B": [[0, 1], [1, 2], [3, 4]], "Qwen2-14B": [[0, 1], [0, 1], [1, 2]]},
    5: {"Qwen2-7B": [[0, 1, 2, 3, 4]] * 3, "Qwen2-14B": [[0, 1, 2]] * 3},
}


@pytest.mark.parametrize(
    ("kind", "shared", "sources", "joint"),
    list(itertools.product(["mlp", "linear", "residual"], [True, False], [1, 2, 5], [True, False])),
)
def test_equals_the_formula(kind: str, shared: bool, sources: int, joint: bool) -> None:
    torch.manual_seed(0)
    projector = disturbed(KVDimensionProjector(
        TEACHERS, 4, kind=kind, shared=shared, sources=sources, joint=joint, mlp_ratio=0.5
    ))  # fmt: skip
    given = caches()
    expected = by_hand(projector, given, kind, NEAREST[sources], joint)
    found = projector.project_multi_teacher_kv(given)
    assert found.shape == (2, 3, 7, 4)
    torch.testing.assert_close(found.keys, expected["keys"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.values, expected["values"], rtol=1e-10, atol=1e-10)
    assert (found.keys - found.values).abs().max() > 0.1
    for name in TEACHERS:
        alone = by_hand(projector, {name: given[name]}, kind, NEAREST[sources], joint)
        one = projector.project_teacher_kv(name, given[name])
        torch.testing.assert_close(one.keys, alone["keys"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one.values, alone["values"], rtol=1e-10, atol=1e-10)


def test_a_map_of_one_s_own() -> None:
    given, maps = {"t": cache(6, 5)}, {"t": [[4, 0], [1, 1]]}
    projector = disturbed(KVDimensionProjector({"t": {"d_model": 6, "num_layers": 5}}, 4, student_layers=2,
                                               layer_maps=maps))  # fmt: skip
    expected = by_hand(projector, given, "mlp", maps, joint=False)
    torch.testing.assert_close(projector.project_teacher_kv("t", given["t"]).keys, expected["keys"])


def test_caches_as_models_give_them() -> None:
    projector = disturbed(KVDimensionProjector({"t": {"d_model": 6, "num_layers": 5}}, 4))
    kv, filled = cache(6, 5), DynamicCache()
    expected = projector.project_teacher_kv("t", kv)
    pairs = [[side[:, layer].unflatten(-1, (2, 3)).transpose(1, 2) for side in (kv.keys, kv.values)]
             for layer in range(5)]  # fmt: skip
    for layer, pair in enumerate(pairs):
        filled.update(*pair, layer)
    for form in (filled, pairs, [[side[:, layer] for side in (kv.keys, kv.values)] for layer in range(5)]):
        found = projector.project_teacher_kv("t", form)
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found.values, expected.values)


def test_a_teacher_in_bfloat16() -> None:
    """Its cache has its dtype; what it is projected with keeps that of its weights."""
    projector = KVDimensionProjector(TEACHERS, 4).eval()
    given = caches(dtype=torch.bfloat16)
    found = projector.project_multi_teacher_kv(given)
    expected = projector({name: KV(kv.keys.float(), kv.values.float()) for name, kv in given.items()})
    assert found.keys.dtype == torch.float32
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


def test_the_order_in_which_teachers_are_given_does_not_matter() -> None:
    projector, given = disturbed(KVDimensionProjector(TEACHERS, 4)), caches()
    expected = projector.project_multi_teacher_kv(given)
    found = projector.project_multi_teacher_kv(dict(reversed(given.items())))
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


def test_gates_begin_as_the_plain_mean() -> None:
    torch.manual_seed(0)
    three = TEACHERS | {"c": {"d_model": 2, "num_layers": 9}}
    projector = KVDimensionProjector(three, 4).double().eval()
    given = caches() | {"c": cache(2, 9, 7)}
    said = [projector.project_teacher_kv(name, kv) for name, kv in given.items()]
    found = projector.project_multi_teacher_kv(given)
    torch.testing.assert_close(found.keys, sum(kv.keys for kv in said) / 3)
    torch.testing.assert_close(found.values, sum(kv.values for kv in said) / 3)


def test_gates_learn_whom_to_believe() -> None:
    """One teacher knows, one is noise: adapters fixed, the gates alone find out, for keys here, for values there."""
    torch.manual_seed(0)
    configs = {"one": {"d_model": 4, "num_layers": 2}, "two": {"d_model": 4, "num_layers": 2}}
    projector = KVDimensionProjector(configs, 4, kind="linear").eval()
    assert projector.gates is not None
    for name in configs:
        for side in ("keys", "values"):
            linear: Any = projector.of(name, side)[0]
            nn.init.eye_(linear.weight)
    truth, noise = (torch.randn(16, 2, 8, 4) + 2 for _ in range(2))
    own = KV(truth, truth)
    given = {"one": KV(truth, noise), "two": KV(noise, truth)}
    optimizer = AdamW([projector.gates], lr=0.1, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        compute_kv_loss(own, projector(given)).backward()
        optimizer.step()
    # By how much of the way from the mean to the knowing teacher the answer moved.
    found, mean = KV.detach(projector(given)), (truth + noise) / 2
    for said in (found.keys, found.values):
        assert float((said - truth).square().mean()) < 0.6 * float((mean - truth).square().mean())
    gates = projector.gates.detach().sum((-1, -2))  # (side, teacher)
    assert gates[0, 0] > gates[0, 1]
    assert gates[1, 1] > gates[1, 0]


def test_dropout_in_training_only() -> None:
    torch.manual_seed(0)
    projector, given = KVDimensionProjector(TEACHERS, 4, dropout=0.5).double(), caches()
    one, two = (projector.train().project_multi_teacher_kv(given) for _ in range(2))
    assert not torch.equal(one.keys, two.keys)
    one, two = (projector.eval().project_multi_teacher_kv(given) for _ in range(2))
    assert torch.equal(one.keys, two.keys)


# Files

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


# What it refuses


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
