"""Distillation: the loss against float64, the text alone as a special case, resume, and the comparison's table."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tinyonn_lib.align.distil import Way, distil, teacher_nats
from tinyonn_lib.align.distil_compare import compare, kl_from
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import texts
from tinyonn_lib.lm.judge import bits_per_byte
from tinyonn_lib.lm.models import new_model
from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.pretrain import architectures
from tinyonn_lib.pretrain.forward import forward
from tinyonn_lib.pretrain.layout import Rows, lay
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.train import pretrain

torch.set_num_threads(1)
TEXTS = [f"the cat number {i} sat on the mat, and the dog ate the hat of Größe {i % 7}." for i in range(400)]
TOKENIZER = train_bpe(TEXTS, 300)
IDS = texts.encode(TEXTS, TOKENIZER, None)
BLOCKS = texts.pack(IDS, 32, 0, seed=0)
EXACT = Recipe(precision="float32")
STEP = 16 * 32


def model(width: int = 32, seed: int = 0, **more: Any) -> Any:
    """A small Qwen3 whose branches are not zero."""
    sizes = {"vocab_size": 300, "layers": 1, "heads": 2, "head_dim": 16, "ffn": 64, "max_length": 32}
    made = new_model(**(sizes | more), width=width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * (0.0 if "norm" in name else 0.1))
    return made.eval()


def values(made: Any) -> list[Tensor]:
    return [value.clone() for value in made.state_dict().values()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_and_gradient_are_those_of_the_kl(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 50, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    student.requires_grad_()
    p, q = (softmax(logits.detach().numpy() / temperature) for logits in (teacher, student))
    nats = teacher_nats(student, teacher, temperature)
    entropy = teacher_nats(teacher, teacher, temperature)
    assert nats.detach().numpy() == pytest.approx(temperature**2 * -(p * np.log(q)).sum(-1), rel=1e-6)
    kl = temperature**2 * (p * np.log(p / q)).sum(-1)
    assert (nats - entropy).detach().numpy() == pytest.approx(kl, rel=1e-5, abs=1e-5)
    (grad,) = torch.autograd.grad(nats.double().sum(), student)
    assert grad.numpy() == pytest.approx(temperature * (q - p), rel=1e-6, abs=1e-9)


def test_temperature_does_not_change_the_size_of_the_gradient() -> None:
    """In the limit it is that of ½ (logit difference)² around the mean, over the vocabulary (Hinton et al., eq. 4)."""
    student, teacher = torch.randn(2, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    student.requires_grad_()
    (grad,) = torch.autograd.grad(teacher_nats(student, teacher, 1e4).sum(), student)
    gap = (student - teacher).detach()
    assert grad.numpy() == pytest.approx(((gap - gap.mean()) / 50).numpy(), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("layout", ["packed", "documents", "padded"])
def test_share_0_is_pretraining_to_the_bit(layout: Any) -> None:
    rows = lay(IDS, 32, eos=0, pad=1, layout=layout)
    recipe, budget = Recipe(layout=layout), {"tokens": 6 * STEP, "seed": 3, "shards": 2}
    one, two = model(), model()
    expected = pretrain(rows, one, recipe, **budget)
    found = distil(two, model(64, 1), rows, Way(0.0), recipe, **budget)
    assert same(values(one), values(two))
    pd.testing.assert_frame_equal(found, expected)


def test_share_0_is_pretraining_to_the_bit_with_experts_too() -> None:
    sizes = {"vocab_size": 300, "width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64}
    one, two = (architectures.new("qwen3_moe", **sizes, max_length=32, experts=4, active=2) for _ in range(2))
    ways = one.config._experts_implementation, one.config._attn_implementation
    pretrain(BLOCKS, one, tokens=6 * STEP, shards=2)
    distil(two, model(64, 1), BLOCKS, Way(0.0), tokens=6 * STEP, shards=2)
    assert same(values(one), values(two))
    assert (two.config._experts_implementation, two.config._attn_implementation) == ways


def apart(judged: Any, rows: Rows) -> Tensor:
    """Logits at all places but the last, (N, length − 1, V), without anything between documents."""
    found = []
    for number, row in enumerate(rows.ids[:, :-1]):
        starts = [0] if rows.positions is None else (rows.positions[number, :-1] == 0).nonzero().flatten().tolist()
        pieces = row.tensor_split(starts[1:])
        with torch.no_grad():
            found.append(torch.cat([judged(piece[None]).logits[0] for piece in pieces]))
    return torch.stack(found)


@pytest.mark.parametrize("layout", ["documents", "padded"])
@pytest.mark.parametrize(("share", "temperature"), [(0.3, 2.0), (1.0, 1.0)])
def test_the_first_loss_is_the_weighted_sum(share: float, temperature: float, layout: Any) -> None:
    """Against sums in float64 over the places that ask for something, each document on its own."""
    rows = lay(IDS, 32, eos=0, pad=1, layout=layout)
    few = Rows(rows.ids[:16], None if rows.positions is None else rows.positions[:16], rows.pad)
    student, teacher = model(), model(64, 1)
    one, two = (apart(judged, few).double().numpy() for judged in (student, teacher))
    p, q = softmax(two / temperature), softmax(one / temperature)
    asked = few.ids[:, 1:].numpy()
    counted = asked != 1 if layout == "padded" else np.ones_like(asked, bool)
    nll = -np.log(np.take_along_axis(softmax(one), asked[..., None], -1)[..., 0])
    expected = (share * temperature**2 * -(p * np.log(q)).sum(-1) + (1 - share) * nll)[counted].mean()
    recipe = Recipe(layout=layout, precision="float32")
    history = distil(student, teacher, few, Way(share, temperature), recipe, tokens=STEP, shards=1)
    assert history["loss"].tolist() == pytest.approx([expected], rel=1e-5)


def test_experts_stay_balanced_while_they_learn() -> None:
    sizes = {"vocab_size": 300, "width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64}
    student = architectures.new("qwen3_moe", **sizes, max_length=32, experts=4, active=2)
    teacher, losses = model(64, 1), []
    for balance in (0.0, 0.5):
        recipe = Recipe(precision="float32", balance=balance)
        history = distil(copy.deepcopy(student), teacher, BLOCKS[:16], recipe=recipe, tokens=STEP, shards=1)
        losses.append(history["loss"][0])
    with torch.no_grad():
        expected = float(forward(student, BLOCKS[:16, :-1]).balance)
    assert expected > 0.5
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, rel=1e-4)


def test_the_student_comes_close_to_the_teacher_who_stays() -> None:
    teacher, student = model(64, 1), model()
    pretrain(BLOCKS, teacher, EXACT, tokens=60 * STEP)
    weights, far = values(teacher), kl_from(student, teacher, BLOCKS[:20])
    teacher.train()
    distil(student, teacher, BLOCKS, tokens=60 * STEP)
    assert same(values(teacher), weights)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert (student.training, student.config._attn_implementation) == (False, "sdpa")
    assert teacher.config._attn_implementation == "sdpa"
    assert kl_from(student, teacher, BLOCKS[:20]) < 0.1 * far


class Stop(Exception):
    pass


def test_resume_is_exact_and_only_with_the_same_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut, batches = model(), model(), Rows.batches
    options: dict[str, Any] = {"tokens": 12 * STEP, "shards": 2, "every_seconds": 0.0}
    expected = distil(whole, model(64, 1), BLOCKS, **options)

    def interrupted(rows: Rows, *given: Any) -> Callable[[int], Any]:
        at = batches(rows, *given)

        def until(step: int) -> Any:
            if step == 7:
                raise Stop
            return at(step)

        return until

    options |= {"checkpoint": tmp_path / "c.pt", "timing": {}}
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "batches", interrupted)
        with pytest.raises(Stop):
            distil(cut, model(64, 1), BLOCKS, **options)
    kept = (tmp_path / "c.pt").read_bytes()
    for number, (teacher, way, step) in enumerate(((2, Way(), 0), (1, Way(0.9), 0), (1, Way(), 7))):
        again, options["checkpoint"] = model(), tmp_path / f"{number}.pt"
        options["checkpoint"].write_bytes(kept)
        history = distil(again, model(64, teacher), BLOCKS, way, **options)
        assert options["timing"]["resumed_from"] == step
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    assert same(values(again), values(whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": {"vocab_size": 310}}, "student has 300 tokens, the teacher 310.* the same tokenizer"),
        ({"teacher": {"max_length": 16}}, "Rows of 32 tokens exceed the 16 that both models can read"),
        ({"rows": torch.full((3, 8), 300)}, "A block holds token 300, the model has 300: other tokenizer"),
        ({"rows": torch.zeros(3, 1, dtype=torch.long)}, r"length ≥ 2\) token ids, got shape \(3, 1\)"),
        ({"tokens": 0}, "tokens=0"),
        ({"recipe": Recipe(mtp=0.3)}, "no head for multi-token prediction"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    options = {"recipe": None, "tokens": STEP} | {k: v for k, v in change.items() if k in ("recipe", "tokens")}
    with pytest.raises(BenchError, match=message) as caught:
        distil(model(), model(64, **change.get("teacher", {})), change.get("rows", BLOCKS), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("share", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, math.nan)])
def test_impossible_ways(share: float, temperature: float) -> None:
    with pytest.raises(BenchError, match="must be in"):
        Way(share, temperature)


HELDOUT = pd.DataFrame({"text": TEXTS[:40], "source": [f"file {i % 10}" for i in range(40)]})


def test_kl_from_is_exact() -> None:
    student, teacher = model(), model(64, 1)
    with torch.no_grad():
        p, q = (softmax(m(BLOCKS[:20, :-1]).logits.double().numpy()) for m in (teacher, student))
    assert kl_from(student, teacher, BLOCKS[:20], batch=3) == pytest.approx(
        (p * np.log(p / q)).sum(-1).mean(), rel=1e-4
    )
    assert kl_from(teacher, teacher, BLOCKS[:20]) == pytest.approx(0, abs=1e-7)


def test_compare(tmp_path: Path) -> None:
    student, teacher = model(), model(64, 1)
    pretrain(BLOCKS, teacher, EXACT, tokens=60 * STEP)
    before, ways = values(student), {"text": Way(0.0), "teacher": Way(1.0)}
    said: list[str] = []

    def progress(what: str, unit: str) -> Callable[[int, int, str], None]:
        return lambda done, steps, note: said.append(f"{what} {note}")

    options: dict[str, Any] = {"tokens": 8 * STEP, "ways": ways, "recipe": EXACT, "seeds": 2, "progress": progress}
    found = compare(student, teacher, BLOCKS, TOKENIZER, HELDOUT, folder=tmp_path, **options)
    assert same(values(student), before)
    assert list(zip(found["method"], found["budget"], strict=True)) == [
        ("start", "none"), ("teacher", "none"), ("text", "tokens"), ("teacher", "tokens"), ("teacher", "time")
    ]  # fmt: skip
    for row, judged in ((0, student), (1, teacher)):
        assert found["bits_per_byte"][row] == pytest.approx(bits_per_byte(judged, TOKENIZER, TEXTS[:40]), rel=1e-9)
    assert found["kl"][1] == pytest.approx(0, abs=1e-7)
    assert (found["kl"][2:] < found["kl"][0]).all()
    size = sum(len(text.encode()) for text in TEXTS[:40]) / sum(map(len, IDS[:40]))
    assert found["nats_per_token"].to_numpy() == pytest.approx(found["bits_per_byte"] * math.log(2) * size)
    cost = json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert cost["text"] == 1
    assert found["cost"][2:].tolist() == [1, cost["teacher"], cost["teacher"]]
    assert found["tokens"][2:].tolist() == [8 * STEP, 8 * STEP, round(8 * STEP / cost["teacher"])]
    gaps = found["bits_per_byte"][3:] - found["bits_per_byte"][2]
    assert found["difference"][3:].to_numpy() == pytest.approx(gaps.to_numpy(), abs=1e-9)
    assert ((found["low"] <= found["difference"]) & (found["difference"] <= found["high"]))[3:].all()
    assert found.loc[:2, "standing"].isna().all()

    alone = [model(), model()]  # the control is plain pretraining from the same start
    for seed, each in enumerate(alone):
        pretrain(BLOCKS, each, EXACT, tokens=8 * STEP, seed=seed)
    expected = np.mean([bits_per_byte(each, TOKENIZER, TEXTS[:40]) for each in alone])
    assert found["bits_per_byte"][2] == pytest.approx(expected, rel=1e-6)

    said.clear()  # a comparison that was killed goes on: nothing is trained or measured twice
    again = compare(student, teacher, BLOCKS, TOKENIZER, HELDOUT, folder=tmp_path, **options)
    pd.testing.assert_frame_equal(again, found, check_exact=True)
    assert len(said) == 6
    assert all("going on from the last checkpoint" in line for line in said)
