"""What a notebook says in words; text from data sets is escaped here."""

from __future__ import annotations

import html
from collections.abc import Mapping
from numbers import Number
from typing import Any


def facts_table(values: Mapping[str, Any]) -> str:
    """A Markdown table of names and values, numbers with separators."""
    shown = {k: f"{v:,}" if isinstance(v, Number) else html.escape(str(v)) for k, v in values.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in shown.items())])


def quotations(samples: Mapping[str, str]) -> str:
    """HTML quotations: each prompt in bold, then what the model made of it."""
    cards = []
    for prompt, text in samples.items():
        rest = html.escape(text.removeprefix(prompt)).replace("\n", "<br>").replace("  ", "&nbsp; ")
        cards.append(f"<blockquote><b>{html.escape(prompt)}</b>{rest}</blockquote>")
    return "\n".join(cards)
