"""What becomes of records: rows, or bad ones that are counted; none stops the reading, none is lost."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.texts import load_texts
from tinyonn_lib.selection.rows import Bad, Row, rows

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}

RECORDS: list[tuple[Any, tuple[str, str] | str]] = [  # record → (text, prompt), or the reason why it is bad
    ({"text": "plain", "prompt": "x", "response": "y"}, ("plain", "")),
    ("bare", ("bare", "")),
    ({"messages": [USER, BOT]}, ("user: Hi\n\nassistant: Hello", "user: Hi\n\nassistant: ")),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2},
        ("human: a\n\ngpt: b\n\nhuman: a\n\ngpt: b", "human: a\n\ngpt: b\n\nhuman: a\n\ngpt: "),
    ),
    ({"messages": [USER]}, ("user: Hi", "")),
    ({"messages": [BOT]}, ("assistant: Hello", "")),
    ({"text": [USER, BOT]}, ("user: Hi\n\nassistant: Hello", "user: Hi\n\nassistant: ")),
    ({"instruction": "do", "input": "with", "output": "done"}, ("do\n\nwith\n\ndone", "do\n\nwith\n\n")),
    ({"instruction": "do", "input": "", "output": "done"}, ("do\n\ndone", "do\n\n")),
    ({"instruction": "do", "input": None, "output": "done"}, ("do\n\ndone", "do\n\n")),
    ({"question": "q", "answer": "a"}, ("q\n\na", "q\n\n")),
    ({"prompt": "p", "response": "r"}, ("p\n\nr", "p\n\n")),
    ({"prompt": "p", "completion": "c"}, ("p\n\nc", "p\n\n")),
    ({"prompt": "p", "chosen": "c", "rejected": "d"}, ("p\n\nc", "p\n\n")),
    ({"prompt": "Hi", "chosen": [USER, BOT]}, ("user: Hi\n\nassistant: Hello", "user: Hi\n\nassistant: ")),
    ({"prompt": [USER], "completion": [BOT]}, ("user: Hi\n\nassistant: Hello", "user: Hi\n\nassistant: ")),
    ({"text": "half \ud800"}, ("half ?", "")),
    ({"text": "  "}, "empty"),
    ("", "empty"),
    ({"messages": []}, "empty"),
    ({"messages": [USER, BOT | {"content": " "}]}, "empty"),
    ({"prompt": "p", "response": "\n"}, "empty"),
    ({"text": None}, "not text"),
    ({"text": 5}, "not text"),
    ({"text": {"a": 1}}, "not text"),
    ({"body": "x"}, "not text"),
    ({"messages": ["Hi"]}, "not text"),
    ({"messages": [USER, BOT | {"content": None}]}, "not text"),
    ({"question": None, "answer": "a"}, "not text"),
    ({"question": "q", "answer": 4}, "not text"),
    ({"instruction": "do", "input": 1, "output": "x"}, "not text"),
    (5, "not text"),
    (None, "not text"),
    ([], "not text"),
]


def expected(name: str) -> list[Row | Bad]:
    return [
        Bad(name, index, wanted) if isinstance(wanted, str) else Row(name, index, *wanted)
        for index, (_, wanted) in enumerate(RECORDS)
    ]


def test_every_kind_of_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([record for record, _ in RECORDS]))
    # Blank lines are no records.
    (tmp_path / "b.jsonl").write_text("\n\n" + "\n \n".join(json.dumps(record) for record, _ in RECORDS) + "\n")
    assert list(rows(str(tmp_path / "a.json"))) == expected("a.json")
    assert list(rows(str(tmp_path / "b.jsonl"))) == expected("b.jsonl")
    assert list(rows(str(tmp_path))) == expected("a.json") + expected("b.jsonl")


def test_another_column_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert list(rows(str(tmp_path / "a.jsonl"), "answer")) == [Row("a.jsonl", 0, "a")]


def test_the_text_is_that_of_load_texts(tmp_path: Path) -> None:
    """Where both can read a record."""
    records = [record for record, wanted in RECORDS if not isinstance(wanted, str)]
    known = [r for r in records if isinstance(r, str) or r.keys() & {"text", "messages", "conversations"}]
    (tmp_path / "a.json").write_text(json.dumps(known))
    texts = [row.text for row in rows(str(tmp_path / "a.json")) if isinstance(row, Row)]
    assert texts == load_texts(str(tmp_path / "a.json"))["text"].tolist()


def test_parquet_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"question": "q", "answer": "a"}, {"question": "r", "answer": None}] * 1500)
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(rows(str(tmp_path / "a.parquet")))
    assert found[-2:] == [Row("a.parquet", 2998, "q\n\na", "q\n\n"), Bad("a.parquet", 2999, "not text")]


LONG = "long " * 2_000_000  # 10 MB
LINES = [  # one line each → its reason, "" for a row
    (b'{"text": "fine"}', ""),
    (b'{"text": "caf\xe9"}', "broken UTF-8"),
    (b'{"text": "caf\xc3\xa9"}', ""),
    (b'{"text": "a"', "not JSON"),
    (b"nothing", "not JSON"),
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"text": ' + b"1" * 5_000 + b"}", "not JSON"),
    (json.dumps({"text": LONG}).encode(), ""),
    (b'{"text": "x\\u0000y"}', ""),
    (b'{"text": "caf\xc3', "cut off"),
]


@pytest.mark.parametrize("last", [b'{"text": "caf\xc3', b'{"text": "ca', b"["])
def test_broken_lines_are_listed_where_they_are(tmp_path: Path, last: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*(line for line, _ in LINES[:-1]), last]))
    found = list(rows(str(file)))
    assert [(row.source_index, getattr(row, "reason", "")) for row in found] == [*enumerate(r for _, r in LINES)]
    assert isinstance(found[7], Row)
    assert found[7].text == LONG


@pytest.mark.parametrize("line", [line for line, reason in LINES if reason])
def test_what_is_listed_here_stops_load_texts(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(BenchError, match=r"^a.jsonl (line 2 is not|holds JSON nested)[^\n]*$"):
        load_texts(str(tmp_path / "a.jsonl"))


def test_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n two\r\n\r\n \n\n\nbro\nk\xe9n\n\nlast")
    assert list(rows(str(tmp_path / "a.txt"))) == [
        Row("a.txt", 0, "one\n two"),
        Bad("a.txt", 1, "broken UTF-8"),
        Row("a.txt", 2, "last"),
    ]
    with pytest.raises(BenchError, match="not UTF-8 .* near byte 24"):
        load_texts(str(tmp_path / "a.txt"))


def test_a_broken_value_in_parquet_is_one_bad_row(tmp_path: Path) -> None:
    values = pa.array([b"fine", b"caf\xe9", b"too"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    found = list(rows(str(tmp_path / "a.parquet")))
    assert found == [Row("a.parquet", 0, "fine"), Bad("a.parquet", 1, "broken UTF-8"), Row("a.parquet", 2, "too")]
    with pytest.raises(BenchError, match="not UTF-8"):
        load_texts(str(tmp_path / "a.parquet"))


def test_an_empty_file_among_others_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text('"x"\n')
    assert list(rows(str(tmp_path))) == [Bad("a.jsonl", 0, "empty file"), Row("deep/b.jsonl", 0, "x")]


def test_what_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    (tmp_path / "a.json").write_text('[{"text": "a"}, ')
    (tmp_path / "b.json").write_text("1" * 5_000)
    for name, message in {
        "a.parquet": "not a complete parquet",
        "a.json": "cut off",
        "b.json": "too many digits",
    }.items():
        with pytest.raises(BenchError, match=message):
            list(rows(str(tmp_path / name)))
    with pytest.raises(BenchError, match="No such file"):
        list(rows(str(tmp_path / "c.jsonl")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELD = st.sampled_from(["text", "messages", "conversations", "prompt", "chosen", "question", "answer", "input"])
TURN = st.fixed_dictionaries({"role": JSON | st.sampled_from(["user", "assistant"]), "content": st.text() | JSON})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(FIELD, JSON | st.lists(TURN, max_size=4), max_size=4) | JSON, max_size=5))
def test_any_json_gives_a_row_or_a_reason(tmp_path_factory: pytest.TempPathFactory, records: list[Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    found = list(rows(str(file)))
    assert [row.source_index for row in found] == [*range(len(records))]
    for row in found:
        if isinstance(row, Row):
            assert row.text.startswith(row.prompt)
            assert row.text[len(row.prompt) :].strip()
            row.text.encode()


@pytest.mark.parametrize("ending", ["jsonl", "txt", "parquet"])
def test_reading_takes_no_memory_for_the_whole_file(tmp_path: Path, ending: str) -> None:
    file, texts = tmp_path / f"a.{ending}", [f"{number} " + "word " * 200 for number in range(20_000)]  # 20 MB
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), file, compression="none", use_dictionary=False)  # one row group
    else:
        file.write_text("\n\n".join(json.dumps(text) if ending == "jsonl" else text for text in texts))
    texts.clear()
    stream = rows(str(file))
    next(stream)
    tracemalloc.start()
    arrow = 0
    for _ in stream:
        arrow = max(arrow, pa.total_allocated_bytes())
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python < 5_000_000
    assert arrow < 8_000_000
