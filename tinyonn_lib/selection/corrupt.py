"""Text made bad in known ways: what a router learns to call its trash experts for, and what selection is judged by.

Nothing in a language model's loss makes an expert a trash expert (document 001 names the last 12.5 % so by decree):
it is learned by contrast with corrupted text, and every score's AUROC is measured against the same five corruptions.

Every corruption is a pure function of its arguments, never returns what it was given, and keeps the length in
characters within `TOLERANCE`, so that length tells nothing. What it cannot corrupt in its own way (one word, blanks)
gets `byte_noise`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from tinyonn_lib.errors import BenchError

Corruption = Callable[[str, str, Random, Sequence[str]], str]
"""(text, prompt, rng, others) → corrupted text.

`prompt` is the front of the text that is given ("" for a plain document); only `wrong_answer` keeps it as it is, the
others spoil the whole row. `others` are other documents or, for a row with a prompt, other rows' answers.
"""

NOISE = 0.12
"""Share of the characters that `byte_noise` replaces."""

TOLERANCE = 0.1
"""By how much of its length a corrupted text may be longer or shorter."""

BOILERPLATE = (
    "This website stores cookies on your device. Choose which ones you allow.",
    "Accept all cookies | Reject all | Manage my preferences",
    "By continuing to browse you consent to our use of cookies and similar technologies.",
    "Your privacy matters to us. Read our updated privacy notice.",
    "Sign up for our weekly newsletter and never miss a story.",
    "Enter your email address to subscribe. You can unsubscribe at any time.",
    "Thank you for subscribing! Please check your inbox to confirm.",
    "Get 15% off your first order when you join our mailing list.",
    "Home > Shop > Accessories > Sale",
    "Home | About us | Services | Blog | Careers | Contact",
    "Skip to main content. Skip to navigation. Skip to footer.",
    "Menu  Search  My account  Basket (0)",
    "Log in or register to leave a comment.",
    "Forgot your password? Click here to reset it.",
    "Already a member? Sign in. New here? Create a free account.",
    "Your session has expired. Please log in again.",
    "404 - Page not found. The page you requested has moved or no longer exists.",
    "Error 503: service temporarily unavailable. Please try again later.",
    "Please enable JavaScript in your browser to view this page.",
    "You are using an outdated browser. Upgrade for a better experience.",
    "Loading, please wait. You will be redirected in 5 seconds.",
    "Copyright 2016 Sample Media Ltd. All rights reserved.",
    "No part of this page may be copied or redistributed without written permission.",
    "Terms of use | Privacy policy | Imprint | Accessibility | Site map",
    "Powered by a free theme. Proudly hosted in the cloud.",
    "Advertisement. Scroll down to continue reading.",
    "Sponsored content: seven tricks your dentist will not tell you.",
    "You may also like: the 10 best gadgets of the year. Number 4 is a surprise.",
    "Related articles | Most read | Editor's choice | Latest",
    "Share this on social media: post, pin, send, print.",
    "Follow us for daily updates, photos and competitions.",
    "Like what you see? Tell a friend!",
    "Posted by admin on Tuesday at 08:41. Filed under: Uncategorised. 0 comments.",
    "Your email address will not be published. Required fields are marked *",
    "Be the first to review this product. Rating: 0 out of 5 stars.",
    "Was this page helpful? Yes (3) No (17)",
    "Add to basket. In stock. Free delivery on orders over 40.00.",
    "Tags: news, misc, general, other. Previous post. Next post.",
    "Page 1 of 23. First. Previous. 1 2 3 4 5. Next. Last.",
    "Download our app. Available in all stores. Scan the code to install.",
)
"""Lines that frame the text of web pages, in our own words."""

_TRIES = 8


def byte_noise(text: str, prompt: str, rng: Random, others: Sequence[str]) -> str:
    """`NOISE` of the characters, at least one, replaced by other printable ASCII characters."""
    return _noise(_part(text, ""), rng)


def word_shuffle(text: str, prompt: str, rng: Random, others: Sequence[str]) -> str:
    """All words in random order between the separators that were there; the characters of a single word."""

    def shuffled(text: str) -> str:
        pieces = re.split(r"(\s+)", text)
        if len(pieces) < 3:  # no blank in it: one word, or a script that has none
            return "".join(rng.sample(text, len(text)))
        words = [piece for piece in pieces[::2] if piece]
        rng.shuffle(words)
        waiting = iter(words)
        pieces[::2] = [next(waiting) if piece else "" for piece in pieces[::2]]
        return "".join(pieces)

    return _until_changed(text, "", rng, shuffled)


def repetition(text: str, prompt: str, rng: Random, others: Sequence[str]) -> str:
    """A phrase of 4 to 9 of its words (of half of them in a short text) again and again."""

    def repeated(text: str) -> str:
        words = re.findall(r"\S+\s*", text)
        units = words if len(words) > 1 else list(text)
        count = min(rng.randint(4, 9), max(1, len(units) // 2))
        first = rng.randrange(len(units) - count + 1)
        phrase = "".join(units[first : first + count])
        if units is words and not phrase[-1].isspace():
            phrase += " "
        return _fit(phrase * (2 * len(text) // len(phrase) + 1), len(text))

    return _until_changed(text, "", rng, repeated)


def boilerplate(text: str, prompt: str, rng: Random, others: Sequence[str]) -> str:
    """From a random word in its first half on, lines of `BOILERPLATE`."""

    def framed(text: str) -> str:
        kept = text[: _word(text, rng.randrange(max(1, len(text) // 2)))]
        lines = [kept] if kept else []
        while sum(map(len, lines)) < 2 * len(text):
            lines += rng.sample(BOILERPLATE, len(BOILERPLATE))
        return _fit("\n".join(lines), len(text))

    return _until_changed(text, "", rng, framed)


def wrong_answer(text: str, prompt: str, rng: Random, others: Sequence[str]) -> str:
    """Another row's answer to its prompt; a plain document goes on with the second half of another from its middle."""

    def foreign(text: str) -> str:
        cut = 0 if prompt else _word(text, len(text) // 2)
        cut += text[cut].isspace()
        need = int((len(text) - cut) * (1 + TOLERANCE)) + 1
        drawn = [rng.choice(others) for _ in range(_TRIES if others else 0)]
        usable = [other for other in drawn if other.strip() and other != text]
        if prompt:
            usable.sort(key=lambda other: abs(len(other) - len(text)))
        found = ""
        for other in usable:
            # From its middle, or earlier if what is left would be too short.
            start = 0 if prompt else _word(other, max(0, min(len(other) // 2, len(other) - need)))
            found += other[start:].strip() + "\n"
            if len(found) > need:
                break
        if not found:
            return text
        return text[:cut] + _fit(found * (need // len(found) + 1), len(text) - cut)

    return _until_changed(text, prompt, rng, foreign)


CORRUPTIONS: dict[str, Corruption] = {
    "byte_noise": byte_noise,
    "word_shuffle": word_shuffle,
    "repetition": repetition,
    "boilerplate": boilerplate,
    "wrong_answer": wrong_answer,
}


def parse(names: str) -> tuple[str, ...]:
    """Names of corruptions, separated by blanks, each once.

    Raises:
        BenchError: an unknown name, or none.
    """
    found = tuple(dict.fromkeys(names.split()))
    if not found or (unknown := [name for name in found if name not in CORRUPTIONS]):
        what = f"Unknown corruption: {', '.join(unknown)}" if found else "No corruption given"
        raise BenchError(f"{what}. Name some of: {' '.join(CORRUPTIONS)}.")
    return found


def _part(text: str, prompt: str) -> str:
    """What may be changed of a text."""
    part = text.removeprefix(prompt)
    if not part:
        raise BenchError("An empty text cannot be corrupted: drop it before.")
    return part


def _noise(text: str, rng: Random) -> str:
    characters = list(text)
    for place in rng.sample(range(len(text)), max(1, round(NOISE * len(text)))):
        code = rng.randrange(33, 126)  # of 33 to 126 without the character that is there
        characters[place] = chr(code + (code >= ord(text[place])))
    return "".join(characters)


def _until_changed(text: str, prompt: str, rng: Random, corrupt: Callable[[str], str]) -> str:
    """Corrupt what follows the prompt, again if nothing changed or nothing is left, with noise if it never does."""
    part = _part(text, prompt)
    for _ in range(_TRIES):
        if (made := corrupt(part)) != part and made.strip():
            return prompt + made
    return prompt + _noise(part, rng)


def _word(text: str, place: int, within: int | None = None) -> int:
    """The white space nearest to `place` and at most `within` characters (a tenth of the text) from it, else `place`.

    As often before as behind: cutting there neither shortens nor lengthens texts on average.
    """
    within = int(TOLERANCE * len(text)) if within is None else within
    for step in range(within + 1):
        for near in (place - step, place + step):
            if 0 <= near < len(text) and text[near].isspace():
                return near
    return place


def _fit(text: str, length: int) -> str:
    """The front of a text of at least about `length` characters, cut at a word where one ends near."""
    return text[: _word(text, length, int(TOLERANCE * length))]
