"""What the values of parameters may be: numbers within bounds, and lists of names or numbers in one flat text.

Names that the science knows are written out here, because its modules take seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

# A run is a folder name: no separators, nothing hidden.
RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+,=-]{0,199}$")]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=0.5)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

Ranking = Literal[
    "literal",
    "centred",
    "log_mass",
    "contrastive",
    "combined",
    "random",
    "length",
    "longest",
    "perplexity",
    "perplexity_fitted",
    "ifd",
]
Corruption = Literal["byte_noise", "word_shuffle", "repetition", "boilerplate", "wrong_answer"]
Method = Literal["gspo", "grpo", "rejection", "dpo", "gold"]


def _numbers(good: Callable[[float], bool], expected: str) -> Any:
    def checked(text: str) -> str:
        try:
            fits = all(good(float(part)) for part in text.split())
        except ValueError:
            fits = False
        if not text.split() or not fits:
            raise ValueError(f"expected {expected}")
        return text

    return Annotated[str, BeforeValidator(str), AfterValidator(checked)]


def _names(known: Any, what: str, needed: bool = False, always: str = "") -> Any:
    """Some of the names of a Literal; `needed`: at least one; `always`: one that must be among them."""

    def checked(text: str) -> str:
        some = f"name some of {' '.join(get_args(known))}"
        if unknown := [name for name in text.split() if name not in get_args(known)]:
            raise ValueError(f"unknown {what} '{unknown[0]}'; {some}")
        if needed and not text.split():
            raise ValueError(f"no {what} given; {some}")
        if always and always not in text.split():
            raise ValueError(f"{always} is missing: the others are its controls")
        return text

    return Annotated[str, AfterValidator(checked)]


_RATES = "learning rates below 1, separated by blanks, such as '1.0e-3 3.0e-3'"
# Several values in one flat text, such as `0.25 0.5 0.75`.
Fractions = _numbers(lambda value: 0 < value <= 1, "numbers in (0, 1], separated by blanks")
Rates = _numbers(lambda value: 1e-12 <= value < 1, _RATES)
RatesOrZero = _numbers(lambda value: 0 <= value < 1, _RATES)
Rankings = _names(Ranking, "ranking")
Corruptions = _names(Corruption, "corruption", needed=True)
Methods = _names(Method, "method", always="gspo")


def _no_password(url: str) -> str:
    # Parameters end up in manifests, notebooks and reports.
    if urlsplit(url).password:
        raise ValueError("leave the password out of the URL and give it as TINYONN_REDIS_PASSWORD in the environment")
    return url


Url = Annotated[str, AfterValidator(_no_password)]
