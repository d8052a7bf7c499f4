"""Rows of which it is known whether they are text or trash: what to learn from and what to judge by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import context_length
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.pool import fitted, passages
from tinyonn_lib.selection.rows import Bad, Row, rows
from tinyonn_lib.selection.scoring import Scorer
from tinyonn_lib.selection.selector import Selector

MOST = 1024
"""Tokens of the longest passage unless asked otherwise, of a model that takes more."""

SHORTEST = 0.4
"""Passages are at least this share of the longest: so short a text says little."""


def longest(model: Any, length: int = 0) -> int:
    """Tokens of the longest text: as asked, or what the model takes beside a start token, at most `MOST`.

    Raises:
        BenchError: longer than the model takes.
    """
    limit = (context_length(model) or MOST) - 1
    if length > limit:
        raise BenchError(f"length={length} is more than this model takes: choose 1 to {limit}.")
    return length or min(limit, MOST)


def draw(texts: pd.DataFrame, tokenizer: Any, count: int, length: int, seed: int) -> pd.DataFrame:
    """Passages of plain documents in a random order, at most `count`.

    Args:
        texts: columns `text` and `source`.
        length: of the longest, tokens.

    Returns:
        Columns `text` and `source`.
    """
    return _sample(passages(texts, tokenizer, length, _shortest(length)), count, seed)


def _shortest(length: int) -> int:
    return max(1, round(SHORTEST * length))


def _sample(found: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    found = found.drop_duplicates("text")
    return found.sample(min(count, len(found)), random_state=seed).reset_index(drop=True)


def halves(
    source: str | pd.DataFrame,
    tokenizer: Any,
    *,
    learn: int,
    judge: int,
    length: int,
    seed: int,
    left_out: dict[str, int] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Passages to learn on and others to judge by.

    Args:
        source: a table with `text, source, split` as 01_pretrain leaves it: calibration texts are for learning,
            heldout ones for judging; or what `rows` reads, whose passages are divided.
        learn, judge: how many of each.
        length: of the longest, tokens.
        left_out: gets kind of reason → rows of `rows` that gave no passage, most first.

    Returns:
        Two tables with `text`, `source` and, if there are any, `prompt`.

    Raises:
        BenchError: too little text.
    """
    if isinstance(source, pd.DataFrame):
        parts = dict(list(source.groupby("split")))
        ours, others = (
            draw(parts[part], tokenizer, count, length, seed)
            for part, count in (("calibration", learn), ("heldout", judge))
        )
        return ours[~ours["text"].isin(others["text"])].reset_index(drop=True), others  # files share licences
    every, reasons = _read(source, tokenizer, learn + judge, length, seed)
    if left_out is not None:
        left_out.update(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])))
    if not (judged := min(judge, len(every) // 4)) or every["source"].nunique() < 2:
        texts = every["source"].nunique()
        raise BenchError(
            f"{source} has {len(every)} passage(s) of at most {length} tokens from {texts} text(s): too few to learn "
            "on some and judge by others; give more texts."
        )
    ours, others = apart(every, judged)
    return ours.head(learn), others.head(judge)


def apart(passages: pd.DataFrame, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Passages in two parts that share no source; about `count` of them, at least one source, in the second.

    The second takes the sources that come last.
    """
    sizes = passages["source"].value_counts(sort=False) if "source" in passages else None
    if sizes is None or len(sizes) < 2:
        cut = len(passages) - count
        return passages.iloc[:cut].reset_index(drop=True), passages.iloc[cut:].reset_index(drop=True)
    taken = sizes[::-1].cumsum()[::-1] <= count
    taken.iloc[-1] = True
    mine = passages["source"].isin(taken[taken].index)
    return passages[~mine].reset_index(drop=True), passages[mine].reset_index(drop=True)


def _read(source: str, tokenizer: Any, count: int, length: int, seed: int) -> tuple[pd.DataFrame, Counter[str]]:
    """As `draw`, from a source of texts: documents become passages, rows with a prompt stay whole or are left out.

    Returns:
        Columns `text`, `source` and `prompt`; kind of reason → rows that were left out.

    Raises:
        BenchError: nothing to read.
    """
    plain: list[tuple[str, str]] = []
    asked: list[tuple[str, str, str]] = []
    left: Counter[str] = Counter()
    for row in rows(source):
        if isinstance(row, Bad):
            left[row.reason.partition(":")[0]] += 1
            continue
        where = f"{row.source_dataset}:{row.source_index}"
        if row.prompt:
            asked.append((row.text, where, row.prompt))
        else:
            plain.append((row.text, where))
        if len(plain) + len(asked) >= 4 * count:  # enough to choose from, of however long a stream
            break
    if not plain and not asked:
        raise BenchError(f"{source} holds no text: check that it is the right file.")
    tables = []
    if plain:
        some = 0
        try:
            pieces = passages(pd.DataFrame(plain, columns=["text", "source"]), tokenizer, length, _shortest(length))
            some = pieces["source"].nunique()
            tables.append(_sample(pieces, count, seed))
        except BenchError:  # all too short
            if not asked:
                raise
        left[f"no passage of {_shortest(length)} to {length} tokens"] += len(plain) - some
    if asked:
        known = pd.DataFrame(asked, columns=["text", "source", "prompt"]).drop_duplicates("text")
        sizes = tokenizer(known["text"].tolist(), add_special_tokens=False, verbose=False)["input_ids"]
        fits = [len(ids) <= length for ids in sizes]
        left["too long"] += fits.count(False)
        tables.append(known[fits])
    found = pd.concat(tables).fillna({"prompt": ""} if asked else {})
    return found.sample(min(count, len(found)), random_state=seed).reset_index(drop=True), +left


def paired(clean: pd.DataFrame, tokenizer: Any, length: int, seed: int, kinds: Sequence[str] = ()) -> pd.DataFrame:
    """Every passage as it is and once in each corruption.

    Args:
        clean: columns `text`, `source` and, if there are any, `prompt`.
        kinds: keys of `CORRUPTIONS`; none: all.

    Returns:
        Columns `text`, `source`, `corruption` ("" if clean).
    """
    prompts = clean["prompt"].tolist() if "prompt" in clean else [""] * len(clean)
    others = [text.removeprefix(prompt) for text, prompt in zip(clean["text"], prompts, strict=True)]
    tables = [clean[["text", "source"]].assign(corruption="")]
    for kind in kinds or CORRUPTIONS:
        rng = Random(f"{seed} {kind}")
        texts = [
            CORRUPTIONS[kind](text, prompt, rng, others) for text, prompt in zip(clean["text"], prompts, strict=True)
        ]
        tables.append(pd.DataFrame({"text": texts, "source": clean["source"].to_numpy(), "corruption": kind}))
    return fitted(pd.concat(tables, ignore_index=True), tokenizer, length)


def as_rows(known: pd.DataFrame) -> list[Row]:
    """Known rows as a scorer takes them."""
    return [Row("known", place, text) for place, text in enumerate(known["text"])]


def scored(selector: Selector, known: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Scores of known rows: the columns of `Scorer`, with `source` and `corruption`.

    Args:
        options: for `Scorer`.
    """
    table, _ = Scorer(selector, **options)(as_rows(known))
    where = known.iloc[table["source_index"].to_numpy()]
    return table.assign(source=where["source"].to_numpy(), corruption=where["corruption"].to_numpy())
