"""A byte-level BPE tokenizer as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_QWEN2: "qwen2", _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe"}
"""How texts are cut before merging (the regular expression in tokenizer.json) → llama.cpp's name for it."""


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Tokens, merges, special tokens and chat template of the tokenizer in `folder`.

    Args:
        vocab_size: rows of the embedding; ids without a token become unused ones.

    Raises:
        BenchError: no tokenizer.json, one that is no byte-level BPE of a known kind, or more tokens than rows.
    """
    import gguf
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        raw = json.loads(file.read_text("utf-8"))
        tokens = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise BenchError(f"Cannot read {file}: a GGUF file needs the tokenizer in it.") from error
    split = _split(raw)
    if split is None or raw["model"].get("type") != "BPE":
        raise BenchError(
            "This tokenizer is no byte-level BPE cut like GPT-2's, Qwen2's or Llama-3's: not written as GGUF."
        )
    if max(tokens.values()) >= vocab_size:
        raise BenchError(f"The tokenizer has ids up to {max(tokens.values())}, the model {vocab_size} rows for them.")
    names = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in tokens.items():
        names[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in raw.get("added_tokens", []):
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _split(raw: dict[str, Any]) -> str | None:
    """llama.cpp's name for how this tokenizer cuts texts before merging."""
    first = raw.get("pre_tokenizer") or {}
    parts = first.get("pretokenizers", [first])
    if [part.get("type") for part in parts] == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if [part.get("type") for part in parts] == ["Split", "ByteLevel"]:
        return _SPLITS.get((parts[0].get("pattern") or {}).get("Regex", ""))
    return None
