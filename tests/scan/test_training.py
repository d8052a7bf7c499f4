"""The observer around other people's training: Trainer, accelerate, a budget; and what it says it covers."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.state import AcceleratorState
from scan_models import nll, samples, tiny
from torch import nn
from transformers import Trainer, TrainingArguments

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import mscan
from tinyonn_lib.scan.audit import coverage
from tinyonn_lib.scan.budget import Budget
from tinyonn_lib.scan.callback import ObserverCallback
from tinyonn_lib.scan.observer import Observer

ALL = "neurons,linears,embeddings"


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return on_modules + sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


def data(count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": text, "labels": text} for text in samples(count, low=24, high=25)]


def arguments(folder: Path, **options: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", per_device_train_batch_size=2, learning_rate=1e-3, seed=3, **options,
    )  # fmt: skip


def reference_norms(model: nn.Module, args: TrainingArguments, rows: list[dict[str, list[int]]]) -> list[float]:
    """Norm of one weight's gradient per optimiser step of the same training, read from `.grad` by a subclass."""
    found: list[float] = []

    class Reading(Trainer):
        def training_step(self, model: nn.Module, *a: object, **k: object) -> torch.Tensor:
            loss = super().training_step(model, *a, **k)
            grads[0] = model.model.layers[0].mlp.up_proj.weight.grad.double().norm().item()
            return loss

    grads = [0.0]

    class Closing(ObserverCallback):
        def on_train_begin(self, *a: object, **k: object) -> None: ...
        def on_train_end(self, *a: object, **k: object) -> None: ...
        def on_pre_optimizer_step(self, *a: object, **k: object) -> None:
            found.append(grads[0])

    Reading(model, args, train_dataset=rows, callbacks=[Closing()]).train()
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trainer_with_accumulation_evaluation_and_an_odd_last_step(tmp_path: Path, checkpointing: bool) -> None:
    rows = data(10)  # batches of 2, three to a step: the last step of the epoch has two
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.0}
    options |= {"gradient_checkpointing": checkpointing, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, **options)
    plain, seen = tiny(), tiny()
    Trainer(plain, args, train_dataset=rows, eval_dataset=rows[:2]).train()
    before = hooks(seen)
    path = tmp_path / "run.mscan"
    with ObserverCallback(ALL, rows=True, budget=0.0, path=path) as watching:
        Trainer(seen, args, train_dataset=rows, eval_dataset=rows[:2], callbacks=[watching]).train()
    pairs = list(zip(plain.parameters(), seen.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    totals = watching.observer.totals()
    assert (totals.counts[:, 1] == 4).all()
    assert (totals.counts[:, 0] == 20 * 24).all()  # evaluation does not count
    assert hooks(seen) <= before + checkpointing  # transformers keeps one of its own for checkpointing
    table = mscan.read(path)
    of = table[table["target"] == "model.layers.0.mlp.up_proj"]
    again = args if not checkpointing else arguments(tmp_path, **(options | {"gradient_checkpointing": False}))
    again.eval_strategy = "no"
    np.testing.assert_allclose(of["grad"], reference_norms(tiny(), again, rows), rtol=1e-3)  # 3.2e-4 by its coding
    assert len(table) == 4 * len(totals.layout.targets)


def test_a_training_that_fails_leaves_no_hook(tmp_path: Path) -> None:
    model = tiny()
    rows = [*data(2), {"input_ids": [5000], "labels": [5000]}]
    watching = ObserverCallback("linears", path=tmp_path / "run.mscan")
    with pytest.raises(IndexError), watching:
        Trainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=rows, callbacks=[watching]).train()
    assert hooks(model) == 0
    with pytest.raises(BenchError, match="not begun"):
        _ = ObserverCallback().observer


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_loop_is_bit_identical(precision: str) -> None:
    texts = [torch.tensor([text]) for text in samples(4, low=30, high=31)]

    AcceleratorState._reset_state(reset_partial_state=True)

    def train(model: nn.Module, watch: bool) -> tuple[nn.Module, Observer | None]:
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        observer = Observer(accelerator.unwrap_model(model), ALL, calls=2) if watch else None

        def loop() -> None:
            for text in texts:
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=text, labels=text).loss)
                    optimizer.step()
                    optimizer.zero_grad()

        if observer is None:
            loop()
        else:
            with observer:
                loop()
        return accelerator.unwrap_model(model), observer

    plain, _ = train(tiny(), watch=False)
    seen, observer = train(tiny(), watch=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))
    assert observer is not None
    assert (observer.totals().counts == [120, 2, 120, 2]).all()
    assert all((part[-1] > 0).any() for part in observer.totals().sums)


def test_budget_holds_the_slowdown_and_follows_a_change() -> None:
    """A clock of our own: plain steps take 10 ms, observing adds 4 ms, later 30 ms, later nothing."""
    now, spent, plain = 0.0, 0.0, 0.0
    budget = Budget(0.05, clock=lambda: now)
    draw = np.random.default_rng(0)
    shares = []
    for extra in (4.0, 30.0, 0.0):
        seen = budget.observed
        for _ in range(2000):
            sampled = budget.begin()
            step = 10.0 * draw.lognormal(0, 0.1)
            now += step + extra * sampled
            plain += step
            spent += extra * sampled
        shares.append((budget.observed - seen) / 2000)
        assert 0.03 < spent / plain <= 0.05 or extra == 0.0
    assert shares[0] == pytest.approx(0.04 * 10 / 4, rel=0.2)
    assert shares[1] == pytest.approx(0.04 * 10 / 30, rel=0.3)
    assert shares[2] > 0.75  # what costs nothing is mostly on
    assert budget.steps == 6000


def test_a_slow_first_step_does_not_fool_the_budget() -> None:
    now = 0.0
    budget = Budget(0.05, clock=lambda: now)
    for number in range(1000):
        now += (500.0 if number < 2 else 10.0) + 20.0 * budget.begin()
    assert 0.01 < budget.observed / budget.steps < 0.035


def test_observer_with_a_budget_samples_whole_steps() -> None:
    model, texts = tiny(), samples(40, low=20, high=21)
    told: list[int] = []
    with Observer(model, ALL, budget=0.2, record=lambda step, *_: told.append(step)) as observer:
        for text in texts:
            model.zero_grad()
            nll(model, torch.tensor([text])).backward()
            observer.end_sample()
    totals = observer.totals()
    assert observer.steps == 40
    assert 0 < observer.samples == len(told) < 40
    assert observer.share == observer.samples / 40
    assert (totals.counts[:, 1] == observer.samples).all()
    assert all(a < b for a, b in pairwise(told))
    # What was observed is exact: the same steps again, all of them watched.
    with Observer(model, ALL) as every:
        for step in told:
            model.zero_grad()
            nll(model, torch.tensor([texts[step]])).backward()
            every.end_sample()
    for one, other in zip(totals.sums, every.totals().sums, strict=True):
        np.testing.assert_array_equal(one, other)


def test_budget_without_end_sample_counts_steps_by_forwards() -> None:
    model, texts = tiny().requires_grad_(False), samples(30, low=20, high=21)
    with Observer(model, "linears", budget=0.3, calls=2) as observer:
        for text in texts:
            nll(model, torch.tensor([text])).backward()
    assert observer.steps == 15
    assert 0 < observer.samples < 15


def test_forwards_without_a_graph_pass_unseen() -> None:
    model, text = tiny(), torch.tensor(samples(1))
    with Observer(model, ALL) as observer:
        for _ in range(2):
            with torch.no_grad():
                model(input_ids=text)
            nll(model, text).backward()
            with torch.inference_mode():
                model(input_ids=text)
            observer.end_sample()
    assert (observer.totals().counts[:, :2] == [2 * text.shape[1], 2]).all()


def test_coverage_names_everything_once_and_says_why_not() -> None:
    model = tiny()
    with Observer(model, ["neurons", "*.self_attn.[qk]_proj"]) as observer:
        nll(model, torch.tensor([[1, 2, 3, 4]])).backward()
    table = coverage(model, observer.totals()).set_index("parameter")
    assert len(table) == len(list(model.named_parameters()))
    assert table.loc["model.layers.1.mlp.down_proj.weight", ["observed", "samples"]].tolist() == ["neurons", 1]
    assert table.loc["model.layers.0.self_attn.q_proj.weight", "observed"] == "linear"
    assert table.loc["model.layers.0.self_attn.v_proj.weight", "why"] == "not among the targets"
    assert table.loc["model.norm.weight", "why"] == "a vector: norm or bias"
    assert ((table["observed"] == "") == (table["why"] != "")).all()


def test_targets_that_match_nothing_and_wrong_budgets_are_one_line() -> None:
    model = tiny()
    with pytest.raises(BenchError, match=r"targets='\*\.attention\.\*' matches no linear.*model\."):
        Observer(model, "*.attention.*")
    with pytest.raises(BenchError, match="budget=1"):
        Observer(model, budget=1.0)


def test_modules_with_a_forward_of_their_own_are_refused_only_when_frozen() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 8.0

    model = tiny()
    scaled = Scaled(*model.model.embed_tokens.weight.shape)
    scaled.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = scaled
    with Observer(model, "*embed_tokens") as observer:
        nll(model, torch.tensor([[1, 2, 3]])).backward()
    expected = scaled.weight.grad.double().norm(dim=1).numpy()
    np.testing.assert_allclose(observer.totals().of("model.embed_tokens", "grad"), expected, rtol=1e-5)
    model.requires_grad_(False)
    with (
        pytest.raises(BenchError, match=r"embed_tokens: Scaled has a forward of its own"),
        Observer(model, "embeddings"),
    ):
        pass


def test_device_maps_are_observed_and_offloaded_or_compiled_parts_refused_by_name() -> None:
    text = torch.tensor([[1, 2, 3, 4, 5]])
    found = []
    for mapped in (False, True):
        model = tiny()
        if mapped:  # accelerate puts its own forward on every module
            model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
        with Observer(model, ALL) as observer:
            nll(model, text).backward()
        found.append(observer.totals())
    assert all(np.array_equal(a, b) for a, b in zip(found[0].sums, found[1].sums, strict=True))
    offloaded = cpu_offload(tiny(), execution_device=torch.device("cpu"))
    with pytest.raises(BenchError, match=r"model\.layers\.0\.mlp\.gate_proj is offloaded"):
        Observer(offloaded)
    compiled = tiny()
    compiled.model.layers[1].compile()
    with pytest.raises(BenchError, match=r"model\.layers\.1\..*compiled"), Observer(compiled):
        pass


def test_a_weight_tied_between_two_linears_is_one_target() -> None:
    model = tiny()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    text = torch.tensor([[1, 2, 3, 4, 5]])
    exact = copy.deepcopy(model).double()
    nll(exact, text).backward()
    expected = exact.model.layers[0].self_attn.q_proj.weight.grad.norm(dim=1).numpy()
    for trainable in (True, False):
        model.requires_grad_(trainable)
        with Observer(model, "*.q_proj") as observer:
            nll(model, text).backward()
        [target] = observer.layout.targets
        np.testing.assert_allclose(observer.totals().of(target.name, "grad"), expected, rtol=1e-4)
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(BenchError, match="share one weight"):
        Observer(model, "neurons")
