"""Variable k: the loaded checkpoint computes what the divided model in memory does, and says clearly when it cannot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import analytic, export, routing, running, variable
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router, exported
from tinyonn_lib.experts.student import Routed
from tinyonn_lib.experts.training import calibrate
from tinyonn_lib.lm import models, tokenizer
from tinyonn_lib.workbench import cli

from .dense import dense, divide
from .references import linear_router
from .test_export import files_at_most

IDS = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen2Moe": ("qwen2", {"shared": 16}, "softmax"),
    "Qwen3Moe": ("qwen3", {"counts": (8, 8)}, "softmax"),
    "Glm4Moe": ("llama", {"shared": 16}, "sigmoid"),
    "Glm4Moe, uneven": ("mistral", {"counts": (3, 6), "sizes": (20, 9), "dropped": 2}, "sigmoid"),
}


@dataclass(frozen=True)
class Case:
    """A divided model in memory, and its checkpoint."""

    dense: Any
    partition: Partition
    layers: list[Routed]
    folder: Path

    def load(self, **options: Any) -> Any:
        return variable.load(self.folder, dtype=torch.float32, **options)

    def in_memory(self, scales: list[routing.Scale] | None = None) -> Tensor:
        """The divided model's logits."""
        with torch.no_grad(), routing.scaled(models.ffns(self.dense), scales or [part.scale for part in self.layers]):
            logits: Tensor = self.dense(IDS).logits
        return logits


def make(name: str, folder: Path) -> Case:
    kind, division, gates = CASES[name]
    model, part, rng = dense(kind), divide(**division), torch.Generator().manual_seed(3)
    layers = []
    for layer, index in enumerate(part.experts):
        start = analytic.Linear(torch.randn(len(index), 32, generator=rng), torch.randn(len(index), generator=rng))
        router = Router(start, torch.randn(50, 32, generator=rng), gates, gain=0.5)
        layers.append(Routed(router, part, layer, 2, variable=True))
    calibrate(model, models.ffns(model), layers, torch.randint(3, 96, (4, 16), generator=rng))
    rows, biases = exported(part.router for part in layers)
    export.export(model, part, folder, k=2, routers=rows, biases=biases)
    thresholds = [part.router.exported_threshold(part.threshold) for part in layers]
    variable.save(folder, thresholds, [1.75, 2.25], [len(index) for index in part.experts])
    return Case(model, part, layers, folder)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    base = tmp_path_factory.mktemp("variable")
    return {name: make(name, base / str(i)) for i, name in enumerate(CASES)}


@pytest.fixture
def case(cases: dict[str, Case], tmp_path: Path) -> Case:
    """One whose side file a test may change: weights are linked."""
    one = cases["Qwen3Moe"]
    for file in one.folder.iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
        else:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return Case(one.dense, one.partition, one.layers, tmp_path)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", CASES)
def test_loaded_equals_in_memory(cases: dict[str, Case], name: str, implementation: str) -> None:
    one = cases[name]
    moe, expected = one.load(experts_implementation=implementation), one.in_memory()
    with torch.no_grad():
        assert error(moe(IDS).logits, expected) <= 1e-5
    shares: list[float] = []

    def watched(layer: Routed) -> routing.Scale:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            on = layer.hard(x)[0].sum(-1)
            assert on.min() < on.max()
            shares.append(float(on.double().mean()))
            return layer.scale(x, h)

        return scale

    one.in_memory([watched(layer) for layer in one.layers])
    assert variable.active(moe, IDS) == pytest.approx(shares, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_plain_load_has_the_fixed_k(cases: dict[str, Case], name: str) -> None:
    one = cases[name]
    rows, biases = exported(part.router for part in one.layers)
    fixed = linear_router(rows, one.partition, 2, CASES[name][2], biases)
    plain = AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float32)
    with torch.no_grad():
        before = plain(IDS).logits
        assert error(before, one.in_memory(fixed)) <= 1e-5
        assert variable.active(plain, IDS) == [2, 2]
        with variable.attach(plain, one.folder):
            assert error(plain(IDS).logits, one.in_memory()) <= 1e-5
            assert error(plain(IDS).logits, before) > 1e-3
            assert plain.config.num_experts_per_tok == 2  # saving it again writes the same config
        assert torch.equal(plain(IDS).logits, before)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_are_off_are_not_computed(case: Case, implementation: str) -> None:
    moe, x = case.load(experts_implementation=implementation), torch.randn(1, 40, 32)
    block = moe.model.layers[0].mlp
    with torch.no_grad(), running.choices(moe) as found:
        expected = block(x)
        chosen, count = found[0]
        assert chosen.shape[1] < count  # only as many places as some token fills
        empty = chosen == count
        assert empty.any()
        assert (block.gate(x)[1][empty] == 0).all()  # on which kernels for experts on several processes rely
        off = chosen.ne(0).all(1)
        assert 0 < off.sum() < 40
        block.experts.gate_up_proj[0] = torch.nan  # 0 · NaN would be NaN
        assert error(block(x[:, off]), expected[:, off]) <= 1e-6
        assert block(x)[0].isnan().any(-1).equal(~off)


def test_with_no_expert_only_the_shared_ones_are_left(cases: dict[str, Case]) -> None:
    one = cases["Qwen2Moe"]
    before = (one.folder / variable.FILE).read_bytes()
    scale = routing.chosen(one.partition, [lambda x: x[..., :4]] * 2, 0)
    try:
        variable.save(one.folder, [1e9, 1e9], [0, 0])
        for implementation in ("eager", "grouped_mm"):
            moe = one.load(experts_implementation=implementation)
            with torch.no_grad():
                assert error(moe(IDS).logits, one.in_memory(scale)) <= 1e-5
            assert variable.active(moe, IDS) == [0, 0]
    finally:
        (one.folder / variable.FILE).write_bytes(before)


def test_at_the_threshold_is_off(case: Case) -> None:
    gate, x = case.load().model.layers[0].mlp.gate, torch.randn(1, 32)
    logits = gate(x)[0][0].detach()
    third = logits.sort(descending=True).indices[2]
    variable.save(case.folder, [float(logits[third]), 0.0], [2, 2])
    chosen = case.load().model.layers[0].mlp.gate(x)[2][0]
    assert set(chosen.tolist()) == set(logits.topk(2).indices.tolist())


def test_padding_stays_off_under_any_threshold(cases: dict[str, Case]) -> None:
    one = cases["Glm4Moe, uneven"]
    before = (one.folder / variable.FILE).read_bytes()
    try:
        variable.save(one.folder, [-1e9, -1e9], [3, 6], [3, 6])
        assert variable.active(one.load(), IDS) == [3, 6]
    finally:
        (one.folder / variable.FILE).write_bytes(before)


def test_generation_with_a_cache_equals_one_forward(cases: dict[str, Case]) -> None:
    moe = cases["Glm4Moe"].load()
    with torch.no_grad():
        out = moe.generate(IDS[:2, :6], max_new_tokens=8, do_sample=False, eos_token_id=None)
        again = moe(out).logits.argmax(-1)
    assert torch.equal(out[:, 6:], again[:, 5:-1])


def test_the_file_and_the_card_say_what_they_are(case: Case) -> None:
    told = json.loads((case.folder / variable.FILE).read_text())
    assert (told["format"], told["version"]) == ("tinyonn variable k", 1)
    assert told["order"] == "router logit"
    assert variable.read(case.folder).mean_k == (1.75, 2.25)
    card = case.folder / "README.md"
    card.write_text(card.read_text() + "\n## Notes\n\nmine\n")
    variable.save(case.folder, [0.5, 0.5], [1.0, 3.0])
    text = card.read_text()
    assert text.startswith("---\n")
    assert text.count("## Variable number of experts") == text.count("## Notes\n\nmine\n") == 1
    for line in ("runs the 2 best", "By them 2.00 are on in the mean (1.00 to 3.00 by layer)", "variable.load(folder)"):
        assert line in text
    with files_at_most(100), pytest.raises(BenchError, match="Cannot write .*variable_k.json"):
        variable.save(case.folder, [0.1, 0.1], [1.0, 1.0])
    assert variable.read(case.folder).thresholds == (0.5, 0.5)
    assert not list(case.folder.glob(".*"))


def test_gguf_says_that_it_stays_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    tok = tokenizer.train_bpe(["some words to learn from", "and some more words"], 300)
    rows = [torch.randn(4, 32) for _ in range(2)]
    moe = export.export(dense("qwen3", vocab_size=300), divide(), tmp_path / "moe", tokenizer=tok, k=2, routers=rows)
    for says in (False, True):
        assert cli.main(["gguf", str(moe), str(tmp_path / "moe.gguf")]) == 0
        assert ("variable_k.json stays behind: a GGUF file has a fixed k" in capsys.readouterr().out) == says
        variable.save(moe, [0.0, 0.0], [2, 2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (None, "holds no variable_k.json, so its k is fixed: load it with AutoModelForCausalLM"),
        ("{", "Cannot read .*variable_k.json: Expecting"),
        ("[]", "Cannot read .*variable_k.json"),
        ({"version": 2}, "has version 2 and this package reads up to 1: upgrade tinyonn"),
        ({"version": "1"}, "Cannot read"),
        ({"format": "other"}, "its format is not 'tinyonn variable k'"),
        ({"thresholds": None}, "Cannot read"),
        ({"thresholds": [0.1]}, "do not name the same layers"),
        ({"thresholds": [0.1, float("nan")]}, "a threshold or mean is no finite number"),
        ({"thresholds": [0.1, "1"]}, "a threshold or mean is no finite number"),
        ({"experts": [8, 0]}, "not whole numbers from 1 on"),
        ({"mean_k": [1, 9]}, "below 0 or above the layer's experts"),
        ({"model_type": "llama"}, "'llama' is none of qwen2_moe"),
        ({"model_type": "qwen2_moe"}, "for a 'qwen2_moe' of 2 layers and the model is a 'qwen3_moe' of 2"),
        (
            {"experts": [8] * 3, "thresholds": [0.1] * 3, "mean_k": [1] * 3},
            "for a 'qwen3_moe' of 3 layers and the model is a 'qwen3_moe' of 2: they do not belong together",
        ),
        ({"experts": [16, 16]}, "up to 16 experts and the model has 8"),
    ],
)
def test_bad_side_files_are_one_line(case: Case, changes: Any, says: str) -> None:
    path = case.folder / variable.FILE
    if changes is None:
        path.unlink()
    else:
        path.write_text(
            changes if isinstance(changes, str) else json.dumps({**json.loads(path.read_text()), **changes})
        )
    with pytest.raises(BenchError, match=says) as caught:
        case.load()
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_attached(case: Case) -> None:
    with pytest.raises(BenchError, match="Qwen3ForCausalLM has no routers"):
        variable.attach(case.dense, case.folder)
    moe = case.load()
    with pytest.raises(BenchError, match="runs with variable k already"):
        variable.attach(moe, case.folder)
    for block in moe.model.layers:
        del block.mlp.experts._is_expert_parallel
    with pytest.raises(BenchError, match="needs 5.23 or newer"):
        variable.attach(moe, case.folder)


def test_values_that_cannot_be_saved(case: Case, tmp_path: Path) -> None:
    before = (case.folder / variable.FILE).read_bytes()
    for values, says in (
        (([0.1], [1.0]), "cannot be saved: experts, thresholds and mean_k do not name the same layers"),
        (([0.1, float("nan")], [1, 1]), "cannot be saved: a threshold or mean is no finite number"),
        (([0.1] * 3, [1.0] * 3, [8] * 3), "'qwen3_moe' of 3 layers and the model is a 'qwen3_moe' of 2"),
        (([0.1] * 2, [1.0] * 2, [4, 4]), "up to 4 experts and the model has 8"),
    ):
        with pytest.raises(BenchError, match=says):
            variable.save(case.folder, *values)  # type: ignore[arg-type]
    assert (case.folder / variable.FILE).read_bytes() == before
    case.dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(BenchError, match="dense is a 'qwen3' model; variable k goes with qwen2_moe"):
        variable.save(tmp_path / "dense", [0.1, 0.1], [1, 1])
