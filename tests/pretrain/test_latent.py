"""The ablation: latent embeddings turned by depth, and the plain per-layer tables that are its control."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain.architectures import new
from tinyonn_lib.pretrain.forward import forward
from tinyonn_lib.pretrain.latent import Latent, attached


def random_ids(seed: int, length: int = 12) -> Tensor:
    return torch.randint(2, 50, (2, length), generator=torch.Generator().manual_seed(seed))


def trained(model: Any, rotate: bool) -> Latent:
    """One whose up-projection is no longer zero."""
    latent = Latent(model, 12, rotate=rotate)
    torch.nn.init.normal_(latent.up.weight, generator=torch.Generator().manual_seed(2))
    torch.nn.init.normal_(latent.table.weight, generator=torch.Generator().manual_seed(3))
    return latent


@pytest.mark.parametrize("rotate", [True, False])
def test_at_the_start_nothing_changes_and_afterwards_nothing_stays(rotate: bool, alive: Callable[..., Any]) -> None:
    """The plain model before, inside (still zero) and after; its parameters, hooks and settings, too."""
    model, ids = alive("qwen3"), random_ids(0)
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        plain = forward(model, ids).logits
        with attached(model, Latent(model, 12, rotate=rotate)):
            assert torch.equal(forward(model, ids).logits, plain)
        with contextlib.suppress(RuntimeError), attached(model, trained(model, rotate)):
            assert not torch.allclose(forward(model, ids).logits, plain, atol=1e-3)
            raise RuntimeError("stop")
        assert torch.equal(forward(model, ids).logits, plain)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rotate", [True, False])
def test_each_layers_input_by_hand(rotate: bool, alive: Callable[..., Any]) -> None:
    """Turned pair by pair in float64; the control from its own columns."""
    model, ids = alive("qwen3"), random_ids(1)
    latent, inputs = trained(model, rotate), []
    for layer in model.model.layers:  # these hooks run before those that add
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad(), attached(model, latent):
        for layer in model.model.layers:  # and these after them
            layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        forward(model, ids)
        for place in range(3):
            for row, token in ((0, 0), (1, 7)):
                a = latent.table.weight[ids[row, token]].tolist()
                if rotate:
                    turned = [0.0] * 12
                    for j in range(6):
                        angle = place * 10 ** -(j / 5)
                        turned[j] = a[j] * math.cos(angle) - a[j + 6] * math.sin(angle)
                        turned[j + 6] = a[j] * math.sin(angle) + a[j + 6] * math.cos(angle)
                else:
                    turned = [value if j // 4 == place else 0.0 for j, value in enumerate(a)]
                wanted = latent.up.weight @ torch.tensor(turned, dtype=torch.float64)
                added = (inputs[2 * place + 1] - inputs[2 * place])[row, token]
                torch.testing.assert_close(added, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rotate", [True, False])
def test_gradients_flow_into_both_parts(rotate: bool, alive: Callable[..., Any]) -> None:
    """B at once, A as soon as B is no longer zero, as in LoRA; all of them are the model's parameters inside."""
    model, ids = alive("qwen3"), random_ids(2)
    for latent, moves in ((Latent(model, 12, rotate=rotate), False), (trained(model, rotate), True)):
        with attached(model, latent):
            assert {id(p) for p in latent.parameters()} < {id(p) for p in model.parameters()}
            loss = forward(model, ids).logits.square().mean()
            table, up = torch.autograd.grad(loss, [latent.table.weight, latent.up.weight])
        assert bool(up.ne(0).all())
        assert bool(table[ids.unique()].ne(0).all()) is moves


def test_the_seed_makes_the_table(alive: Callable[..., Any]) -> None:
    """Same seed, same table; another seed, another; the global random state is left alone."""
    model, before = alive("qwen3"), torch.random.get_rng_state()
    one, again, other = (Latent(model, 6, seed=seed).table.weight for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_two_threads_get_each_their_own(alive: Callable[..., Any]) -> None:
    """Logits and gradients as one after the other, to the bit."""
    model, batches = alive("qwen3"), [random_ids(seed, length=10 + seed) for seed in (3, 4)]
    latent, barrier = trained(model, True), threading.Barrier(2)

    def one(ids: Tensor) -> list[Tensor]:
        logits = forward(model, ids).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().mean(), list(latent.parameters()))]

    def together(ids: Tensor) -> list[list[Tensor]]:
        barrier.wait()
        return [one(ids) for _ in range(6)]

    with attached(model, latent):
        wanted = [one(ids) for ids in batches]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(together, batches))
    for runs, alone in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, alone, strict=True))


def test_a_copy_of_the_model_has_its_own(alive: Callable[..., Any]) -> None:
    """A trial on a deep copy neither uses nor changes the original's table."""
    model, ids = alive("qwen3"), random_ids(5)
    latent = trained(model, True)
    with torch.no_grad(), attached(model, latent):
        before = forward(model, ids).logits
        copied = copy.deepcopy(model)
        assert torch.equal(forward(copied, ids).logits, before)
        copied.model.latent.up.weight.zero_()
        assert not torch.equal(forward(copied, ids).logits, before)
        assert torch.equal(forward(model, ids).logits, before)


def test_a_checkpoint_is_the_plain_model(tmp_path: Path, alive: Callable[..., Any]) -> None:
    """Also when it is saved inside."""
    model = alive("qwen3")
    model.save_pretrained(tmp_path / "plain")
    with attached(model, trained(model, True)):
        model.save_pretrained(tmp_path / "inside")
    names = []
    for folder in ("plain", "inside"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]


@pytest.mark.parametrize("rank", [6, 12, 48])
def test_parameters_by_formula(rank: int, sizes: dict[str, Any]) -> None:
    """r · (V + d), with and without rotation."""
    model = new("qwen3", **sizes)
    found = {sum(p.numel() for p in Latent(model, rank, rotate=rotate).parameters()) for rotate in (True, False)}
    assert found == {rank * (50 + 32)}


def test_what_does_not_fit(alive: Callable[..., Any]) -> None:
    """One line each."""
    model = alive("qwen3")
    with pytest.raises(BenchError, match="rank=5 must be a multiple of 2"):
        Latent(model, 5)
    with pytest.raises(BenchError, match="rank=4 must be a multiple of 3"):
        Latent(model, 4, rotate=False)
    with pytest.raises(BenchError, match="not of gemma3n_text"):
        Latent(alive("gemma3n"), 4)
    with attached(model, Latent(model, 6)), pytest.raises(BenchError, match="need token ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))
