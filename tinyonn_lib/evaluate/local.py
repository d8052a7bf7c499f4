"""The embedded default's benchmarks: bits per byte and a cloze test, both made from held-out documents."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate.task import Task, shipped, shipped_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("bits_per_byte", "cloze")
_NEAREST = 12  # continuations closest in length among which the wrong ones are drawn
_LONGEST = 64  # characters per token beyond which a text is not looked at; longer tokens only make the cut shorter
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def build(
    texts: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    names: Sequence[str] = NAMES,
    *,
    length: int,
    documents: int = 100,
    questions: int = 150,
    context: int = 64,
    continuation: int = 24,
    choices: int = 4,
    seed: int = 0,
) -> list[Task]:
    """Write the documents of the tasks named, with their YAML files, and return these tasks.

    A cloze question is the beginning of a document, its own continuation, and continuations of other documents from
    other sources. Each is cut from the same place of its document and to about the same length, so that only what it
    says can tell them apart.

    Args:
        texts: held-out documents, columns `text` and `source`.
        tokenizer: the model's: every document and every question fits the model.
        folder: gets bits_per_byte.jsonl, cloze.jsonl, and a .yaml of the same name for each.
        names: some of `NAMES`; other names are passed over.
        length: the model's limit in tokens.
        documents: at most this many for bits per byte.
        questions: at most this many for the cloze test.
        context: tokens at most of a document's beginning; half as many at least.
        continuation: tokens at most of each choice; half as many at least.
        seed: which documents, in which order, and where the right answer stands.

    Raises:
        BenchError: lengths that do not fit, or too few documents for one question.
    """
    # One token of the limit is the BOS or EOS before a document's first.
    if "cloze" in names and (context < 2 or continuation < 2 or context + continuation >= length):
        raise BenchError(
            f"A cloze question of {context} + {continuation} tokens does not fit a model of {length}: shorten it."
        )
    if documents < 1 or questions < 1 or choices < 2:
        raise BenchError(f"documents={documents}, questions={questions}, choices={choices}: need at least 1, 1 and 2.")
    rng = np.random.default_rng(seed)
    drawn = texts.iloc[rng.permutation(len(texts))]
    # One document of each source, then a second of each, …: an interval is as good as the number of sources in it.
    drawn = drawn.iloc[drawn.groupby("source").cumcount().argsort(kind="stable")]
    cutter = _Cutter(tokenizer)
    made: dict[str, list[dict[str, Any]]] = {}
    if "bits_per_byte" in names:
        made["bits_per_byte"] = [
            {"text": cut, "source": str(source)}
            for text, source in zip(drawn["text"][:documents], drawn["source"][:documents], strict=True)
            if (cut := cutter.front(text, length - 1))
        ]
    if "cloze" in names:
        parts = []
        for text, source in zip(drawn["text"], drawn["source"], strict=True):
            if pair := cutter.pair(text, context, continuation):
                parts.append((*pair, str(source)))
        made["cloze"] = _questions(parts, questions, choices, rng)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in made.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(shipped_text(name), encoding="utf-8")
    return tasks(folder, list(made))


def tasks(folder: str | Path, names: Sequence[str] = NAMES) -> list[Task]:
    """Some of the tasks that `build` wrote into a folder.

    Raises:
        BenchError: a file is missing or damaged.
    """
    return [Task(shipped(name), {"test": _rows(Path(folder) / f"{name}.jsonl")}, group="source") for name in names]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except OSError:
        raise BenchError(f"No {path.name} in {path.parent}: build the local tasks first.") from None
    except ValueError as error:
        raise BenchError(f"{path} is damaged ({error}): build the local tasks again.") from error


class _Cutter:
    """Cuts texts to numbers of tokens, between words where there are words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def front(self, text: str, tokens: int) -> str:
        """The longest beginning with at most so many tokens."""
        text = text[: tokens * _LONGEST]
        if self.count(text) <= tokens:
            return text.rstrip()
        end = bisect_right(range(len(text)), tokens, key=lambda n: self.count(text[:n])) - 1
        space = text.rfind(" ", 0, end + 1)
        return text[: space if space > end // 2 else end].rstrip()

    def pair(self, text: str, context: int, continuation: int) -> tuple[str, str] | None:
        """A beginning and what follows; None if either has less than half of its tokens.

        They part at a single space between two words: a line break would give the right continuation away.
        """
        places = [found.start() for found in _BETWEEN_WORDS.finditer(self.front(text, context) + text[-1:])]
        if not places:
            return None
        head, tail = text[: places[-1]], self.front(text[places[-1] + 1 :], continuation)
        enough = self.count(head) * 2 >= context and self.count(tail) * 2 >= continuation
        return (head, tail) if enough else None


def _questions(
    parts: list[tuple[str, str, str]], questions: int, choices: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A question for each of the first `parts` (beginning, continuation, source)."""
    lengths = np.array([len(tail) for _, tail, _ in parts])
    found = []
    for head, tail, source in parts[:questions]:
        # Each source once, so that a question never offers two continuations of one file.
        near: dict[str, str] = {}
        for place in np.argsort(np.abs(lengths - len(tail)), kind="stable"):
            _, other, where = parts[place]
            if where not in (source, *near) and other not in (tail, *near.values()):
                near[where] = other
            if len(near) == _NEAREST:
                break
        if len(near) < choices - 1:
            raise BenchError(
                f"{len(parts)} held-out documents are long enough for a cloze question, and they come from too few "
                f"sources for {choices} choices: give more documents, or shorten context and continuation."
            )
        wrong = rng.choice(list(near.values()), choices - 1, replace=False).tolist()
        answer = int(rng.integers(choices))
        offered = [*wrong[:answer], tail, *wrong[answer:]]
        found.append({"context": head, "choices": offered, "answer": answer, "source": source})
    if not found:
        raise BenchError(
            "No held-out document is long enough for a cloze question: give longer ones, or shorten context and "
            "continuation."
        )
    return found
