"""The closed form against scikit-learn's ridge regression in float64, penalty by penalty; what it is fitted on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kv_texts import drawn
from sklearn.linear_model import Ridge
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv import ridge
from tinyonn_lib.kv.adapter import Residual
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.data import Batch, Caches, own_of, teachers_of
from tinyonn_lib.kv.projector import KVDimensionProjector

MAPS = {"linear": [[0], [2], [4]], "joint": [[0, 1], [1, 2], [3, 4]]}
"""Teacher layers of each student layer: one source, and two."""


@pytest.fixture(scope="module")
def train(student: KVModel, teacher: KVModel) -> Caches:
    return Caches(student, {"t": teacher}, drawn(40, 0), batch=7)


@pytest.fixture(scope="module")
def validation(student: KVModel, teacher: KVModel) -> Caches:
    return Caches(student, {"t": teacher}, drawn(20, 1), batch=6)


def made(caches: Caches, *names: str, **options: Any) -> KVDimensionProjector:
    torch.manual_seed(0)
    defaults = {"kind": "linear", "sources": 1, "joint": False, "shared": False}
    configs = {name: caches.teachers[name].model.config for name in names or caches.names}
    return KVDimensionProjector.from_configs(configs, caches.student.model.config, **(defaults | options)).double()


def pairs(caches: Any, side: str, place: int, layers: list[int], joint: bool, name: str = "t") -> list[np.ndarray]:
    """What the adapter of student layer `place` reads and should give, token by token."""
    xs, ys = [], []
    for batch in caches.batches():
        kv, own = teachers_of(batch, [name])[name], own_of(batch)
        parts = [kv.keys, kv.values] if joint else [getattr(kv, side)]
        for row, real in enumerate(batch["mask"].sum(1).tolist()):
            for token in range(real):
                xs.append(torch.cat([part[row, layer, token] for part in parts for layer in layers]).double().numpy())
                ys.append(getattr(own, side)[row, place, token].double().numpy())
    return [np.stack(xs), np.stack(ys)]


def reference(x: np.ndarray, y: np.ndarray, penalty: float) -> Ridge:
    """`penalty` is in units of the inputs' mean variance, for squared errors that are averaged over tokens."""
    return Ridge(alpha=penalty * len(x) * x.var(0).mean()).fit(x, y)


def same(linear: Any, expected: Ridge) -> None:
    scale = np.abs(expected.coef_).max()
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected.coef_, rtol=1e-6, atol=1e-7 * scale)
    np.testing.assert_allclose(linear.bias.detach().numpy(), expected.intercept_, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("penalty", ridge.PENALTIES)
def test_equals_scikit_learn_at_each_penalty(
    penalty: float, shared: bool, joint: bool, train: Caches, validation: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "PENALTIES", (penalty,))
    projector = made(train, shared=shared, joint=joint, sources=1 + joint)
    chosen = ridge.fit_ridge(projector, train, validation)
    layers = MAPS["joint" if joint else "linear"]
    assert chosen == {f"t {side} {n}": penalty for side in ("keys", "values") for n in range(1 if shared else 3)}
    for side in ("keys", "values"):
        each = [pairs(train, side, place, layers[place], joint) for place in range(3)]
        if shared:
            each = [[np.concatenate(parts) for parts in zip(*each, strict=True)]]
        for linear, (x, y) in zip(projector.of("t", side), each, strict=True):
            same(linear, reference(x, y, penalty))


def test_penalty_is_the_best_on_validation_text(train: Caches, validation: Caches) -> None:
    projector = made(train, joint=True, sources=2)
    chosen = ridge.fit_ridge(projector, train, validation)
    expected = {}
    for side in ("keys", "values"):
        for place, layers in enumerate(MAPS["joint"]):
            x, y = pairs(train, side, place, layers, joint=True)
            new_x, new_y = pairs(validation, side, place, layers, joint=True)
            fits = {penalty: reference(x, y, penalty) for penalty in ridge.PENALTIES}
            expected[f"t {side} {place}"] = best = min(
                fits, key=lambda penalty: float(((fits[penalty].predict(new_x) - new_y) ** 2).sum())
            )
            same(projector.of("t", side)[place], fits[best])
    assert chosen == expected
    assert len(set(chosen.values())) > 1
    assert max(chosen.values()) > min(ridge.PENALTIES)
    # On what it was fitted on, the least penalty always looks best.
    assert set(ridge.fit_ridge(projector, train, train).values()) == {min(ridge.PENALTIES)}


class Changed:
    """Caches in which something else stands."""

    def __init__(self, caches: Caches, **values: float) -> None:
        self._caches, self._values = caches, values

    def batches(self) -> list[Batch]:
        padding = [~batch["mask"][:, None, :, None] for batch in self._caches.batches()]
        return [
            {key: self._value(key, tensor, blank) for key, tensor in batch.items()}
            for batch, blank in zip(self._caches.batches(), padding, strict=True)
        ]

    def _value(self, key: str, tensor: Tensor, padding: Tensor) -> Tensor:
        if key in ("ids", "mask"):
            return tensor
        if "padding" in self._values:
            return tensor.masked_fill(padding, self._values["padding"])
        changed = tensor.clone()
        if key in self._values:
            changed[0, 0, 0, 2] = self._values[key]
        return changed


def test_padding_is_ignored(train: Caches, validation: Caches) -> None:
    one, two = made(train), made(train)
    chosen = ridge.fit_ridge(one, train, validation)
    changed: list[Any] = [Changed(caches, padding=float("nan")) for caches in (train, validation)]
    assert ridge.fit_ridge(two, *changed) == chosen
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["own.values", "t/values"])
@pytest.mark.parametrize("where", ["train", "validation"])
def test_caches_that_are_not_finite(where: str, key: str, bad: float, train: Caches, validation: Caches) -> None:
    projector = made(train)
    broken: Any = Changed(train if where == "train" else validation, **{key: bad})
    with pytest.raises(BenchError, match="NaN or infinite"):
        ridge.fit_ridge(projector, *((broken, validation) if where == "train" else (train, broken)))


def test_a_residual_becomes_its_linear(train: Caches, validation: Caches) -> None:
    alone, beside = made(train), made(train, kind="residual", trainable=False)
    with torch.no_grad():
        for value in beside.parameters():
            value += 0.1
    assert ridge.fit_ridge(alone, train, validation) == ridge.fit_ridge(beside, train, validation)
    given = {"t": teachers_of(next(train.batches()), ["t"])["t"]}
    one, two = alone(given), beside.eval()(given)
    torch.testing.assert_close(one.keys, two.keys, rtol=0, atol=0)
    torch.testing.assert_close(one.values, two.values, rtol=0, atol=0)
    assert all(not module.mlp[-1].weight.any() for module in beside.modules() if isinstance(module, Residual))


def test_weights_in_the_projector_s_dtype(train: Caches, validation: Caches) -> None:
    exact, usual = made(train), made(train).float()
    ridge.fit_ridge(exact, train, validation)
    ridge.fit_ridge(usual, train, validation)
    for one, two in zip(exact.parameters(), usual.parameters(), strict=True):
        assert two.dtype == torch.float32
        assert torch.equal(one.float(), two)


def test_each_teacher_is_fitted_alone(student: KVModel, teacher: KVModel) -> None:
    """Whatever their order, and whoever else is in the caches."""
    sides = [Caches(student, {"t": teacher, "own/student": student}, drawn(30, seed), batch=8) for seed in (0, 1)]
    both, turned, alone = made(sides[0]), made(sides[0], "own/student", "t"), made(sides[0], "own/student")
    chosen = ridge.fit_ridge(both, *sides)
    assert ridge.fit_ridge(turned, *sides) == chosen
    assert ridge.fit_ridge(alone, *sides) == {key: p for key, p in chosen.items() if key.startswith("own/student ")}
    assert both.gates is not None
    assert not both.gates.any()
    for side in ("keys", "values"):
        for place in range(3):
            x, y = pairs(sides[0], side, place, [place], joint=False, name="own/student")
            expected = reference(x, y, chosen[f"own/student {side} {place}"])
            for projector in (both, turned, alone):
                same(projector.of("own/student", side)[place], expected)
                linear: Any = projector.of("own/student", side)[place]
                assert linear.weight.diagonal().min() > 0.5  # the student's own cache explains itself


@pytest.mark.parametrize("options", [{"kind": "mlp"}, {"kind": "mlp", "shared": True}])
def test_only_linear_layers_are_fitted(options: dict[str, Any], train: Caches, validation: Caches) -> None:
    projector = made(train, **options)
    before = [value.clone() for value in projector.parameters()]
    with pytest.raises(BenchError, match="kind='linear' or kind='residual'"):
        ridge.fit_ridge(projector, train, validation)
    assert all(torch.equal(one, two) for one, two in zip(before, projector.parameters(), strict=True))


def test_a_constant_input_gives_the_mean() -> None:
    """Nothing to learn from: no division by zero."""
    x, y = torch.full((20, 4), 3.0), torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    weight, bias, _ = ridge._solved(ridge._Sums.of(x, y), ridge._Sums.of(x, y))
    torch.testing.assert_close(3.0 * weight.sum(0) + bias, y.double().mean(0))
