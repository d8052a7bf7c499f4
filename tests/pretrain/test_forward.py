"""The forward pass of all architectures: documents, balance, threads, the quick way on a CPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyonn_lib.pretrain.architectures import ARCHITECTURES
from tinyonn_lib.pretrain.forward import forward, quick, sequence_balance, switch_balance

SPARSE = ("qwen3_moe", "qwen2_moe", "deepseek_v3")


def random_ids(seed: int, rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def gates(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def switch_by_hand(logits: np.ndarray, active: int) -> float:
    """Token by token, over the whole batch."""
    tokens = logits.reshape(-1, logits.shape[-1])
    experts = tokens.shape[1]
    share, mass = np.zeros(experts), np.zeros(experts)
    for token in tokens:
        p = np.exp(token) / np.exp(token).sum()
        mass += p / len(tokens)
        for expert in np.argsort(-p)[:active]:
            share[expert] += 1 / (len(tokens) * active)
    return float(experts * sum(f * p for f, p in zip(share, mass, strict=True)))


def sequence_by_hand(logits: np.ndarray, active: int) -> float:
    """Eq. 17 to 20, row by row."""
    losses = []
    for row in logits:
        length, experts = row.shape
        f, p = np.zeros(experts), np.zeros(experts)
        for token in row:
            s = 1 / (1 + np.exp(-token))
            p += s / s.sum() / length
            for expert in np.argsort(-s)[:active]:
                f[expert] += experts / (active * length)
        losses.append(float((f * p).sum()))
    return float(np.mean(losses))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_hidden_are_the_models_own(name: str, alive: Callable[..., Any]) -> None:
    """To the bit."""
    model, ids = alive(name), random_ids(0)
    with torch.no_grad():
        out = forward(model, ids)
        assert torch.equal(out.logits, model(ids).logits)
        assert torch.equal(out.hidden, model.model(ids).last_hidden_state)
    assert out.balance.shape == ()
    assert (float(out.balance) == 0) == (name not in SPARSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_documents_in_a_row_do_not_see_each_other(name: str, attention: str, alive: Callable[..., Any]) -> None:
    """Another first document leaves the others' logits alone; each is as it is by itself; without positions not."""
    model, ids = alive(name), random_ids(1, rows=2, length=20)
    model.set_attn_implementation(attention)
    lengths = (7, 1, 12)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    other = ids.clone()
    other[:, :7] = random_ids(2, length=7)
    with torch.no_grad():
        packed = forward(model, ids, positions).logits
        assert torch.equal(forward(model, other, positions).logits[:, 7:], packed[:, 7:])
        parts = [forward(model, part).logits for part in ids.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=1e-5, rtol=0)
        assert not torch.allclose(forward(model, ids).logits[:, 7:], packed[:, 7:], atol=1e-3)


@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize(
    ("measure", "by_hand"), [(switch_balance, switch_by_hand), (sequence_balance, sequence_by_hand)]
)
def test_balance_by_hand(
    measure: Callable[[Tensor, int], Tensor], by_hand: Callable[[np.ndarray, int], float], active: int
) -> None:
    """Against plain loops in float64."""
    logits = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(active)) * 2
    assert float(measure(logits, active)) == pytest.approx(by_hand(logits.double().numpy(), active), rel=1e-5)


@pytest.mark.parametrize("measure", [switch_balance, sequence_balance])
def test_balance_of_extremes(measure: Callable[[Tensor, int], Tensor]) -> None:
    """1 when all experts get the same, E / k when the same k get everything."""
    even = torch.full((3, 8, 8), -20.0)
    for token in range(8):
        even[:, token, [token, (token + 1) % 8]] = 20.0
    assert float(measure(even, 2)) == pytest.approx(1.0, rel=1e-4)
    one_sided = torch.full((3, 8, 8), -20.0)
    one_sided[..., :2] = 20.0
    assert float(measure(one_sided, 2)) == pytest.approx(4.0, rel=1e-4)


def test_sequences_balance_one_by_one() -> None:
    """Two rows that each use their own expert are balanced as a batch, and not as sequences."""
    logits = torch.full((2, 6, 2), -8.0)
    logits[0, :, 0] = logits[1, :, 1] = 8.0
    assert float(switch_balance(logits, 1)) == pytest.approx(1.0, rel=1e-3)
    assert float(sequence_balance(logits, 1)) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("name", SPARSE)
def test_balance_is_the_mean_over_the_layers(name: str, alive: Callable[..., Any]) -> None:
    """Of the routers' outputs, caught here by hooks."""
    model, ids, caught = alive(name), random_ids(3), []
    for gate in gates(model):
        gate.register_forward_hook(lambda module, args, output: caught.append(output[0].reshape(2, 24, -1).numpy()))
    with torch.no_grad():
        found = float(forward(model, ids).balance)
    by_hand = sequence_by_hand if name == "deepseek_v3" else switch_by_hand
    assert len(caught) == (2 if name == "deepseek_v3" else 3)
    assert found == pytest.approx(np.mean([by_hand(logits, 2) for logits in caught]), rel=1e-5)
    assert found > 1.01  # so that another layer or row would show


@pytest.mark.parametrize("name", SPARSE)
def test_gradients_reach_the_routers(name: str, alive: Callable[..., Any]) -> None:
    """From the balance alone, and from the logits alone."""
    model, ids = alive(name), random_ids(4)
    weights = [gate.weight for gate in gates(model)]
    out = forward(model, ids)
    for value in (out.balance, out.logits.square().mean()):
        grads = torch.autograd.grad(value, weights, retain_graph=True)
        assert all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_threads_get_each_their_own(name: str, alive: Callable[..., Any]) -> None:
    """Logits, balance and gradients as one after the other, to the bit."""
    model, batches = alive(name).train(), [random_ids(seed, length=20 + seed) for seed in (5, 6)]
    params = list(model.parameters())

    def one(ids: Tensor) -> tuple[Tensor, ...]:
        out = forward(model, ids)
        grads = torch.autograd.grad(out.logits.square().mean() + out.balance, params, allow_unused=True)
        return (out.logits.detach(), out.balance.detach(), *(grad for grad in grads if grad is not None))

    barrier = threading.Barrier(2)

    def together(ids: Tensor) -> list[tuple[Tensor, ...]]:
        barrier.wait()
        return [one(ids) for _ in range(4)]

    with quick(model), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(together, batches))
        wanted = [one(ids) for ids in batches]
    assert float(wanted[0][1]) != float(wanted[1][1]) or name not in SPARSE
    for runs, alone in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, alone, strict=True))


@pytest.mark.parametrize("name", SPARSE)
def test_split_experts_are_the_models_own(name: str, alive: Callable[..., Any]) -> None:
    """Logits and all gradients as with transformers' eager experts; also where experts have no token."""
    model = alive(name, experts=16)
    params = list(model.parameters())
    for ids in (random_ids(7), random_ids(8, rows=1, length=3)):

        def one(ids: Tensor = ids) -> list[Tensor]:
            out = forward(model, ids)
            grads = torch.autograd.grad(out.logits.square().mean(), params)
            return [out.logits.detach(), *grads]

        wanted = one()
        with quick(model):
            assert model.config._experts_implementation == "split"
            found = one()
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quick_leaves_the_settings(name: str, alive: Callable[..., Any]) -> None:
    """After an error, too."""
    model = alive(name)
    before = model.config._attn_implementation, model.config._experts_implementation
    assert before[0] == "sdpa"
    with contextlib.suppress(RuntimeError), quick(model):
        assert model.config._attn_implementation == "eager"
        raise RuntimeError("stop")
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
