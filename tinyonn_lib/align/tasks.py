"""Tasks whose reward is a program: prompts from a seed, the right answer, and a check that cannot be talked round.

The texts are made for a small byte-level BPE: it merges neighbours ("12", "([", "name="), and differently in every
place, so the same digit or bracket would have to be learned once for each merge. A blank in front of every digit,
bracket and word forbids the merge (the pre-tokenisation cuts there) and " 7" is one token wherever it stands.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd

from tinyonn_lib.errors import BenchError

Split = Literal["train", "tune", "heldout"]
_LONGEST = 200  # characters of an answer that is worth parsing; no right one is longer
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_NAMES = re.findall(
    "[a-z]+",
    "ada alan ann bob carl dan dora emma eric eva fred gina hal ida igor ivan jack jane john karl kim lea leo lisa "
    "mary max mia nina noah olga otto pam paul rosa ruth sam sara tim tom vera will zoe",
)


@dataclass(frozen=True)
class Task:
    """A family of prompts.

    Attributes:
        about: what is asked, for a table.
        size: how hard, the default; `means` says of what.
        means: what `size` counts.
        largest: the largest size that fits a short context.
        draw: random numbers and a size → a prompt.
        solve: prompt → the answer that is taught.
        right: prompt and answer → is it right? Of the answer alone; no text that is not an answer passes.
    """

    about: str
    size: int
    means: str
    largest: int
    draw: Callable[[random.Random, int], str]
    solve: Callable[[str], str]
    right: Callable[[str, str], bool]


def prompts(task: str, count: int, seed: int = 0, split: Split = "train", size: int | None = None) -> pd.DataFrame:
    """Different prompts of a task with their solutions.

    A prompt's text decides by its hash to which split it belongs (70 % train, 10 % tune, 20 % heldout), so that no
    seed and no size ever brings a held-out prompt into training.

    Args:
        task: name in `TASKS`.
        count: prompts.
        seed: of the drawing; the same seed gives the same prompts.
        split: "tune" is for choosing settings, "heldout" for judging.
        size: how hard, see `Task.means`; None takes the task's default.

    Returns:
        One row per prompt: task, prompt, solution.

    Raises:
        BenchError: no such task, split or size, or the task has not that many different prompts.
    """
    kind = named(task)
    size = kind.size if size is None else size
    if split not in get_args(Split):
        raise BenchError(f"Unknown split '{split}': choose one of {', '.join(get_args(Split))}.")
    if not 1 <= size <= kind.largest or count < 1:
        raise BenchError(
            f"size={size}, count={count} of '{task}': size is the {kind.means}, 1 to {kind.largest}; count at least 1."
        )
    rng = random.Random(f"{task} {size} {seed} {split}")
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count and tries < 1000 + 50 * count:
        tries += 1
        text = kind.draw(rng, size)
        if split_of(text) == split:
            found[text] = None
    if len(found) < count:
        raise BenchError(
            f"'{task}' with size={size} has too few prompts: {count} wanted, {len(found)} found in '{split}'. "
            "Ask for fewer or take a larger size."
        )
    return pd.DataFrame({"task": task, "prompt": list(found), "solution": [kind.solve(text) for text in found]})


def split_of(prompt: str) -> Split:
    """To which split a prompt belongs, whoever drew it."""
    share = hashlib.sha256(prompt.encode()).digest()[0] / 256
    return "heldout" if share < 0.2 else "tune" if share < 0.3 else "train"


def named(task: str) -> Task:
    """The task of that name.

    Raises:
        BenchError: there is none.
    """
    if task not in TASKS:
        raise BenchError(f"Unknown task '{task}': choose one of {', '.join(TASKS)}.")
    return TASKS[task]


def right(task: str, prompt: str, completion: str | None) -> bool:
    """Does this completion, and nothing but it, answer the prompt?

    Args:
        completion: what the model wrote up to its end token; None if it never ended, which is wrong. One blank in
            front is allowed to be missing, because some tokenizers swallow it.
    """
    if completion is None or len(completion) > _LONGEST:
        return False
    return named(task).right(prompt, completion.removeprefix(" "))


def _digits(number: int) -> str:
    return " ".join(str(number))


def _draw_sum(rng: random.Random, size: int) -> str:
    one, two, sign = rng.randint(0, size), rng.randint(0, size), rng.choice("+-")
    if sign == "-":
        one, two = max(one, two), min(one, two)  # no negative results
    return f" {_digits(one)} {sign} {_digits(two)} ="


def _solve_sum(prompt: str) -> str:
    one, sign, two = re.fullmatch(r"((?: [0-9])+) ([+-])((?: [0-9])+) =", prompt).groups()  # type: ignore[union-attr]
    first, second = int(one.replace(" ", "")), int(two.replace(" ", ""))
    return " " + _digits(first + second if sign == "+" else first - second)


def _draw_brackets(rng: random.Random, size: int) -> str:
    marks: list[str] = []
    opened: list[str] = []
    depth = rng.randint(1, size)
    while len(opened) < depth:
        if opened and rng.random() < 0.25 and len(marks) < 4 * size:
            marks.append(_CLOSES[opened.pop()])
        else:
            opened.append(rng.choice("([{"))
            marks.append(opened[-1])
    return f" {' '.join(marks)} :"


def _open(marks: list[str]) -> list[str] | None:
    """The brackets left open, or None if one closes what is not open, or is no bracket."""
    opened: list[str] = []
    for mark in marks:
        if mark in _CLOSES:
            opened.append(mark)
        elif not opened or mark != _CLOSES[opened.pop()]:
            return None
    return opened


def _solve_brackets(prompt: str) -> str:
    return "".join(f" {_CLOSES[mark]}" for mark in reversed(_open(prompt[1:-2].split(" ")) or []))


def _right_brackets(prompt: str, completion: str) -> bool:
    closers = completion.split(" ")
    return set(closers) <= set(_CLOSES.values()) and _open(prompt[1:-2].split(" ") + closers) == []


def _draw_format(rng: random.Random, size: int) -> str:
    fields: dict[str, Any] = {"name": rng.choice(_NAMES)}
    fields |= {"age": rng.randint(0, 99), "size": rng.randint(0, 99), "code": rng.randint(0, 9)}
    kept = rng.sample(sorted(fields), size)
    return "".join(f" {key} {fields[key]}" for key in kept) + " ;"


def _fields(prompt: str) -> dict[str, Any]:
    words = prompt[1:-2].split(" ")
    return {key: int(value) if key != "name" else value for key, value in zip(words[::2], words[1::2], strict=True)}


def _solve_format(prompt: str) -> str:
    return " " + json.dumps(_fields(prompt))


def _right_format(prompt: str, completion: str) -> bool:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    if completion != completion.strip():
        return False  # JSON would allow white space around it
    try:
        found = json.loads(completion, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return False
    # repr tells 5 from 5.0 and True from 1, which == does not; the order of the keys is free in JSON.
    return isinstance(found, dict) and sorted(map(repr, found.items())) == sorted(map(repr, _fields(prompt).items()))


TASKS: dict[str, Task] = {
    "arithmetic": Task(
        "add or subtract two numbers, digit by digit", 99, "largest number", 9999, _draw_sum, _solve_sum,
        lambda prompt, completion: completion == _solve_sum(prompt)[1:],
    ),
    "brackets": Task(
        "close the brackets that are open, in order", 4, "deepest nesting", 12, _draw_brackets, _solve_brackets,
        _right_brackets,
    ),
    "format": Task(
        "write the fields as a JSON object", 3, "number of fields", 4, _draw_format, _solve_format, _right_format
    ),
}  # fmt: skip
