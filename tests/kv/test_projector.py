"""`KVDimensionProjector`: called as the document calls it, and its answers by hand in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from projectors import TEACHERS, cache, caches, disturbed
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import DynamicCache

from tinyonn_lib.kv.cache import KV
from tinyonn_lib.kv.loss import compute_kv_loss
from tinyonn_lib.kv.projector import KVDimensionProjector


@pytest.mark.parametrize(
    ("teachers", "width", "ratio", "dropout"),
    [
        ({"Qwen2-7B": {"d_model": 3584, "num_layers": 28}}, 2048, 0.5, 0.1),
        ({"Qwen2-14B": {"d_model": 5120, "num_layers": 40}}, 1536, 1.0, 0.1),
        ({"Llama-3-70B": {"d_model": 8192, "num_layers": 80}}, 2048, 2.0, 0.15),
    ],
)
def test_the_document_s_three_schemes(teachers: dict[str, Any], width: int, ratio: float, dropout: float) -> None:
    with torch.device("meta"):
        projector = KVDimensionProjector(
            teacher_configs=teachers, student_d_model=width, mlp_ratio=ratio, dropout=dropout, init_method="xavier",
            trainable=True,
        )  # fmt: skip
    ((name, config),) = teachers.items()
    for side in ("keys", "values"):
        (adapter,) = projector.of(name, side)
        assert [type(part) for part in adapter] == [nn.LayerNorm, nn.Linear, nn.SiLU, nn.Dropout, nn.Linear]
        assert adapter[3].p == dropout
        assert (adapter[1].in_features, adapter[1].out_features) == (config["d_model"], ratio * config["d_model"])
        assert adapter[4].out_features == width
    assert projector.student_layers == config["num_layers"]
    assert all(value.requires_grad for value in projector.parameters())


def test_the_document_s_training_loop() -> None:
    torch.manual_seed(0)
    device, student_model = torch.device("cpu"), nn.Linear(8, 8)
    projector = KVDimensionProjector(
        teacher_configs=TEACHERS, student_d_model=8, mlp_ratio=1.0, dropout=0.1, init_method="xavier", trainable=True,
    ).to(device)  # fmt: skip
    optimizer = AdamW([
        {"params": student_model.parameters(), "lr": 5e-5},
        {"params": projector.parameters(), "lr": 1e-3},
    ])  # fmt: skip
    teacher_kvs, wanted = caches(dtype=torch.float32), cache(8, 3, 9, torch.float32)
    before = [value.detach().clone() for value in projector.parameters()]
    losses = []
    for _ in range(30):
        student_kv = KV(student_model(wanted.keys), student_model(wanted.values))
        aligned_kvs = projector.project_multi_teacher_kv(teacher_kvs)
        loss = compute_kv_loss(student_kv, aligned_kvs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(one, two) for one, two in zip(before, projector.parameters(), strict=True))


def test_frozen_by_its_argument() -> None:
    projector = KVDimensionProjector(TEACHERS, 8, trainable=False)
    assert not any(value.requires_grad for value in projector.parameters())
    assert not projector.project_multi_teacher_kv(caches(dtype=torch.float32)).keys.requires_grad


def one_adapter(module: nn.Module, x: Tensor, kind: str) -> Tensor:
    """From its weights alone, in their order."""
    values = [value.detach() for value in module.parameters()]
    direct: Any = 0
    if kind != "mlp":
        weight, bias, *values = values
        direct = x @ weight.T + bias
    if kind == "linear":
        return direct
    gain, shift, up, up_bias, down, down_bias = values
    centred = x - x.mean(-1, keepdim=True)
    hidden = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift) @ up.T + up_bias
    return direct + (hidden / (1 + (-hidden).exp())) @ down.T + down_bias


def by_hand(
    projector: KVDimensionProjector,
    given: Mapping[str, KV],
    kind: str,
    read: Mapping[str, list[list[int]]],
    joint: bool,
) -> dict[str, Tensor]:
    """Token by token as far as it matters: each student layer, each teacher, then the gates."""
    found = {}
    for number, side in enumerate(("keys", "values")):
        layers = []
        for place in range(projector.student_layers):
            said = []
            for name, kv in given.items():
                sides = [kv.keys, kv.values] if joint else [getattr(kv, side)]
                x = torch.cat([part[:, layer] for part in sides for layer in read[name][place]], -1)
                modules = projector.of(name, side)
                said.append(one_adapter(modules[place if len(modules) > 1 else 0], x, kind))
            if len(said) > 1:
                assert projector.gates is not None
                scores = [(answer * gate[place]).sum(-1) for answer, gate in
                          zip(said, projector.gates.detach()[number], strict=True)]  # fmt: skip
                whole = sum(score.exp() for score in scores)
                said = [answer * (score.exp() / whole)[..., None] for answer, score in zip(said, scores, strict=True)]
            layers.append(sum(said))
        found[side] = torch.stack(layers, 1)
    return found


# Of 5 and of 3 teacher layers for 3 student layers, nearest in depth; of two as near the lower one.
NEAREST = {
    1: {"Qwen2-7B": [[0], [2], [4]], "Qwen2-14B": [[0], [1], [2]]},
    2: {"Qwen2-7B": [[0, 1], [1, 2], [3, 4]], "Qwen2-14B": [[0, 1], [0, 1], [1, 2]]},
    5: {"Qwen2-7B": [[0, 1, 2, 3, 4]] * 3, "Qwen2-14B": [[0, 1, 2]] * 3},
}


@pytest.mark.parametrize(
    ("kind", "shared", "sources", "joint"),
    list(itertools.product(["mlp", "linear", "residual"], [True, False], [1, 2, 5], [True, False])),
)
def test_equals_the_formula(kind: str, shared: bool, sources: int, joint: bool) -> None:
    torch.manual_seed(0)
    projector = disturbed(KVDimensionProjector(
        TEACHERS, 4, kind=kind, shared=shared, sources=sources, joint=joint, mlp_ratio=0.5
    ))  # fmt: skip
    given = caches()
    expected = by_hand(projector, given, kind, NEAREST[sources], joint)
    found = projector.project_multi_teacher_kv(given)
    assert found.shape == (2, 3, 7, 4)
    torch.testing.assert_close(found.keys, expected["keys"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.values, expected["values"], rtol=1e-10, atol=1e-10)
    assert (found.keys - found.values).abs().max() > 0.1
    for name in TEACHERS:
        alone = by_hand(projector, {name: given[name]}, kind, NEAREST[sources], joint)
        one = projector.project_teacher_kv(name, given[name])
        torch.testing.assert_close(one.keys, alone["keys"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one.values, alone["values"], rtol=1e-10, atol=1e-10)


def test_a_map_of_one_s_own() -> None:
    given, maps = {"t": cache(6, 5)}, {"t": [[4, 0], [1, 1]]}
    projector = disturbed(KVDimensionProjector({"t": {"d_model": 6, "num_layers": 5}}, 4, student_layers=2,
                                               layer_maps=maps))  # fmt: skip
    expected = by_hand(projector, given, "mlp", maps, joint=False)
    torch.testing.assert_close(projector.project_teacher_kv("t", given["t"]).keys, expected["keys"])


def test_caches_as_models_give_them() -> None:
    projector = disturbed(KVDimensionProjector({"t": {"d_model": 6, "num_layers": 5}}, 4))
    kv, filled = cache(6, 5), DynamicCache()
    expected = projector.project_teacher_kv("t", kv)
    pairs = [[side[:, layer].unflatten(-1, (2, 3)).transpose(1, 2) for side in (kv.keys, kv.values)]
             for layer in range(5)]  # fmt: skip
    for layer, pair in enumerate(pairs):
        filled.update(*pair, layer)
    for form in (filled, pairs, [[side[:, layer] for side in (kv.keys, kv.values)] for layer in range(5)]):
        found = projector.project_teacher_kv("t", form)
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found.values, expected.values)


def test_a_teacher_in_bfloat16() -> None:
    """Its cache has its dtype; what it is projected with keeps that of its weights."""
    projector = KVDimensionProjector(TEACHERS, 4).eval()
    given = caches(dtype=torch.bfloat16)
    found = projector.project_multi_teacher_kv(given)
    expected = projector({name: KV(kv.keys.float(), kv.values.float()) for name, kv in given.items()})
    assert found.keys.dtype == torch.float32
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


def test_the_order_in_which_teachers_are_given_does_not_matter() -> None:
    projector, given = disturbed(KVDimensionProjector(TEACHERS, 4)), caches()
    expected = projector.project_multi_teacher_kv(given)
    found = projector.project_multi_teacher_kv(dict(reversed(given.items())))
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


def test_gates_begin_as_the_plain_mean() -> None:
    torch.manual_seed(0)
    three = TEACHERS | {"c": {"d_model": 2, "num_layers": 9}}
    projector = KVDimensionProjector(three, 4).double().eval()
    given = caches() | {"c": cache(2, 9, 7)}
    said = [projector.project_teacher_kv(name, kv) for name, kv in given.items()]
    found = projector.project_multi_teacher_kv(given)
    torch.testing.assert_close(found.keys, sum(kv.keys for kv in said) / 3)
    torch.testing.assert_close(found.values, sum(kv.values for kv in said) / 3)


def test_gates_learn_whom_to_believe() -> None:
    """One teacher knows, one is noise: adapters fixed, the gates alone find out, for keys here, for values there."""
    torch.manual_seed(0)
    configs = {"one": {"d_model": 4, "num_layers": 2}, "two": {"d_model": 4, "num_layers": 2}}
    projector = KVDimensionProjector(configs, 4, kind="linear").eval()
    assert projector.gates is not None
    for name in configs:
        for side in ("keys", "values"):
            linear: Any = projector.of(name, side)[0]
            nn.init.eye_(linear.weight)
    truth, noise = (torch.randn(16, 2, 8, 4) + 2 for _ in range(2))
    own = KV(truth, truth)
    given = {"one": KV(truth, noise), "two": KV(noise, truth)}
    optimizer = AdamW([projector.gates], lr=0.1, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        compute_kv_loss(own, projector(given)).backward()
        optimizer.step()
    # By how much of the way from the mean to the knowing teacher the answer moved.
    found, mean = KV.detach(projector(given)), (truth + noise) / 2
    for said in (found.keys, found.values):
        assert float((said - truth).square().mean()) < 0.6 * float((mean - truth).square().mean())
    gates = projector.gates.detach().sum((-1, -2))  # (side, teacher)
    assert gates[0, 0] > gates[0, 1]
    assert gates[1, 1] > gates[1, 0]


def test_dropout_in_training_only() -> None:
    torch.manual_seed(0)
    projector, given = KVDimensionProjector(TEACHERS, 4, dropout=0.5).double(), caches()
    one, two = (projector.train().project_multi_teacher_kv(given) for _ in range(2))
    assert not torch.equal(one.keys, two.keys)
    one, two = (projector.eval().project_multi_teacher_kv(given) for _ in range(2))
    assert torch.equal(one.keys, two.keys)
