"""The projected gradient is the gradient, the inits are what they say, and the large model never notices."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import align, projection
from tinyonn_lib.lm import models
from tinyonn_lib.lm.models import FFN

from .conftest import Tiny

CHOSEN = [torch.tensor([3, 0, 17, 31]), torch.tensor([5, 6, 30])]  # unsorted, and not as many in each layer
EVERY = [torch.arange(32), torch.arange(32)]


def texts(count: int, length: int, seed: int = 7) -> list[list[int]]:
    found: list[list[int]] = torch.randint(
        0, 299, (count, length), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return found


SAMPLES = [texts(1, 17)[0], texts(1, 9)[0], [5, 8]]
CALIBRATION = pd.DataFrame({"ids": texts(12, 16)})
HELD = pd.DataFrame({"ids": texts(20, 12, seed=8), "source": [f"file{i % 10}" for i in range(20)]})


def exact_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss in the model's own precision."""
    return F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:])


def reference(model: Any, ffns: list[FFN], samples: list[list[int]]) -> list[projection.Slice]:
    """Mean gradients of the chosen neurons by autograd, full size."""
    model.requires_grad_(True)
    for ids in samples:
        exact_loss(model, torch.tensor([ids])).backward()
    full = [[getattr(ffn, name).weight.grad / len(samples) for name in projection.Slice._fields] for ffn in ffns]
    return [projection.Slice(g[i], u[i], d[:, i]) for (g, u, d), i in zip(full, CHOSEN, strict=True)]


def double(tiny: Tiny) -> tuple[Any, list[FFN]]:
    model = copy.deepcopy(tiny.model).double()
    return model, models.ffns(model)


def loss_under(model: Any, ffns: list[FFN], taps: list[projection.Tap], samples: list[list[int]]) -> float:
    with align.tapped(ffns, taps):
        return evaluate.loss(model, samples).mean


def test_gradient_is_that_of_autograd(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ffns = double(tiny)
    monkeypatch.setattr(projection, "next_token_loss", exact_loss)  # the bench's own rounds to float32
    found = projection.capture(model, ffns, CHOSEN, SAMPLES)
    for mine, true in zip(found, reference(model, ffns, SAMPLES), strict=True):
        for name in projection.Slice._fields:
            torch.testing.assert_close(getattr(mine, name), getattr(true, name), atol=0, rtol=1e-9)


def test_gradient_and_copy_of_nf4_are_those_of_its_dequantised_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = models.new_model(vocab_size=64, width=64, layers=2, heads=1, kv_heads=1, head_dim=64, ffn=64)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    plain = copy.deepcopy(model)
    for packed, full in zip(models.ffns(model), models.ffns(plain), strict=True):
        for name in projection.Slice._fields:
            new = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            new.load_state_dict({"weight": getattr(packed, name).weight.data})
            new = new.to("cpu")
            new.support_avx512bf16_for_cpu = False
            new.weight = new.weight._quantize("cpu") if new.weight.quant_state is None else new.weight
            setattr(packed.module, f"{name}_proj", new)
            dense = bnb.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
            getattr(full, name).weight.data.copy_(dense)
    model.requires_grad_(False)
    samples, parts = [[token % 64 for token in ids] for ids in SAMPLES], models.ffns(model)
    found = projection.capture(model, parts, CHOSEN, samples)
    for mine, true in zip(found, reference(plain, models.ffns(plain), samples), strict=True):
        for name in projection.Slice._fields:
            torch.testing.assert_close(getattr(mine, name), getattr(true, name), atol=1e-6, rtol=1e-4)
    for packed, full, index in zip(parts, models.ffns(plain), CHOSEN, strict=True):
        mine = projection.own(packed, index)
        assert torch.equal(mine.gate, full.gate.weight[index])
        assert torch.equal(mine.down, full.down.weight[:, index])


def test_large_model_stays_as_it_was(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    projection.capture(model, models.ffns(model), CHOSEN, SAMPLES)
    align.compare(model, models.ffns(model), CHOSEN, CALIBRATION, HELD, steps=2, lr=0.01, seeds=[0], length=16)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_inits_are_one_step_of_the_same_length_from_where_they_say(tiny: Tiny) -> None:
    gradients = projection.capture(tiny.model, tiny.ffns, CHOSEN, SAMPLES)
    small = {k: projection.initial(k, tiny.ffns, CHOSEN, gradients, 4, alpha=0.5, beta=0.2) for k in projection.INITS}
    for layer, (ffn, index, gradient) in enumerate(zip(tiny.ffns, CHOSEN, gradients, strict=True)):
        own = (ffn.gate.weight[index], ffn.up.weight[index], ffn.down.weight[:, index])
        for name, true, grad in zip(projection.Slice._fields, own, gradient, strict=True):
            at = {kind: getattr(each[layer], f"{name}_proj").weight.detach() for kind, each in small.items()}
            step = 0.1 * grad / grad.norm()
            assert torch.equal(at["copy"], true)
            assert float(at["random"].abs().max()) <= true.shape[1] ** -0.5
            torch.testing.assert_close(at["gradient"] - at["random"], step, atol=1e-6, rtol=0)
            torch.testing.assert_close(at["gradient_descent"] - at["random"], -step, atol=1e-6, rtol=0)
            torch.testing.assert_close(at["copy + gradient"] - at["copy"], step, atol=1e-6, rtol=0)
            torch.testing.assert_close(at["copy - gradient"] - at["copy"], -step, atol=1e-6, rtol=0)
    other = projection.initial("random", tiny.ffns, CHOSEN, gradients, 5)
    assert not torch.equal(other[0].gate_proj.weight, small["random"][0].gate_proj.weight)
    assert all(p.requires_grad for each in small.values() for expert in each for p in expert.parameters())


def test_plus_climbs_the_loss_and_minus_descends(tiny: Tiny) -> None:
    model, ffns = double(tiny)
    gradients = projection.capture(model, ffns, CHOSEN, SAMPLES[:1])
    start = {k: projection.initial(k, ffns, CHOSEN, gradients, 0, beta=1e-5) for k in projection.INITS}
    moved = [align.exchanged(start[f"copy {sign} gradient"], start["copy"]) for sign in "+-"]
    up, down = (loss_under(model, ffns, taps, SAMPLES[:1]) for taps in moved)
    dense = evaluate.loss(model, SAMPLES[:1]).mean
    # A small step of length αβ along each matrix's gradient changes the loss by ±αβ·Σ‖∇W‖ (evaluate rounds to float32).
    expected = 0.8e-5 * sum(float(matrix.norm()) for each in gradients for matrix in each)
    assert up - down == pytest.approx(2 * expected, rel=0.02)
    assert up > dense > down


def test_all_neurons_copied_are_the_large_model(tiny: Tiny) -> None:
    gradients = projection.capture(tiny.model, tiny.ffns, EVERY, SAMPLES)
    taps = align.instead(projection.initial("copy", tiny.ffns, EVERY, gradients, 0))
    expected = tiny.model(tiny.ids).logits
    with align.tapped(tiny.ffns, taps):
        torch.testing.assert_close(tiny.model(tiny.ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tiny.model(tiny.ids).logits, expected)
    silent = [lambda x, y: torch.zeros_like(y)] * 2
    exact, zero, none = align.relative_mse(tiny.model, tiny.ffns, [taps, silent, [lambda x, y: None] * 2], SAMPLES)
    assert (exact < 1e-10, zero, none) == (True, 1.0, 0.0)


def test_taps_are_the_models_they_stand_for(tiny: Tiny) -> None:
    gradients = projection.capture(tiny.model, tiny.ffns, CHOSEN, SAMPLES)
    kinds = ("gradient", "copy", "copy + gradient")
    small = {k: projection.initial(k, tiny.ffns, CHOSEN, gradients, 0) for k in kinds}
    really_small, moved = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
    with torch.no_grad():
        for layer, index in enumerate(CHOSEN):
            really_small.model.layers[layer].mlp = small["gradient"][layer]
            mlp, new = moved.model.layers[layer].mlp, small["copy + gradient"][layer]
            mlp.gate_proj.weight[index] = new.gate_proj.weight
            mlp.up_proj.weight[index] = new.up_proj.weight
            mlp.down_proj.weight[:, index] = new.down_proj.weight
    taps = [align.instead(small["gradient"]), align.exchanged(small["copy + gradient"], small["copy"])]
    for mine, true in zip(taps, (really_small, moved), strict=True):
        found = loss_under(tiny.model, tiny.ffns, mine, SAMPLES)
        assert found == pytest.approx(evaluate.loss(true, SAMPLES).mean, abs=1e-5)


def test_small_models_learn_together_as_they_would_alone(tiny: Tiny) -> None:
    gradients = projection.capture(tiny.model, tiny.ffns, EVERY, SAMPLES)

    def trained(*kinds: str) -> tuple[pd.DataFrame, list[Any]]:
        smalls = [projection.initial(kind, tiny.ffns, EVERY, gradients, 1) for kind in kinds]
        batch = lambda step: torch.tensor(texts(8, 16, seed=step % 2))  # noqa: E731
        history = align.align(tiny.model, tiny.ffns, smalls, batch, steps=30, lr=0.01, shards=2)
        return history, smalls

    history, both = trained("random", "gradient")
    alone = [trained("random"), trained("gradient")]
    mean = (alone[0][0]["loss"] + alone[1][0]["loss"]) / 2
    pd.testing.assert_series_equal(history["loss"], mean, rtol=1e-4)
    assert history["loss"].iloc[-1] < 0.9 * history["loss"].iloc[0]
    for together, (_, (apart,)) in zip(both, alone, strict=True):
        torch.testing.assert_close(together[1].up_proj.weight, apart[1].up_proj.weight, atol=1e-4, rtol=1e-3)


def test_first_loss_is_the_relative_error_by_hand(tiny: Tiny) -> None:
    gradients = projection.capture(tiny.model, tiny.ffns, CHOSEN, SAMPLES)
    small = projection.initial("copy", tiny.ffns, CHOSEN, gradients, 0)
    ids = texts(4, 16)
    (expected,) = align.relative_mse(tiny.model, tiny.ffns, [align.instead(small)], ids)
    history = align.align(tiny.model, tiny.ffns, [small], lambda step: torch.tensor(ids), steps=1, lr=0.01)
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)


def court(tiny: Tiny, **options: Any) -> pd.DataFrame:
    options = (
        dict[str, Any]()
        | {"steps": 6, "lr": 0.01, "seeds": (0, 1), "length": 16, "batch": 4, "every_seconds": 0.0}
        | options
    )
    return align.compare(tiny.model, tiny.ffns, CHOSEN, CALIBRATION, HELD, **options)


def test_table(tiny: Tiny) -> None:
    table = court(tiny).set_index(["init", "moment"])
    inits = [(kind, moment) for moment in ("before", "after") for kind in projection.INITS]
    assert set(table.index) == {*inits, ("large + gradient", "before"), ("large - gradient", "before")}
    assert table["seeds"].to_dict() == {
        (init, moment): 2 if init in ("random", "gradient", "gradient_descent") else 1 for init, moment in table.index
    }
    assert (table["low"] <= table["delta_nll"]).all()
    assert (table["delta_nll"] <= table["high"]).all()
    for moment in ("before", "after"):
        found, random = table.loc["copy", moment], table.loc["random", moment]
        assert found["vs_random"] == pytest.approx(found["delta_nll"] - random["delta_nll"])
    assert table.loc["random", "vs_random"].isna().all()
    assert (table.loc["random", "mse"]["after"]) < table.loc["random", "mse"]["before"]


def test_wins_are_counted_seed_by_seed() -> None:
    losses = [evaluate.Loss(np.array([value, value]), np.array([1, 1])) for value in (1.0, 2.0, 3.0, 0.0)]
    counted = [
        align._against(each, losses[3], losses[:3], ["a", "b"])["wins"]
        for each in ([losses[3], losses[2], losses[1]], losses[1:2])  # one each; one for all, without a seed
    ]
    assert counted == [2, 1]


def test_large_model_along_its_gradient_is_measured_on_both_texts(tiny: Tiny) -> None:
    table = court(tiny, seeds=(0,), steps=1, beta=0.01).set_index("init")
    gradients = projection.capture(tiny.model, tiny.ffns, CHOSEN, CALIBRATION["ids"].tolist())
    old = projection.initial("copy", tiny.ffns, CHOSEN, gradients, 0)
    for sign in "+-":
        new = projection.initial(f"copy {sign} gradient", tiny.ffns, CHOSEN, gradients, 0, beta=0.01)
        for column, texts in (("delta_nll", HELD), ("delta_seen", CALIBRATION)):
            ids = texts["ids"].tolist()
            moved = loss_under(tiny.model, tiny.ffns, align.exchanged(new, old), ids)
            expected = moved - evaluate.loss(tiny.model, ids).mean
            assert table[column][f"large {sign} gradient"] == pytest.approx(expected, abs=1e-6)
    assert table["delta_seen"]["large + gradient"] > 0 > table["delta_seen"]["large - gradient"]
    assert table["delta_seen"].notna().sum() == 2


class Killed(BaseException):
    pass


def forwards(tiny: Tiny, action: Callable[[], object], kill_at: int | None = None) -> int:
    """Runs of the decoder during `action`, which is killed in the given one."""
    counter, seen = itertools.count(1), [0]

    def hook(module: nn.Module, args: object) -> None:
        number = next(counter)  # atomic: judging runs batches side by side
        seen.append(number)
        if number == kill_at:
            raise Killed

    handle = tiny.model.model.register_forward_pre_hook(hook)
    try:
        action()
    except Killed:
        pass
    finally:
        handle.remove()
    return max(seen)


def test_a_killed_comparison_goes_on_and_gives_the_same_numbers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.losses, "default_shards", lambda device: 1)  # else the forwards depend on the cores
    whole: list[pd.DataFrame] = []
    runs = forwards(tiny, lambda: whole.append(court(tiny, shards=1)))
    # In the middle of the gradient, of the first seed and of the second: samples and steps that need no second run.
    inside = {7: 6, 76: 12 + 2, runs - 30: 12 + 6 + 3}
    for place, (kill_at, saved) in enumerate(inside.items()):
        folder = tmp_path / str(place)
        notes: list[str] = []
        again: list[pd.DataFrame] = []
        going_on = {"shards": 1, "resume": folder, "progress": lambda done, total, note, into=notes: into.append(note)}

        def run(options: dict[str, Any] = going_on, into: list[pd.DataFrame] = again) -> None:
            into.append(court(tiny, **options))

        assert forwards(tiny, run, kill_at) == kill_at
        assert not again
        assert forwards(tiny, run) == runs - saved
        assert any(note.startswith("going on") for note in notes)
        pd.testing.assert_frame_equal(again[0], whole[0], check_exact=True)


def test_a_checkpoint_of_other_neurons_is_not_used(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "gradient.pt"
    other = [index.flip(0) for index in CHOSEN]
    expected = projection.capture(tiny.model, tiny.ffns, other, SAMPLES)
    projection.capture(tiny.model, tiny.ffns, CHOSEN, SAMPLES, checkpoint=path)
    found = projection.capture(tiny.model, tiny.ffns, other, SAMPLES, checkpoint=path)
    assert path.exists()
    assert all(torch.equal(a, b) for mine, true in zip(found, expected, strict=True) for a, b in zip(mine, true))  # noqa: B905


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        (CHOSEN[:1], "in 1 layers, the model has 2"),
        ([CHOSEN[0], torch.tensor([32])], r"model\.layers\.1\.mlp has neurons 0 to 31"),
        ([CHOSEN[0], torch.tensor([-1])], "neurons 0 to 31"),
        ([torch.tensor([4, 4]), CHOSEN[1]], "each once"),
        ([torch.tensor([], dtype=torch.long), CHOSEN[1]], "choose some"),
    ],
)
def test_bad_neurons_are_one_line(tiny: Tiny, chosen: list[torch.Tensor], line: str) -> None:
    with pytest.raises(BenchError, match=line):
        projection.capture(tiny.model, tiny.ffns, chosen, SAMPLES)


def test_bad_samples_are_named(tiny: Tiny) -> None:
    def poison(module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((args[0] == 299)[..., None], float("nan"))

    handle = tiny.model.model.embed_tokens.register_forward_hook(poison)
    try:
        with pytest.raises(BenchError, match="not finite in sample 1"):
            projection.capture(tiny.model, tiny.ffns, CHOSEN, [SAMPLES[0], [3, 299, 4], SAMPLES[1]])
    finally:
        handle.remove()
    for samples in ([], [[1, 2, 3], [4]]):
        with pytest.raises(BenchError, match="two tokens"):
            projection.capture(tiny.model, tiny.ffns, CHOSEN, samples)


def test_other_bad_input_is_one_line(tiny: Tiny) -> None:
    gradients = projection.capture(tiny.model, tiny.ffns, CHOSEN, SAMPLES)
    with pytest.raises(BenchError, match="Unknown init 'best': choose one of random, gradient"):
        projection.initial("best", tiny.ffns, CHOSEN, gradients, 0)
    with pytest.raises(BenchError, match="belong to other neurons"):
        projection.initial("copy", tiny.ffns, EVERY, gradients, 0)
    with pytest.raises(BenchError, match="No seed"):
        court(tiny, seeds=())
    model = models.new_model(vocab_size=300, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=32)
    small = projection.initial("copy", models.ffns(model), CHOSEN, gradients, 0)
    with pytest.raises(BenchError, match="nothing but zeros"):
        align.align(model, models.ffns(model), [small], lambda step: tiny.ids, steps=1, lr=0.01)


def test_an_ffn_that_hooks_cannot_see_is_refused(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: F.silu(x @ mlp.gate_proj.weight.T) @ mlp.down_proj.weight.T
    with pytest.raises(BenchError, match="3 of 6 gradients arrived"):
        projection.capture(model, models.ffns(model), CHOSEN, SAMPLES)


def test_top_takes_the_highest_of_each_layer() -> None:
    table = pd.DataFrame({"layer": [1, 0, 1, 0, 1, 0], "neuron": [0, 0, 1, 1, 2, 2], "sp": [3.0, 1, 2, 9, 5, 4]})
    assert [index.tolist() for index in projection.top(table, "sp", 2)] == [[1, 2], [0, 2]]
    with pytest.raises(BenchError, match="No column 'x'"):
        projection.top(table, "x", 2)
    with pytest.raises(BenchError, match="from 1 to 3"):
        projection.top(table, "sp", 4)


def test_the_verdict_says_what_the_table_says() -> None:
    after = {"moment": "after", "seeds": 3, "files": 20}
    table = pd.DataFrame(
        [
            {"init": "large + gradient", "moment": "before", "delta_seen": 0.25},
            after | {"init": "random", "delta_nll": 0.5},
            after | {"init": "gradient", "vs_random": 0.1, "vs_low": -0.1, "vs_high": 0.3, "wins": 1},
            after | {"init": "copy", "vs_random": -0.2, "vs_low": -0.3, "vs_high": -0.1, "wins": 3},
        ]
    )
    said = align.verdict(table).splitlines()
    assert "+0.500 nats per token from a random start" in said[0]
    assert said[1] == "- `gradient` loses about as much as it (+0.100 [-0.100, +0.300], lower in 1 of 3 seeds)."
    assert said[2] == "- `copy` loses less than it (-0.200 [-0.300, -0.100], lower in 3 of 3 seeds)."
    assert said[3] == "- `large + gradient`: +0.250 nats per token on the texts that the gradient is of."
