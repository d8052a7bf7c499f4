"""Plain transformers classes from a few sizes: files, starting weights, parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain.architectures import ARCHITECTURES, counts, matched, new

SPARSE = ("qwen3_moe", "qwen2_moe", "deepseek_v3")

STRANGER = """
import json, sys
sys.modules["tinyonn_lib"] = None  # importing it fails
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        logits = model.eval()(ids).logits
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    found[folder] = {
        "class": type(model).__name__, "module": type(model).__module__, "problems": sum(len(info[k]) for k in info),
        "logits": logits[0, -1].tolist(), "tokens": made[0].tolist(),
    }
print(json.dumps(found))
"""


def test_a_stranger_loads_and_generates_the_same(tmp_path: Path, alive: Callable[..., Any]) -> None:
    """A process that cannot import this library: no missing or unexpected keys, the same logits and greedy tokens."""
    models = {name: alive(name, tie=name != "deepseek_v3").float() for name in ARCHITECTURES}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *(str(tmp_path / name) for name in models)],
        capture_output=True, text=True, cwd=tmp_path, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    ids = torch.arange(2, 12)[None]
    for name, model in models.items():
        told = found[str(tmp_path / name)]
        assert told["class"] == type(model).__name__
        assert told["module"].startswith("transformers.models.")
        assert told["problems"] == 0
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(told["logits"]), model(ids).logits[0, -1], atol=1e-5, rtol=1e-5)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert told["tokens"] == made[0].tolist()
        assert len(told["tokens"]) > ids.shape[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_seed_makes_the_weights(name: str, sizes: dict[str, Any]) -> None:
    """Same seed, same weights; another seed, others; the global random state is left alone."""
    before = torch.random.get_rng_state()
    one, again, other = (new(name, **sizes, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert {value.dtype for value in one.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["qwen3", *SPARSE])
def test_untrained_it_is_the_identity(name: str, sizes: dict[str, Any]) -> None:
    """From embedding to final norm, all branches being zero."""
    model, ids = new(name, **sizes), torch.arange(2, 22)[None]
    with torch.no_grad():
        wanted = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
        assert torch.equal(model(ids).logits, wanted)


def test_untrained_gemma_adds_no_attention_and_no_ffn(sizes: dict[str, Any]) -> None:
    """AltUp and LAuReL mix from the start, so it is no identity, but the zero branches add nothing."""
    model, ids = new("gemma3n", **sizes), torch.arange(2, 22)[None]
    with torch.no_grad():
        before = model(ids).logits
        for key, weight in model.named_parameters():
            if key.endswith(("v_proj.weight", "up_proj.weight")):
                weight.normal_()
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("ffn", [96, 104, 200])
def test_experts_share_the_width(name: str, ffn: int, sizes: dict[str, Any]) -> None:
    """What a token uses is `ffn` neurons; experts are rounded down to multiples of 8."""
    config = new(name, **{**sizes, "ffn": ffn}).config
    width = config.moe_intermediate_size
    assert width % 8 == 0
    if name == "qwen3_moe":
        assert 2 * width <= ffn < 2 * (width + 8)
    if name == "qwen2_moe":
        assert 2 * width + config.shared_expert_intermediate_size == ffn
        assert width <= config.shared_expert_intermediate_size / 2 < width + 8
    if name == "deepseek_v3":
        assert 3 * width <= ffn < 3 * (width + 8)
        assert config.intermediate_size == ffn


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("active", [1, 2, 4])
def test_active_parameters_are_those_a_token_reaches(name: str, active: int, alive: Callable[..., Any]) -> None:
    """Brute force: the experts that one token's logits have a gradient for."""
    model = alive(name, active=active, experts=6, ffn=160)
    model(torch.tensor([[7]])).logits.square().sum().backward()
    reached = 0
    for key, weight in model.named_parameters():
        parts = weight.grad if ".experts." in key else weight.grad[None]
        chosen = sum(bool(part.any()) for part in parts) if ".experts." in key else 1
        reached += chosen * parts[0].numel()
    assert counts(model)["active"] == reached < counts(model)["total"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_counts_by_hand(name: str, tie: bool, sizes: dict[str, Any]) -> None:
    """Totals as torch counts them; tables by formula."""
    model = new(name, **sizes, tie=tie)
    found = counts(model)
    assert found["total"] == sum(p.numel() for p in model.parameters())
    per_layer = 50 * 3 * 8 if name == "gemma3n" else 0
    assert found["embedding"] == 50 * 32 * (1 if tie else 2) + per_layer
    assert (found["active"] < found["total"]) == (name in SPARSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matched_parameters(name: str) -> None:
    """Within 2 % at the sizes of the bench."""
    sizes = {
        "vocab_size": 4096, "width": 128, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 64, "max_length": 256,
    }  # fmt: skip
    ffn = matched(name, 2_500_000, **sizes)
    assert ffn % 8 == 0
    assert counts(new(name, ffn=ffn, **sizes))["total"] == pytest.approx(2_500_000, rel=0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("wanted", [36_000, 41_111, 60_000])
def test_no_other_width_is_nearer(name: str, wanted: int, sizes: dict[str, Any]) -> None:
    """Against all widths."""
    more = {key: value for key, value in sizes.items() if key != "ffn"} | {"experts": 4, "layers": 2}

    def off(ffn: int) -> int:
        return abs(counts(new(name, ffn=ffn, **more))["total"] - wanted)

    assert off(matched(name, wanted, **more)) == min(off(ffn) for ffn in range(32, 400, 8))


def test_matched_says_when_it_cannot(sizes: dict[str, Any]) -> None:
    """Fewer parameters than the tables alone have."""
    del sizes["ffn"]
    with pytest.raises(BenchError, match="narrowest FFN already, not 1,000"):
        matched("qwen3_moe", 1000, **sizes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {}, "Unknown architecture 'llama': choose one of qwen3, "),
        ("qwen3_moe", {"width": 0, "active": 0}, "must be positive: width=0, active=0"),
        ("qwen2_moe", {"heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
        ("qwen3_moe", {"head_dim": 7}, "head_dim=7 is odd"),
        ("qwen3_moe", {"ffn": 15}, "ffn=15 is too narrow for experts: it must be at least 16"),
        ("qwen2_moe", {"ffn": 31}, "at least 32"),
        ("deepseek_v3", {"ffn": 23}, "at least 24"),
        ("qwen3_moe", {"active": 9}, "active=9 of experts=8"),
        ("deepseek_v3", {"experts": 1, "active": 1}, "at least 2 experts"),
        ("deepseek_v3", {"head_dim": 6}, "head_dim=6 is no multiple of 4"),
        ("deepseek_v3", {"width": 24}, "width=24 is too narrow for latent attention"),
        ("gemma3n", {"width": 30}, "width=30 is not a multiple of heads=4"),
        ("qwen3", {"heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
    ],
)
def test_sizes_that_do_not_fit(name: str, changes: dict[str, int], message: str, sizes: dict[str, Any]) -> None:
    """One line each."""
    with pytest.raises(BenchError, match=message):
        new(name, **{**sizes, **changes})
