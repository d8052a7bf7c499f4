"""The table's numbers equal one text at a time through the plain model; what cannot be scored is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.judge import start_token
from tinyonn_lib.selection import head, scoring
from tinyonn_lib.selection.head import find_head
from tinyonn_lib.selection.rows import Bad, Row
from tinyonn_lib.selection.scores import SCORES, text_scores
from tinyonn_lib.selection.scoring import Scorer, uniform
from tinyonn_lib.selection.selector import Selector

FAMILIES = ("olmoe", "granitemoe", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "lfm2_moe")
COMBINED = {"combined": {"contrastive": 2.0, "log_perplexity": -3.0, "intercept": 0.5}}
UNITS = (0.5, 2.0)


def selected(model: Any, tokenizer: Any, **more: Any) -> Selector:
    gap = (torch.tensor([0.0, 0.9] + [0.0] * (model.config.num_experts - 2)),) * 2 if hasattr(
        model.config, "num_experts"
    ) else ()  # fmt: skip
    return Selector(model, tokenizer, UNITS, **{"gap": gap, "combined": COMBINED} | more)


def rows(texts: list[str]) -> list[Row]:
    """Every third one with a prompt."""
    return [
        Row("a.jsonl" if place % 2 else "b.jsonl", place, text, text[: len(text) // 2] if place % 3 == 0 else "")
        for place, text in enumerate(texts)
    ]


@torch.no_grad()
def exact(selector: Selector, row: Row, trash: list[torch.Tensor]) -> dict[str, float]:
    """One text, without padding, from the model's own logits, in float64."""
    ids = selector.tokenizer(row.text, add_special_tokens=False)["input_ids"]
    start = start_token(selector.tokenizer)

    def nats(tokens: list[int]) -> torch.Tensor:
        out = selector.model(input_ids=torch.tensor([[start, *tokens]]), output_router_logits=True, use_cache=False)
        own.append(out.router_logits)
        return -out.logits[0, :-1].double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    own: list[Any] = []
    each = nats(ids)
    mask = torch.ones(1, len(ids) + 1, dtype=torch.bool)
    mask[0, 0] = False
    doubles = [layer.double() for layer in own[0]]
    found = {name: float(value) for name, value in text_scores(doubles, mask, trash, selector.units).items()}
    found |= {"tokens": len(ids), "perplexity": math.exp(each.mean()), "ifd": math.nan}
    if row.prompt:
        prompt = selector.tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
        given = next((i for i, (x, y) in enumerate(zip(ids, prompt, strict=False)) if x != y), len(prompt))
        found["ifd"] = math.exp(each[given:].mean()) / math.exp(nats(ids[given:]).mean())
    if selector.combined:
        found["combined"] = 2 * found["contrastive"] - 3 * float(each.mean()) + 0.5
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_one_text_at_a_time_through_the_model(
    kind: str, make_moe: Callable[..., Any], tokenizer: Any, make_texts: Callable[..., list[str]]
) -> None:
    selector = selected(make_moe(kind), tokenizer)
    given = rows(make_texts(13))
    scorer = Scorer(selector, ratio=0.25, batch_tokens=100)
    assert find_head(selector.model) is not None
    table, bad = scorer(given)
    assert bad == []
    assert table["source_index"].tolist() == list(range(13))
    for place, row in enumerate(given):
        for name, value in exact(selector, row, scorer._trash).items():
            assert table.loc[place, name] == pytest.approx(value, rel=2e-4, abs=2e-5, nan_ok=True), (name, place)
    assert table["ifd"].notna().tolist() == [place % 3 == 0 for place in range(13)]
    assert table["contrastive"].std() > 0.01


def test_order_batches_and_threads_do_not_matter(
    olmoe: Any, tokenizer: Any, make_texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(make_texts(24))
    selector = selected(olmoe, tokenizer)
    plain, _ = Scorer(selector)(given)
    order = np.random.default_rng(0).permutation(24)
    moved, _ = Scorer(selector, batch_tokens=1)([given[place] for place in order])
    monkeypatch.setattr(scoring, "default_shards", lambda _: 3)
    threaded, _ = Scorer(selector, batch_tokens=64)(given)
    back = moved.set_index("source_index").loc[range(24)].reset_index()[plain.columns]
    pd.testing.assert_frame_equal(back, plain, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(threaded, plain, rtol=1e-4, atol=1e-6)
    assert plain["random"].tolist() == [uniform(0, row.source_dataset, row.source_index) for row in given]


def test_without_a_head_of_one_matrix_the_whole_logits_give_the_same(
    olmoe: Any, tokenizer: Any, make_texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(make_texts(12))
    quick, _ = Scorer(selected(olmoe, tokenizer))(given)
    monkeypatch.setattr(scoring, "find_head", lambda _: None)
    whole, _ = Scorer(selected(olmoe, tokenizer))(given)
    pd.testing.assert_frame_equal(quick, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tile", "bias", "scale"), [((3, 7), False, 1.0), ((64, 1000), True, 1.0), ((5, 64), True, 0.3)]
)
def test_tiles_equal_the_cross_entropy(
    tile: tuple[int, int], bias: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.TILE, "cpu", tile)
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(17, 8, generator=make), 3 * torch.randn(90, 8, generator=make)
    extra = torch.randn(90, generator=make) if bias else None
    targets = torch.randint(90, (17,), generator=make)
    found = head.Head(torch.nn.Identity(), weight, extra, scale).nats(hidden, targets)
    logits = scale * torch.nn.functional.linear(
        hidden.double(), weight.double(), extra if extra is None else extra.double()
    )
    assert (found - torch.nn.functional.cross_entropy(logits, targets, reduction="none")).abs().max() < 1e-5
    assert head.Head(torch.nn.Identity(), weight, extra, scale).nats(hidden[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("offset", [0.0, 80.0, 1000.0, -1000.0, -75.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_extreme_logits_lose_nothing(offset: float, kind: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=make).to(kind), torch.randn(700, 8, generator=make).to(kind)
    bias = torch.full((700,), offset).to(kind)
    targets = torch.randint(700, (9,), generator=make)
    found = head.Head(torch.nn.Identity(), weight, bias, 1.0).nats(hidden, targets)
    logits = torch.nn.functional.linear(hidden, weight, bias).double()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert (found - expected).abs().max() < 2e-6 * max(10, abs(offset))
    assert found.dtype == torch.float32


def test_the_head_is_taken_only_if_it_is_all_there_is(make_moe: Callable[..., Any]) -> None:
    granite = find_head(make_moe("granitemoe"))
    assert granite is not None
    assert granite.scale == pytest.approx(1 / 3)
    plain = make_moe()
    found = find_head(plain)
    assert found is not None
    assert found.scale == 1.0
    forward = plain.forward

    def capped(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    plain.forward = capped
    assert find_head(plain) is None
    looking = make_moe()

    def peek(_: Any, __: Any, kwargs: dict[str, Any], out: Any) -> Any:
        if kwargs.get("attention_mask") is None:  # as attention in both directions would
            out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    looking.model.register_forward_hook(peek, with_kwargs=True)
    assert find_head(looking) is None
    wrapped = make_moe()
    wrapped.lm_head = torch.nn.Sequential(wrapped.lm_head)
    assert find_head(wrapped) is None


def test_calibrated_trash_is_where_the_gap_is(olmoe: Any, tokenizer: Any, make_texts: Callable[..., list[str]]) -> None:
    selector = selected(olmoe, tokenizer)
    given = rows(make_texts(6))
    scorer = Scorer(selector, trash="calibrated")
    table, _ = scorer(given)
    chosen = [torch.arange(8) == 1] * 2
    for place, row in enumerate(given):
        assert table.loc[place, "contrastive"] == pytest.approx(exact(selector, row, chosen)["contrastive"], rel=1e-4)
    with pytest.raises(BenchError, match="not warmed up.*choose trash=last"):
        Scorer(replace(selector, gap=()), trash="calibrated")
    with pytest.raises(BenchError, match="trash=first is unknown: choose last or calibrated"):
        Scorer(selector, trash="first")


def test_columns(olmoe: Any, tokenizer: Any, make_texts: Callable[..., list[str]]) -> None:
    front = ["source_dataset", "source_index", "tokens", *SCORES]
    given = rows(make_texts(3))
    selector = selected(olmoe, tokenizer)
    assert list(Scorer(selector)(given)[0]) == [*front, "random", "combined", "perplexity", "ifd"]
    assert list(Scorer(selector, baselines=False)(given)[0]) == [*front, "random"]
    assert "combined" not in Scorer(replace(selector, combined={}))(given)[0]
    table, bad = Scorer(selector)([])
    assert len(table) == 0
    assert bad == []
    assert list(table) == [*front, "random", "combined", "perplexity", "ifd"]


def test_rows_that_cannot_be_scored_are_told(olmoe: Any, tokenizer: Any) -> None:
    given = [Row("a", 0, "x" * 12), Row("a", 1, "y" * 11), Row("a", 2, ""), Row("a", 3, "zz", "zz")]
    table, bad = Scorer(selected(olmoe, tokenizer), length=11)(given)
    assert table["source_index"].tolist() == [1, 3]
    assert table["tokens"].tolist() == [11, 2]
    assert table["ifd"].isna().all()  # no prompt; no answer
    assert bad == [Bad("a", 0, "too long: 12 tokens"), Bad("a", 2, "empty: 0 tokens")]
    model_limit, _ = Scorer(selected(olmoe, tokenizer))([Row("a", 0, "x" * 63)])
    assert model_limit["tokens"].tolist() == [63]  # with the start token the model's 64
    assert Scorer(selected(olmoe, tokenizer))([Row("a", 0, "x" * 64)])[1] == [Bad("a", 0, "too long: 64 tokens")]
    too_long = "this model takes 1 to 63 tokens"
    for wrong, line in (({"length": 64}, too_long), ({"length": -1}, too_long), ({"batch_tokens": 0}, "no token")):
        with pytest.raises(BenchError, match=line):
            Scorer(selected(olmoe, tokenizer), **wrong)


def test_not_a_number_names_the_row(make_moe: Callable[..., Any], tokenizer: Any) -> None:
    model = make_moe()
    selector = selected(model, tokenizer)
    scorer = Scorer(selector)
    word = tokenizer("q", add_special_tokens=False)["input_ids"][0]
    model.get_input_embeddings().weight[word] = torch.nan
    with pytest.raises(BenchError, match="row 7 of 'b' is not a number"):
        scorer([Row("a", 0, "router"), Row("b", 7, "a q"), Row("b", 8, "q q")])


def test_too_little_memory_is_one_line(make_moe: Callable[..., Any], tokenizer: Any) -> None:
    model = make_moe()
    scorer = Scorer(selected(model, tokenizer), batch_tokens=512)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    model.model.forward = full
    with pytest.raises(BenchError, match="score 512 tokens at a time: lower batch_tokens"):
        scorer([Row("a", 0, "router")])


def test_random_depends_on_seed_and_place_alone() -> None:
    values = np.array([[uniform(seed, "a", index) for index in range(4000)] for seed in (0, 1)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values)[0, 1]) < 0.05
    assert uniform(0, "a", 1) != uniform(0, "b", 1)
    assert uniform(0, "\ud800", 1) == uniform(0, "\ud800", 1)
