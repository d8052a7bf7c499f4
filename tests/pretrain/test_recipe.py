"""Recipes: how many rows a step has, which optimiser has which parameter, and what the loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.train import fit
from tinyonn_lib.pretrain.architectures import ARCHITECTURES, new
from tinyonn_lib.pretrain.forward import forward, next_token_nats, quick
from tinyonn_lib.pretrain.latent import Latent, attached
from tinyonn_lib.pretrain.layout import IGNORED, Layout, Rows, lay
from tinyonn_lib.pretrain.mtp import MTPHead
from tinyonn_lib.pretrain.muon import Muon
from tinyonn_lib.pretrain.recipe import RECIPES, Recipe, loss, optimizers
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES

EXACT = Recipe(precision="float32", clip=None)
RAMPS = st.sampled_from([0.0, 0.1, 0.5, 0.99])


@given(st.integers(1, 20_000), st.integers(2, 64), st.integers(1, 20), RAMPS)
def test_steps_fill_the_budget(tokens: int, length: int, batch: int, ramp: float) -> None:
    sizes = Recipe(batch=batch, ramp=ramp).sizes(tokens, length)
    total = sum(sizes) * length
    if len(sizes) > 1:
        assert abs(total - tokens) <= batch * length / 2
    else:
        assert total <= tokens + batch * length  # at least a step, whatever the budget
    assert sizes == sorted(sizes)
    assert min(sizes) >= 1
    assert max(sizes) <= batch
    if not ramp:
        assert set(sizes) == {batch}
    else:
        assert sizes[0] == max(1, round(batch / 4))
        assert sizes[-1] == batch or total - sizes[-1] * length < ramp * tokens


def test_ramp_grows_from_a_quarter_over_its_share() -> None:
    sizes = Recipe(batch=16, ramp=0.5).sizes(64_000, 10)
    done = [10 * sum(sizes[:place]) for place in range(len(sizes))]
    assert sizes[0] == 4
    for size, before in zip(sizes, done, strict=True):
        assert size == pytest.approx(16 * min(1.0, 0.25 + 0.75 * before / 32_000), abs=0.5)
    assert sizes.index(16) == pytest.approx(len([b for b in done if b < 31_000]), abs=3)
    assert len(sizes) > 64_000 / 160  # small batches: more steps for the same tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer 'sgd': choose one of muon, adamw"),
        ({"layout": "diagonal"}, "packed, documents, padded"),
        ({"schedule": "square"}, "schedule 'square'"),
        ({"batch": 0}, "batch=0"),
        ({"ramp": 1.0}, r"ramp=1\.0"),
        ({"ramp": -0.1}, r"ramp=-0\.1"),
        ({"balance": -1.0}, r"balance=-1\.0"),
        ({"mtp": -1.0}, r"mtp=-1\.0"),
    ],
)
def test_refuses(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        Recipe(**change)


def test_recipe_from_parameters() -> None:
    found = Recipe.of(SimpleNamespace(lr_matrix=0.5, clip=0.0, tokens=3, layout="padded"))
    assert found == Recipe(lr_matrix=0.5, clip=None, layout="padded")
    assert Recipe.of(SimpleNamespace(clip=0.3)).clip == 0.3
    assert Recipe.of(SimpleNamespace()) == Recipe()  # what is not said stays


def test_the_phase_and_the_contest_have_the_same_default() -> None:
    assert Recipe.of(params.validate(PHASES["pretrain"], params.defaults(PHASES["pretrain"]))) == RECIPES["default"]


def tables(name: str) -> bool:
    """Whether a parameter belongs to AdamW by its name."""
    tables = ("embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight", "latent.table.weight")
    return name.endswith((*tables, ".bias", "norm.weight", "layernorm.weight", "correct_output_scale"))


def held(opts: list[torch.optim.Optimizer], kind: type) -> dict[int, dict[str, Any]]:
    """Parameter → its group, of the optimisers of a kind; each only once over all."""
    found = [(id(p), g, type(o)) for o in opts for g in o.param_groups for p in g["params"]]
    assert len({place for place, _, _ in found}) == len(found)
    return {place: group for place, group, of in found if of is kind}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_goes_where_it_belongs(name: str, tie: bool, sizes: dict[str, Any]) -> None:
    model = new(name, **sizes, tie=tie)
    named = dict(model.named_parameters())
    frozen = next(key for key in named if key.endswith("layers.1.self_attn.o_proj.weight"))
    named.pop(frozen).requires_grad_(False)
    opts = optimizers(model, Recipe(lr_matrix=0.3, lr_other=0.7, momentum=0.6, weight_decay=0.2), parts=2)
    muon, adamw = held(opts, Muon), held(opts, torch.optim.AdamW)
    assert len(opts) == 3
    for key, param in named.items():
        if tables(key) or param.ndim < 2:
            group = adamw.pop(id(param))
            assert (group["lr"], group["weight_decay"]) == (0.7, 0.0), key
        else:
            group = muon.pop(id(param))
            assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.6, 0.2), key
            assert group["parts"] == (2 if key.endswith("gate_up_proj") else 1), key
    assert not muon
    assert not adamw
    assert any(key.endswith("lm_head.weight") for key in named) != tie
    stacks = [key for key, param in named.items() if param.ndim == 3]
    assert bool(stacks) == ("moe" in name or "deepseek" in name)
    loads = [sum(p.numel() * min(p.shape[-2:]) for g in o.param_groups for p in g["params"]) for o in opts[:2]]
    assert abs(loads[0] - loads[1]) <= max(p.numel() * min(p.shape[-2:]) for p in named.values() if p.ndim > 1)


def test_adamw_has_two_rates_and_decays_matrices_only(sizes: dict[str, Any]) -> None:
    model = new("qwen2_moe", **sizes)
    (opt,) = optimizers(model, replace(RECIPES["adamw"], lr_matrix=0.3, lr_other=0.7, weight_decay=0.2), parts=2)
    groups = held([opt], torch.optim.AdamW)
    for key, param in model.named_parameters():
        other = tables(key) or param.ndim < 2
        assert (groups[id(param)]["lr"], groups[id(param)]["weight_decay"]) == ((0.7, 0.0) if other else (0.3, 0.2))
    assert opt.defaults["betas"] == (0.9, 0.95)


def test_what_is_trained_beside_the_model(sizes: dict[str, Any]) -> None:
    model = new("qwen3", **sizes, tie=False)
    head = MTPHead(model)
    muon, adamw = (held(optimizers(nn.ModuleList([model, head]), Recipe()), kind) for kind in (Muon, torch.optim.AdamW))
    assert {id(p) for p in head.parameters() if p.ndim == 2} < muon.keys()
    assert {id(p) for p in head.parameters() if p.ndim == 1} < adamw.keys()
    assert id(model.lm_head.weight) in adamw
    assert len(muon) + len(adamw) == len([*model.parameters(), *head.parameters()])
    latent = Latent(model, 6)
    with attached(model, latent):
        opts = optimizers(model, Recipe())
    assert id(latent.table.weight) in held(opts, torch.optim.AdamW)
    assert id(latent.up.weight) in held(opts, Muon)


TEXTS = [[5 + (3 * n + k * k) % 40 for k in range(n)] for n in (0, 3, 30, 7, 1, 12, 25, 4, 9, 16)]


def laid(layout: Layout) -> Rows:
    return lay(TEXTS, 12, eos=0, pad=1, layout=layout)


@pytest.mark.parametrize("layout", ["packed", "documents", "padded"])
def test_loss_is_the_mean_over_the_asked_tokens(layout: Layout, alive: Callable[..., Any]) -> None:
    """Against float64, a row at a time, and a document at a time where masks part them; in float32 and bfloat16."""
    rows, exact, nats = laid(layout), alive("qwen3"), list[float]()
    for row in rows.ids.tolist():
        begins = [0, *(place for place in range(1, 11) if row[place] == 0 and layout == "documents")]
        for begin, end in zip(begins, [*begins[1:], 11], strict=True):
            with torch.no_grad():
                chances = exact(input_ids=torch.tensor([row[begin:end]])).logits[0].log_softmax(-1)
            wanted = row[begin + 1 : end + 1]
            nats += [-float(chances[i, token]) for i, token in enumerate(wanted) if (layout, token) != ("padded", 1)]
    expected, model = sum(nats) / len(nats), alive("qwen3").float()
    batch = {"ids": rows.ids} | ({} if rows.positions is None else {"positions": rows.positions})
    with torch.no_grad():
        assert float(loss(model, rows, EXACT)(batch)) == pytest.approx(expected, rel=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert float(loss(model, rows, EXACT)(batch)) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_nats_of_each_place(dtype: torch.dtype, tolerance: float) -> None:
    logits = (4 * torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    asked = torch.arange(15).view(3, 5)
    asked[1, 2] = asked[2, 4] = -100
    exact = logits.detach().double().requires_grad_()
    right = F.cross_entropy(exact.flatten(0, 1), asked.flatten(), reduction="none").view(3, 5)
    found = next_token_nats(logits, asked)
    assert found.dtype == torch.float32
    assert found[1, 2] == found[2, 4] == 0
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=0)
    found.sum().backward()
    right.sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert not logits.grad[1, 2].any()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("layout", ["packed", "documents", "padded"])
@pytest.mark.parametrize(("shards", "mtp"), [(2, 0.0), (3, 0.0), (3, 0.5)])
def test_unequal_shards_learn_as_one(layout: Layout, shards: int, mtp: float, alive: Callable[..., Any]) -> None:
    """Seven rows in 2 or 3 parts, some of them mostly padding: the loss and one step of plain gradient descent."""
    rows = laid(layout)
    batch = {"ids": rows.ids[:7]} | ({} if rows.positions is None else {"positions": rows.positions[:7]})
    results: list[tuple[float, float, Tensor]] = []
    for count in (1, shards):
        model = alive("qwen3")
        of = loss(model, rows, replace(EXACT, mtp=mtp), MTPHead(model) if mtp else None)
        history = fit(
            model, of, lambda step: batch, torch.optim.SGD(model.parameters(), lr=1.0), steps=1, schedule="constant",
            clip=None, shards=count,
        )  # fmt: skip
        flat = torch.cat([param.detach().flatten() for param in model.parameters()])
        results.append((history["loss"][0], history["grad_norm"][0], flat))
    # Sums of nats are float32 (`next_token_nats`).
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-6)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=1e-6)
    asked = (rows.asked(rows.ids[:7]) != IGNORED).sum(1)
    assert (len(set(asked.tolist())) > 1) == (layout == "padded")


def test_balance_and_the_token_after_the_next_weigh_what_the_recipe_says(alive: Callable[..., Any]) -> None:
    rows, model = laid("documents"), alive("qwen3_moe").float()
    head, batch = MTPHead(model), {"ids": rows.ids, "positions": rows.positions}
    assert rows.positions is not None
    torch.manual_seed(0)
    with torch.no_grad(), quick(model):
        model.get_input_embeddings().weight.normal_()
        for weight in head.parameters():
            weight.normal_()
        out = forward(model, rows.ids[:, :-1], rows.positions[:, :-1])
        after = head.loss(model, out.hidden, rows.ids, rows.positions)
        across = head.loss(model, out.hidden, rows.ids)  # as if there were no borders
        bare = loss(model, rows, replace(EXACT, balance=0.0))(batch)
        found = loss(model, rows, replace(EXACT, balance=0.5, mtp=0.3), head)(batch)
    assert out.balance > 0.5
    assert abs(across - after) > 0.01
    assert float(found) == pytest.approx(float(bare + 0.5 * out.balance + 0.3 * after), rel=1e-5)


def test_padding_is_no_target_of_the_token_after_the_next(alive: Callable[..., Any]) -> None:
    """More padding at the end of the rows changes nothing but what is divided by."""
    model = alive("qwen3").float()
    head, short = MTPHead(model), laid("padded")
    wide = Rows(F.pad(short.ids, (0, 5), value=1), None, 1)
    with torch.no_grad():
        one, two = (loss(model, rows, replace(EXACT, mtp=0.7), head)({"ids": rows.ids}) for rows in (short, wide))
    assert float(one) == pytest.approx(float(two), rel=1e-5)
