"""Controls and routers once more, from their descriptions, in the plainest loops: what the library is compared with.

Nothing here is fast or shared with the library, but for what `linear_router` is made of. Arrays are float64; `h` is
`(tokens, neurons)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from tinyonn_lib.experts import routing
from tinyonn_lib.experts.partition import Partition

Array = Any


def dot(a: Array, b: Array) -> float:
    return sum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def length(a: Array) -> float:
    return math.sqrt(dot(a, a))


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


def hidden(x: Array, gate: Array, up: Array) -> Array:
    return np.array([[silu(dot(t, g)) * dot(t, u) for g, u in zip(gate, up, strict=True)] for t in x])


def ranked(values: Array) -> list[int]:
    """Numbers by falling value, the first of equals first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def slices(values: Array, size: int, shared: int) -> list[int]:
    labels = [0] * len(values)
    for place, neuron in enumerate(ranked(values)):
        labels[neuron] = -1 if place < shared else (place - shared) // size
    return labels


def left_over(values: Array, shared: int) -> list[int]:
    return sorted(ranked(values)[shared:])


def weight_norms(gate: Array, up: Array, down: Array) -> list[float]:
    return [length(gate[i]) * length(up[i]) * length(down[:, i]) for i in range(len(gate))]


def wanda(h: Array, down: Array) -> list[float]:
    return [length(h[:, i]) * length(down[:, i]) for i in range(h.shape[1])]


def flap(h: Array, down: Array) -> list[float]:
    scores = []
    for i in range(h.shape[1]):
        mean = sum(h[:, i]) / len(h)
        scores.append(sum((v - mean) ** 2 for v in h[:, i]) / len(h) * length(down[:, i]) ** 2)
    return scores


def marked(h: Array, top: int) -> list[set[int]]:
    """Of each token the neurons with the largest |h|."""
    return [set(ranked([abs(v) for v in row])[:top]) for row in h]


def rates(marks: list[set[int]], neurons: int) -> list[float]:
    return [sum(i in mark for mark in marks) / len(marks) for i in range(neurons)]


def together(marks: list[set[int]], neurons: list[int], batch: int) -> Array:
    """Σ over batches of min(1, Σ over tokens a aᵀ), without the diagonal."""
    total = np.zeros((len(neurons), len(neurons)))
    for start in range(0, len(marks), batch):
        for (p, i), (q, j) in combinations(enumerate(neurons), 2):
            if any(i in mark and j in mark for mark in marks[start : start + batch]):
                total[p, q] += 1
                total[q, p] += 1
    return total


def spectral_cosines(adjacency: Array, dimensions: int) -> Array:
    """Cosines between the nodes' rows of the leading eigenvectors of D^-½ A D^-½: free of sign and rotation."""
    degree = adjacency.sum(0)
    root = np.array([1 / math.sqrt(v) if v else 0.0 for v in degree])
    values, vectors = np.linalg.eigh(root[:, None] * adjacency * root)
    rows = vectors[:, np.argsort(-values)[:dimensions]]
    for i, v in enumerate(degree):
        rows[i] = rows[i] / length(rows[i]) if v else 0.0
    return rows @ rows.T


def hamming(marks: list[set[int]], i: int, j: int) -> int:
    return sum((i in mark) != (j in mark) for mark in marks)


def profiles(x: Array, sample: Array, gate: Array) -> Array:
    """Mean |silu(gate)| of each neuron over each sample's tokens."""
    result = np.zeros((len(gate), max(sample) + 1))
    for i, g in enumerate(gate):
        for s in range(max(sample) + 1):
            own = [abs(silu(dot(t, g))) for t, of in zip(x, sample, strict=True) if of == s]
            result[i, s] = sum(own) / len(own)
    return result


def expertweaver_share(rows: Array, threshold: float, least: float, most: float) -> float:
    specialised = 0
    for row in rows:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row))
        specialised += deviation / mean > threshold
    return most - (most - least) * specialised / len(rows)


def centres(x: Array, clusters: list[int], count: int) -> Array:
    found = []
    for c in range(count):
        own = [t for t, of in zip(x, clusters, strict=True) if of == c]
        found.append([sum(column) / len(own) for column in zip(*own, strict=True)])
    return np.array(found)


def importance(x: Array, saliency: Array, middles: Array) -> Array:
    """Mean saliency over the tokens whose largest product is with this centre."""
    result = np.zeros((len(middles), saliency.shape[1]))
    winners = [ranked([dot(t, m) for m in middles])[0] for t in x]
    for c in range(len(middles)):
        own = [t for t, winner in enumerate(winners) if winner == c]
        for i in range(saliency.shape[1]):
            result[c, i] = sum(float(saliency[t, i]) for t in own) / len(own) if own else 0.0
    return result


def voted(scores: Array, size: int, shared: int) -> list[int]:
    """The neurons that most experts want among their best `size`, round by round."""
    chosen: list[int] = []
    while len(chosen) < shared:
        votes = [0] * scores.shape[1]
        for row in scores:
            for i in [i for i in ranked(row) if i not in chosen][:size]:
                votes[i] += 1
        chosen += [i for i, vote in enumerate(votes) if vote == max(votes)][: shared - len(chosen)]
    return chosen


def dealt(scores: Array, size: int, shared: list[int]) -> list[int]:
    """Again and again the largest importance of a free neuron to an expert with room."""
    labels: list[int | None] = [-1 if i in shared else None for i in range(scores.shape[1])]
    while None in labels:
        options = [
            (-scores[e, i], e, i)
            for e in range(len(scores))
            for i in range(scores.shape[1])
            if labels[i] is None and labels.count(e) < size
        ]
        _, expert, neuron = min(options)
        labels[neuron] = expert
    return labels  # type: ignore[return-value]


def nearest_to_mean(marks: list[set[int]], neurons: list[int]) -> int:
    """The neuron with the least L1 distance of its marker column to the mean column."""
    means = [Fraction(sum(i in mark for i in neurons), len(neurons)) for mark in marks]
    return min(
        neurons, key=lambda i: (sum(abs((i in mark) - mean) for mark, mean in zip(marks, means, strict=True)), i)
    )


def output_norms(h: Array, down: Array, experts: list[list[int]]) -> Array:
    return np.array([[length([dot(row[ids], d[ids]) for d in down]) for ids in experts] for row in h])


def ridge(x: Array, target: Array, penalties: list[float]) -> tuple[Array, Array]:
    """Weight and bias at the penalty that best predicts each token from all others, by fitting once per token."""

    def fit(rows: Array, wanted: Array, penalty: float) -> Array:
        one = np.hstack([np.ones((len(rows), 1)), rows])
        cost = penalty * np.eye(one.shape[1])
        cost[0, 0] = 0  # the intercept is free
        return np.linalg.solve(one.T @ one + cost, one.T @ wanted)

    def left_out(penalty: float) -> float:
        error = 0.0
        for t in range(len(x)):
            rest = [i for i in range(len(x)) if i != t]
            solution = fit(x[rest], target[rest], penalty)
            error += float(((target[t] - np.array([1, *x[t]]) @ solution) ** 2).sum())
        return error

    solution = fit(x, target, min(penalties, key=left_out))
    return solution[1:].T, solution[0]


def linear_router(
    rows: Sequence[Tensor],
    partition: Partition,
    k: int,
    gates: str = "softmax",
    biases: Sequence[Tensor] | None = None,
) -> list[routing.Scale]:
    """A linear top-k router per layer, `rows[l]` `(experts, d_model)`, as the exported family computes it.

    Args:
        gates: a key of `routing.GATES`; a zero router with every expert on is the dense model under each.
        biases: per layer `(experts,)`, added to σ(logit) for the choice alone; only with sigmoid gates.
    """
    gate = routing.GATES[gates]

    def layer_scale(layer: int, weight: Tensor, bias: Tensor | None) -> routing.Scale:
        widen = routing.per_neuron(partition, layer)

        def scale(x: Tensor, h: Tensor) -> Tensor:
            logits = x.float() @ weight.detach().to(x.device).T
            order = logits if bias is None else logits.sigmoid() + bias.detach().to(x.device)
            return widen((gate(logits) * routing.top_mask(order, k)).to(h))

        return scale

    return [layer_scale(layer, weight, None if biases is None else biases[layer]) for layer, weight in enumerate(rows)]
