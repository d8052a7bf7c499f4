"""The rule of sizes: one answer for each, none for nonsense; and what a measured table makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_tables import table

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.projector import KVDimensionProjector
from tinyonn_lib.kv.recommend import judged, recommended


@pytest.mark.parametrize(
    ("size", "ratio", "dropout"),
    [(1e6, 0.5, 0.1), (7.6e9, 0.5, 0.1), (13_999_999_999, 0.5, 0.1), (14e9, 1.0, 0.1), (29.9e9, 1.0, 0.1),
     (30e9, 2.0, 0.15), (70.6e9, 2.0, 0.15), (np.float64(405e9), 2.0, 0.15), (np.int64(14_200_000_000), 1.0, 0.1)],
)  # fmt: skip
def test_one_answer_for_every_size(size: float, ratio: float, dropout: float) -> None:
    found = recommended(size)
    assert (found.mlp_ratio, found.dropout, found.document) == (2.0, 0.0, ratio)
    assert f"mlp_ratio {ratio:g} and dropout {dropout:g}; this one" in found.reason
    assert ("It ends at 70 billion" in found.reason) == (size > 70e9)


def test_the_reason_names_the_interval() -> None:
    reasons = [recommended(size).reason for size in (1e9, 14e9, 30e9)]
    said = ("teachers below 14 billion", "teachers from 14 to below 30 billion", "teachers of 30 billion or more")
    assert all(start in reason for reason, start in zip(reasons, said, strict=True))


@given(st.floats(1e6, 1e13), st.floats(1e6, 1e13))
def test_never_narrower_for_a_larger_teacher(one: float, other: float) -> None:
    small, large = (recommended(size) for size in sorted((one, other)))
    assert small.document <= large.document
    assert small.mlp_ratio == large.mlp_ratio


def test_a_projector_takes_it() -> None:
    found = recommended(7e9)
    projector = KVDimensionProjector({"t": {"d_model": 32, "num_layers": 2}}, 16, found.mlp_ratio, found.dropout)
    assert projector.options["mlp_ratio"] == 2.0


@pytest.mark.parametrize(
    ("size", "said"),
    [(7, "write 7e+09"), (0.5, "write 5e+08"), (999_999, "not billions"), (0, "0 parameters"), (-7e9, "such as 7e9"),
     (float("nan"), "nan"), (float("inf"), "inf"), (True, "True"), ("7B", "'7B'"), (None, "None"), (7e9 + 0j, "j")],
)  # fmt: skip
def test_what_is_no_size(size: Any, said: str) -> None:
    with pytest.raises(BenchError, match="such as 7e9") as error:
        recommended(size)
    assert said.replace("+", "") in str(error.value).replace("+", "")


def test_a_table_that_speaks_against_the_rule() -> None:
    lines = judged(table(), {"The rule's": 0.5}).splitlines()
    # The best of each ratio has silu, no LayerNorm, normal: 0.42 + what the ratio costs.
    assert lines[0] == (
        "Held-out loss: linear 0.55, 0.5× 0.47, 1× 0.42, 2× 0.4; 2× is best, 0.5× gains most on linear per parameter."
    )
    assert lines[1].endswith("linear 4.5500, 0.5× 4.4700, 1× 4.4200, 2× 4.4000; 2× is best.")
    assert lines[2] == "The rule's 0.5× is not borne out: it costs 0.0700 nats per token."
    assert judged(table(), {"The rule's": 2.0}).splitlines()[2] == "The rule's 2× is borne out."


def test_what_mattered_more_than_the_spread() -> None:
    ratio, layernorm, activation, init = judged(table(), {"The rule's": 1.0}).splitlines()[3:]
    assert ratio == (
        "Ratio, all else at its best: 2× 0.4, 1× 0.42, 0.5× 0.47; worst − best 0.07, more than twice the spread over "
        "seeds (0.001). Averaged over all else: 0.07."
    )
    assert "without 0.4, with 0.41; worst − best 0.01, more than" in layernorm
    assert "silu 0.4, relu 0.401, gelu 0.4015; worst − best 0.0015, no more than" in activation
    assert "normal 0.4, xavier 0.42, kaiming 0.52; worst − best 0.12, more than" in init
    # What matters only where all else is bad shows in the average alone.
    rescued = table()
    rescued.loc[(rescued["init"] == "kaiming") & rescued["layernorm"].eq(False), "heldout"] += 0.3
    assert "worst − best 0.01, more than" in judged(rescued, {"The rule's": 1.0}).splitlines()[4]
    assert "Averaged over all else: 0.09." in judged(rescued, {"The rule's": 1.0}).splitlines()[4]
    alone = table().assign(heldout_spread=float("nan"))
    assert judged(alone, {"The rule's": 1.0}).count("with one seed there is no spread") == 4


def test_the_best_of_a_ratio_is_chosen_by_validation_not_by_what_is_reported() -> None:
    measured = table()
    lucky = measured["configuration"] == "0.5×, LayerNorm, relu, kaiming"
    measured.loc[lucky, ["heldout", "nll"]] = [0.0, 0.0]
    assert "0.5× 0.47" in judged(measured, {"The rule's": 0.5})
