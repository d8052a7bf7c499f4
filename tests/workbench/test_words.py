"""Text of data sets stays text."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd

from tinyonn_lib.workbench import words


def test_facts_have_separators_and_are_escaped() -> None:
    table = words.facts_table({"neurons": 276480, "n": np.int64(1000), "model": "<script>x</script>"})
    assert "| neurons | 276,480 |" in table
    assert "| n | 1,000 |" in table
    assert "<script>" not in table


def test_quotations_are_escaped_and_keep_their_lines() -> None:
    quoted = words.quotations({"<b>Say": "<b>Say <img src=x>\nmore"})
    assert quoted == "<blockquote><b>&lt;b&gt;Say</b> &lt;img src=x&gt;<br>more</blockquote>"


def test_parameters_are_escaped_and_marked_when_changed() -> None:
    table = words.parameters({"texts": '"<i>"', "seed": "0"}, {"texts": '"<b>"'}, {"texts": "a < b", "seed": "order"})
    assert "2 parameters, 1 changed" in table
    assert "<mark>&quot;&lt;i&gt;&quot;</mark></code> (default <code>&quot;&lt;b&gt;&quot;</code>)" in table
    assert "a &lt; b" in table
    assert table.count("<mark>") == 1
    assert "changed" not in words.parameters({"seed": "0"}, {}, {"seed": "order"})


def test_tables_show_markup_of_data_sets_as_text() -> None:
    table = words.table(pd.DataFrame({"text": ["`a` *b* _c_ $x$ [d](e) | <i>"]}))
    row = table.splitlines()[-1]
    assert not set("`*_$[]<>") & set(row)
    assert html.unescape(row) == "| `a` *b* _c_ $x$ [d](e) | <i> |"
