"""The best linear map in closed form: the control that every trained projector must beat, and where ours begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.adapter import Residual
from tinyonn_lib.kv.data import NOT_FINITE, Batch, Caches, own_of, teachers_of
from tinyonn_lib.kv.projector import SIDES, KVDimensionProjector

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Tried, in units of the inputs' mean variance; the one with the least error on validation text is taken."""

MEMORY = 2**33
"""Bytes of moments held at a time."""


@dataclass
class _Sums:
    """Second moments of inputs x and targets y, in float64."""

    n: int
    x: Tensor  # (d,)
    y: Tensor  # (s,)
    xx: Tensor  # (d, d)
    xy: Tensor  # (d, s)
    yy: Tensor  # ()

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Sums:
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())

    def add(self, other: _Sums) -> None:
        for name in ("n", "x", "y", "xx", "xy", "yy"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def fit_ridge(projector: KVDimensionProjector, caches: Caches, validation: Caches) -> dict[str, float]:
    """Set the linear layers of a "linear" or "residual" projector to ridge regressions; MLPs beside them to 0.

    Each teacher alone is regressed on the student's own cache; where adapters are shared, over all layers at once.

    Args:
        caches: what is fitted.
        validation: other texts, by which each adapter's penalty is chosen of `PENALTIES`.

    Returns:
        Adapter, such as "teacher keys 0", → penalty.

    Raises:
        BenchError: adapters without a linear layer, or caches that are not finite.
    """
    layers = linears(projector)
    chosen = {}
    for group in _groups(layers):
        train, held = (_moments(projector, each, group) for each in (caches, validation))
        for key in group:
            weight, bias, chosen[key] = _solved(train[key], held[key])
            with torch.no_grad():
                layers[key].weight.copy_(weight.T)
                layers[key].bias.copy_(bias)
    for module in projector.modules():
        if isinstance(module, Residual):
            module.hush()
    return chosen


def linears(projector: KVDimensionProjector) -> dict[str, nn.Linear]:
    """Adapter, such as "teacher keys 0", → its linear layer.

    Raises:
        BenchError: adapters without one.
    """
    found = {}
    for name in projector.teachers:
        for side in SIDES:
            for place, module in enumerate(projector.of(name, side)):
                linear = module.linear if isinstance(module, Residual) else module
                if not isinstance(linear, nn.Linear):
                    raise BenchError(
                        "Ridge fits linear layers: make the projector with kind='linear' or kind='residual'."
                    )
                found[f"{name} {side} {place}"] = linear
    return found


def _groups(layers: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Adapters whose moments, of both sets of texts, fit into `MEMORY` together; each group reads all texts anew."""
    groups: list[list[str]] = [[]]
    filled = 0
    for key, linear in layers.items():
        size = 2 * 8 * linear.in_features * (linear.in_features + linear.out_features)
        if groups[-1] and filled + size > MEMORY:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    return groups


def _moments(projector: KVDimensionProjector, caches: Caches, keys: Sequence[str]) -> dict[str, _Sums]:
    sums: dict[str, _Sums] = {}
    for batch in caches.batches():
        for key, x, y in _rows(projector, batch, keys):
            new = _Sums.of(x, y)
            if key in sums:
                sums[key].add(new)
            else:
                sums[key] = new
    return sums


def _rows(projector: KVDimensionProjector, batch: Batch, keys: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Adapter, what it reads `(n, d)`, what it should give `(n, s)`, of real tokens; a shared one layer by layer."""
    own, real = own_of(batch), batch["mask"]
    for name, kv in teachers_of(batch, list(projector.teachers)).items():
        for side in SIDES:
            for layer, aim in enumerate(getattr(own, side).unbind(1)):
                key = f"{name} {side} {0 if projector.options['shared'] else layer}"
                if key in keys:
                    yield key, projector.reads(name, kv, side, layer)[real], aim[real]


def _solved(train: _Sums, held: _Sums) -> tuple[Tensor, Tensor, float]:
    """Weights `(d, s)`, bias `(s,)` and the penalty with the least squared error on `held`."""
    mx, my = train.x / train.n, train.y / train.n
    gram = train.xx / train.n - torch.outer(mx, mx)
    cross = train.xy / train.n - torch.outer(mx, my)
    if not torch.isfinite(gram).all() or not torch.isfinite(cross).all():
        raise BenchError(NOT_FINITE)
    values, vectors = torch.linalg.eigh(gram)
    turned = vectors.T @ cross
    best: tuple[float, Tensor, Tensor, float] | None = None
    for penalty in PENALTIES:
        amount = penalty * values.mean().clamp_min(1e-30)
        weight = vectors @ (turned / (values.clamp_min(0) + amount)[:, None])
        bias = my - mx @ weight
        error = _error(held, weight, bias)
        if not math.isfinite(error):
            raise BenchError(NOT_FINITE)
        if best is None or error < best[0]:
            best = (error, weight, bias, penalty)
    assert best is not None
    return best[1], best[2], best[3]


def _error(sums: _Sums, weight: Tensor, bias: Tensor) -> float:
    """Σ‖y − xW − b‖² from moments."""
    fitted = (weight * (sums.xx @ weight)).sum() + 2 * (sums.x @ weight) @ bias + sums.n * bias.square().sum()
    shared = (weight * sums.xy).sum() + sums.y @ bias
    return float(sums.yy - 2 * shared + fitted)
