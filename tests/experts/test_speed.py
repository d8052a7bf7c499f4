"""What a speed is measured of: the right k, the right kernels, the same work, in turns; and what is said of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import export, running, speed
from tinyonn_lib.experts.running import Arm, Task

from .dense import dense, divide

IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
KINDS = ("qwen2", "qwen3", "llama")  # → Qwen2Moe, Qwen3Moe, Glm4Moe
ACTIVE = {1: 0.25, 2: 0.5}
COLUMNS = [
    "model", "implementation", "active", "k", "stage", "batch", "tokens_per_second", "ratio", "low", "high", "rounds",
    "touched", "note",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    rows = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    base = tmp_path_factory.mktemp("moe")
    return {kind: export.export(dense(kind), divide(), base / kind, k=2, routers=rows) for kind in KINDS}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.fixture
def moe(folders: dict[str, Path]) -> Any:
    return load(folders["qwen3"])


@pytest.fixture
def broken() -> Iterator[str]:
    """An implementation that transformers knows and no machine runs."""

    def fails(*args: Any) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this machine")

    ALL_EXPERTS_FUNCTIONS["broken"] = fails
    yield "broken"
    del ALL_EXPERTS_FUNCTIONS["broken"]


def small(model: Any, variants: list[speed.Variant], **options: Any) -> pd.DataFrame:
    return speed.throughput(model, variants, IDS, **{"batches": (1, 4), "new_tokens": 2, "seconds": 0.0} | options)


@pytest.mark.parametrize("kind", KINDS)
def test_k_is_what_the_routers_choose_and_what_loading_with_it_gives(folders: dict[str, Path], kind: str) -> None:
    model = load(folders[kind])
    with torch.no_grad():
        before = model(IDS).logits
        for k in (1, 3, 4):
            with running.running(model, k, "grouped_mm"), running.choices(model) as found:
                logits = model(IDS).logits
            assert [(chosen.shape, count) for chosen, count in found] == [((IDS.numel(), k), 4)] * 2
            assert all(len(set(row)) == k for chosen, _ in found for row in chosen.tolist())
            assert torch.equal(logits, load(folders[kind], num_experts_per_tok=k)(IDS).logits)
            assert not torch.allclose(logits, before, rtol=1e-2)
        assert torch.equal(model(IDS).logits, before)
    assert model.config.num_experts_per_tok == 2
    assert not any(gate._forward_hooks for gate in running.routers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_implementations_are_those_named_and_agree(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, log = load(folders[kind], experts_implementation="batched_mm"), []
    for name in ("grouped_mm", "batched_mm"):

        def spy(*args: Any, name: str = name, real: Any = ALL_EXPERTS_FUNCTIONS[name]) -> torch.Tensor:
            log.append(name)
            found: torch.Tensor = real(*args)
            return found

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, spy)
    logits = {}
    for name in speed.IMPLEMENTATIONS:
        log.clear()
        with running.running(model, 2, name), torch.no_grad():
            logits[name] = model(IDS).logits
        assert log == ([] if name == "eager" else [name, name])
    assert model.config._experts_implementation == "batched_mm"
    for name in speed.IMPLEMENTATIONS[1:]:
        scale = float(logits["eager"].abs().max())  # grouped_mm refuses float64
        torch.testing.assert_close(logits[name], logits["eager"], rtol=0, atol=1e-5 * scale)


def test_the_model_is_as_before_even_after_an_error(moe: Any) -> None:
    with pytest.raises(ValueError, match="nonsense"), running.running(moe, 1, "nonsense"):
        pass
    with pytest.raises(KeyError, match="mine"), running.running(moe, 1, "eager"):
        raise KeyError("mine")
    assert [gate.top_k for gate in running.routers(moe)] == [2, 2]
    assert (moe.config.num_experts_per_tok, moe.config._experts_implementation) == (2, "grouped_mm")


def test_table_has_a_row_for_everything_that_was_asked_for(moe: Any, broken: str) -> None:
    ticks: list[tuple[int, int, str]] = []
    variants = [speed.Variant("moe", moe, ACTIVE), speed.Variant("narrow", dense("qwen3"), {0: 0.5})]
    names = (*speed.IMPLEMENTATIONS, broken, "nonsense")
    table = small(dense("qwen3"), variants, implementations=names, progress=lambda *tick: ticks.append(tick))
    assert list(table) == COLUMNS
    cells = [("prefill", 1), ("prefill", 4), ("decode", 1), ("decode", 4)]
    models = [("dense", "", 1.0, 0), *(("moe", name, ACTIVE[k], k) for k in ACTIVE for name in names)]
    models.append(("narrow", "", 0.5, 0))
    expected = [(*model, *cell) for cell in cells for model in models]
    assert list(table[COLUMNS[:6]].itertuples(index=False, name=None)) == expected
    assert ticks == [(i, 4, f"{stage}, batch {batch}") for i, (stage, batch) in enumerate(cells, 1)]

    lost = table["implementation"].isin([broken, "nonsense"])
    assert (table.loc[lost, "rounds"] == 0).all()
    assert table.loc[lost, ["tokens_per_second", "ratio", "low", "high", "touched"]].isna().all(axis=None)
    assert set(table.loc[table["implementation"] == broken, "note"]) == {"RuntimeError: no kernel for this machine"}
    assert table.loc[table["implementation"] == "nonsense", "note"].str.startswith("ValueError: ").all()
    measured = table[~lost]
    assert (measured["note"] == "").all()
    assert (measured[["tokens_per_second", "ratio"]] > 0).all(axis=None)
    assert (measured["low"] <= measured["ratio"]).all()
    assert (measured["ratio"] <= measured["high"]).all()
    assert (table.loc[table["model"] == "dense", ["ratio", "low", "high"]] == 1).all(axis=None)

    alone = measured[(measured["k"] > 0) & (measured["stage"] == "decode") & (measured["batch"] == 1)]
    assert (alone["touched"] == alone["k"] / 4).all()  # of one token, with k different experts
    assert measured.loc[measured["k"] == 0, "touched"].isna().all()
    assert moe.config.num_experts_per_tok == 2


def test_decoding_takes_the_likeliest_token_of_a_cache_that_holds_the_prompt(moe: Any) -> None:
    moe.generation_config.eos_token_id = moe.config.eos_token_id = list(range(96))  # any token would end it
    fed: list[torch.Tensor] = []
    handle = moe.get_input_embeddings().register_forward_hook(lambda module, args, out: fed.append(args[0]))
    with torch.inference_mode():
        Arm("moe", moe, "grouped_mm", 1, 0.25).run(Task("decode", IDS, 5))
        handle.remove()
        moe.set_experts_implementation("eager")
        for gate in running.routers(moe):
            gate.top_k = 1
        text = IDS[:, : running.START]
        for _ in range(5):
            text = torch.cat([text, moe(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert [tuple(ids.shape) for ids in fed] == [(4, running.START)] + [(4, 1)] * 5
    assert torch.equal(torch.cat(fed, 1), text)


def test_tokens_are_counted_by_hand() -> None:
    assert (Task("prefill", IDS, 7).tokens, Task("prefill", IDS, 7).at_once) == (96, 96)
    assert (Task("decode", IDS, 7).tokens, Task("decode", IDS, 7).at_once) == (28, 4)


def test_turns_cancel_the_drift_of_the_machine(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"": 1.0, "eager": 2.0, "grouped_mm": 0.5, "batched_mm": 10.1}
    log: list[str] = []

    def run(arm: Arm, task: Task) -> float:
        log.append(arm.implementation)
        return cost[arm.implementation] * 1.5 ** (log.count(""))  # slower and slower

    monkeypatch.setattr(Arm, "warm", lambda arm, task: (99.0, 1.0))
    monkeypatch.setattr(Arm, "run", run)
    table = small(dense("qwen3"), [speed.Variant("moe", moe, {1: 0.25})], batches=(1,), seconds=1.0)
    prefill = table[table["stage"] == "prefill"].set_index("implementation")
    turns = ["", "eager", "grouped_mm", "batched_mm"], *[["eager", "grouped_mm", ""], ["grouped_mm", "", "eager"]] * 2
    expected = [*turns[0], *turns[1], *turns[2], "", "eager", "grouped_mm", *turns[1]]
    assert log[: len(expected)] == expected
    assert dict(prefill["rounds"]) == {"": 5, "eager": 5, "grouped_mm": 5, "batched_mm": 1}  # more than HOPELESS
    assert prefill.loc["batched_mm", ["low", "ratio", "high"]].tolist() == pytest.approx([1 / 10.1] * 3)
    # Rounds 0 and 3 pair alike; in 1 and 4 both others ran before dense was slower, in 2 grouped_mm alone.
    assert prefill.loc["eager", "ratio"] == pytest.approx(0.5)
    assert prefill.loc["eager", ["low", "high"]].tolist() == pytest.approx([0.5, 0.75])
    assert prefill.loc["grouped_mm", ["low", "ratio", "high"]].tolist() == pytest.approx([2.0, 3.0, 3.0])
    assert prefill.loc["", "tokens_per_second"] == pytest.approx(24 / 1.5**3)


def test_spread_is_the_quartiles_of_the_rounds(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1.0, 10.0, 4.0, 2.0, 5.0] * 2
    monkeypatch.setattr(Arm, "warm", lambda arm, task: (1.0, 1.0))
    monkeypatch.setattr(Arm, "run", lambda arm, task: left.pop() if arm.k else 1.0)
    table = small(dense("qwen3"), [speed.Variant("moe", moe, {1: 0.25})], batches=(1,), implementations=("eager",))
    found = table.loc[table["k"] == 1, ["low", "ratio", "high", "tokens_per_second"]].to_numpy().tolist()
    assert found == [[0.2, 0.25, 0.5, 24 / 4], [0.2, 0.25, 0.5, 2 / 4]]


def test_more_time_means_more_rounds_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arm, "warm", lambda arm, task: (1.0, 1.0))
    monkeypatch.setattr(Arm, "run", lambda arm, task: 0.5)
    for seconds, rounds in ((0.0, 5), (8.0, 8), (1e4, 30)):  # half of the time for each of two stages, 0.5 s a round
        assert set(small(dense("qwen3"), [], batches=(1,), seconds=seconds)["rounds"]) == {rounds}


@pytest.mark.parametrize(("warm", "rounds"), [(1.0, 5), (11.0, 1)])
def test_a_single_slow_run_makes_nothing_hopeless(
    moe: Any, warm: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Arm, "warm", lambda arm, task: (warm, 1.0))
    monkeypatch.setattr(Arm, "run", lambda arm, task: 11.0 if arm.k else 1.0)
    table = small(dense("qwen3"), [speed.Variant("moe", moe, {1: 0.25})], batches=(1,), implementations=("eager",))
    assert table["rounds"].tolist() == [5, rounds] * 2


def test_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait for {device}"))
    monkeypatch.setattr(time, "perf_counter", lambda: log.append("clock") or 7.0)
    assert running._now(torch.device("cuda:1")) == running._now(torch.device("cpu")) == 7.0
    assert log == ["wait for cuda:1", "clock", "clock"]


def test_batched_mm_is_left_out_where_its_copies_would_fill_the_memory(
    moe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * 24 * 2 * (3 * 16 * 32) * 4  # tokens, k, weights of an expert, bytes
    task, arm = Task("prefill", IDS, 1), Arm("moe", moe, "batched_mm", 2, 0.5)
    monkeypatch.setattr(running, "_free", lambda device: 4 * needed + 1)
    with torch.inference_mode():
        assert arm.warm(task)[1] == 1.0
    monkeypatch.setattr(running, "_free", lambda device: 4 * needed)
    table = small(dense("qwen3"), [speed.Variant("moe", moe, {2: 0.5})], batches=(4,)).set_index(
        ["stage", "implementation"]
    )
    assert table.loc[("prefill", "batched_mm"), "note"].startswith("MemoryError: batched_mm would copy 0.0012 GB")
    assert (table.drop(index=("prefill", "batched_mm"))["note"] == "").all()


def test_gpu_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert running._free(torch.device("cuda")) == 123
    assert running._free(torch.device("cpu")) > 2**20


def test_models_in_other_conditions_get_no_ratio(moe: Any) -> None:
    table = small(dense("qwen3").bfloat16(), [speed.Variant("moe", moe, {1: 0.25})], batches=(1,))
    mine = table[table["k"] > 0]
    assert (mine["tokens_per_second"] > 0).all()
    assert mine["ratio"].isna().all()
    note = "no ratio: this model is float32 on cpu, sdpa attention, the dense one bfloat16 on cpu, sdpa attention"
    assert set(mine["note"]) == {note}
    assert speed.verdict(table).startswith("No mixture could be compared")


def test_a_dense_model_that_fails_leaves_the_others_speeds(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense("qwen3")
    monkeypatch.setattr(model, "forward", lambda **inputs: 1 / 0)
    table = small(model, [speed.Variant("moe", moe, {1: 0.25})], batches=(1,))
    assert set(table.loc[table["model"] == "dense", "note"]) == {"ZeroDivisionError: division by zero"}
    assert set(table.loc[table["model"] == "moe", "note"]) == {"no ratio: the dense model did not run"}
    assert (table["tokens_per_second"] > 0).tolist() == (table["model"] == "moe").tolist()
    assert set(small(model, [], batches=(1,))["rounds"]) == {0}


def test_misuse_is_one_clear_line(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense("qwen3")
    with pytest.raises(BenchError, match="at least 16 of more than 16 tokens"):
        small(model, [], batches=(1, 16))
    with pytest.raises(BenchError, match="more than 16 tokens"):
        speed.throughput(model, [], IDS[:, : running.START], batches=(1,))
    with pytest.raises(BenchError, match="k=5 active experts: choose 1 to 4"):
        small(model, [speed.Variant("moe", moe, {5: 1.0})])
    with pytest.raises(BenchError, match="Qwen3ForCausalLM has no routers"):
        small(model, [speed.Variant("dense", model, {1: 0.5})])
    stubborn = running.routers(moe)[1]
    monkeypatch.setattr(stubborn, "forward", lambda x, old=stubborn.forward: [part[:, :1] for part in old(x)])
    with pytest.raises(BenchError, match="k=2 was set, but the routers choose 1"):
        small(model, [speed.Variant("moe", moe, {2: 0.5})])


def rated(model: str, how: str, k: int, stage: str, batch: int, low: float, ratio: float, high: float) -> list[Any]:
    return [model, how, k / 4, k, stage, batch, 100.0, ratio, low, high, 5, 0.5, ""]


def test_verdict_says_where_it_is_slower_and_where_faster() -> None:
    rows = [
        rated("dense", "", 0, "prefill", 16, 1, 1, 1),
        rated("small", "eager", 1, "prefill", 16, 0.1, 0.2, 0.3),
        rated("small", "grouped_mm", 1, "prefill", 16, 0.4, 0.5, 0.9),  # the best of this setting
        rated("small", "eager", 2, "prefill", 16, 0.2, 0.4, 0.6),
        rated("large", "eager", 1, "decode", 1, 1.1, 1.5, 2.0),
        rated("large", "eager", 2, "decode", 1, 0.9, 1.2, 1.3),
        rated("large", "batched_mm", 2, "decode", 1, math.nan, math.nan, math.nan),
        rated("narrow", "", 0, "decode", 1, 1.7, 1.8, 1.9),
    ]
    assert speed.verdict(pd.DataFrame(rows, columns=COLUMNS)) == (
        "Next to the dense model, 4 settings, each with its fastest implementation: "
        "**slower** in 2, at 0.40 to 0.50 × its tokens/s (small, prefill, batch 16, 25% and 50% active); "
        "**faster** in 1, at 1.50 × its tokens/s (large, decode, batch 1, 25% active); "
        "**unclear** in 1, at 1.20 × its tokens/s (large, decode, batch 1, 50% active). "
        "Slowest way of all: eager, 0.20 × (small, prefill, batch 16, 25% active). "
        "1 of 6 combinations have no ratio; their notes say why. "
        "Narrower dense models, without routers, run at 1.80 ×. "
        "Active is meant of the FFNs: attention, embedding and head cost both models the same."
    )
