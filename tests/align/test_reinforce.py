"""Training on rewards and preferences: it learns, leaves nothing behind, and survives a kill to the bit."""

from __future__ import annotations

import copy
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.align.small import SETTINGS, train_small
from tests.tiny import environment
from tinyonn_lib.align.answers import answers
from tinyonn_lib.align.prefer import pairs, prefer
from tinyonn_lib.align.reinforce import reinforce
from tinyonn_lib.align.warm import teach
from tinyonn_lib.errors import BenchError

Fresh = Callable[[], Any]


def _weights(model: Any) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def _gap(one: Any, two: Any) -> float:
    return float((_weights(one) - _weights(two)).abs().max())


class Stop(Exception):
    pass


def _stop_after(wanted: int) -> Callable[[int, int, str], None]:
    def told(done: int, total: int, note: str) -> None:
        if done == wanted and "going on" not in note:
            raise Stop

    return told


def test_gspo_raises_the_success(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    model = half()
    before = answers(model, tokenizer, sums, 32)["right"].mean()
    history = reinforce(model, tokenizer, sums, steps=12, prompts_per_step=10, group=8, updates=2, lr=2.0e-2)
    assert answers(model, tokenizer, sums, 32)["right"].mean() > before + 0.1
    assert history["step"].tolist() == list(range(1, 13))
    assert history["reward"].iloc[0] == pytest.approx(before, abs=0.2)
    assert history["tokens"].diff().dropna().to_numpy() == pytest.approx(80 * history["length"].iloc[1:], abs=0.1)
    assert history["zero_spread"].between(0, 1).all()
    assert not history.isna().any().any()


def test_no_spread_no_change(tokenizer: Any, model: Any, sums: pd.DataFrame) -> None:
    """All right: every advantage is zero, and so is every step. The reward is the verifier's."""
    teach(model, tokenizer, sums.head(4), steps=80, batch=16, lr=1.0e-2)
    before = copy.deepcopy(model)
    history = reinforce(
        model, tokenizer, sums.head(4), steps=2, prompts_per_step=4, group=4, updates=2, temperature=0.3
    )
    assert history["reward"].tolist() == [1.0, 1.0]
    assert history["zero_spread"].tolist() == [1.0, 1.0]
    assert _gap(model, before) == 0.0


def test_one_update_per_round_is_the_same_method(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    """With a step per round the ratio is 1: GSPO and GRPO differ only from the second step on."""

    def trained(kind: Any, updates: int) -> Any:
        model = half()
        reinforce(model, tokenizer, sums, kind=kind, steps=2, prompts_per_step=4, group=8, updates=updates)
        return model

    assert _gap(trained("gspo", 1), trained("grpo", 1)) < 1e-6
    assert _gap(trained("gspo", 4), trained("grpo", 4)) > 1e-4


def test_sigkill_and_again(half: Fresh, tmp_path: Path) -> None:
    """Killed in a process of its own, gone on with here: the weights are those of an uninterrupted training."""
    start, place = tmp_path / "model", tmp_path / "checkpoint.pt"
    half().save_pretrained(start)
    with subprocess.Popen(
        [sys.executable, "-c", f"from tests.align.small import main; main({str(start)!r}, {str(place)!r})"],
        env=environment(tmp_path), stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("done 3 "):
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    assert place.exists()
    seen: list[tuple[int, str]] = []
    whole, resumed = half(), half()
    one = train_small("gspo", whole)
    two = train_small("gspo", resumed, place, lambda done, total, note: seen.append((done, note)))
    assert seen[0][0] >= 3
    assert seen[0][1].startswith("going on")
    assert _gap(whole, resumed) <= 1e-6
    assert _gap(whole, half()) > 1e-4
    pd.testing.assert_frame_equal(one, two, rtol=1e-5, atol=1e-6)


def test_stopped_at_every_round_and_with_a_reference(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, tmp_path: Path
) -> None:
    """With KL the reference is the model that came in, also when a checkpoint has changed it since."""
    settings: dict[str, Any] = {**SETTINGS, "steps": 4, "beta": 0.5}
    whole = half()
    one = reinforce(whole, tokenizer, sums, **settings)
    for stop in range(1, 4):
        with pytest.raises(Stop):
            reinforce(half(), tokenizer, sums, checkpoint=tmp_path / "c", every_seconds=0, progress=_stop_after(stop),
                      **settings)  # fmt: skip
    resumed = half()
    two = reinforce(resumed, tokenizer, sums, checkpoint=tmp_path / "c", every_seconds=0, **settings)
    assert torch.equal(_weights(whole), _weights(resumed))
    pd.testing.assert_frame_equal(one, two)
    assert (one["kl"].iloc[1:] > 0).all()
    free = half()
    reinforce(free, tokenizer, sums, **{**settings, "beta": 0.0})
    assert _gap(free, whole) > 1e-4


def test_dpo_goes_on_too(half: Fresh, tmp_path: Path) -> None:
    whole = half()
    one = train_small("dpo", whole)
    with pytest.raises(Stop):
        train_small("dpo", half(), tmp_path / "c", _stop_after(4))
    for left in (2, 0):  # the second time all is done, and only read back
        resumed, told = half(), []
        two = train_small("dpo", resumed, tmp_path / "c", lambda *each, told=told: told.append(each))
        assert told[0][2].startswith("going on")
        assert len(told) == 1 + left
        assert torch.equal(_weights(whole), _weights(resumed))
        pd.testing.assert_frame_equal(one, two)


def test_another_training_does_not_take_the_checkpoint(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, tmp_path: Path
) -> None:
    told: list[str] = []
    saved = b""
    for more in ({}, {"seed": 1}, {"lr": 1.0e-3}, {"kind": "grpo"}, {"temperature": 0.9}):
        settings: dict[str, Any] = {**SETTINGS, "steps": 1, **more}
        saved = saved or ((tmp_path / "c").read_bytes() if more else b"")
        if more:
            (tmp_path / "c").write_bytes(saved)
        reinforce(half(), tokenizer, sums, checkpoint=tmp_path / "c", progress=lambda *a: told.append(a[2]), **settings)
    assert not [note for note in told if note.startswith("going on")]


def test_nothing_is_left_behind(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """No file, no line of output, no patched forward, no random state, no pad token."""
    from transformers.utils import logging

    monkeypatch.chdir(tmp_path)
    model, unpadded = half(), copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    model.requires_grad_(True)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), logging.get_verbosity()
    name = model.config._name_or_path
    capfd.readouterr()
    reinforce(model, unpadded, sums, **{**SETTINGS, "steps": 1, "beta": 0.1})
    prefer(model, unpadded, pairs(sums, answers(model, unpadded, sums, 8)), steps=1, batch=4)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), logging.get_verbosity()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert list(tmp_path.iterdir()) == []
    assert "".join(capfd.readouterr()) == ""
    assert "forward" not in model.__dict__
    assert not model.training
    assert model.config._name_or_path == name
    assert unpadded.pad_token is None
    assert all(param.requires_grad and param.grad is None for param in model.parameters())


def test_dpo_puts_the_right_answer_first(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    model = half()
    table = pairs(sums, answers(model, tokenizer, sums, 16))
    history = prefer(model, tokenizer, table, steps=30, batch=16, lr=5.0e-2)
    assert history["loss"].iloc[0] == pytest.approx(np.log(2), abs=1e-4)  # the model is its own reference
    assert history["margin"].iloc[-1] > 0.5
    assert history["accuracy"].iloc[-1] > 0.7


def test_pairs_are_a_right_and_a_wrong_answer() -> None:
    prompts = pd.DataFrame({"task": "t", "prompt": ["p", "q", "r"], "solution": " 1"})
    rows = [
        (0, " 1", True), (0, " 2", False), (0, " 1", True), (0, " 2", False), (0, " 3", False), (0, None, False),
        (1, " 1", True), (1, " 1", True), (2, " 7", False), (2, None, False),
    ]  # fmt: skip
    table = pairs(prompts, pd.DataFrame(rows, columns=["prompt", "completion", "right"]))
    assert table[["prompt", "chosen", "rejected"]].to_numpy().tolist() == [["p", " 1", " 2"], ["p", " 1", " 3"]]
    with pytest.raises(BenchError, match="both a right and a wrong"):
        pairs(prompts, pd.DataFrame(rows[6:], columns=["prompt", "completion", "right"]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "ppo"}, "Unknown kind 'ppo'"),
        ({"group": 1}, "group=1"),
        ({"updates": 3}, "cannot be cut into updates=3"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"part": "head"}, "Unknown part 'head'"),
    ],
)
def test_bad_settings(half: Fresh, tokenizer: Any, sums: pd.DataFrame, given: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        reinforce(half(), tokenizer, sums, **{**SETTINGS, **given})


@pytest.mark.parametrize("method", ["gspo", "dpo"])
def test_a_broken_model_ends_in_one_line(method: str, half: Fresh) -> None:
    model = half()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BenchError, match="not finite.*lower the learning rate"):
        train_small(method, model)


def test_without_trl(half: Fresh, tokenizer: Any, sums: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(BenchError, match=r"pip install 'tinyonn\[align\]'"):
        reinforce(half(), tokenizer, sums, **SETTINGS)
