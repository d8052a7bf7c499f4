"""Analytic routers in a checkpoint: a stranger's program chooses as they do, with gates of 1; and their file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import export, router_file, routing
from tinyonn_lib.experts.analytic import Linear, Representative
from tinyonn_lib.lm import models

from .dense import dense, divide

IDS = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(0))
KINDS = ("qwen2", "qwen3", "llama")
DIVISION: dict[str, Any] = {"counts": (6, 6), "sizes": (8, 8)}


def linear(scale: float = 1.0, experts: int = 6, width: int = 32) -> list[Linear]:
    """Random routers whose biases weigh as much as their rows."""
    generator = torch.Generator().manual_seed(2)
    return [
        Linear(
            scale * torch.randn(experts, width, generator=generator) / width**0.5,
            scale * torch.randn(experts, generator=generator),
        )
        for _ in range(2)
    ]


# Runs where our package cannot be imported.
_STRANGER = """
import json, sys
sys.modules["tinyonn_lib"] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_experts_per_tok=2)
    found = {"class": type(model).__name__}
    def keep(layer):
        def hook(module, args, out):
            found[f"x{layer}"] = args[0].flatten(0, -2).numpy()
            found[f"gates{layer}"], found[f"chosen{layer}"] = out[1].numpy(), out[2].numpy()
        return hook
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate.register_forward_hook(keep(layer))
    with torch.no_grad():
        found["logits"] = model(torch.from_numpy(np.load(sys.argv[2]))).logits.numpy()
    np.savez(f"{folder}/found.npz", **found)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Kind of dense model → what a stranger's process computes with two experts on."""
    base = tmp_path_factory.mktemp("biased")
    rows, biases = router_file.unit_gates(linear())
    folders = [
        export.export(dense(kind), divide(**DIVISION), base / kind, routers=rows, biases=biases) for kind in KINDS
    ]
    np.save(base / "ids.npy", IDS.numpy())
    command = [sys.executable, "-c", _STRANGER, json.dumps([str(folder) for folder in folders]), str(base / "ids.npy")]
    subprocess.run(command, cwd=base, check=True, capture_output=True)
    return {kind: dict(np.load(base / kind / "found.npz")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_chooses_as_the_scores_do(kind: str, found: dict[str, dict[str, np.ndarray]]) -> None:
    theirs = found[kind]
    assert str(theirs["class"]) == "Glm4MoeForCausalLM"
    for layer, score in enumerate(linear()):
        x = torch.from_numpy(theirs[f"x{layer}"])
        values, chosen = score(x), torch.from_numpy(theirs[f"chosen{layer}"])
        highest = values.topk(3).values
        clear = highest[:, 1] - highest[:, 2] > 0.05  # twice float32's step at σ = ½; rows have length 1
        assert clear.float().mean() > 0.8
        mask = torch.zeros_like(values).scatter_(-1, chosen, 1.0)
        assert torch.equal(mask[clear], routing.top_mask(values, 2)[clear])
        without = routing.top_mask(values - score.bias, 2)
        assert (without != mask).any(-1).float().mean() > 0.2  # the bias counts
        assert np.abs(theirs[f"gates{layer}"] - 1).max() <= 1e-4
        assert np.abs(theirs[f"gates{layer}"] - 1).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_judged_is_what_is_loaded(kind: str, found: dict[str, dict[str, np.ndarray]]) -> None:
    model, part = dense(kind), divide(**DIVISION)
    with torch.no_grad(), routing.scaled(models.ffns(model), routing.chosen(part, linear(), 2)):
        expected = model(IDS).logits.numpy()
    gap = np.abs(found[kind]["logits"] - expected).max(-1) / np.abs(expected).max()
    assert np.median(gap) <= 1e-4  # a near tie moves single tokens, and those after it
    with torch.no_grad():
        assert np.abs(model(IDS).logits.numpy() - expected).max() > 0.01 * np.abs(expected).max()


def test_every_expert_on_is_the_dense_model(tmp_path: Path) -> None:
    rows, biases = router_file.unit_gates(linear(scale=50.0))
    items = [
        (export.export(dense(kind), divide(**DIVISION), tmp_path / kind, routers=rows, biases=biases), dense(kind), IDS)
        for kind in KINDS
    ]
    for proof in export.verify_all(items):
        assert proof["missing"] == proof["unexpected"] == []
        assert 0 < proof["relative_error"] <= 2e-5  # ε, which these models' large weights double at most


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-3])
def test_unit_gates_keep_the_order_and_the_gates(epsilon: float) -> None:
    """In float64, where no rounding hides the formula's own error, which is of the order ε²."""
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for score, row, bias in zip(linear(), *router_file.unit_gates(linear(), epsilon), strict=True):
        half = (x @ row.double().T).sigmoid()
        values = x @ score.weight.double().T + score.bias.double()
        centred = values - values.mean(-1, keepdim=True)
        spread = (score.weight - score.weight.mean(0)).double().square().sum(1).mean().sqrt()
        torch.testing.assert_close((half - 0.5 + bias.double()) / epsilon * 4, centred / spread, atol=2e-5, rtol=1e-5)
        assert (2 * half - 1).std() == pytest.approx(epsilon / 2, rel=0.2)


def test_unit_gates_mean_the_same_for_every_scale_and_common_part() -> None:
    for rows, other in zip(
        zip(*router_file.unit_gates(linear()), strict=True),
        zip(*router_file.unit_gates([Linear(1e3 * s.weight + 7, 1e3 * s.bias - 2) for s in linear()]), strict=True),
        strict=True,
    ):
        for one, two in zip(rows, other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-4)


def test_a_router_that_is_only_a_bias() -> None:
    """As `analytic.static`: best first, whatever the token."""
    (rows,), (bias,) = router_file.unit_gates([Linear(torch.zeros(28, 8), -torch.arange(28.0))])
    assert rows.count_nonzero() == 0
    assert (0.5 + bias).sort(descending=True).indices.tolist() == list(range(28))
    assert (0.5 + bias).unique().numel() == 28


def test_only_linear_scores_can_leave() -> None:
    other = Representative(torch.zeros(4, 8), torch.zeros(4, 8), torch.nn.functional.silu)
    with pytest.raises(BenchError, match="linear routers only; layer 1's is 'Representative'"):
        router_file.unit_gates([linear()[0], other])


@pytest.mark.parametrize("biased", [True, False])
def test_the_file_comes_back(biased: bool, tmp_path: Path) -> None:
    rows = [torch.randn(n, 8) for n in (3, 6, *[4] * 10)]  # twelve layers: names sort otherwise than numbers
    biases = [torch.randn(len(r)) for r in rows] if biased else None
    path = router_file.save_routers(tmp_path / "new" / "routers.safetensors", rows, biases)
    found = router_file.load_routers(path)
    assert all(torch.equal(a, b) for a, b in zip(found[0], rows, strict=True))
    assert (found[1] is None) == (biases is None)
    assert all(torch.equal(a, b) for a, b in zip(found[1] or [], biases or [], strict=True))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.norm.weight": (4,)}, "holds 'model.norm.weight', so it is no file of routers"),
        ({}, "lacks routers or biases of some layers"),
        ({"layers.0.weight": (4, 8), "layers.2.weight": (4, 8)}, "lacks routers or biases of some layers"),
        ({"layers.0.weight": (4, 8), "layers.1.weight": (4, 8), "layers.1.bias": (4,)}, "lacks routers or biases"),
        ({"layers.0.weight": (4, 8), "layers.0.bias": (5,)}, r"layer 0 has rows of torch.float32 \(4, 8\) and biases"),
        ({"layers.0.weight": (4,)}, r"layer 0 has rows of torch.float32 \(4,\)"),
        ({"layers.0.weight": ()}, r"layer 0 has rows of torch.float32 \(\)"),
    ],
)
def test_files_that_hold_something_else(tensors: dict[str, tuple[int, ...]], says: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "r.safetensors")
    with pytest.raises(BenchError, match=says) as caught:
        router_file.load_routers(tmp_path / "r.safetensors")
    assert "\n" not in str(caught.value)


def test_damaged_files_and_other_partitions(tmp_path: Path) -> None:
    path = router_file.save_routers(tmp_path / "r.safetensors", *router_file.unit_gates(linear()))
    rows, biases = router_file.load_routers(path)
    for part, says in (
        (divide(), r"layer 0 has \(6, 32\) instead of \(4, 32\)"),
        (divide(counts=(6, 8), sizes=(8, 8)), r"layer 1 has \(6, 32\) instead of \(8, 32\)"),
    ):
        with pytest.raises(BenchError, match=f"do not belong to this partition and model: {says}"):
            export.export(dense("qwen3"), part, tmp_path / "moe", routers=rows, biases=biases)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BenchError, match="Cannot read .*r.safetensors: .*cut off or damaged"):
        router_file.load_routers(path)
    with pytest.raises(BenchError, match="Cannot read .*none: it is missing"):
        router_file.load_routers(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="Cannot write .*file/r: .*Make room"):
        router_file.save_routers(tmp_path / "file" / "r", rows, biases)
