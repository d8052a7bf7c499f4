"""What is learned from and what is judged by: apart, deterministic, fitting, and with their prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import context_length
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.known import MOST, SHORTEST, as_rows, draw, halves, longest, paired, scored
from tinyonn_lib.selection.outcome_target import sizes
from tinyonn_lib.selection.pool import mixed
from tinyonn_lib.selection.selector import Selector

LENGTH = 40


def documents(make_texts: Callable[..., list[str]], number: int, seed: int = 0) -> list[str]:
    """Of twelve lines each."""
    lines = make_texts(12 * number, seed=seed)
    return ["\n".join(lines[12 * n : 12 * n + 12]) for n in range(number)]


@pytest.fixture
def texts(make_texts: Callable[..., list[str]]) -> pd.DataFrame:
    made = documents(make_texts, 30)
    split = ["calibration"] * 15 + ["heldout"] * 10 + ["train"] * 5
    return pd.DataFrame({"text": made, "source": [f"file{n}" for n in range(30)], "split": split})


@pytest.fixture
def asked(make_texts: Callable[..., list[str]], tmp_path: Path) -> Path:
    """Instructions, one of them too long."""
    answers = [*make_texts(60), " ".join(make_texts(9))]
    path = tmp_path / "asked.jsonl"
    records = [{"instruction": f"token {n}", "input": "model" * (n % 2), "output": a} for n, a in enumerate(answers)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def size(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_run_s_own_texts(texts: pd.DataFrame, tokenizer: Any) -> None:
    asked = {"learn": 20, "judge": 12, "length": LENGTH}
    learn, judge = halves(texts, tokenizer, **asked, seed=0)
    assert (len(learn), len(judge)) == (20, 12)
    assert set(learn["source"]) <= {f"file{n}" for n in range(15)}
    assert set(judge["source"]) <= {f"file{n}" for n in range(15, 25)}
    for text in [*learn["text"], *judge["text"]]:
        assert SHORTEST * LENGTH <= size(tokenizer, text) <= LENGTH
        assert any(text in document for document in texts["text"])
    for one, other in zip((learn, judge), halves(texts, tokenizer, **asked, seed=0), strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert halves(texts, tokenizer, **asked, seed=1)[0]["text"].tolist() != learn["text"].tolist()


def test_nothing_judged_was_learned_though_files_share_passages(texts: pd.DataFrame, tokenizer: Any) -> None:
    """A licence at the head of every file."""
    licence = "\n".join(["layer joins the model and splits the token"] * 6) + "\n"
    shared = texts.assign(text=licence + texts["text"])
    learn, judge = halves(shared, tokenizer, learn=500, judge=500, length=LENGTH, seed=0)
    assert min(len(learn), len(judge)) > 10
    assert not set(learn["text"]) & set(judge["text"])


@pytest.mark.parametrize("kind", ["documents", "instructions"])
def test_nothing_judged_was_learned_from_own_texts_with_repeats(
    kind: str, texts: pd.DataFrame, asked: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "twice.jsonl"
    if kind == "documents":
        lines = [json.dumps({"text": text}) for text in texts["text"]]
    else:
        lines = asked.read_text().splitlines()
    path.write_text("\n".join(lines * 3) + "\n")
    learn, judge = halves(str(path), tokenizer, learn=400, judge=100, length=LENGTH, seed=0)
    assert min(len(learn), len(judge)) > 10
    assert not set(learn["text"]) & set(judge["text"])


def test_own_instructions_keep_their_prompts(asked: Path, tokenizer: Any) -> None:
    learn, judge = halves(str(asked), tokenizer, learn=30, judge=10, length=LENGTH, seed=3)
    assert (len(learn), len(judge)) == (30, 10)
    both = pd.concat([learn, judge])
    assert both["text"].is_unique
    assert all(text.startswith(prompt) for text, prompt in zip(both["text"], both["prompt"], strict=True))
    assert both["prompt"].str.match(r"token \d+\n\n(model\n\n)?$").all()
    assert all(size(tokenizer, text) <= LENGTH for text in both["text"])
    assert "asked.jsonl:60" not in set(both["source"])
    for one, other in zip((learn, judge), halves(str(asked), tokenizer, learn=30, judge=10, length=LENGTH, seed=3),
                          strict=True):  # fmt: skip
        pd.testing.assert_frame_equal(one, other)
    everything = pd.concat(halves(str(asked), tokenizer, learn=300, judge=100, length=63, seed=3))
    assert len(everything) == sum(size(tokenizer, text) <= 63 for text in everything["text"]) >= 60


def test_a_small_source_is_divided_and_a_tiny_one_refused(asked: Path, tokenizer: Any, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    lines = asked.read_text().splitlines()
    few.write_text("\n".join(lines[:20]) + "\n")
    learn, judge = halves(str(few), tokenizer, learn=300, judge=100, length=LENGTH, seed=0)
    assert (len(learn), len(judge)) == (15, 5)
    learn, judge = halves(str(asked), tokenizer, learn=8, judge=30, length=LENGTH, seed=0)
    assert len(learn) <= 30  # never mostly what was to be judged by
    assert 0 < len(judge) <= 30
    few.write_text(lines[0] + "\n")
    with pytest.raises(BenchError):
        halves(str(few), tokenizer, learn=30, judge=10, length=LENGTH, seed=0)
    few.write_text(lines[60] + "\n")  # the one that is too long
    with pytest.raises(BenchError):
        halves(str(few), tokenizer, learn=30, judge=10, length=LENGTH, seed=0)
    few.write_text("\n\n")
    with pytest.raises(BenchError):
        halves(str(few), tokenizer, learn=30, judge=10, length=LENGTH, seed=0)


def test_short_documents_beside_instructions_do_no_harm(asked: Path, tokenizer: Any) -> None:
    with asked.open("a") as file:
        file.write(json.dumps({"text": "router"}) + "\n")
    learn, judge = halves(str(asked), tokenizer, learn=30, judge=10, length=LENGTH, seed=0)
    assert (len(learn), len(judge)) == (30, 10)


def test_rows_left_out_are_counted(asked: Path, tokenizer: Any, make_texts: Callable[..., list[str]]) -> None:
    bad = ['{"text": ""}', '{"text": " "}', '{"text": 7}', '{"other": "x"}', '{"output": "x"}', '{"text": "router"}']
    with asked.open("a") as file:
        file.write("\n".join(bad) + "\n")
        for text in documents(make_texts, 10):
            file.write(json.dumps({"text": text}) + "\n")
    left: dict[str, int] = {}
    plan: dict[str, Any] = {"learn": 60, "judge": 20, "length": LENGTH, "seed": 0}
    told = halves(str(asked), tokenizer, **plan, left_out=left)
    assert list(left.items()) == [
        ("not text", 3),
        ("empty", 2),
        (f"no passage of 16 to {LENGTH} tokens", 1),
        ("too long", 1),
    ]
    for one, other in zip(told, halves(str(asked), tokenizer, **plan), strict=True):
        pd.testing.assert_frame_equal(one, other)
    left = {}
    clean = asked.with_name("clean.jsonl")
    clean.write_text("\n".join(asked.read_text().splitlines()[:60]) + "\n")
    halves(str(clean), tokenizer, **plan, left_out=left)
    assert left == {}


def test_documents_and_instructions_together(asked: Path, tokenizer: Any, make_texts: Callable[..., list[str]]) -> None:
    with asked.open("a") as file:
        for text in documents(make_texts, 10):
            file.write(json.dumps({"text": text}) + "\n")
    learn, judge = halves(str(asked), tokenizer, learn=60, judge=20, length=LENGTH, seed=0)
    for half in (learn, judge):
        assert set(half["prompt"].map(type)) == {str}
        assert (half["prompt"] == "").any()
        assert (half["prompt"] != "").any()
    table = paired(judge, tokenizer, LENGTH, 0)
    assert len(table) == 20 * (1 + len(CORRUPTIONS))


def test_draw_takes_what_there_is(texts: pd.DataFrame, tokenizer: Any) -> None:
    every = draw(texts, tokenizer, 10_000, LENGTH, 0)
    assert 30 < len(every) < 10_000
    assert every.index.tolist() == list(range(len(every)))
    few = draw(texts, tokenizer, 7, LENGTH, 0)
    assert len(few) == 7
    assert set(few["text"]) <= set(every["text"])
    assert every["text"].tolist() != draw(texts, tokenizer, 10_000, LENGTH, 1)["text"].tolist()
    with pytest.raises(BenchError, match="No passage of 800 to 2000 tokens"):
        draw(texts, tokenizer, 7, 2000, 0)


def test_paired_has_every_passage_in_every_kind(asked: Path, tokenizer: Any) -> None:
    _, judge = halves(str(asked), tokenizer, learn=30, judge=10, length=LENGTH, seed=0)
    table = paired(judge, tokenizer, LENGTH, 5)
    pd.testing.assert_frame_equal(table, paired(judge, tokenizer, LENGTH, 5))
    assert not table.equals(paired(judge, tokenizer, LENGTH, 6))
    assert list(table) == ["text", "source", "corruption"]
    assert table["corruption"].value_counts().to_dict() == dict.fromkeys(["", *CORRUPTIONS], 10)
    clean = table[table["corruption"] == ""]
    assert clean["text"].tolist() == judge["text"].tolist()
    for kind in CORRUPTIONS:
        rows = table[table["corruption"] == kind]
        assert rows["source"].tolist() == judge["source"].tolist()
        assert not (rows["text"].to_numpy() == clean["text"].to_numpy()).any()
        assert all(0 < size(tokenizer, text) <= LENGTH for text in rows["text"])
    wrong = table[table["corruption"] == "wrong_answer"]
    assert all(text.startswith(prompt) for text, prompt in zip(wrong["text"], judge["prompt"], strict=True))
    # A kind does not depend on which others were asked for.
    alone = paired(judge, tokenizer, LENGTH, 5, ("repetition",))
    assert set(alone["corruption"]) == {"", "repetition"}
    same = table[table["corruption"].isin(["", "repetition"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, same)


def test_a_wrong_answer_is_another_answer_and_no_other_question(tokenizer: Any, make_texts: Any) -> None:
    prompts = [f"? {n} " + "token layer " * 6 for n in range(12)]
    clean = pd.DataFrame({"prompt": prompts, "source": "x", "text": [p + "model " + p[2:4] for p in prompts]})
    made = paired(clean, tokenizer, 63, 0, ("wrong_answer",))["text"][12:].tolist()
    for text, prompt, right in zip(made, prompts, clean["text"], strict=True):
        assert text.startswith(prompt + "model")
        assert text != right
        assert text.count("?") == 1


def test_longest(olmoe: Any) -> None:
    assert longest(olmoe) == longest(olmoe, 63) == 63
    assert longest(olmoe, 5) == 5
    with pytest.raises(BenchError, match="^length=64 is more than this model takes: choose 1 to 63"):
        longest(olmoe, 64)


def test_a_model_that_names_no_limit() -> None:
    """As recurrent ones."""
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    model = SimpleNamespace(config=config)
    assert context_length(model) is None
    assert longest(model) == MOST - 1
    assert sizes(model) == {"length": MOST, "context": 256, "continuation": 64}


def test_scored_keeps_source_and_corruption_though_rows_are_left_out(
    olmoe: Any, tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    clean = pd.DataFrame({"text": make_texts(12), "source": [f"s{n}" for n in range(12)]})
    table = paired(clean, tokenizer, 63, 0, ("byte_noise",))
    table.loc[3, "text"] = "token " * 70  # more than the model takes
    found = scored(Selector(olmoe, tokenizer, (1.0, 1.0)), table, ratio=0.25)
    assert found["source_index"].tolist() == [n for n in range(24) if n != 3]
    for row in found.itertuples():
        assert (row.source, row.corruption) == (
            table["source"][row.source_index],
            table["corruption"][row.source_index],
        )
        assert row.tokens == size(tokenizer, table["text"][row.source_index])
    assert [row.text for row in as_rows(table)] == table["text"].tolist()


def test_a_pool_says_what_it_did(make_texts: Callable[..., list[str]]) -> None:
    clean = pd.DataFrame({"text": make_texts(50), "source": "x"})
    pool = mixed(clean, 0.4, 0, tuple(CORRUPTIONS))
    was = pool["text"].isin(set(clean["text"]))
    assert (was == (pool["corruption"] == "")).all()
    assert (~was).sum() == 20
