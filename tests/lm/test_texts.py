from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.texts import encode, load_texts, pack
from tinyonn_lib.lm.tokenizer import train_bpe

ROWS: list[dict[str, object]] = [
    {"text": "eins", "n": 1},
    {"text": "  "},
    {"text": "zwei ü"},
    {"text": None},
    {"text": "drei"},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_formats_agree(tmp_path: Path, name: str) -> None:
    table = load_texts(str(write(tmp_path / name, ROWS)))
    assert table["text"].tolist() == ["eins", "zwei ü", "drei"]
    assert table["source"].tolist() == [f"{name}:1", f"{name}:3", f"{name}:5"]
    assert len(load_texts(str(tmp_path / name), limit=2)) == 2


def test_txt_paragraphs_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\ntwo\r\n\n \n\nthree".encode())
    table = load_texts(str(tmp_path / "a.txt"))
    assert table.values.tolist() == [["one\ntwo", "a.txt:1"], ["three", "a.txt:6"]]


def test_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path / "data" / "b.jsonl", [{"text": "second"}])
    write(tmp_path / "data" / "a.parquet", [{"text": "first"}])
    write(tmp_path / ".cache" / "x.json", [{"other": 1}])
    (tmp_path / "README.md").write_text("# no text of ours")
    assert load_texts(str(tmp_path))["source"].tolist() == ["data/a.parquet:1", "data/b.jsonl:1"]


def test_chats_are_joined(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
    ]
    texts = load_texts(str(write(tmp_path / "chat.jsonl", rows)))["text"].tolist()
    assert texts == ["user: Hi\n\nassistant: Hello", "human: Hi"]


def hostile(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    files = {
        "missing": (tmp_path / "none.jsonl", "No such file"),
        "empty": (tmp_path / "e.jsonl", "is empty"),
        "blank": (tmp_path / "blank.txt", "holds no text"),
        "column": (write(tmp_path / "c.jsonl", [{"body": "x"}]), "no column 'text': it has body"),
        "cut line": (tmp_path / "cut.jsonl", "line 2 is not valid JSON"),
        "cut parquet": (write(tmp_path / "cut.parquet", ROWS), "not a complete parquet"),
        "cut json": (tmp_path / "cut.json", "is not valid JSON"),
        "latin": (tmp_path / "latin.txt", "not UTF-8"),
        "latin lines": (tmp_path / "latin.jsonl", "line 2 is not UTF-8"),
        "number": (write(tmp_path / "n.jsonl", [{"text": 5}]), "holds int, not text"),
        "scalar": (tmp_path / "s.jsonl", "not a record"),
        "ending": (tmp_path / "x.xlsx", "must end in"),
        "deep": (tmp_path / "deep.jsonl", "nested too deep"),
        "folder": (tmp_path / "hollow", "holds no"),
    }
    files["empty"][0].write_bytes(b"")
    files["blank"][0].write_text("\n \n")
    files["cut line"][0].write_text('{"text": "a"}\n{"text": "b')
    files["cut parquet"][0].write_bytes(files["cut parquet"][0].read_bytes()[:-20])
    files["cut json"][0].write_text('[{"text": "a"}, ')
    files["latin"][0].write_bytes(b"caf\xe9")
    files["latin lines"][0].write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    files["deep"][0].write_text("[" * 100_000)
    files["scalar"][0].write_text("5\n")
    files["ending"][0].write_bytes(b"x")
    files["folder"][0].mkdir()
    return files


def test_hostile_files_give_one_clear_line(tmp_path: Path) -> None:
    for name, (path, message) in hostile(tmp_path).items():
        with pytest.raises(BenchError) as caught:
            load_texts(str(path))
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_without_network_fails_fast_and_names_the_way(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    with pytest.raises(BenchError, match="hf download --repo-type dataset HuggingFaceH4/ultrachat_200k"):
        load_texts("HuggingFaceH4/ultrachat_200k")
    assert time.monotonic() - began < 6


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    assert load_texts(str(tmp_path / "a.jsonl"))["text"].tolist() == ["a ? b"]


def test_bad_limit(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="limit"):
        load_texts(str(write(tmp_path / "a.jsonl", ROWS)), limit=0)


@settings(max_examples=80, deadline=None)
@given(st.text())
def test_tokenizer_round_trip(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


TOKENIZER = train_bpe(["the cat sat on the mat , the end . " * 20, "Größe 猫"], 300)


def test_tokenizer_saves_as_a_plain_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  the cat\n\n\tsat  …  n't , ok .\r\n"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 1)
    assert len(loaded) <= 300


def test_tokenizer_refuses() -> None:
    with pytest.raises(BenchError, match="at least 258"):
        train_bpe(["a"], 100)
    with pytest.raises(BenchError, match="No text"):
        train_bpe([""], 300)


def test_encode_cuts_and_drops() -> None:
    ids = encode(["the cat sat on the mat", "a", ""], TOKENIZER, 3, min_length=2)
    assert [len(row) for row in ids] == [3]
    assert len(encode(["the", ""], TOKENIZER, None, min_length=0)) == 2
    with pytest.raises(BenchError, match="tokens"):
        encode(["a"], TOKENIZER, 8, min_length=5)


def test_pack_keeps_every_token_in_order() -> None:
    blocks = pack([[1, 2, 3], [4], [5, 6]], 3, eos=0)
    assert blocks.tolist() == [[0, 1, 2], [3, 0, 4], [0, 5, 6]]
    shuffled = pack([[i] * 5 for i in range(1, 50)], 4, eos=0, seed=1)
    assert not np.array_equal(shuffled.numpy(), pack([[i] * 5 for i in range(1, 50)], 4, eos=0).numpy())
    with pytest.raises(BenchError, match="fill"):
        pack([[1]], 64, eos=0)
    with pytest.raises(BenchError, match="predict"):
        pack([[1]], 1, eos=0)
