"""What is said about a training and a contest, in each case there is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain.outcome import contest_story, lesson_story, spike_note
from tinyonn_lib.workbench import published, results

NAN = math.nan


def history(model: str, spiked: dict[int, float], steps: int = 100) -> pd.DataFrame:
    """Loss is 10 − step / 100, but 5 at a spike."""
    step = np.arange(1, steps + 1)
    norms = np.array([spiked.get(int(s), 0.5) for s in step])
    spike = np.isin(step, list(spiked))
    loss = np.where(spike, 5.0, 10 - step / 100)
    return pd.DataFrame(
        {"step": step, "tokens": 64 * step, "loss": loss, "lr": 0.1, "grad_norm": norms, "spike": spike, "model": model}
    )


def test_no_spike() -> None:
    table = pd.concat([history("model", {}, 1200), history("student", {}, 34)], ignore_index=True)
    table.loc[3, "grad_norm"] = 1.234
    assert spike_note(table, 1.0) == "No gradient spike in 1,234 steps; the longest gradient measured 1.23."


def test_one_spike_and_what_became_of_it() -> None:
    """The mean of the 20 losses after step 60 of that model alone: 10 − 0.705."""
    table = pd.concat([history("student", {}), history("model", {60: 7.891})], ignore_index=True)
    said = spike_note(table, 0.5)
    assert said.startswith(
        "**1 gradient spike** (above four medians of the 50 steps before), and all beyond 0.5 clipped; "
    )
    assert said.endswith("the mean of the 20 after it: model, step 60: 7.89, loss 5.00 → 9.29.")


@pytest.mark.parametrize("clip", [None, 0.0])
def test_many_spikes_are_counted_and_the_last_step_has_nothing_after_it(clip: float | None) -> None:
    many = dict.fromkeys(range(10, 80, 10), 3.0)
    table = pd.concat([history("<b>model", many), history("student", {100: 4.0})], ignore_index=True)
    said = spike_note(table, clip)
    assert said.startswith("**8 gradient spikes** (")
    assert "not clipped (`clip` is 0)" in said
    assert said.count("&lt;b&gt;model, step ") == 5
    assert said.endswith("student, step 100: 4.00, loss 5.00 and the end and 2 more.")
    assert "<b>" not in said
    assert "nan" not in said


def contest(**difference: tuple[float, float, float]) -> pd.DataFrame:
    """Differences and intervals at equal time; names with a capital are other architectures."""
    rows: list[dict[str, Any]] = []
    for name, (mean, low, high) in {"default": (0.0, 0.0, 0.0), **difference}.items():
        common = {"recipe": name.replace("_", " "), "dense": not name[0].isupper(), "seeds": 3 - 2 * (name == "ramp")}
        rows += [
            common | {"budget": "time", "bits_per_byte": 2 + mean, "difference": mean, "low": low, "high": high},
            # At equal tokens everybody wins: no word about that.
            common | {"budget": "tokens", "bits_per_byte": 1.0, "difference": -1.0, "low": -1.1, "high": -0.9},
        ]
    return pd.DataFrame(rows)


def test_default_is_not_beaten() -> None:
    said = contest_story(contest(cosine=(0.05, 0.01, 0.09), batch_ramp=(-0.002, -0.01, 0.006), MoE=(-0.2, -0.3, -0.1)))
    assert said == (
        "The default pays 2.000 bits per byte. No other recipe for the same model is clearly better at equal time; the "
        "next is *batch ramp* (-0.002 [-0.010, +0.006]). Other architectures at equal time: MoE -0.200."
    )


def test_default_is_beaten() -> None:
    table = contest(cosine=(-0.05, -0.07, -0.03), plain=(0.3, 0.2, 0.4), ramp=(-0.1, -0.11, -0.09))
    assert contest_story(table) == (
        "The default pays 2.000 bits per byte. **Better at equal time: cosine (-0.050), ramp (-0.100, a single "
        "training).**"
    )
    said = contest_story(contest(ramp=(-0.002, -0.01, 0.006)))
    assert said.endswith("the next is *ramp* (-0.002 [-0.010, +0.006], a single training).")


def test_too_few_sources_for_an_interval() -> None:
    said = contest_story(contest(cosine=(-0.05, NAN, NAN), plain=(0.3, NAN, NAN)))
    assert said.endswith("at equal time; the next is *cosine* (-0.050 no interval).")


def test_nobody_else_of_the_same_model() -> None:
    assert contest_story(contest(MoE=(0.1, 0.0, 0.2))) == (
        "The default pays 2.000 bits per byte. Other architectures at equal time: MoE +0.100."
    )


def test_lessons_are_means_of_the_best_rates() -> None:
    rows = [
        ("batch size", "batch 16", 2.0, True), ("batch size", "batch 16", 3.0, True), ("batch size", "batch 16", 9.0,
        False), ("batch size", "batch 1", math.inf, True), ("long context", "packed", 2.25, True),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["lesson", "setting", "bits_per_byte", "best"])
    expected = "Batch size: batch 16 2.500, batch 1 does not converge. Long context: packed 2.250."
    assert lesson_story(table) == expected
    as_published = table.astype({"best": object}).replace(math.inf, NAN)
    as_published.loc[len(as_published)] = ["batch size", "batch 1", 2.0, True]  # another seed did
    assert lesson_story(as_published) == expected


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    path = tmp_path / "benchmarks" / "results"
    path.mkdir(parents=True)
    return path


def test_published_rows_by_kind_are_the_tables_that_were_written(folder: Path) -> None:
    rows = [
        {"kind": "recipe", "recipe": "default", "dense": True, "seeds": 3, "spread": None, "low": 0.5},
        {"kind": "lesson", "setting": "packed", "best": False, "steps": 7},
        {"kind": "recipe", "recipe": "MoE", "dense": False, "seeds": 1, "spread": None, "low": None},
    ]
    (folder / "one.json").write_text(json.dumps({"rows": rows}))
    found = published("one")
    assert list(found) == ["recipe", "lesson"]
    expected = {"recipe": ["default", "MoE"], "dense": [True, False], "seeds": [3, 1], "spread": [NAN] * 2,
                "low": [0.5, NAN]}  # fmt: skip
    pd.testing.assert_frame_equal(found["recipe"], pd.DataFrame(expected))  # types, too
    pd.testing.assert_frame_equal(found["lesson"], pd.DataFrame({"setting": ["packed"], "best": [False], "steps": [7]}))


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"rows": [{"low": 1}]}', '{"rows": [3]}', '{"rows": null}'])
def test_results_that_cannot_be_read_say_how_to_make_them(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / "other.json").write_text(text)
    with pytest.raises(BenchError, match=r"other\.json cannot be read .*: run python benchmarks/other\.py --json"):
        published("other")
