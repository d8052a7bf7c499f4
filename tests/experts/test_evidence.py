"""What methods may look at is what the model does, and statistics of another model are refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import evidence
from tinyonn_lib.lm import models

from .conftest import Tiny


def by_hand(model: Any, ffn: models.FFN, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The FFN's input and |h·∂L/∂h|, h made a leaf of its own."""
    kept: dict[str, torch.Tensor] = {}

    def keep_x(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        kept["x"] = args[0][0]

    def keep_h(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept["h"] = args[0].detach().requires_grad_()
        return (kept["h"],)

    handles = [ffn.module.register_forward_pre_hook(keep_x), ffn.down.register_forward_pre_hook(keep_h)]
    tokens = torch.tensor([ids])
    F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:]).backward()
    for handle in handles:
        handle.remove()
    h = kept["h"]
    assert h.grad is not None
    return kept["x"], (h * h.grad).abs()[0].detach()


def test_tokens_are_what_autograd_sees(tiny: Tiny) -> None:
    samples = [[5, 9, 200, 31], [7, 8, 9]]
    found = evidence.collect(tiny.model, tiny.ffns, samples)
    for layer, ffn in enumerate(tiny.ffns):
        assert found[layer].sample.tolist() == [0, 0, 0, 0, 1, 1, 1]
        seen = [by_hand(tiny.model, ffn, ids) for ids in samples]
        torch.testing.assert_close(found[layer].x, torch.cat([x for x, _ in seen]))
        torch.testing.assert_close(found[layer].saliency.float(), torch.cat([s for _, s in seen]), rtol=1e-2, atol=1e-7)


def test_a_profile_needs_no_backward_pass(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [[5, 9, 200, 31], [7, 8, 9]]
    with_saliency = evidence.collect(tiny.model, tiny.ffns, samples)
    known = evidence.Evidence(tiny.ffns, tiny.neurons, tiny.scores, with_saliency)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    for without, full in zip(
        evidence.collect(tiny.model, tiny.ffns, samples, saliency=False), with_saliency, strict=True
    ):
        assert torch.equal(without.x, full.x)
        assert torch.equal(without.sample, full.sample)
        assert without.saliency.shape == (7, 0)
    scores = evidence.add_profile(tiny.scores, tiny.model, tiny.ffns, tiny.neurons, samples, 3, 1)
    columns = ["layer", "neuron", "p0", "p1", "p2"]
    pd.testing.assert_frame_equal(scores[columns], evidence.profile(known, 3, 1))


def test_nan_activations_name_the_sample(tiny: Tiny) -> None:
    broken = copy.deepcopy(tiny.model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[9] = float("nan")
    # The head is tied: the logit of token 9 breaks every gradient, its input only the sample that has it.
    for saliency, sample in ((True, 0), (False, 1)):
        with pytest.raises(BenchError, match=rf"NaN or infinite activations in .*mlp, calibration sample {sample}: "):
            evidence.collect(broken, models.ffns(broken), [[5, 6], [8, 9, 10]], saliency=saliency)


def test_a_layers_evidence_is_the_layers(tiny: Tiny) -> None:
    for layer, ffn in zip(tiny.evidence, tiny.ffns, strict=True):
        x = layer.tokens.x
        torch.testing.assert_close(layer.h, F.silu(ffn.gate(x)) * ffn.up(x))
        torch.testing.assert_close(layer.h @ layer.down.T, ffn.module(x), atol=1e-5, rtol=1e-5)
        assert layer.rows["neuron"].tolist() == list(range(32))
        means = layer.by_sample(layer.h)
        torch.testing.assert_close(means[2], layer.h[layer.tokens.sample == 2].mean(0))
        best = layer.h.abs().argsort(1, descending=True)[:, :5]
        assert torch.equal(layer.markers(5).sort(1).values, best.sort(1).values)


def test_collecting_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


def test_weight_norms(tiny: Tiny) -> None:
    found = evidence.weight_norms(tiny.ffns).set_index(["layer", "neuron"])["weight"]
    ffn = tiny.ffns[1]
    expected = torch.cat([ffn.gate.weight[3], ffn.up.weight[3], ffn.down.weight[:, 3]]).norm()
    assert found[1, 3] == pytest.approx(float(expected))


def test_profile_puts_together_what_fires_together(tiny: Tiny) -> None:
    found = evidence.profile(tiny.evidence, size=4, seed=0, top=8)
    assert list(found.columns) == ["layer", "neuron", "p0", "p1", "p2", "p3"]
    layer = next(iter(tiny.evidence))
    marks = torch.zeros(32, len(layer.h)).scatter_(0, layer.markers(8).T, 1.0)
    together = (marks @ marks.T).fill_diagonal_(0).numpy().ravel()
    points = found[found["layer"] == 0].filter(like="p").to_numpy()
    near = (points @ points.T).ravel()
    assert np.corrcoef(together, near)[0, 1] > 0.6


def test_statistics_of_another_model(tiny: Tiny) -> None:
    tokens = [layer.tokens for layer in tiny.evidence]
    with pytest.raises(BenchError, match="2 layers of 10 neurons and the model 2 of 32: they belong to another model"):
        evidence.Evidence(tiny.ffns, tiny.neurons[tiny.neurons["neuron"] < 10], tiny.scores, tokens)
    deep = models.ffns(models.new_model(vocab_size=300, width=32, layers=3, ffn=32, head_dim=16))
    with pytest.raises(BenchError, match="another model"):
        evidence.check(tiny.neurons, deep)


def test_nan_statistics(tiny: Tiny) -> None:
    broken = tiny.neurons.assign(act_sq=tiny.neurons["act_sq"].where(tiny.neurons["neuron"] != 3))
    tokens = [layer.tokens for layer in tiny.evidence]
    with pytest.raises(BenchError, match="2 neurons have no finite value for 'act_sq'"):
        evidence.Evidence(tiny.ffns, broken, tiny.scores, tokens)
