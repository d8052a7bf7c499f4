from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import bits_per_byte
from tinyonn_lib.lm.models import new_model
from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.pretrain.layout import Rows, lay
from tinyonn_lib.pretrain.lessons import Bench, batch_size, long_context
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.train import pretrain

ROWS = Rows(torch.arange(40 * 8).view(40, 8))
COLUMNS = [
    "lesson", "setting", "lr", "seed", "steps", "tokens_computed", "tokens_learned", "seconds", "choose",
    "bits_per_byte", "best",
]  # fmt: skip


class Trainer:
    """Keeps account, and marks the model with what it was trained on."""

    def __init__(self, ramp: bool = False) -> None:
        self.calls: list[tuple[int, float, int, int]] = []
        self.rows: list[Rows] = []
        self.ramp = ramp

    def __call__(self, model: Any, rows: Rows, *, batch: int, lr: float, tokens: int, seed: int) -> pd.DataFrame:
        self.calls.append((batch, lr, tokens, seed))
        self.rows.append(rows)
        model.batch, model.lr = batch, lr
        steps = tokens // (batch * rows.ids.shape[1]) - self.ramp
        return pd.DataFrame({"tokens": [batch * rows.ids.shape[1] * (step + 1) for step in range(steps)]})


def bench(trainer: Any, **more: Any) -> Bench:
    """Large batches choose large rates; the judge thinks the contrary, but is not asked."""

    def choose(model: Any) -> float:
        return abs(math.log10(model.lr) + 1.0 - 0.5 * math.log2(model.batch) / 4)

    return Bench(
        build=lambda seed: SimpleNamespace(seed=seed),  # type: ignore[arg-type,return-value]
        train=trainer,
        choose=choose,
        judge=lambda model: -100 * model.lr - model.seed,  # type: ignore[attr-defined]
        **{"rates": (0.1, 0.3, 1.0), "seeds": (7, 8), **more},
    )


def test_batch_size_goes_through_the_same_rows_in_whole_steps() -> None:
    trainer = Trainer()
    table = batch_size(bench(trainer), ROWS, tokens=40 * 8 - 1, batches=(16, 1, 4))
    assert list(table.columns) == COLUMNS
    assert all(rows.ids.equal(ROWS.ids[:32]) for rows in trainer.rows)
    assert set(table["tokens_computed"]) == {32 * 8}
    assert set(table["tokens_learned"]) == {32 * 7}
    assert dict(zip(table["setting"], table["steps"], strict=True)) == {
        "batch 1": 32, "batch 4": 8, "batch 16": 2, "batch 1 at the rate of batch 16": 32,
    }  # fmt: skip


def test_every_batch_gets_its_best_rate_and_the_smallest_that_of_the_largest() -> None:
    trainer = Trainer()
    table = batch_size(bench(trainer), ROWS, tokens=40 * 8, batches=(1, 16))
    size = 32 * 8
    assert trainer.calls == [
        (1, 0.1, size, 7), (1, 0.3, size, 7), (1, 1.0, size, 7), (1, 0.1, size, 8),
        (16, 0.1, size, 7), (16, 0.3, size, 7), (16, 1.0, size, 7), (16, 0.3, size, 8),
        (1, 0.3, size, 8),  # with seed 7 it was trained already
    ]  # fmt: skip
    best = table[table["best"]].set_index(["setting", "seed"])
    assert best["lr"].to_dict() == {
        ("batch 1", 7): 0.1, ("batch 1", 8): 0.1, ("batch 16", 7): 0.3, ("batch 16", 8): 0.3,
        ("batch 1 at the rate of batch 16", 7): 0.3, ("batch 1 at the rate of batch 16", 8): 0.3,
    }  # fmt: skip
    assert best.loc[("batch 1 at the rate of batch 16", 7), "bits_per_byte"] == -30 - 7
    assert len(table) == len(trainer.calls) + 1


def test_one_batch_has_no_other_rate() -> None:
    assert set(batch_size(bench(Trainer()), ROWS, tokens=320, batches=(4,))["setting"]) == {"batch 4"}


def test_long_context_counts_padding_as_computation_only() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 20, (60,), generator=generator).tolist()
    documents = [[2 + place % 50] * size for place, size in enumerate(sizes)]
    trainer = Trainer()
    table = long_context(
        bench(trainer, rates=(0.1,), seeds=(7,)), documents, length=12, tokens=12 * 4 * 5 + 11, batch=4, eos=0, pad=1
    ).set_index("setting")
    taken = next(n for n in range(60) if 1 + sum(size + 1 for size in sizes[:n]) >= 12 * 4 * 5)
    # A document of n tokens has n + 1 to predict, 11 in a row, in rows that begin with EOS or where the last one ended.
    asked = [min(11, size + 1 - begin) for size in sizes[:taken] for begin in range(0, size + 1, 11)]
    whole = len(asked) // 4 * 4
    assert table["tokens_computed"].to_dict() == {
        "packed": 240, "padded, equal computation": 240, "padded, equal text": whole * 12
    }  # fmt: skip
    assert table["tokens_learned"].to_dict() == {
        "packed": 20 * 11, "padded, equal computation": sum(asked[:20]), "padded, equal text": sum(asked[:whole])
    }  # fmt: skip
    assert list(table["steps"]) == [5, 5, whole // 4]
    packed, padded, text = (set(rows.ids.flatten().tolist()) - {0, 1} for rows in trainer.rows)
    assert padded < text
    assert packed <= {2 + place % 50 for place in range(taken)}
    assert trainer.rows[0].pad is None
    assert trainer.rows[1].pad == 1


def test_a_rate_that_diverges_is_a_result() -> None:
    def train(model: Any, rows: Rows, *, lr: float, **more: Any) -> pd.DataFrame:
        if lr == 1.0:
            raise BenchError("The loss is not finite at step 3 (learning rate 1): lower the learning rate.")
        return Trainer()(model, rows, lr=lr, **more)

    table = batch_size(bench(train), ROWS, tokens=320, batches=(1, 4))
    assert (table["bits_per_byte"] == math.inf).equals(table["lr"] == 1.0)
    assert not table.loc[table["lr"] == 1.0, "best"].any()

    def broken(*_: Any, **__: Any) -> pd.DataFrame:
        raise BenchError("other tokenizer?")

    with pytest.raises(BenchError, match="other tokenizer"):
        batch_size(bench(broken), ROWS, tokens=320)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 100}, "less than a step of 16 rows of 8"),
        ({"tokens": 10_000}, "40 rows are fewer"),
        ({"tokens": 320, "batches": (0, 4)}, "1 or more"),
        ({"tokens": 320, "batches": ()}, "1 or more"),
    ],
)
def test_batch_size_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        batch_size(bench(Trainer()), ROWS, **options)


def test_long_context_refuses() -> None:
    options: Any = {"length": 8, "batch": 2, "eos": 0, "pad": 1}
    with pytest.raises(BenchError, match="9 tokens of text are fewer"):
        long_context(bench(Trainer()), [[2, 3, 4]] * 2, tokens=64, **options)
    with pytest.raises(BenchError, match="less than a step"):
        long_context(bench(Trainer()), [[2, 3, 4]] * 99, tokens=15, **options)


def test_a_trainer_that_goes_another_way_is_found_out() -> None:
    with pytest.raises(BenchError, match="batch 1: the trainer went 31 steps over 248 tokens instead of 32 over 256"):
        batch_size(bench(Trainer(ramp=True)), ROWS, tokens=320)


TEXTS = [f"the cat number {i} sat on mat {i % 7}." for i in range(600)]
TOKENIZER = train_bpe(TEXTS, 300)
DOCUMENTS = TOKENIZER(TEXTS, add_special_tokens=False)["input_ids"]


def real(**more: Any) -> Bench:
    def train(model: Any, rows: Rows, *, batch: int, lr: float, tokens: int, seed: int) -> pd.DataFrame:
        rates = {"lr_matrix": 0.02 * lr, "lr_other": 0.05 * lr}
        return pretrain(rows, model, replace(Recipe(), batch=batch, **rates), tokens=tokens, seed=seed, shards=1)

    def build(seed: int) -> Any:
        return new_model(
            vocab_size=300, width=32, layers=1, heads=1, kv_heads=1, head_dim=32, ffn=64, max_length=128, seed=seed
        )

    judges = [lambda model, part=part: bits_per_byte(model, TOKENIZER, part) for part in (TEXTS[:9], TEXTS[9:18])]
    return Bench(build, train, *judges, **more)


def test_mostly_padding_teaches_less() -> None:
    table = long_context(
        real(rates=(1.0,), seeds=(0,)), DOCUMENTS, length=128, tokens=128 * 4 * 12, batch=4, eos=0, pad=1
    ).set_index("setting")
    assert table["tokens_computed"].iloc[0] == table["tokens_computed"].iloc[1] == 128 * 4 * 12
    assert table["tokens_learned"].iloc[1] < 0.3 * table["tokens_learned"].iloc[0]
    assert table["tokens_learned"].iloc[2] == pytest.approx(table["tokens_learned"].iloc[0], rel=0.1)
    assert table.loc["packed", "bits_per_byte"] < table.loc["padded, equal computation", "bits_per_byte"]


def test_batches_with_the_real_trainer() -> None:
    rows = lay(DOCUMENTS, 32, eos=0, pad=1, layout="packed")
    table = batch_size(real(rates=(0.3, 1.0), seeds=(0,)), rows, tokens=32 * 32, batches=(1, 8))
    assert list(table["steps"]) == [32, 32, 4, 4, 32]
    assert set(table["tokens_learned"]) == {32 * 31}
    assert table["bits_per_byte"].map(math.isfinite).all()
    lr = table.loc[table["best"] & (table["setting"] == "batch 8"), "lr"].item()
    same = table[(table["setting"] == "batch 1") & (table["lr"] == lr)]
    assert table["bits_per_byte"].iloc[-1] == same["bits_per_byte"].item()
