"""Tokenizers from folders with and without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import load_model, load_tokenizer
from tinyonn_lib.lm.tokenizer import END, PAD, train_bpe

TEXT = "the cat sat on the mat, and the dog ate the hat of Größe"
MADE = train_bpe([TEXT] * 3, 280, max_length=99)


def test_a_folder_needs_no_model(tmp_path: Path) -> None:
    MADE.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(TEXT)["input_ids"] == MADE(TEXT)["input_ids"]
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token, loaded.model_max_length) == (END, END, PAD, 99)
    with pytest.raises(BenchError, match="holds no config.json: it is not a Hugging Face model folder"):
        load_model(str(tmp_path), device="cpu")


def test_one_file_will_do(tmp_path: Path) -> None:
    MADE.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(TEXT)["input_ids"] == MADE(TEXT)["input_ids"]
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert len(loaded) == len(MADE)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="holds no config.json and no tokenizer.json: it is not"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BenchError, match="holds no tokenizer .tokenizer.json."):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    for config in (True, False):
        if not config:
            (tmp_path / "config.json").unlink()
        with pytest.raises(BenchError, match="^Cannot load a tokenizer from") as failed:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(failed.value)
    with pytest.raises(BenchError, match="is a file: give the folder that holds it .config.json or tokenizer.json."):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
