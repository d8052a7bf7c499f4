"""What a notebook says in words; text from data sets is escaped here."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


_MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in "|`*_$[]\\~"}
"""What Markdown and its mathematics would take for markup: entities are shown as they are."""


def facts_table(values: Mapping[str, Any]) -> str:
    """A Markdown table of names and values, numbers with separators."""
    return _table(("", ""), list(values.items()))


def table(frame: pd.DataFrame) -> str:
    """A Markdown table of a frame, numbers with separators."""
    return _table([str(name) for name in frame.columns], list(frame.itertuples(index=False)))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, Number):
        return f"{value:,}" if value == value else "–"
    return html.escape(str(value)).translate(_MARKUP)


def quotations(samples: Mapping[str, str]) -> str:
    """HTML quotations: each prompt in bold, then what the model made of it."""
    cards = []
    for prompt, text in samples.items():
        rest = html.escape(text.removeprefix(prompt)).replace("\n", "<br>").replace("  ", "&nbsp; ")
        cards.append(f"<blockquote><b>{html.escape(prompt)}</b>{rest}</blockquote>")
    return "\n".join(cards)
