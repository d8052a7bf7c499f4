"""The embedded pool: rows to choose from whose answer is known, on every machine, and text to judge a target on.

Documentation of packages that the embedded models were not trained on, a share of it corrupted in known ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from tinyonn_lib.lm import corpus
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.known import SHORTEST, longest
from tinyonn_lib.selection.pool import fitted, mixed, passages
from tinyonn_lib.selection.selector import Selector


def pool(
    packages: Sequence[str], selector: Selector, *, rows: int, length: int, dirt: float, heldout: float, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Passages to choose from, and documents that are none of them.

    Args:
        packages: installed packages whose documentation it is.
        rows: of the pool.
        selector: what will score them: a row fits its model.
        length: of the longest passage, tokens; 0: what the model takes.
        dirt: share of the rows that is corrupted, kinds in equal numbers.
        heldout: share of the documentation, by whole files, that is kept to judge on.

    Returns:
        The pool, `text, source, corruption` ("" if clean), and the documents, `text, source`.

    Raises:
        BenchError: a package is not installed, or too little text.
    """
    tokenizer, length = selector.tokenizer, longest(selector.model, length)
    texts = corpus.split(corpus.python_docs(packages), seed, heldout=heldout)
    chosen = texts[texts["split"] == "train"].sample(frac=1, random_state=seed)
    enough = chosen[chosen["text"].str.len().cumsum() < rows * length * 5]  # characters: about three make a token
    cut = passages(enough, tokenizer, length, max(1, round(SHORTEST * length)))
    drawn = cut.sample(min(rows, len(cut)), random_state=seed)
    dirty = fitted(mixed(drawn, dirt, seed, tuple(CORRUPTIONS)), tokenizer, length)
    return dirty, texts.loc[texts["split"] == "heldout", ["text", "source"]].reset_index(drop=True)
