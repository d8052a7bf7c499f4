"""Only routers learn; what they learn is what the slow formula says; a kill costs nothing but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import load
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.selection import warmup
from tinyonn_lib.selection.calibrate import cold
from tinyonn_lib.selection.pairs import Pairs
from tinyonn_lib.selection.routers import Watch, routers
from tinyonn_lib.selection.scores import trash_experts
from tinyonn_lib.selection.selector import in_float32
from tinyonn_lib.selection.warmup import warm_up, warm_up_all

from .warmups import RECIPE, passages, trained

FAMILIES = ("glm4_moe", "qwen2_moe", "olmoe", "gpt_oss")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(make_moe: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family saved, as a user has it."""
    found = {}
    for kind in FAMILIES:
        found[kind] = tmp_path_factory.mktemp(kind)
        make_moe(kind).save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    return found


def rows_of(model: Any) -> list[torch.Tensor]:
    return [x.detach().clone() for layer in routers(model) for x in (layer.weight, layer.bias) if x is not None]


def everything(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also the ones that are not saved."""
    both = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in both.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["contrastive", "lm"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_only_the_routers_learn_and_all_of_their_rows(
    kind: str, loss: str, dtype: load.Dtype, folders: dict[str, Path], tokenizer: Any,
    make_texts: Callable[..., list[str]],
) -> None:  # fmt: skip
    model = load.load_model(str(folders[kind]), dtype, "cpu")
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    before, told = everything(model), model(input_ids=ids).logits
    own = {f"{layer.name}.{part}" for layer in routers(model) for part in ("weight", "bias")} & before.keys()
    beside = {f"{layer.name}.{name}" for layer in routers(model) for name, _ in layer.module.named_buffers()}
    assert len(own) == (4 if kind == "gpt_oss" else 2)
    trained(model, tokenizer, passages(make_texts), replace(RECIPE, loss=loss))
    after = everything(model)
    assert after.keys() == before.keys()
    assert kind != "qwen2_moe" or any("shared_expert_gate" in name for name in after.keys() - own)
    for name in after.keys() - own:
        assert torch.equal(after[name].double(), before[name].double()), name
        assert after[name].dtype == before[name].dtype or name in beside, name
    for name in own:
        assert after[name].dtype == torch.float32, name
        change = after[name].double() - before[name].double()
        moved = change.abs() > 1e-6
        assert moved.any(-1).all(), name  # no row stays as it was
        if change.ndim == 2:
            assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == min(change.shape), name
    moved_to = model(input_ids=ids).logits
    assert moved_to.dtype == told.dtype == getattr(torch, dtype)
    assert torch.isfinite(moved_to).all()
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == own


def test_the_learning_rate_rises_and_falls_alike_in_each_epoch(
    make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    model = make_moe()
    spread = float(routers(model)[0].weight.square().mean().sqrt())
    found = [h for _, _, h in warm_up(model, tokenizer, passages(make_texts), replace(RECIPE, epochs=3))]
    assert [history["epoch"].unique().tolist() for history in found] == [[1], [2], [3]]
    rates = [history["lr"].tolist() for history in found]
    assert rates[0] == rates[1] == rates[2]
    assert max(rates[0]) == pytest.approx(RECIPE.lr * spread)
    assert rates[0][-1] < max(rates[0])


def exact_scores(model: Any, text: list[int], start: int, trash: list[Any], units: list[float]) -> tuple[float, float]:
    """`contrastive` and `log_mass` of one text alone, in float64, by the definition."""
    out = model(input_ids=torch.tensor([[start, *text]]), output_router_logits=True, use_cache=False)
    odds, mass = 0.0, 0.0
    for raw, bad, unit in zip(out.router_logits, trash, units, strict=True):
        for z in raw.reshape(len(text) + 1, -1)[1:].double():
            e = (z / unit).exp()
            odds += float((e[~bad].sum() / e[bad].sum()).log()) / len(text) / len(units)
            mass += float((e[~bad].sum() / e.sum()).log()) / len(text) / len(units)
    return odds, mass


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_contrastive_loss_is_the_slow_formula(
    kind: str, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    model, texts = make_moe(kind), passages(make_texts, 6)
    layers = in_float32(model)
    trash = trash_experts([layer.experts for layer in layers], 0.25)
    units = [0.7, 1.9]
    batch = Pairs(tokenizer, texts, replace(RECIPE, batch=5))(0)
    start = start_token(tokenizer)
    total = 0.0
    for row in range(5):
        good, bad = (
            exact_scores(model, batch[name][row][batch[f"{name}_mask"][row]].tolist(), start, trash, units)
            for name in ("clean", "bad")
        )
        total += sum(float(F.softplus(torch.tensor(b - g).double())) for g, b in zip(good, bad, strict=True)) / 10
    model.requires_grad_(True)
    with Watch(model.base_model) as watch:
        loss = warmup._contrast(watch, layers, trash, torch.tensor(units))(batch)
        inputs = [x.double() for x in watch.inputs]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    assert total > 0.01
    loss.backward()
    own = {id(x) for layer in layers for x in (layer.weight, layer.bias)}
    assert all((weight.grad is not None) == (id(weight) in own) for weight in model.parameters())
    assert all(float(layer.weight.grad.abs().max()) > 1e-6 for layer in layers)  # type: ignore[union-attr]

    # The gradient of the first layer, with what it saw held fixed, by differences in float64.
    def there(weight: torch.Tensor) -> float:
        logits = [
            F.linear(x, weight if layer is layers[0] else layer.weight.detach().double(),
                     None if layer.bias is None else layer.bias.detach().double())
            for x, layer in zip(inputs, layers, strict=True)
        ]  # fmt: skip
        width = max(batch["clean"].shape[1], batch["bad"].shape[1])
        masks = torch.cat(
            [F.pad(batch[name], (0, width - batch[name].shape[1])) for name in ("clean_mask", "bad_mask")]
        )
        values: dict[str, torch.Tensor] = {"odds": torch.zeros(10).double(), "mass": torch.zeros(10).double()}
        for raw, bad, unit in zip(logits, trash, units, strict=True):
            e = (raw / unit).exp()
            each = {"odds": e[:, ~bad].sum(1) / e[:, bad].sum(1), "mass": e[:, ~bad].sum(1) / e.sum(1)}
            for name, value in each.items():
                values[name] += (value.log().view(masks.shape) * masks).sum(1) / masks.sum(1) / 2
        return sum(float(F.softplus(value[5:] - value[:5]).mean()) / 2 for value in values.values())

    weight = layers[0].weight.detach().double()
    for row, column in ((0, 0), (1, 7), (layers[0].experts - 1, 31)):
        step = torch.zeros_like(weight)
        step[row, column] = 1e-5
        slope = (there(weight + step) - there(weight - step)) / 2e-5
        assert float(layers[0].weight.grad[row, column]) == pytest.approx(slope, rel=1e-3, abs=1e-6)  # type: ignore[index]


def test_the_documents_loss_is_masked_cross_entropy(
    make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    model = make_moe("qwen2_moe")
    batch = Pairs(tokenizer, passages(make_texts, 6), replace(RECIPE, batch=6))(0)
    assert batch["clean_mask"].sum(1).unique().numel() > 1  # there is padding
    total = 0.0
    for ids, mask in zip(batch["clean"], batch["clean_mask"], strict=True):
        text = ids[mask]
        alone = model(input_ids=torch.cat([ids[:1], text])[None], use_cache=False).logits[0, :-1].double()
        total -= float(alone.log_softmax(-1).gather(1, text[:, None]).mean()) / 6
    assert float(warmup._language(model)(batch)) == pytest.approx(total, rel=1e-5)


def test_every_epoch_has_steps_of_its_own(
    make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    made = Pairs.__call__

    def spy(self: Pairs, step: int, device: torch.device | None = None) -> Any:
        steps.append(step)
        return made(self, step, device)

    monkeypatch.setattr(Pairs, "__call__", spy)
    trained(make_moe(), tokenizer, passages(make_texts), RECIPE)
    assert steps == list(range(8))


class StopHere(Exception):
    pass


def stopping(at: int) -> Callable[[int, int, str], None]:
    def progress(done: int, of_all: int, note: str) -> None:
        if done >= at:
            raise StopHere

    return progress


@pytest.mark.parametrize("loss", ["contrastive", "lm"])
def test_goes_on_to_the_bit_after_an_interruption(
    loss: str, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    texts, recipe = passages(make_texts, 50), replace(RECIPE, loss=loss, epochs=3)
    whole, histories = make_moe(seed=3), []
    expected = []
    for _, selector, history in warm_up(whole, tokenizer, texts, recipe):
        histories.append(history)
        expected.append((rows_of(whole), selector.units, selector.gap, selector.combined))
    steps = len(histories[0])
    assert steps == 5
    ticking = count(0, 0.5)
    monkeypatch.setattr("time.monotonic", lambda: next(ticking))  # each step is told, not each one is kept
    with pytest.raises(StopHere):
        trained(make_moe(seed=3), tokenizer, texts, recipe, checkpoints=tmp_path, every_seconds=0.9,
                progress=stopping(steps + 3))  # fmt: skip
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["warm_0_1.pt", "warm_0_2.pt"]
    told: list[tuple[int, int, str]] = []
    model, found, again = make_moe(seed=3), [], []
    for _, selector, history in warm_up(
        model, tokenizer, texts, recipe, checkpoints=tmp_path, progress=lambda *n: told.append(n)
    ):
        again.append(history)
        found.append((rows_of(model), selector.units, selector.gap, selector.combined))
    resumed = [done for done, _, note in told if note.startswith("going on")]
    assert resumed[0] == steps
    assert steps < resumed[1] < 2 * steps
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[0], theirs[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(mine[2], theirs[2], strict=True))
        assert mine[1::2] == theirs[1::2]
    for left, right in zip(again, histories, strict=True):
        pd.testing.assert_frame_equal(left, right, check_exact=True)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (3 * steps, 3 * steps)


@pytest.mark.parametrize("change", ["lr", "corruptions", "ratio", "loss", "epochs", "texts", "later texts", "weights"])
def test_a_checkpoint_of_another_warm_up_is_not_used(
    change: str, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    texts, recipe = passages(make_texts, 60), replace(RECIPE, epochs=1)
    trained(make_moe(), tokenizer, texts, recipe, checkpoints=tmp_path)
    other: dict[str, Any] = {
        "lr": 0.05, "corruptions": ("repetition",), "ratio": 0.5, "loss": "lm", "epochs": 2,
    }  # fmt: skip
    changed = replace(recipe, **{change: other[change]}) if change in other else recipe
    model = make_moe(seed=int(change == "weights"))
    if change == "texts":
        texts = passages(make_texts, 60, seed=9)
    if change == "later texts":  # neither in the first batch nor in what the units are measured on
        pairs, first = Pairs(tokenizer, texts.head(48), recipe), set()
        for row, mask in zip(pairs(0)["clean"], pairs(0)["clean_mask"], strict=True):
            first.add(tokenizer.decode(row[mask]))
        late = next(place for place in range(33, 48) if texts["text"][place] not in first)
        texts = texts.assign(text=[t if place != late else "token model" for place, t in enumerate(texts["text"])])
    told: list[str] = []
    trained(model, tokenizer, texts, changed, checkpoints=tmp_path, progress=lambda _, __, note: told.append(note))
    assert told
    assert not any(note.startswith("going on") for note in told)


KILLED = """
import sys, os, signal
from pathlib import Path
import pandas as pd, torch
from tests.selection.conftest import sentences
from tinyonn_lib.selection.warmup import Recipe, warm_up_all
model, out, resume, when = sys.argv[1:]
wanted, save = int(when), torch.save
saved = 0
def dying(state, path):
    global saved
    saved += 1
    save(state, path)
    if saved == wanted:
        half = Path(path).read_bytes()
        Path(path).write_bytes(half[: len(half) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
texts = pd.DataFrame({"text": sentences(40, least=6)})
recipe = Recipe(corruptions=("byte_noise", "word_shuffle"), ratio=0.25, epochs=2, batch=8, lr=0.1)
warm_up_all(model, texts, recipe, lambda name: Path(out) / name, seeds=2, device="cpu",
            checkpoints=Path(resume), every_seconds=0.0)
"""


def test_goes_on_to_the_bit_after_sigkill(
    folders: dict[str, Path], make_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Killed in the middle of writing a checkpoint of the second epoch."""
    steps, model = 4, str(folders["glm4_moe"])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, model, str(tmp_path / "out"), str(tmp_path / "resume"), str(steps + 3)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "out/epoch_1/selector.json").exists()
    assert not (tmp_path / "out/epoch_2").exists()
    told: list[tuple[int, str]] = []

    def progress(what: str, unit: str) -> Callable[[int, int, str], None]:
        return lambda done, of_all, note: told.append((done, note))

    for out, more in (("out", {"checkpoints": tmp_path / "resume"}), ("plain", {})):
        warm_up_all(
            model, passages(make_texts), RECIPE, lambda name, out=out: tmp_path / out / name, seeds=2,
            device="cpu", progress=progress, **more,
        )  # fmt: skip
    # The first epoch is not trained again, of the second what the last whole checkpoint had not.
    assert [done for done, note in told if note.startswith("going on")] == [steps, steps + 2]
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file


def test_seeds_and_epochs_have_folders_and_histories_of_their_own(
    folders: dict[str, Path], make_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    asked: list[tuple[str, str]] = []

    def progress(what: str, unit: str) -> Callable[[int, int, str], None]:
        asked.append((what, unit))
        return lambda *_: None

    history = warm_up_all(
        str(folders["olmoe"]), passages(make_texts), replace(RECIPE, seed=4), lambda name: tmp_path / name, seeds=2,
        device="cpu", progress=progress,
    )  # fmt: skip
    found = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("selector.json")}
    assert found == {"epoch_1", "epoch_2", "seed_1/epoch_1", "seed_1/epoch_2"}
    assert history.groupby(["seed", "epoch"]).size().to_dict() == {(s, e): 4 for s in (4, 5) for e in (1, 2)}
    assert [what for what, _ in asked] == ["warm-up, seed 4", "warm-up, seed 5"]
    weights = {name: (tmp_path / name / "routers.safetensors").read_bytes() for name in found}
    assert len(set(weights.values())) == 4


@pytest.mark.parametrize(
    ("number", "change", "line"),
    [
        (12, {"batch": 8}, r"^12 passages are too few"),
        (8, {"batch": 1}, r"^8 passages are too few"),
        (0, {}, r"too few"),
        (40, {"ratio": 0.1}, r"^trash_expert_ratio 0\.1 of 8 experts .*no trash"),
        (40, {"ratio": 1.0}, r"^trash_expert_ratio 1\.0"),
    ],
)
def test_refused(
    number: int, change: dict[str, Any], line: str, make_moe: Callable[..., Any], tokenizer: Any,
    make_texts: Callable[..., list[str]],
) -> None:  # fmt: skip
    with pytest.raises(BenchError, match=line):
        trained(make_moe(), tokenizer, passages(make_texts, number), replace(RECIPE, **change))


def test_a_dense_model_is_refused_with_the_phases_that_make_an_moe(
    make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    for call in (warm_up, cold):
        with pytest.raises(BenchError, match=r"no router: .*02_scan to 05_router.*OLMoE"):
            list(call(make_moe("qwen3"), tokenizer, passages(make_texts), *([RECIPE] if call is warm_up else [])))  # type: ignore[operator]
