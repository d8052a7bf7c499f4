"""How large a projector is: the document's pairs, and widths under grouped-query attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from projectors import TEACHERS
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from tinyonn_lib.kv.projector import KVDimensionProjector

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
