"""A small byte-level BPE tokenizer, trained on the corpus and saved as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tinyonn_lib.errors import BenchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
MIN_VOCAB = 256 + 2  # every byte and the two special tokens


def train_bpe(texts: Iterable[str], vocab_size: int = 4096, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (GPT-2's pre-tokenisation): any text comes back unchanged after decoding.

    `<|endoftext|>` ends a document and, as in GPT-2, also starts one (BOS = EOS); `<|pad|>` pads.
    Save it with `tokenizer.save_pretrained(folder)`; `AutoTokenizer` reads it back.

    Args:
        texts: training texts.
        vocab_size: tokens in all, at least 258; fewer come out if the texts do not hold that many pairs.
        max_length: `model_max_length` of the tokenizer, in tokens.

    Raises:
        BenchError: vocabulary too small, or no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB:
        raise BenchError(f"vocab_size is {vocab_size}: a byte-level vocabulary needs at least {MIN_VOCAB}.")
    texts = list(texts)
    if not any(texts):
        raise BenchError("No text to train a tokenizer on.")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,  # cleaning would break the round trip
    )
