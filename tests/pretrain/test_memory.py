"""What a training would take, against models that are really built; and what is said when it is too much."""

from __future__ import annotations

import re
from typing import Any

import psutil
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain import memory
from tinyonn_lib.pretrain.architectures import ARCHITECTURES, counts, new
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES


def asked(**changes: Any) -> Any:
    """Parameters of 01_pretrain with a vocabulary of 300 and steps of 8 · 16 tokens."""
    small: dict[str, Any] = {"vocab_size": 300, "batch": 8, "length": 16, "device": "cpu"}
    return params.validate(PHASES["pretrain"], params.defaults(PHASES["pretrain"]) | small | changes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_as_if_built(name: str, sizes: dict[str, Any]) -> None:
    """The first layers may differ from the later ones, as deepseek_v3's dense one does."""
    del sizes["layers"]
    for layers in (1, 2, 3, 4, 7):
        wanted = counts(new(name, layers=layers, **sizes))["total"]
        assert memory.parameters(name, layers=layers, **sizes) == wanted


def test_nothing_is_built(sizes: dict[str, Any]) -> None:
    """Ten thousand layers of a million neurons of a million weights each."""
    huge = sizes | {"width": 2**20, "ffn": 2**20, "layers": 10_000, "head_dim": 2**16}
    assert memory.parameters("qwen3", **huge) > 3e16
    with pytest.raises(BenchError, match=r"; its training needs about \d{6,}\.\d GB and "):
        memory.check(asked(width=2**20, ffn=2**20, layers=10_000))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_byte_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 bytes a weight, 16 a logit, and 4 for what the layers keep of each of 8 · 16 tokens; of either model."""
    sizes: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 16, "vocab_size": 300, "experts": 4, "active": 2}
    given = asked(**{**sizes, "architecture": name, "width": 32, "ffn": 64, "student_width": 96, "student_ffn": 64})
    model = counts(new(name, width=32, layers=3, ffn=64, max_length=16, **sizes))["total"]
    student = counts(new(name, width=96, layers=2, ffn=64, max_length=16, **sizes))["total"]
    assert model < student
    kept = {"model": 3 * (5 * 64 + 16 * 32), "student": 2 * (5 * 64 + 16 * 96)}
    for who, count in (("student", student), ("model", model)):
        enough = 24 * count + 16 * 8 * 16 * 300 + 4 * 8 * 16 * kept[who]
        monkeypatch.setattr(memory, "free", lambda place, there=enough - 1: there)
        gb = f"{enough / 1e9:.1f}"
        said = f"The {who} would have {count:,} parameters; its training needs about {gb} GB and {gb} GB are free: "
        with pytest.raises(BenchError, match=f"^{re.escape(said)}") as failed:
            memory.check(given)
        prefix = "student_" if who == "student" else ""
        assert f": lower some of {prefix}width=" in str(failed.value)
    monkeypatch.setattr(memory, "free", lambda place: 24 * student + 16 * 8 * 16 * 300 + 4 * 8 * 16 * kept["student"])
    memory.check(given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ffn": 16, "student_ffn": 64}, "^ffn=16 is too narrow for experts: it must be at least 32"),
        ({"student_ffn": 16}, "^student_ffn=16 is too narrow for experts: it must be at least 32"),
        ({"architecture": "deepseek_v3", "student_width": 16}, "^student_width=16 is too narrow for latent attention"),
        ({"architecture": "gemma3n", "student_width": 62, "heads": 4}, "^student_width=62 is not a multiple of heads"),
        ({"architecture": "deepseek_v3", "head_dim": 10}, "^head_dim=10 is no multiple of 4"),
        ({"device": "warp9"}, "^Device 'warp9' is not available"),
    ],
)
def test_lines_name_the_parameter_to_be_changed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        memory.check(asked(**{"architecture": "qwen3_moe", "active": 4} | changes))


def test_free_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (1000 + place.index, 9999))
    assert memory.free(torch.device("cuda:1")) == 1001
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("V", (), {"available": 77, "total": 99}))
    assert memory.free(torch.device("cpu")) == memory.free() == 77
