"""What the notebook says and shows of the contest."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tinyonn_lib import plots
from tinyonn_lib.align import outcome


def table(seeds: int = 1, **notes: str) -> pd.DataFrame:
    """GSPO lifts, DPO does not; 16 prompts, made-up figures."""
    rows = []
    pairs = [("gspo", "warm"), ("dpo", "warm"), ("cooler", "warm"), ("gspo", "dpo"), ("gspo", "cooler")]
    gaps = {"gspo": 0.2, "dpo": 0.0, "cooler": 0.3}
    for method, against in pairs:
        gap = gaps[method] - gaps.get(against, 0.0)
        standing = "better" if gap > 0 else "worse" if gap < 0 else "no clear difference"
        row: dict[str, Any] = {"method": method, "against": against, "seeds": 1 if method == "cooler" else seeds}
        row |= {"note": notes.get(method) or notes.get(against, ""), "task": "arithmetic"}
        row |= {"base": 0.5, "tuned": 0.5 + gap, "difference": gap, "low": gap - 0.05, "high": gap + 0.05}
        rows += [row | {"how": how, "prompts": 16, "standing": standing} for how in ("greedy", "sampled")]
    return pd.DataFrame(rows)


def test_the_story_of_one_training_claims_no_more() -> None:
    first, controls, scope = outcome.story(table()).split("\n\n")
    assert first.startswith(
        "GSPO lifted the share of right answers (sampled) on 16 held-out prompts: **50.0% → 70.0%**"
    )
    assert controls.startswith("DPO: 50.0%; GSPO was better (+20.0% [+15.0%, +25.0%]).")
    assert "The warm model at half the temperature, no training: 80.0%; **GSPO was worse** (-10.0%" in controls
    assert scope.startswith("One training each")
    assert "another seed" in scope


def test_the_story_of_several_names_them() -> None:
    assert outcome.story(table(3)).endswith("Intervals are over prompts and the 3 seeds.")
    assert "One training" not in outcome.story(table(3))


def test_a_method_with_nothing_to_learn_is_named_everywhere() -> None:
    lifts = table(dpo="nothing to learn")
    assert "DPO: 50.0% (nothing to learn); GSPO was better" in outcome.story(lifts)
    assert "Of its trainings" not in outcome.story(lifts)
    figure = plots.lifts(lifts)
    assert list(figure.data[0].y) == ["gspo", "dpo (nothing to learn)", "cooler"]
    assert "dpo (nothing to learn) sampled 50.0% to 50.0%" in str(figure.layout.meta)
    noted = outcome.story(table(3, gspo="diverged in 1 of 3"))
    assert "Of its trainings: diverged in 1 of 3." in noted
    assert outcome.metrics(lifts, pd.DataFrame({"kept": [3], "prompts": [4]}), _taught())["dpo_sampled"] == 0.5


def _taught() -> pd.DataFrame:
    return pd.DataFrame({"method": ["half and half"], "budget": ["tokens"], "difference": [-0.1]})
