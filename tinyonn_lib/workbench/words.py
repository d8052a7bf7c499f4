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

PARAMETERS = '<details class="parameters">'
"""How the table of parameters begins; a report knows it by this."""


def facts_table(values: Mapping[str, Any]) -> str:
    """A Markdown table of names and values, with numbers as in `table`."""
    return _table(("", ""), list(values.items()))


def table(frame: pd.DataFrame) -> str:
    """A Markdown table of a frame, numbers with separators, four digits of those that are not whole."""
    return _table([str(name) for name in frame.columns], list(frame.itertuples(index=False)))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float) and value == value:  # what follows the fourth digit is noise to a reader
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Number):
        return f"{value:,}" if value == value else "–"
    return html.escape(str(value)).translate(_MARKUP)


def parameters(values: Mapping[str, str], defaults: Mapping[str, str], meanings: Mapping[str, str]) -> str:
    """A folded HTML table of parameters: name, value, meaning.

    `defaults` has those of the changed parameters alone: these are marked, with the default next to the value.
    """
    rows = []
    for name, value in values.items():
        shown = f"<code>{html.escape(value)}</code>"
        if name in defaults:
            shown = (
                f"<code><mark>{html.escape(value)}</mark></code> (default <code>{html.escape(defaults[name])}</code>)"
            )
        rows.append(_row("td", f"<code>{name}</code>", shown, html.escape(meanings[name])))
    count = f"{len(values)} parameters" + (f", {len(defaults)} changed" if defaults else "")
    return (
        f"{PARAMETERS}<summary>{count}: values and meanings</summary>\n<table>"
        f"<thead>{_row('th', 'parameter', 'value', 'meaning')}</thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _row(tag: str, *cells: str) -> str:
    left = f'<{tag} style="text-align: left">'  # JupyterLab sets tables flush right
    return "<tr>" + "".join(f"{left}{cell}</{tag}>" for cell in cells) + "</tr>\n"


def quotations(samples: Mapping[str, str]) -> str:
    """HTML quotations: each prompt in bold, then what the model made of it."""
    cards = []
    for prompt, text in samples.items():
        rest = html.escape(text.removeprefix(prompt)).replace("\n", "<br>").replace("  ", "&nbsp; ")
        cards.append(f"<blockquote><b>{html.escape(prompt)}</b>{rest}</blockquote>")
    return "\n".join(cards)
