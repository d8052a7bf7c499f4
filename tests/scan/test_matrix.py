"""Row and tensor norms of every weight against autograd in float64, over all ways to train that change the hooks."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scan_models import linears, nll, quantised, samples, tiny
from torch import Tensor, nn

from tinyonn_lib.scan import weight
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.statistics import Totals

ALL = "neurons,linears,embeddings"
RHO = 0.1
MODES = ("trainable", "frozen", "nf4")
CHECKPOINTS = ("none", "reentrant", "non-reentrant")
CASES = [
    pytest.param(*case, id="-".join((case[0], case[1], "tied" if case[2] else "untied", case[3])))
    for case in itertools.product(MODES, CHECKPOINTS, (True, False), ("fp32", "bf16"))
]


def made(mode: str, tied: bool, dtype: str) -> tuple[nn.Module, nn.Module]:
    """A model to observe, and one in full precision with the same weights."""
    if mode == "nf4":
        model, plain = quantised(tie_word_embeddings=tied)
        if dtype == "bf16":
            for module in linears(model).values():
                module.compute_dtype = torch.bfloat16
            others = [p for p in model.parameters() if p.is_floating_point()]
            for parameter in others:
                parameter.data = parameter.data.bfloat16()
        return model, plain.requires_grad_(True)
    model = tiny(tie_word_embeddings=tied)
    plain = copy.deepcopy(model).requires_grad_(True)
    return (model.bfloat16() if dtype == "bf16" else model).requires_grad_(mode == "trainable"), plain


def gradients(model: nn.Module, text: list[int]) -> dict[str, Tensor]:
    """Weight gradients by autograd in float64."""
    exact = copy.deepcopy(model).double()
    nll(exact, torch.tensor([text])).backward()
    names = {id(p): n.removesuffix(".weight") for n, p in exact.named_parameters()}
    return {names[id(p)]: p.grad for p in exact.parameters() if p.dim() == 2 and p.grad is not None}


def gradients_of_its_own(model: nn.Module, text: list[int]) -> dict[str, Tensor]:
    """The same for a model that computes in bf16: what its own X and G give in float64, without the scanner."""
    x: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    handles = []

    def watch(name: str):  # noqa: ANN202
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_(True)
            x[name] = args[0].detach()
            output.register_hook(lambda grad: g.__setitem__(name, grad))

        return hook

    watched = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for name, module in watched.items():
        handles.append(module.register_forward_hook(watch(name)))
    nll(model, torch.tensor([text])).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, module in watched.items():
        grad = g[name].double().flatten(0, 1)
        if isinstance(module, nn.Embedding):
            found[name] = torch.zeros(module.num_embeddings, grad.shape[1]).double().index_add_(0, x[name][0], grad)
        else:
            found[name] = grad.t() @ x[name].double().flatten(0, 1)
    head, embedding = model.lm_head, model.model.embed_tokens
    if head.weight is embedding.weight:
        found["model.embed_tokens"] += found.pop("lm_head")
    return found


def agrees(found: np.ndarray, expected: Tensor) -> bool:
    """Within 1e-4 of each norm; of those that are next to nothing, within 1e-7 of the largest."""
    norms = expected.double().numpy()
    return bool((np.abs(found - norms) <= 1e-4 * norms + 1e-7 * norms.max()).all())


def check(totals: Totals, expected: dict[str, Tensor]) -> None:
    layout = totals.layout
    for number, target in enumerate(layout.targets):
        if target.kind == "neurons":
            parts = {part: expected[f"{target.name}.{part}_proj"].double() for part in ("gate", "up", "down")}
            assert agrees(totals.of(target.name, "grad_gate"), parts["gate"].norm(dim=1)), target.name
            assert agrees(totals.of(target.name, "grad_up"), parts["up"].norm(dim=1)), target.name
            assert agrees(totals.of(target.name, "grad_down"), parts["down"].norm(dim=0)), target.name
            whole = torch.stack([part.norm() for part in parts.values()]).norm()
        else:
            gradient = expected[target.name].double()
            assert agrees(totals.of(target.name, "grad", target.kind), gradient.norm(dim=1)), target.name
            whole = gradient.norm()
        assert totals.norms[number, 1] == pytest.approx(float(whole), rel=1e-4), target.name


@pytest.mark.parametrize(("mode", "checkpoint", "tied", "dtype"), CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_norms_equal_a_float64_reference(mode: str, checkpoint: str, tied: bool, dtype: str) -> None:
    model, plain = made(mode, tied, dtype)
    text = samples(1, low=70, high=71)[0]
    if dtype == "fp32":
        expected = gradients(plain, text)
    elif mode == "trainable":
        nll(model, torch.tensor([text])).backward()  # in bf16 its `.grad` is what there is
        names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
        expected = {names[id(p)]: p.grad.clone() for p in model.parameters() if p.dim() == 2}
        model.zero_grad()
    else:
        expected = gradients_of_its_own(model, text)
    if checkpoint != "none":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
    with Observer(model, ALL, rho=RHO) as observer:
        nll(model, torch.tensor([text])).backward()
    totals = observer.totals()
    check(totals, expected)
    assert (totals.counts == [len(text), 1, len(text), 1]).all()  # each target exactly once
    assert len(totals.layout.targets) == 2 + 2 * 7 + (1 if tied else 2)
    assert set(observer.methods) == ({"grad"} if mode == "trainable" else set(observer.methods) - {"grad"})


@pytest.mark.parametrize("method", ["gram", "tiles"])
def test_both_ways_from_inputs_give_all_rows(method: str) -> None:
    for tied in (True, False):
        model, plain = made("frozen", tied, "fp32")
        text = samples(1, low=40, high=41)[0]
        with Observer(model, ALL, rho=RHO, method=method) as observer:
            nll(model, torch.tensor([text])).backward()
        check(observer.totals(), gradients(plain, text))


@pytest.mark.parametrize("mode", ["trainable", "frozen"])
def test_accumulation_and_loss_scale_with_a_tied_embedding(mode: str) -> None:
    model, plain = made(mode, True, "fp32")
    texts = samples(3)
    exact = copy.deepcopy(plain).double()
    for text in texts:
        (nll(exact, torch.tensor([text])) / 3).backward()
    names = {id(p): n.removesuffix(".weight") for n, p in exact.named_parameters()}
    expected = {names[id(p)]: p.grad for p in exact.parameters() if p.dim() == 2}
    with Observer(model, ALL, rho=RHO, calls=3) as observer:
        observer.loss_scale = torch.tensor(4096.0)
        for text in texts:
            (nll(model, torch.tensor([text])) * 4096 / 3).backward()
        observer.end_sample()
    check(observer.totals(), expected)


def test_a_shorter_last_accumulation_is_closed_on_demand() -> None:
    model, plain = made("frozen", True, "fp32")
    texts = samples(2)
    exact = copy.deepcopy(plain).double()
    for text in texts:
        nll(exact, torch.tensor([text])).backward()
    names = {id(p): n.removesuffix(".weight") for n, p in exact.named_parameters()}
    with Observer(model, ALL, rho=RHO, calls=4) as observer:
        for text in texts:
            nll(model, torch.tensor([text])).backward()
        observer.end_sample(calls=2)
    check(observer.totals(), {names[id(p)]: p.grad for p in exact.parameters() if p.dim() == 2})


def test_activations_of_linears_and_embeddings() -> None:
    model, text = tiny(), samples(1, low=50, high=51)[0]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in linears(model).items():
        module.register_forward_hook(lambda m, a, y, name=name: seen.__setitem__(name, (a[0][0], y[0])))
    with torch.no_grad():
        model(input_ids=torch.tensor([text]))
    with Observer(model, ALL, rho=RHO, gradients=False) as observer:
        model(input_ids=torch.tensor([text]))
    totals = observer.totals()
    for name, (x, y) in seen.items():
        number = next(i for i, t in enumerate(totals.layout.targets) if t.name == name)
        assert totals.norms[number, 0] == pytest.approx(x.double().norm().item(), rel=1e-5)
        np.testing.assert_allclose(totals.of(name, "abs_y"), y.double().abs().sum(0).detach().numpy(), rtol=1e-5)
        top = max(1, round(RHO * y.shape[1]))
        hits = torch.zeros_like(y).scatter_(1, y.abs().topk(top, dim=1).indices, 1.0).sum(0)
        np.testing.assert_array_equal(totals.of(name, "top"), hits.numpy())
    counts = np.bincount(text, minlength=97)
    np.testing.assert_array_equal(totals.of("model.embed_tokens", "count"), counts)


def test_tensor_level_keeps_the_same_norms_and_no_rows() -> None:
    model, texts = tiny(), samples(2)
    found = {}
    for rows in (True, False):
        with Observer(model.requires_grad_(False), "linears,embeddings", rho=RHO, rows=rows) as observer:
            for text in texts:
                nll(model, torch.tensor([text])).backward()
        found[rows] = observer.totals()
    np.testing.assert_allclose(found[True].norms, found[False].norms, rtol=1e-6)
    assert found[True].layout.units > 500
    assert found[False].layout.units == 0


def test_padding_row_of_an_embedding_gets_no_gradient() -> None:
    model = tiny(pad_token_id=3)
    text = [3, 5, 3, 7, 9]
    for trainable in (True, False):
        model.requires_grad_(trainable)
        with Observer(model, "*embed_tokens", rho=RHO) as observer:
            nll(model, torch.tensor([text])).backward()
        rows = observer.totals().of("model.embed_tokens", "grad")
        assert rows[3] == 0
        assert (rows[[5, 7]] > 0).all()
        model.zero_grad()


def test_full_precision_inside_whatever_the_caller_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = torch.backends.mkldnn.matmul
    model, plain = made("frozen", True, "fp32")
    text = samples(1, low=60, high=61)[0]
    seen = set()
    original = weight.row_squares_tiles

    def spying(*a: Tensor) -> Tensor:
        seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return original(*a)

    monkeypatch.setattr(weight, "row_squares_tiles", spying)
    for allow in (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(backends, "fp32_precision", "tf32"),
    ):
        allow()
        before = backends.fp32_precision
        try:
            with Observer(model, "linears", rho=RHO, method="tiles") as observer:
                nll(model, torch.tensor([text])).backward()
            assert backends.fp32_precision == before
        finally:
            torch.set_float32_matmul_precision("highest")
    assert seen == {"ieee"}
    expected = gradients(plain, text)["model.layers.0.mlp.up_proj"]
    assert agrees(observer.totals().of("model.layers.0.mlp.up_proj", "grad"), expected.norm(dim=1))
