"""Ways to use a model that would give wrong numbers silently if nobody looked: exact, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_models import nll, samples, tiny
from test_fused import made as experts_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import mscan
from tinyonn_lib.scan.budget import Budget
from tinyonn_lib.scan.callback import ObserverCallback
from tinyonn_lib.scan.observer import Observer

TEXT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
O_PROJ = "model.layers.0.self_attn.o_proj"


def norm_of(model: nn.Module, name: str, *losses: Any) -> float:
    """Norm of the gradient of the sum of losses by autograd, float64."""
    exact = copy.deepcopy(model).double().requires_grad_(True)
    sum(loss(exact) for loss in losses).backward()
    return exact.get_submodule(name).weight.grad.norm().item()


def text_loss(model: nn.Module) -> Tensor:
    return nll(model, TEXT)


def found(observer: Observer) -> float:
    [[_, grad]] = observer.totals().norms
    return float(grad)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_hook_of_the_users_that_changes_the_output(late: bool) -> None:
    model = tiny().requires_grad_(False)

    def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 0.5

    handle = None if late else model.get_submodule(O_PROJ).register_forward_hook(halve)
    with Observer(model, O_PROJ) as observer:
        if late:
            handle = model.get_submodule(O_PROJ).register_forward_hook(halve)
        text_loss(model).backward()
    assert handle is not None
    assert found(observer) == pytest.approx(norm_of(model, O_PROJ, text_loss), rel=1e-5)


def test_a_hook_on_experts_is_not_called_again_and_two_observers_agree() -> None:
    model, calls = experts_model("qwen3").requires_grad_(False), []
    with Observer(model, "experts") as one, Observer(model, "experts", gradients=False) as other:
        model.model.layers[0].mlp.experts.register_forward_hook(lambda m, a, y: calls.append(1) or y * 2.0)
        text_loss(model).backward()
        one.end_sample()
    assert len(calls) == 1
    assert (other.totals().counts[:, 0] == TEXT.numel()).all()
    exact = copy.deepcopy(model).double().requires_grad_(True)
    text_loss(exact).backward()
    expected = exact.model.layers[0].mlp.experts.down_proj.grad.flatten(1).norm(dim=1)
    np.testing.assert_allclose(one.totals().of("model.layers.0.mlp.experts", "grad_down"), expected, rtol=1e-4)


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_a_second_backward_through_one_forward_is_refused(trainable: bool) -> None:
    model = tiny().requires_grad_(trainable)
    with Observer(model, O_PROJ) as observer:
        loss = text_loss(model)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        with pytest.raises(BenchError, match="2 backward passes"):
            observer.end_sample()
        model.zero_grad()
        text_loss(model).backward()
    assert found(observer) == pytest.approx(norm_of(model, O_PROJ, text_loss), rel=1e-5)


def test_a_backward_that_comes_after_its_sample_was_discarded_counts_for_nothing() -> None:
    model = tiny().requires_grad_(False)
    with Observer(model, O_PROJ, calls=2) as observer:
        late = nll(model, torch.tensor([[1, 2, 3, 4]]))
        observer.discard_sample()
        late.backward()
        text_loss(model).backward()
        with pytest.raises(BenchError, match="saw 1 of 2 gradients"):
            observer.end_sample()
        text_loss(model).backward()
        observer.end_sample(calls=1)
        with pytest.raises(BenchError, match="calls=3"):
            observer.end_sample(calls=3)
    assert found(observer) == pytest.approx(norm_of(model, O_PROJ, text_loss), rel=1e-5)


def test_inputs_changed_in_place_before_the_backward_are_refused() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x += y
            return self.second(x)

    model = Adding().requires_grad_(False)
    with pytest.raises(BenchError, match="first: its input was changed in place"), Observer(model, "first"):
        model(torch.randn(3, 4)).sum().backward()


def test_positions_that_a_module_does_not_see_once_are_refused_when_tokens_are_ignored() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return self.pooler(self.body(inputs_embeds)[:, 0])

    model, x = Pooled(), torch.randn(2, 5, 4)
    ragged = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with Observer(model, "*") as observer:
        model(x, torch.ones(2, 5)).sum().backward()
        observer.end_sample()
        assert observer.totals().counts[:, 0].tolist() == [10, 2]
        model.zero_grad()
        with pytest.raises(BenchError, match=r"pooler saw an input of \(2,\) tokens, the model one of \(2, 5\)"):
            model(x, ragged)
        observer.discard_sample()
    with Observer(model, "body") as observer:
        model(x, ragged).sum().backward()
    assert observer.totals().counts[0, 0] == 8


def test_the_head_for_the_newest_positions_only() -> None:
    model = tiny()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    ids = TEXT.repeat(2, 1)
    with Observer(model, "lm_head", gradients=False) as observer:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=6)
    assert observer.totals().counts[0, 0] == 5 + 6
    with pytest.raises(BenchError, match="lm_head saw"), Observer(model, "lm_head", gradients=False):
        model(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([0, 1, 2]))
    with pytest.raises(BenchError, match="attention_mask is not"), Observer(model, "lm_head", gradients=False):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 8, 8))


def test_masks_given_by_name_beside_positional_ids_count() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = tiny()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    labels = TEXT.clone()
    labels[:, :5] = -100
    model = Wrapper()
    with Observer(model, "*.q_proj") as observer:
        model(TEXT, labels=labels).loss.backward()
    assert (observer.totals().counts[:, 0] == 3).all()


def test_two_masks_and_one_backward_under_reentrant_checkpointing_are_refused() -> None:
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    labels = [TEXT.clone(), TEXT.clone()]
    labels[0][:, :5] = -100
    labels[1][:, 5:] = -100
    with Observer(model, calls=2) as observer:
        for one in labels:
            model(input_ids=TEXT, labels=one).loss.backward()
        observer.end_sample()
        loss = sum(model(input_ids=TEXT, labels=one).loss for one in labels)
        with pytest.raises(BenchError, match="use_reentrant=False"):
            loss.backward()
        observer.discard_sample()


def test_what_runs_outside_the_observed_forward_is_refused() -> None:
    model = tiny().requires_grad_(False)
    with Observer(model, "*.q_proj") as observer:
        text_loss(model).backward()
        observer.end_sample()
        with pytest.raises(BenchError, match="outside the forward of the observed model"):
            model.model(input_ids=TEXT)


def test_a_forward_without_a_graph_between_forward_and_backward_blinds_nothing() -> None:
    for reentrant in (True, False):
        model = tiny().requires_grad_(False).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with Observer(model, O_PROJ) as observer:
            loss = text_loss(model)
            with torch.no_grad():
                model(input_ids=torch.tensor([[1, 2, 3]]))
            loss.backward()
        assert found(observer) == pytest.approx(norm_of(tiny(), O_PROJ, text_loss), rel=1e-5)


def test_only_forwards_without_a_graph_say_so() -> None:
    model = tiny()
    with pytest.raises(BenchError, match="pass gradients=False"), Observer(model), torch.no_grad():
        model(input_ids=TEXT)


def test_tied_weights_changed_or_out_of_sight_are_refused() -> None:
    tied = tiny(tie_word_embeddings=True).requires_grad_(False)
    with pytest.raises(BenchError, match="observe the whole language model"), Observer(tied.model, "embeddings"):
        pass
    model = tiny()
    observer = Observer(model, "embeddings")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(BenchError, match="was replaced after the observer was made"), observer:
        pass


def test_parametrised_and_sparse_modules_are_refused_and_empty_inputs_are_not() -> None:
    model = tiny()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.k_proj)
    with pytest.raises(BenchError, match="k_proj is parametrised"):
        Observer(model, "linears")

    class Table(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=sparse)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    with pytest.raises(BenchError, match="sparse"), Observer(Table(True), "table"):
        pass
    lookup = Table(False).requires_grad_(False)
    with Observer(lookup, "table") as observer:
        lookup(torch.zeros(1, 0, dtype=torch.long)).sum().backward()
    assert found(observer) == 0.0


def test_a_layer_frozen_in_the_middle_goes_on_exactly() -> None:
    model = tiny()
    with Observer(model, O_PROJ) as observer:
        text_loss(model).backward()
        observer.end_sample()
        model.zero_grad()
        model.get_submodule(O_PROJ).weight.requires_grad_(False)
        text_loss(model).backward()
        observer.end_sample()
    assert found(observer) == pytest.approx(2 * norm_of(model, O_PROJ, text_loss), rel=1e-5)


def test_an_overflow_under_amp_is_left_out_and_the_next_step_counts() -> None:
    model, told = tiny(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-80)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Observer(model, O_PROJ, record=lambda step, t, norms, m: told.append(norms[0].tolist())) as observer:
        for _ in range(12):
            scaler.scale(text_loss(model)).backward()
            observer.loss_scale = scaler._get_scale_async()
            observer.end_sample()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    overflown = sum(np.isnan(grad) for _, grad in told)
    assert 0 < overflown < 12
    totals = observer.totals()
    assert totals.counts[0].tolist() == [96, 12, 8 * (12 - overflown), 12 - overflown]
    assert found(observer) / (12 - overflown) == pytest.approx(norm_of(model, O_PROJ, text_loss), rel=1e-4)


def test_a_record_that_fails_leaves_counts_and_totals_together() -> None:
    model = tiny()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with Observer(model, O_PROJ, record=fail) as observer:
        text_loss(model).backward()
        with pytest.raises(OSError, match="disk full"):
            observer.end_sample()
        assert (observer.samples, observer.totals().counts[0, 1]) == (1, 1)
        observer.record = None
        model.zero_grad()
        text_loss(model).backward()
    assert observer.samples == 2


def test_steps_and_disabled_steps() -> None:
    model, told = tiny(), []
    with Observer(model, O_PROJ, record=lambda step, *_: told.append(step)) as observer:
        for number in range(4):
            observer.enabled = number != 1
            model.zero_grad()
            text_loss(model).backward()
            observer.end_sample()
    assert told == [0, 1, 2]
    assert (observer.steps, observer.samples, observer.share) == (3, 3, 1.0)


def test_a_budget_without_gradients_needs_end_sample_and_says_so() -> None:
    model = tiny()
    with pytest.raises(BenchError, match=r"end_sample\(\)"), Observer(model, gradients=False, budget=0.5):
        model(input_ids=TEXT)


def test_evaluations_do_not_starve_the_budget() -> None:
    now = 0.0
    budget = Budget(0.05, clock=lambda: now)
    shares = []
    for _ in range(5):
        seen = budget.observed
        for number in range(1000):
            sampled = budget.begin()
            now += 0.010 + 0.004 * sampled + (20.0 if number % 200 == 150 else 0.0)
        shares.append((budget.observed - seen) / 1000)
    assert min(shares[1:]) > 0.8 * 0.04 * 10 / 4
    assert max(shares) < 1.2 * 0.04 * 10 / 4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_resumes_its_file_and_retries_leave_nothing(tmp_path: Path) -> None:
    rows = [{"input_ids": text, "labels": text} for text in samples(4, low=12, high=13)]

    def arguments(**more: Any) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
            save_steps=2, **more,
        )  # fmt: skip

    class Failing(Trainer):
        failed = False

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 1 and not Failing.failed:
                Failing.failed = True
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    path, model = tmp_path / "run.mscan", tiny()

    def train(kind: type[Trainer], model: nn.Module, args: TrainingArguments, checkpoint: str | None = None) -> Any:
        with ObserverCallback("*.q_proj", budget=0.0, path=path) as watching:
            kind(model, args, train_dataset=rows, callbacks=[watching]).train(resume_from_checkpoint=checkpoint)
        return mscan.read(path)

    found = train(Failing, model, arguments(auto_find_batch_size=True, per_device_train_batch_size=2))
    assert not any(module._forward_hooks for module in model.modules())
    assert found["step"].unique().tolist() == list(range(len(found) // 2))
    four = arguments(max_steps=4, per_device_train_batch_size=1)
    first = train(Trainer, tiny(), four)
    assert first["step"].unique().tolist() == [0, 1, 2, 3]
    again = train(Trainer, tiny(), four, str(tmp_path / "out" / "checkpoint-2"))
    assert again["step"].unique().tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(again["grad"], first["grad"], rtol=1e-3)
