"""What neurons fire on, against h of all tokens at once in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import examples

from .conftest import Tiny

START = 0


class Letters:
    """Token id i is a word of its own, but ids from 200 on share three words."""

    bos_token_id, eos_token_id = START, None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i == START)]
        return "".join(f" w{i}" if i < 200 else ("\n", "<b>x</b>", "\u202e")[i % 3] for i in kept)


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    ids = [rng.integers(1, 300, size).tolist() for size in (20, 3, 40, 17, 30)]
    ids[0], ids[2] = [START, *ids[0]], [START, *ids[2], START]  # a start token inside a text is a token like others
    return pd.DataFrame({"ids": ids, "source": "s", "text": ""})


def dense_h(tiny: Tiny, samples: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Every counted token (`sample, position, word`), and |h| of each `(tokens, layers, neurons)`, in float64."""
    rows, h = [], []
    for number, ids in enumerate(samples["ids"]):
        inputs: list[torch.Tensor] = []
        handles = [
            f.module.register_forward_pre_hook(lambda m, args, kept=inputs: kept.append(args[0].double()))
            for f in tiny.ffns
        ]
        tiny.model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        each = [
            F.silu(x[0] @ f.gate.weight.double().T) * (x[0] @ f.up.weight.double().T)
            for f, x in zip(tiny.ffns, inputs, strict=True)
        ]
        skip = int(ids[0] == START)
        h.append(torch.stack(each, 1).numpy()[skip:])
        shown = [examples.visible(Letters().decode([i])).replace(" ", "␣") for i in ids]
        rows += [(number, position, shown[position]) for position in range(skip, len(ids))]
    return pd.DataFrame(rows, columns=["sample", "position", "word"]), np.concatenate(h)


def test_top_tokens_are_those_of_the_dense_reference(tiny: Tiny, samples: pd.DataFrame) -> None:
    tokens, h = dense_h(tiny, samples)
    found = examples.top_examples(tiny.model, tiny.ffns, samples, Letters(), per_neuron=4)
    assert len(found) == 2 * 32 * 4
    for (layer, neuron), rows in found.groupby(["layer", "neuron"]):
        order = np.argsort(-np.abs(h[:, layer, neuron]))[:4]
        expected = tokens.iloc[order]
        assert rows["rank"].tolist() == [0, 1, 2, 3]
        assert rows[["sample", "position"]].to_numpy().tolist() == expected[["sample", "position"]].to_numpy().tolist()
        assert rows["token"].tolist() == expected["word"].tolist()
        np.testing.assert_allclose(rows["h"], h[order, layer, neuron], rtol=1e-4)
    assert found["token"].dtype == "category"  # a million rows hold each string once
    assert (found["h"] < 0).any()


def test_more_examples_than_tokens_and_dead_neurons_leave_no_row(tiny: Tiny) -> None:
    few = pd.DataFrame({"ids": [[START, 5, 7], [START]]})
    found = examples.top_examples(tiny.model, tiny.ffns, few, Letters(), per_neuron=5)
    assert len(found) == 2 * 32 * 2
    assert set(found["position"]) == {1, 2}
    weight = tiny.ffns[1].up.weight
    before = weight[3].clone()
    try:
        weight[3] = 0.0
        found = examples.top_examples(tiny.model, tiny.ffns, few, Letters())
    finally:
        weight[3] = before
    assert not ((found["layer"] == 1) & (found["neuron"] == 3)).any()
    assert len(found) == (2 * 32 - 1) * 2


def labels(tiny: Tiny) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    frame = tiny.scores[["layer", "neuron"]].assign(cluster=rng.integers(0, 3, 64))
    return frame.drop(index=[4, 40])  # two neurons in no cluster


def test_cluster_lift_is_that_of_the_dense_reference(tiny: Tiny, samples: pd.DataFrame) -> None:
    tokens, h = dense_h(tiny, samples)
    scaled = np.abs(h) / np.abs(h).mean(0)
    found = examples.cluster_examples(
        tiny.model, tiny.ffns, labels(tiny), samples, Letters(), tokens=4, texts=2, min_count=2
    )
    assert sorted(found["cluster"].unique()) == [0, 1, 2]
    for cluster, members in labels(tiny).groupby("cluster"):
        activity = tokens.assign(a=scaled[:, members["layer"], members["neuron"]].mean(1))
        assert activity["a"].mean() == pytest.approx(1.0)  # what makes a mean a lift
        for kind, key, least, count in (("token", "word", 2, 4), ("text", "sample", examples.SHORT, 2)):
            rows = found[(found["cluster"] == cluster) & (found["kind"] == kind)]
            by = activity.groupby(key)["a"].agg(["mean", "size"])
            expected = by[by["size"] >= least].nlargest(count, "mean")
            np.testing.assert_allclose(rows["lift"], expected["mean"], rtol=1e-4)
            assert rows["seen"].tolist() == expected["size"].tolist()
            assert rows["shown" if key == "word" else "sample"].tolist() == expected.index.tolist()
            for row, value in zip(rows.itertuples(), expected.index, strict=True):
                own = activity[activity[key] == value]
                strongest = own.loc[own["a"].idxmax()]
                assert (row.sample, row.position) == (strongest["sample"], strongest["position"])


def test_loud_neurons_do_not_rule(tiny: Tiny, samples: pd.DataFrame) -> None:
    def shown(model: Any) -> pd.DataFrame:
        return examples.cluster_examples(model, tiny.ffns, labels(tiny), samples, Letters(), min_count=1)

    before = shown(tiny.model)
    up, down = tiny.ffns[0].up.weight, tiny.ffns[0].down.weight
    kept = up[7].clone(), down[:, 7].clone()
    try:
        up[7] *= 1024.0  # the same function of the input, a thousand times as loud
        down[:, 7] /= 1024.0
        after = shown(tiny.model)
    finally:
        up[7], down[:, 7] = kept
    pd.testing.assert_frame_equal(before, after, rtol=1e-4)


def test_passage_marks_the_token_and_prints_on_one_line(tiny: Tiny) -> None:
    samples = pd.DataFrame({"ids": [[START, 1, 201, 2, 204, 202]]})
    passage = examples.passages(samples, Letters(), before=2, after=1)
    assert passage(0, 3) == (" w1⏎", " w2", "⏎")
    assert passage(0, 1) == ("", " w1", "⏎")
    assert passage(0, 5) == (" w2⏎", "<b>x</b>", "")
    assert examples.visible("a\u202eb\x00\t") == "a·b·⇥"  # nothing that turns or hides text


def test_summary_has_a_row_per_cluster(tiny: Tiny, samples: pd.DataFrame) -> None:
    found = examples.cluster_examples(tiny.model, tiny.ffns, labels(tiny), samples, Letters(), tokens=2, texts=1)
    table = examples.summary(found)
    assert table["cluster"].tolist() == [0, 1, 2]
    first = found[(found["cluster"] == 0) & (found["kind"] == "token")].iloc[0]
    assert table.iloc[0, 1].startswith(f"{first['shown']} {first['lift']:.1f}× ({first['seen']})")
    assert "«" in table.iloc[0, 2]


def test_clusters_of_another_model_are_refused(tiny: Tiny, samples: pd.DataFrame) -> None:
    for layer, neuron in ((0, 32), (2, 0)):
        strange = pd.DataFrame({"layer": [0, layer], "neuron": [0, neuron], "cluster": [0, 0]})
        with pytest.raises(BenchError, match=f"1 neurons .* layer {layer} neuron {neuron}"):
            examples.cluster_examples(tiny.model, tiny.ffns, strange, samples, Letters())
    with pytest.raises(BenchError, match="No sample"):
        examples.top_examples(tiny.model, tiny.ffns, samples.iloc[:0], Letters())


def test_no_hook_stays_behind(tiny: Tiny, samples: pd.DataFrame) -> None:
    bad = pd.DataFrame({"ids": [[1, 2], [10**6]]})
    with pytest.raises(IndexError):
        examples.top_examples(tiny.model, tiny.ffns, bad, Letters())
    assert not any(m._forward_pre_hooks for m in tiny.model.modules())
