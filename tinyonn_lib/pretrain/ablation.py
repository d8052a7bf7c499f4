"""Everything about pretraining that is measured side by side: recipes, document 002's lessons, tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tinyonn_lib.lm import judge
from tinyonn_lib.pretrain import architectures, lessons, tokenizers
from tinyonn_lib.pretrain.contest import Contest
from tinyonn_lib.pretrain.layout import Rows, lay
from tinyonn_lib.pretrain.lineup import DEFAULT, LINEUP
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.train import pretrain
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARIES = "1024 2048 4096 8192"
_CHOOSING = 400  # texts that learning rates are chosen by
_BATCH_SHARE, _CONTEXT_SHARE = 2, 4  # lessons train with a part of the budget: they go through many rates


@dataclass(frozen=True)
class Texts:
    """What is trained on and judged by.

    Attributes:
        table: `text, source, split` with the splits train, calibration (learning rates are chosen by it) and heldout.
        tokenizer: of all but the comparison of tokenizers.
        length: of a row, tokens.
        sizes: of the models: width, layers, heads, kv_heads, head_dim, ffn.
    """

    table: pd.DataFrame
    tokenizer: PreTrainedTokenizerBase
    length: int
    sizes: Mapping[str, Any]

    def of(self, split: str) -> list[str]:
        """All texts of a split; of "calibration" some hundred, whole sources mixed."""
        rows = self.table[self.table["split"] == split]
        if split == "calibration":
            rows = rows.sample(min(_CHOOSING, len(rows)), random_state=0)
        return rows["text"].tolist()


def recipes(
    texts: Texts,
    folder: Path,
    *,
    tokens: int,
    seeds: int = 3,
    rounds: int = 15,
    progress: Callable[[str, str], Progress] | None = None,
) -> Contest:
    """All of `lineup.LINEUP`, trained and judged.

    Args:
        folder: keeps what is done; after a kill the same call goes on there.
        tokens: budget of `lineup.DEFAULT`, whose time is the equal time; seeds: of the main entries.
        rounds: of measuring the speeds.
    """
    given = {"train": texts.of("train"), "validation": texts.of("calibration"), "heldout": texts.of("heldout")}
    sources = texts.table.loc[texts.table["split"] == "heldout", "source"].tolist()
    found = Contest(
        given, sources, texts.tokenizer, folder, sizes=texts.sizes, tokens=tokens, length=texts.length, seeds=seeds,
        progress=progress,
    )  # fmt: skip
    found.measure_speeds(LINEUP, rounds)
    for name, entry in LINEUP.items():
        found.enter(name, entry, LINEUP[DEFAULT])
    return found


def both_lessons(texts: Texts, *, tokens: int, seeds: int = 3) -> pd.DataFrame:
    """Batches of one row, and rows four times as long as usual, with the default recipe.

    See `lessons`; half of `tokens` is the budget of the first, a fourth that of the second.
    """
    tok, long = texts.tokenizer, 4 * texts.length
    common = {"vocab_size": len(tok), "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    choose, held = texts.of("calibration"), texts.of("heldout")

    def train(model: PreTrainedModel, rows: Rows, *, batch: int, lr: float, tokens: int, seed: int) -> pd.DataFrame:
        return pretrain(rows, model, replace(Recipe(), batch=batch, ramp=0.0).faster(lr), tokens=tokens, seed=seed)

    def bench(context: int) -> lessons.Bench:
        return lessons.Bench(
            build=lambda seed: architectures.new("qwen3", **common, **texts.sizes, max_length=context, seed=seed),
            train=train,
            choose=lambda model: judge.bits_per_byte(model, tok, choose, max_length=texts.length),
            judge=lambda model: judge.bits_per_byte(model, tok, held, max_length=texts.length),
            seeds=range(seeds),
        )

    ids = tok(texts.of("train"), add_special_tokens=False, verbose=False)["input_ids"]
    marks: dict[str, Any] = {"eos": tok.eos_token_id, "pad": tok.pad_token_id}
    rows = lay(ids, texts.length, **marks, layout="packed")
    found = [
        lessons.batch_size(bench(texts.length), rows, tokens=tokens // _BATCH_SHARE),
        lessons.long_context(bench(long), ids, length=long, tokens=tokens // _CONTEXT_SHARE, batch=4, **marks),
    ]
    return pd.concat(found, ignore_index=True).drop(columns="seconds")


def vocabularies(texts: Texts, spec: str = VOCABULARIES, *, seconds: float, seeds: int = 3) -> pd.DataFrame:
    """Tokenizers side by side, each with a model trained for equal time by the default recipe: see `tokenizers`."""
    split = {"train": texts.of("train"), "heldout": texts.of("heldout")}
    own, recipe = tokenizers.candidates(split["train"], spec), Recipe()
    found = tokenizers.by_loss(
        split, own, build=partial(architectures.new, "qwen3", **texts.sizes, max_length=texts.length),
        train=lambda model, blocks, tokens, seed: pretrain(blocks, model, recipe, tokens=tokens, seed=seed),
        seconds=seconds, length=texts.length, step_tokens=recipe.batch * texts.length, seeds=range(seeds),
    )  # fmt: skip
    return found.drop(columns=["seconds", "vocabulary"]).merge(sizes_of(texts, own), on="tokenizer")


def sizes_of(texts: Texts, given: Mapping[str, PreTrainedTokenizerBase]) -> pd.DataFrame:
    """What each tokenizer saves in tokens and costs in parameters of a model of these sizes."""
    split = {"train": texts.of("train"), "heldout": texts.of("heldout")}
    model = architectures.counts(
        architectures.new("qwen3", vocab_size=len(texts.tokenizer), max_length=texts.length, **texts.sizes)
    )
    others = model["total"] - model["embedding"]
    return tokenizers.compare(split, given, width=texts.sizes["width"], other_parameters=others)
