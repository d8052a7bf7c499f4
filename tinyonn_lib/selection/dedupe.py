"""Near-duplicates: texts of which nearly all word 5-grams are in a text seen before."""

from __future__ import annotations

import hashlib
import re
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np

_WORDS = 5
_PERMUTATIONS = 128
# A twin that is missed is worse than one text more that is compared: the index proposes what is less similar, too.
_MARGIN, _MISSED, _LOOKED_AT = 0.9, 0.9, 0.1
# Chinese and Japanese have no spaces between words: there a character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def shingles(text: str) -> np.ndarray:
    """Hashes of a text's word 5-grams, sorted, each once, uint64; one of the whole text where it is shorter."""
    words = _WORD.findall(text.lower()) or [text]
    grams = {" ".join(words[start : start + _WORDS]) for start in range(max(1, len(words) - _WORDS + 1))}
    hashed = [hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams]
    return np.sort(np.frombuffer(b"".join(hashed), dtype="<u8"))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared shingles over all shingles of two texts."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


class Unique:
    """Texts of which no two are nearly the same.

    MinHash LSH proposes texts to compare with, so that not all are; the comparison itself is exact. A twin is missed
    with a probability of up to 0.02 when it is just similar enough, and never when it is the same. Shingles are on the
    disk, the index is in memory.

    Args:
        least: Jaccard similarity from which two texts are nearly the same, above 0.
        file: for the shingles.
    """

    def __init__(self, least: float, file: Path) -> None:
        from datasketch import MinHash, MinHashLSH

        self._least = least
        self._empty = MinHash(_PERMUTATIONS, hashfunc=int)
        self._index = MinHashLSH(_MARGIN * least, _PERMUTATIONS, weights=(_LOOKED_AT, _MISSED))
        self._file = file.open("w+b")
        self._ends = array("q", [0])

    def __enter__(self) -> Unique:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def twin(self, text: str) -> tuple[int, float] | None:
        """The most similar of the texts taken so far (0 is the first) if it is nearly the same; else takes this one.

        Returns:
            Its number and the similarity, or None: the text was taken.
        """
        own = shingles(text)
        sketch = self._empty.copy()
        sketch.update_batch((own & np.uint64(0xFFFFFFFF)).tolist())
        near = [(jaccard(own, self._taken(number)), -number) for number in self._index.query(sketch)]
        similarity, number = max(near, default=(-1.0, 0))
        if similarity >= self._least:
            return -number, similarity
        self._index.insert(len(self._ends) - 1, sketch, check_duplication=False)
        self._file.seek(0, 2)
        self._file.write(own.tobytes())
        self._ends.append(self._ends[-1] + own.nbytes)
        return None

    def _taken(self, number: int) -> np.ndarray:
        start, end = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return np.frombuffer(self._file.read(end - start), dtype="<u8")
