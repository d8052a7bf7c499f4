"""The same data cut again by other parameters: scored rows stay, and nothing that scores depend on is overlooked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.selection import outcome_select, select_worker
from tinyonn_lib.selection.select import cut
from tinyonn_lib.selection.select_worker import Job, run
from tinyonn_lib.selection.selector import load_selector, save

from .select_fakes import Hashed
from .warmed_selectors import warmed

OPTIONS: dict[str, Any] = {"trash": "last", "ratio": 0.25, "length": 0, "batch_tokens": 512, "seed": 0}


@pytest.fixture
def job(tmp_path: Path, base: Path, make_texts: Callable[..., list[str]]) -> Job:
    """Texts and a selector on disk."""
    texts = pd.DataFrame({"text": [*make_texts(50), " "]})
    texts.to_json(tmp_path / "texts.jsonl", orient="records", lines=True)
    save(warmed(base), tmp_path / "selector", str(base))
    folders = str(tmp_path / ".kept"), str(tmp_path / "selector")
    return Job(str(tmp_path / "texts.jsonl"), *folders, OPTIONS, chunk=20, device="cpu")


def kept(job: Job, out: Path, by: str, share: float) -> dict[str, bytes]:
    """What a cut writes."""
    cut(Path(job.folder), by, share, out / "a.parquet", out / "a.jsonl")
    return {file.name: file.read_bytes() for file in out.iterdir()}


def chunks(job: Job) -> set[Path]:
    return set(Path(job.folder).glob("*/*.parquet"))


def test_another_percentage_or_score_needs_no_forward_pass(job: Job, tmp_path: Path) -> None:
    passes: list[int] = []

    def ready(score: str) -> Any:
        selector = load_selector(job.selector, device="cpu")
        scorer = outcome_select.usable(selector, score, OPTIONS)
        selector.model.base_model.register_forward_hook(lambda *_: passes.append(1))
        return scorer

    run(job, scorer=ready("log_mass"))
    assert passes
    passes.clear()
    first = kept(job, tmp_path / "out", "log_mass", 0.1)
    for score, share in (("log_mass", 0.4), ("perplexity", 0.1)):
        run(job, scorer=ready(score))
        again = kept(job, tmp_path / "out", score, share)
        assert not passes
        fresh = replace(job, folder=str(tmp_path / f"fresh {score}"))
        run(fresh)
        assert again == kept(fresh, tmp_path / f"out {score}", score, share)
        assert again["a.jsonl"] != first["a.jsonl"]


def test_a_scorer_at_hand_is_used_and_none_is_loaded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_worker, "make_scorer", None)
    scorer = Hashed()
    run(job, scorer=scorer)
    assert scorer.calls == 3


def test_chunks_of_other_questions_go_when_all_is_scored(job: Job) -> None:
    for place in ("notes", "0123456789abcdeg"):
        (Path(job.folder) / place).mkdir(parents=True)
    run(job, scorer=Hashed())
    before, other = chunks(job), replace(job, options=OPTIONS | {"seed": 1})
    with pytest.raises(BenchError, match="no heart"):
        run(other, scorer=Hashed(fail_at=2))
    assert len(before) == 3
    assert before < chunks(job)  # a mistake costs nothing
    run(other, scorer=Hashed())
    assert len(chunks(job)) == 3
    assert not before & chunks(job)
    again = Hashed()
    run(other, scorer=again)
    assert again.calls == 0
    assert (Path(job.folder) / "notes").is_dir()  # not ours
    assert (Path(job.folder) / "0123456789abcdeg").is_dir()


@pytest.mark.parametrize("change", ["base", "routers", "texts", "options", "version", "nothing"])
def test_what_scores_depend_on_is_scored_anew(
    change: str, job: Job, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job, scorer=Hashed())
    if change == "base":  # retrained in place, its routers as they were
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    if change == "routers":
        selector = load_selector(job.selector, device="cpu")
        selector.layers[0].weight.data += 1
        save(selector, Path(job.selector), str(base))
    if change == "texts":
        Path(job.source).write_text(Path(job.source).read_text() + '{"text": "one more"}\n')
    if change == "options":
        job = replace(job, options=OPTIONS | {"ratio": 0.5})
    if change == "version":
        monkeypatch.setattr(select_worker, "__version__", "another")
    again = Hashed()
    run(job, scorer=again)
    assert again.calls == (0 if change == "nothing" else 3)


def test_a_full_selector_and_one_of_a_hub_model(job: Job, base: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save(warmed(base), whole, str(base), full=True)
    assert select_worker._base(whole) == str(whole)
    assert select_worker._base(Path(job.selector)) == str(base)
    save(warmed(base), tmp_path / "hub", "allenai/OLMoE-1B-7B-0924")
    assert select_worker._base(tmp_path / "hub") == "allenai/OLMoE-1B-7B-0924"
    assert replace(job, selector=str(tmp_path / "hub")).settings()["base"] == ["allenai/OLMoE-1B-7B-0924"]
