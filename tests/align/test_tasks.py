"""Prompts are reproducible and disjoint; a verifier lets nothing through that is not the answer."""

from __future__ import annotations

import json

import pytest

from tinyonn_lib.align.tasks import TASKS, prompts, right, split_of
from tinyonn_lib.errors import BenchError


@pytest.mark.parametrize("task", TASKS)
def test_solutions_are_right_and_prompts_reproducible(task: str) -> None:
    table = prompts(task, 200, seed=3)
    assert table.equals(prompts(task, 200, seed=3))
    assert not table.equals(prompts(task, 200, seed=4))
    assert table["prompt"].is_unique
    assert all(right(*row) for row in table.itertuples(index=False))
    assert all(right(name, prompt, answer[1:]) for name, prompt, answer in table.itertuples(index=False))


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_for_any_seed_and_size(task: str) -> None:
    size = TASKS[task].size
    seen = {
        split: {
            text for seed in range(3) for s in (size, size + 1) for text in prompts(task, 100, seed, split, s)["prompt"]
        }
        for split in ("train", "tune", "heldout")
    }
    assert not seen["train"] & seen["heldout"]
    assert not seen["train"] & seen["tune"]
    assert not seen["tune"] & seen["heldout"]
    assert all(split_of(text) == split for split, texts in seen.items() for text in texts)


BOB = '{"name": "bob", "age": 5}'
HOSTILE = {
    "arithmetic": (
        " 1 2 + 7 =",
        " 1 9",
        ["", " ", "19", " 19", " 1 9 ", "  1 9", " 1  9", " 1 9\n", " 1 9.", " 1 9 or 2 0", " 0 1 9", " + 1 9", " 1 8",
         " 1 9 0", " 1 9 = 1 9", " 1 2 + 7 = 1 9", " 1 2 + 7", " １ ９", " ١ ٩", " ¹ ⁹", "\t1 9", " 1\u00a09",
         " 1 9\x00", " 1 9" * 1000, "9" * 100_000, "1e1", " 1 9<|endoftext|>", "\u200b1 9", "nan", "None", "True"],
    ),
    "brackets": (
        " ( [ ] { :",
        " } )",
        ["", " ", "})", " })", " } ) ", "  } )", " }  )", " } ) )", " )", " }", " ) }", " } ) ( )", " ( ) } )",
         " } )\n", " } ) :", " ( [ ] { : } )", " ｝ ）", " } ) ]", " ] } )", " } )" * 1000, " } \u200b)", " x } )",
         " [ ] } )"],
    ),
    "format": (
        " name bob age 5 ;",
        f" {BOB}",
        ["", " ", f"{BOB} ", f"\n{BOB}", f"  {BOB}", f"{BOB} x", BOB * 2, f" name bob age 5 ; {BOB}", f"[{BOB}]",
         BOB[:-1],
         BOB.replace('"', "'"), BOB.replace("5", '"5"'), BOB.replace("5", "5.0"), BOB.replace("5", "05"),
         BOB.replace("5", "5e0"), BOB.replace("5", "true"), BOB.replace("5", "NaN"), BOB.replace("5", "٥"),
         BOB.replace("5", "5" * 9999), BOB.replace("5", '5, "x": 1'), BOB.replace("5", '6, "age": 5'),
         BOB.replace("bob", "Bob"), BOB.replace('"bob"', '["bob"]'), BOB.replace('"bob"', '{"bob": 1}'),
         '{"name": "bob"}', "{}", "null", "[" * 100_000, "[" * 199],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_hostile_answers_are_wrong(task: str) -> None:
    prompt, good, bad = HOSTILE[task]
    assert right(task, prompt, good)
    assert [text[:40] for text in bad if right(task, prompt, text)] == []
    assert not right(task, prompt, None)


def test_format_is_parsed_not_compared() -> None:
    prompt = " name bob age 5 ;"
    assert right("format", prompt, '{"age":5,"name":"bob"}')
    assert right("format", prompt, json.dumps({"name": "bob", "age": 5}, indent=1))


def test_arithmetic_is_arithmetic() -> None:
    assert right("arithmetic", " 1 0 0 - 9 =", " 9 1")
    assert right("arithmetic", " 7 - 7 =", " 0")
    assert right("arithmetic", " 9 9 + 9 9 =", " 1 9 8")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "sums"}, "Unknown task 'sums'"),
        ({"split": "test"}, "Unknown split 'test'"),
        ({"size": 0}, "size=0"),
        ({"size": 10**9}, "largest number"),
        ({"count": 0}, "count=0"),
        ({"size": 1, "count": 50}, "too few prompts"),
    ],
)
def test_bad_wishes(given: dict[str, object], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        prompts(**({"task": "arithmetic", "count": 5} | given))  # type: ignore[arg-type]
