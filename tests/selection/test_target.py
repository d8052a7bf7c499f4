"""LoRA on selected rows: what is learned, what moves, what is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import target
from tinyonn_lib.selection.lora import Lora, save_adapter
from tinyonn_lib.selection.packing import GIVEN, batches, pack
from tinyonn_lib.selection.target import train, train_blocks

from .target_parts import adapted, dense, rows

CPU = torch.device("cpu")


def test_loss_is_the_mean_over_all_learned_tokens(tokenizer: Any) -> None:
    model = dense().double()
    blocks = pack(rows(), tokenizer, 16)
    batch = batches(blocks, 5, 3, CPU)(2)
    with torch.no_grad():
        found = target._loss(model)(batch)
    total, count = 0.0, 0
    for inputs, wanted in zip(batch["inputs"], batch["targets"], strict=True):
        chances = model(input_ids=inputs[None]).logits[0].detach().log_softmax(-1)
        total -= sum(float(chances[place, token]) for place, token in enumerate(wanted) if token != GIVEN)
        count += int((wanted != GIVEN).sum())
    assert 0 < count < batch["targets"].numel()
    assert float(found) == pytest.approx(total / count, rel=1e-6)


def test_shards_and_pieces_learn_what_the_whole_batch_does(tokenizer: Any) -> None:
    blocks = pack(rows(), tokenizer, 16)
    results = []
    for cut in ({"shards": 1}, {"shards": 3}, {"shards": 1, "accumulate": 3}, {"shards": 2, "accumulate": 2}):
        adapted, history = train_blocks(dense(), blocks, steps=6, batch=6, lr=5e-3, **cut)
        results.append((history, get_peft_model_state_dict(adapted)))
    assert results[0][0]["loss"].iloc[-1] < results[0][0]["loss"].iloc[0] - 0.05
    for history, state in results[1:]:
        pd.testing.assert_frame_equal(history, results[0][0], rtol=0, atol=3e-6)
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=0, atol=2e-4, msg=name)


def test_only_the_adapter_moves_and_comes_out_again(tokenizer: Any) -> None:
    model = dense()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, 300, (2, 20))
    logits = model(ids).logits
    random = torch.get_rng_state()
    tuned = train(model, tokenizer, rows(), epochs=2, batch=4, length=16, lr=5e-3)
    assert torch.equal(random, torch.get_rng_state())
    assert len(tuned.history) == round(2 * tuned.tokens / 64)
    assert tuned.epochs == pytest.approx(2, abs=0.1)
    assert 0 < tuned.learned < tuned.tokens
    assert not torch.equal(tuned.model(ids).logits, logits)
    trained = [name for name, weight in tuned.model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all(".lora_" in name for name in trained)
    with pytest.raises(BenchError, match="already holds an adapter"):
        train(model, tokenizer, rows(), length=16)
    again = tuned.model.unload()
    assert again is model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, logits)


def test_other_families_learn(tokenizer: Any) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=32)  # Conv1D
    model = AutoModelForCausalLM.from_config(config).eval()
    tuned = train(model, tokenizer, rows(), tokens=2000, batch=4, length=16, lr=1e-2, shards=2)
    assert tuned.history["loss"].tail(3).mean() < tuned.history["loss"].head(3).mean() - 0.1
    assert adapted(tuned.model.get_base_model()) == {
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_recomputed_layers_learn_the_same(tokenizer: Any) -> None:
    blocks, calls = pack(rows(), tokenizer, 16), list[int]()
    results = []
    for recompute in (False, True):
        model = dense()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        calls.clear()
        results.append(train_blocks(model, blocks, steps=3, shards=1, recompute=recompute)[1])
        assert len(calls) == 3 * (1 + recompute)
        assert not model.model.layers[0].gradient_checkpointing
    pd.testing.assert_frame_equal(*results, rtol=1e-6)


def test_early_stop_keeps_the_best_adapter(tokenizer: Any) -> None:
    held, model = rows(40, seed=9, prompts=False), dense()
    held["text"] = held["text"].str[::-1]  # nothing that the rows teach: it soon only rises
    tuned = train(
        model, tokenizer, rows(20, seed=1), tokens=60 * 64, batch=4, length=16, lr=0.03, held_out=held, look_every=5,
        patience=2, lora=Lora(dropout=0.2),
    )  # fmt: skip
    looks = tuned.history["held_out"].dropna()
    assert 10 <= len(tuned.history) < 60
    assert tuned.epochs == len(tuned.history) * 4 / (tuned.tokens / 16)
    blocks = pack(held, tokenizer, 16)
    with torch.no_grad():  # a look drops nothing out, either
        loss = F.cross_entropy(tuned.model(blocks[:, 0].long()).logits.flatten(0, 1), blocks[:, 1].long().flatten())
    assert float(loss) == pytest.approx(looks.min(), rel=1e-5)
    assert looks.iloc[-1] > looks.min()


def test_nf4_learns(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    dense().save_pretrained(tmp_path)
    common: dict[str, Any] = {"tokens": 1500, "batch": 4, "length": 16, "lr": 1e-2, "dtype": "nf4", "device": "cpu"}
    tuned = train(str(tmp_path), tokenizer, rows(), shards=2, **common)
    alone = train(str(tmp_path), tokenizer, rows(), shards=1, **common)
    assert tuned.history["loss"].tail(3).mean() < tuned.history["loss"].head(3).mean() - 0.1
    pd.testing.assert_series_equal(tuned.history["loss"], alone.history["loss"], rtol=0, atol=1e-4)
    weights = [weight for weight in tuned.model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_failures_leave_the_model_as_it_was(tokenizer: Any) -> None:
    model = dense()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(BenchError, match="^The loss is not finite at step 1"):
        train(model, tokenizer, rows(), length=16)
    assert not adapted(model)
    with pytest.raises(BenchError, match="^Blocks of 65 tokens exceed the model's 64"):
        train(dense(), tokenizer, rows(), length=65)
    with pytest.raises(BenchError, match="^A row holds token .* the model has 90: give its own tokenizer"):
        train(dense(vocab_size=90), tokenizer, rows(), length=16)


def run(folder: Path, blocks: Tensor, kill_at: int = -1) -> tuple[PeftModel, pd.DataFrame]:
    """A training with dropout, which may kill its process."""
    whole = target.batches

    def killing(*arguments: Any) -> Any:
        at = whole(*arguments)

        def batch(step: int) -> Any:
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return at(step)

        return batch

    target.batches = killing
    try:
        return train_blocks(
            dense(), blocks, steps=12, batch=4, lr=5e-3, lora=Lora(dropout=0.1), checkpoint=folder / "c.pt",
            every_seconds=0.0,
        )  # fmt: skip
    finally:
        target.batches = whole


def test_killed_and_resumed_equals_uninterrupted(tokenizer: Any, tmp_path: Path) -> None:
    blocks = pack(rows(), tokenizer, 16)
    torch.save(blocks, tmp_path / "blocks.pt")
    code = (
        "import sys, torch; from pathlib import Path; from tests.selection.test_target import run; "
        "run(Path(sys.argv[1]), torch.load(sys.argv[1] + '/blocks.pt', weights_only=True), 7)"
    )
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / "c.pt").is_file()
    timing: dict[str, float] = {}
    fit = target.fit

    def timed(*arguments: Any, **options: Any) -> pd.DataFrame:
        return fit(*arguments, **options | {"timing": timing})

    target.fit = timed
    try:
        resumed, history = run(tmp_path, blocks)
    finally:
        target.fit = fit
    assert timing["resumed_from"] == 7
    (tmp_path / "whole").mkdir()
    whole, expected = run(tmp_path / "whole", blocks)
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    for model, name in ((resumed, "a"), (whole, "b")):
        save_adapter(model, tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
