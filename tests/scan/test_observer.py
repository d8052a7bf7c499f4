from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scan_models import error, neurons, nll, quantised, reference, samples, tiny
from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.observer import Observer
from tinyonn_lib.scan.statistics import STATISTICS, Totals

RHO = 0.1
METHODS = ["auto", "gram", "tiles", "grad"]


def observe(model: nn.Module, texts: list[list[int]], **options: object) -> Totals:
    with Observer(model, rho=RHO, **options) as observer:
        for text in texts:
            model.zero_grad(set_to_none=True)
            nll(model, torch.tensor([text])).backward()
            observer.end_sample()
    return observer.totals()


def worst(totals: Totals, expected: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: error(neurons(totals, name), expected[name]) for name in STATISTICS}


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return on_modules + sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_every_statistic_equals_autograd(trainable: bool, method: str) -> None:
    model, texts = tiny().requires_grad_(trainable), samples(3)
    totals = observe(model, texts, method=method)
    assert max(worst(totals, reference(model, texts, RHO)).values()) < 1e-5
    assert (totals.counts == [sum(map(len, texts)), 3, sum(map(len, texts)), 3]).all()


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_bf16(trainable: bool) -> None:
    model, texts = tiny().bfloat16().requires_grad_(trainable), samples(3)
    errors = worst(observe(model, texts), reference(model, texts, RHO))
    # The model itself computes in bf16 (three digits); near ties at the threshold of the top fall either way.
    assert errors.pop("top") < 0.2
    assert max(errors.values()) < 0.03


def test_autocast_follows_the_gradient_that_autocast_gives() -> None:
    model, text = tiny(), samples(1, low=100)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), Observer(model, rho=RHO, method="tiles") as observer:
        nll(model, torch.tensor([text])).backward()
    totals = observer.totals()
    for index, block in enumerate(model.model.layers):
        norms = block.mlp.up_proj.weight.grad.double().norm(dim=1).numpy()
        np.testing.assert_allclose(neurons(totals, "grad_up")[index], norms, rtol=2e-3)


def test_nf4() -> None:
    model, plain = quantised()
    texts = samples(3)
    for method in ("auto", "gram", "tiles"):
        assert max(worst(observe(model, texts, method=method), reference(plain, texts, RHO)).values()) < 1e-4


def test_nf4_that_would_be_repacked_is_refused() -> None:
    model, _ = quantised()
    model.model.layers[1].mlp.up_proj.support_avx512bf16_for_cpu = True
    with pytest.raises(BenchError, match=r"layers\.1\.mlp\.up_proj.*support_avx512bf16_for_cpu"):
        observe(model, samples(1))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("method", ["auto", "tiles"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_gradient_checkpointing(reentrant: bool, trainable: bool, method: str) -> None:
    model, texts = tiny().requires_grad_(trainable).train(), samples(2)
    expected = reference(model, texts, RHO)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = hooks(model)  # transformers keeps one of its own
    totals = observe(model, texts, method=method)
    assert max(worst(totals, expected).values()) < 1e-5
    assert (totals.counts[:, 1] == 2).all()
    assert (totals.counts[:, 0] == sum(map(len, texts))).all()
    assert hooks(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_gradient_accumulation_gives_the_norm_of_the_sum(trainable: bool, method: str) -> None:
    model, texts = tiny().requires_grad_(trainable), samples(3)
    with Observer(model, rho=RHO, method=method, calls=3) as observer:
        for text in texts:
            (nll(model, torch.tensor([text])) / 3).backward()
        observer.end_sample()
    exact = copy.deepcopy(model).double().requires_grad_(True)
    exact.zero_grad()
    for text in texts:
        (nll(exact, torch.tensor([text])) / 3).backward()
    for index, block in enumerate(exact.model.layers):
        norms = block.mlp.gate_proj.weight.grad.norm(dim=1).numpy()
        np.testing.assert_allclose(neurons(observer.totals(), "grad_gate")[index], norms, rtol=1e-4)
        norms = block.mlp.down_proj.weight.grad.norm(dim=0).numpy()
        np.testing.assert_allclose(neurons(observer.totals(), "grad_down")[index], norms, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_accumulation_under_checkpointing_tied_and_scaled(reentrant: bool, trainable: bool) -> None:
    model, texts = tiny(tie_word_embeddings=True).requires_grad_(trainable).train(), samples(4)
    exact = copy.deepcopy(model).double().requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = np.zeros((2, 128))
    with Observer(model, rho=RHO, calls=2) as observer:
        observer.loss_scale = 64.0
        for pair in (texts[:2], texts[2:]):
            model.zero_grad()
            exact.zero_grad()
            for text in pair:
                (nll(model, torch.tensor([text])) * 32).backward()
                (nll(exact, torch.tensor([text])) / 2).backward()
            observer.end_sample()
            expected += [block.mlp.down_proj.weight.grad.norm(dim=0).numpy() for block in exact.model.layers]
    found = neurons(observer.totals(), "grad_down")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (observer.totals().counts == [sum(map(len, texts)), 2, sum(map(len, texts)), 2]).all()


def test_a_batch_is_one_sample_and_its_gradient_that_of_the_batch() -> None:
    model, texts = tiny(), torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    for method in ("grad", "gram", "tiles"):
        model.zero_grad()
        with Observer(model, rho=RHO, method=method) as observer:
            model(input_ids=texts, labels=texts).loss.backward()
        for index, block in enumerate(model.model.layers):
            norms = block.mlp.gate_proj.weight.grad.norm(dim=1).numpy()
            np.testing.assert_allclose(neurons(observer.totals(), "grad_gate")[index], norms, rtol=1e-4)
        assert observer.totals().counts[0].tolist() == [10, 1, 10, 1]


def test_forwards_can_pass_unseen() -> None:
    model, text = tiny(), torch.tensor(samples(1))
    with Observer(model, rho=RHO) as observer:
        observer.enabled = False
        nll(model, text)
        observer.enabled = True
        nll(model, text).backward()
    assert (observer.totals().counts[:, 0] == text.shape[1]).all()


def test_accumulating_without_zeroing_still_gives_each_sample_its_own_norm() -> None:
    model, texts = tiny(), samples(3)
    with Observer(model, rho=RHO) as observer:
        for text in texts:
            nll(model, torch.tensor([text])).backward()  # closes itself when the next forward begins
    assert observer.methods["grad"] == 6
    assert max(worst(observer.totals(), reference(model, texts, RHO)).values()) < 1e-5


def test_loss_scale_is_taken_out() -> None:
    model, texts = tiny(), samples(2)
    for scale in (1024.0, torch.tensor(1024.0)):
        with Observer(model, rho=RHO) as observer:
            observer.loss_scale = scale
            for text in texts:
                model.zero_grad()
                (nll(model, torch.tensor([text])) * 1024.0).backward()
        assert max(worst(observer.totals(), reference(model, texts, RHO)).values()) < 1e-5


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_bit_identical(trainable: bool, dtype: torch.dtype) -> None:
    model, ids = tiny().to(dtype).requires_grad_(trainable), torch.tensor(samples(1, low=60))
    model.model.norm.weight.requires_grad_(True)  # something to differentiate in the frozen model too

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    before = step()
    with Observer(model, rho=RHO), Observer(model, rho=RHO, method="gram"):
        during = step()
    assert len(before) == len(during) > 1
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, step(), strict=True))


def test_padding_and_ignored_labels_are_not_tokens() -> None:
    model, text = tiny(), samples(1, low=20, high=30)[0]
    size = len(text)
    ids = torch.tensor([text + [0] * 7])
    attention = torch.tensor([[1] * size + [0] * 7])
    labels = torch.tensor([text + [-100] * 7])
    labels[0, :4] = -100
    with Observer(model, rho=RHO) as observer:
        model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
    with Observer(model, rho=RHO, gradients=False) as plain:
        model(input_ids=ids[:, :size], attention_mask=attention[:, :size])
    with Observer(model, rho=RHO, gradients=False) as prompt:
        model(input_ids=ids[:, :4])
    masked, whole, start = observer.totals(), plain.totals(), prompt.totals()
    assert (masked.counts[:, 0] == size - 4).all()
    for name in ("abs_h", "h", "h_sq"):
        difference = neurons(whole, name) - neurons(start, name)
        np.testing.assert_allclose(neurons(masked, name), difference, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(neurons(masked, "top"), neurons(whole, "top") - neurons(start, "top"))


def test_generate_with_a_cache_is_observed_once_per_position() -> None:
    model, prompt = tiny().eval(), torch.tensor([[1, 2, 3, 4]])
    mask = torch.ones_like(prompt)
    plain = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    with Observer(model, rho=RHO, gradients=False) as observer:
        seen = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, seen)
    assert (observer.totals().counts[:, 0] == seen.shape[1] - 1).all()  # the last token is never fed in


def test_no_hook_is_left_even_after_an_exception() -> None:
    model = tiny()
    with pytest.raises(ZeroDivisionError), Observer(model, rho=RHO) as observer:  # noqa: PT012
        loss = nll(model, torch.tensor([[1, 2, 3, 4]]))
        raise ZeroDivisionError
    assert hooks(model) == 0
    loss.backward()  # the graph outlives the observer: its tensor hooks are gone too
    assert observer.samples == 0
    assert all((part == 0).all() for part in observer.totals().sums)


def test_an_exception_in_a_sample_leaves_no_trace_of_it() -> None:
    model, texts = tiny(), samples(2)
    with Observer(model, rho=RHO, method="gram") as observer:
        nll(model, torch.tensor([texts[0]])).backward()
        observer.end_sample()
        nll(model, torch.tensor([[5, 6, 7]]))  # no backward
        with pytest.raises(BenchError, match=r"sample 1: model\.layers\.0\.mlp\.gate_proj saw 0 of 1 gradients"):
            observer.end_sample()
        nll(model, torch.tensor([texts[1]])).backward()
    assert max(worst(observer.totals(), reference(model, texts, RHO)).values()) < 1e-5


def test_two_backwards_in_one_sample_are_refused() -> None:
    model = tiny().requires_grad_(False)
    with Observer(model, rho=RHO) as observer:
        losses = [nll(model, torch.tensor([[1, 2, 3, 4]])) for _ in range(2)]
        sum(losses).backward()
        with pytest.raises(BenchError, match="ran 2 times, expected 1"):
            observer.end_sample()
        nll(model, torch.tensor([[1, 2, 3, 4]])).backward()


def test_a_target_that_never_fires_is_named() -> None:
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: nn.functional.linear(x * x, mlp.up_proj.weight[:64])  # a "fused kernel"
    with pytest.raises(BenchError, match=r"model\.layers\.1\.mlp\.gate_proj never ran"):
        observe(model, samples(1))
    with pytest.raises(BenchError, match="nothing was observed"), Observer(model, rho=RHO):
        pass


@pytest.mark.parametrize(("where", "what"), [("weights", "activations"), ("loss", "gradients")])
def test_nan_names_layer_and_sample(where: str, what: str) -> None:
    model, texts = tiny(), samples(4)
    with Observer(model, rho=RHO) as observer:
        for number, text in enumerate(texts):
            model.zero_grad()
            if number == 2 and where == "weights":
                model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
            factor = float("nan") if number == 2 and where == "loss" else 1.0
            (nll(model, torch.tensor([text])) * factor).backward()
        observer.end_sample()
        layer = 1 if where == "weights" else 0
        with pytest.raises(BenchError, match=rf"layers\.{layer}\.mlp: {what} are NaN or infinite in sample 2;"):
            observer.totals()


def test_refusals() -> None:
    model = tiny()
    with pytest.raises(BenchError, match="nothing to observe"):
        Observer(model, [])
    with pytest.raises(BenchError, match="method='fast'"):
        Observer(model, rho=RHO, method="fast")
    with pytest.raises(BenchError, match="compiled"):
        observe(torch.compile(model), samples(1))
    with torch.device("meta"):
        ghost = tiny()
    with pytest.raises(BenchError, match="offloaded"):
        Observer(ghost, rho=RHO)


def test_ties_count_and_zeros_do_not() -> None:
    from tinyonn_lib.scan.bank import forward_sums

    h = torch.tensor([[3.0, -2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]])
    into = torch.zeros(4, 4, dtype=torch.float64)
    forward_sums(h, 2, None, into)
    assert into[3].tolist() == [1, 1, 1, 1]
