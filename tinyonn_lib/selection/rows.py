"""Rows to choose from: one text each, and which part of it is given rather than learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tinyonn_lib.lm.files import Unreadable, records
from tinyonn_lib.lm.texts import CHAT_COLUMNS, encodable, join_turns, turn_of

_ANSWERING = ("assistant", "gpt", "model", "chatgpt", "bot")
_PAIRS = (
    ("instruction", "output"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "chosen"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a data set.

    Attributes:
        source_dataset: file, relative to the folder given, or hub id.
        source_index: place in it, from 0; unreadable records count, blank lines do not.
        text: all of it.
        prompt: the front part of `text` that is given and not learned, such as a question; "" for plain documents.
    """

    source_dataset: str
    source_index: int
    text: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that is no row, and why, as "empty", "not text", "broken UTF-8" or "too long: 812 tokens"."""

    source_dataset: str
    source_index: int
    reason: str


def rows(source: str, column: str = "text") -> Iterator[Row | Bad]:
    """Stream the rows of a data set; as many come out as there are records.

    A record's text is its field `column`; a chat there or in `messages` or `conversations`, whose prompt is all before
    the last answer; or an instruction and its answer: instruction (and input)/output, question/answer,
    prompt/response, prompt/completion, prompt/chosen, parted by a blank line.

    Args:
        source: as in `lm.texts.load_texts`.
        column: the field that holds the text.

    Raises:
        BenchError: nothing can be read: no such file or hub, a .json or .parquet file that is cut off.
    """
    for name, group in groupby(records(source), key=lambda record: record.source):
        for index, record in enumerate(group):
            found = _texts(record.value, column)
            if isinstance(found, str):
                yield Bad(name, index, found)
            else:
                text, prompt = found
                yield Row(name, index, encodable(text), encodable(prompt))


def _texts(value: Any, column: str) -> tuple[str, str] | str:
    """Text and prompt, or why there are none."""
    if isinstance(value, Unreadable):
        return value.reason
    if isinstance(value, str):
        return (value, "") if value.strip() else "empty"
    if not isinstance(value, dict):
        return "not text"
    field = next((name for name in (column, *CHAT_COLUMNS) if name in value), None)
    if field is not None:
        said = value[field]
        return _chat(said) if isinstance(said, list) else _plain(said)
    for asked, answered in _PAIRS:
        if asked in value and answered in value:
            return _pair(value[asked], value.get("input") if asked == "instruction" else None, value[answered])
    return "not text"


def _plain(said: Any) -> tuple[str, str] | str:
    if not isinstance(said, str):
        return "not text"
    return (said, "") if said.strip() else "empty"


def _pair(asked: Any, more: Any, answer: Any) -> tuple[str, str] | str:
    if isinstance(answer, list):  # as turns; those of a preference begin with the prompt, those of a completion do not
        return _chat(asked + answer if isinstance(asked, list) else answer)
    given = [part for part in (asked, more) if part is not None]
    if asked is None or not all(isinstance(part, str) for part in (*given, answer)):
        return "not text"
    if not answer.strip():
        return "empty"
    prompt = "\n\n".join(part for part in given if part.strip())
    prompt += "\n\n" if prompt else ""
    return prompt + answer, prompt


def _chat(turns: Sequence[Any]) -> tuple[str, str] | str:
    if not all(isinstance(turn, dict) for turn in turns):
        return "not text"
    said = [turn_of(turn) for turn in turns]
    if not all(isinstance(content, str) for _, content in said):
        return "not text"
    if not any(content.strip() for _, content in said):
        return "empty"
    answers = [place for place, (role, _) in enumerate(said) if str(role).lower() in _ANSWERING]
    last = answers[-1] if answers else 0
    if answers and not said[last][1].strip():
        return "empty"
    # The role before an answer is given, too.
    return join_turns(said), join_turns([*said[:last], (said[last][0], "")]) if last else ""
