"""What a partition method and a router may look at: statistics, weights, and calibration tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.assemble import dense_weight
from tinyonn_lib.lm.models import FFN
from tinyonn_lib.progress import Progress


@dataclass(frozen=True)
class Tokens:
    """What calibration tokens do in one layer, T of them, in the order of the texts.

    Attributes:
        x: the FFN's input, `(T, d_model)`, in the model's precision.
        sample: which sample each token is from, `(T,)`.
        saliency: |h·∂L/∂h| of the sample's mean next-token loss, bfloat16 `(T, d_ffn)`; `(T, 0)` if not asked for.
    """

    x: Tensor
    sample: Tensor
    saliency: Tensor


@dataclass(frozen=True)
class LayerEvidence:
    """One layer: a method's whole view.

    Attributes:
        layer: its place in the decoder.
        rows: per neuron, in order, the scan's statistics and the scores (`sp`, z-scored features).
        gate, up: weights, float32 `(d_ffn, d_model)`.
        down: `(d_model, d_ffn)`.
        act: the gate's activation function.
        tokens: what calibration tokens do here.
    """

    layer: int
    rows: pd.DataFrame
    gate: Tensor
    up: Tensor
    down: Tensor
    act: Callable[[Tensor], Tensor]
    tokens: Tokens

    @cached_property
    def x(self) -> Tensor:
        """The tokens' inputs in the weights' precision, `(T, d_model)`."""
        return self.tokens.x.to(self.gate.dtype)

    @cached_property
    def gates(self) -> Tensor:
        """act(x Gᵀ), `(T, d_ffn)`."""
        return self.act(self.x @ self.gate.T)

    @cached_property
    def h(self) -> Tensor:
        """act(x Gᵀ) ⊙ (x Uᵀ), `(T, d_ffn)`."""
        return self.gates * (self.x @ self.up.T)

    @cached_property
    def contribution(self) -> Tensor:
        """‖W_down[:, i]‖, `(d_ffn,)`."""
        return self.down.norm(dim=0)

    @cached_property
    def token_centres(self) -> dict[tuple[int, int], Tensor]:
        """What `controls.token_clusters` has found so far, by number of experts and seed; a router needs it again."""
        return {}

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens' x, float64: mean `(d_model,)`, and after centring left singular vectors `(T, r)` and squared
        singular values `(r,)`, those above rounding error; found once for all routers that are fitted to x."""
        x = self.x.double()
        middle = x.mean(0)
        return (middle, *_left_singular(x - middle))

    def markers(self, top: int) -> Tensor:
        """The neurons with the largest |h| of each token, `(T, top)`."""
        return self.h.abs().topk(min(top, self.h.shape[1]), dim=1).indices

    def by_sample(self, values: Tensor) -> Tensor:
        """Mean over each sample's tokens, `(T, n) → (samples, n)`."""
        sums = values.new_zeros(int(self.tokens.sample.max()) + 1, values.shape[1]).index_add_(
            0, self.tokens.sample, values
        )
        return sums / torch.bincount(self.tokens.sample).clamp(min=1)[:, None]


def _left_singular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors `(T, r)` and squared singular values `(r,)` of `(T, d)`, those above rounding error.

    Through the smaller Gram matrix: many times faster than an SVD, and a penalty makes up for the lost digits.
    """
    wide = x.shape[0] < x.shape[1]
    squares, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = squares > 1e-12 * squares[-1]
    squares, vectors = squares[kept], vectors[:, kept]
    return (vectors if wide else x @ vectors / squares.sqrt()), squares


class Evidence:
    """The model's FFNs, their statistics and scores, and what calibration tokens do in them."""

    def __init__(
        self, ffns: Sequence[FFN], neurons: pd.DataFrame, scores: pd.DataFrame, tokens: Sequence[Tokens]
    ) -> None:
        """
        Args:
            neurons: the scan's statistics, one row per neuron (`scan.tables.neurons_table`).
            scores: `layer, neuron, sp` and the features (`score.feature_table`).
            tokens: per layer, from `collect`.

        Raises:
            BenchError: statistics or scores of another model, or NaN in them.
        """
        check(neurons, ffns)
        check(scores, ffns)
        self.ffns, self.tokens = ffns, tokens
        twice = [name for name in scores.columns if name in neurons.columns and name not in ("layer", "neuron")]
        joined = neurons.merge(scores.drop(columns=twice), on=["layer", "neuron"], how="outer").sort_values(
            ["layer", "neuron"]
        )
        numbers = joined.select_dtypes("number")
        bad = ~np.isfinite(numbers)
        if bad.any(axis=None):
            column = numbers.columns[bad.any()][0]
            raise BenchError(
                f"{int(bad[column].sum())} neurons have no finite value for '{column}': statistics and scores must "
                "be of one scan; run scan and cluster again."
            )
        self._rows = [rows.reset_index(drop=True) for _, rows in joined.groupby("layer")]

    def __len__(self) -> int:
        return len(self.ffns)

    def __iter__(self) -> Iterator[LayerEvidence]:
        """One layer after the other, so that only one layer's weights and activations are held."""
        for ffn, rows, tokens in zip(self.ffns, self._rows, self.tokens, strict=True):
            gate, up, down = (dense_weight(m).float().cpu() for m in (ffn.gate, ffn.up, ffn.down))
            act: Any = ffn.module.act_fn
            yield LayerEvidence(ffn.layer, rows, gate, up, down, act, tokens)


def check(neurons: pd.DataFrame, ffns: Sequence[FFN]) -> None:
    """Has the table a row for each of the model's neurons?

    Raises:
        BenchError: it belongs to another model.
    """
    found = {int(layer): int(size) for layer, size in neurons.groupby("layer").size().items()}
    expected = {ffn.layer: ffn.neurons for ffn in ffns}
    if found != expected:
        raise BenchError(
            f"The statistics have {len(found)} layers of {max(found.values(), default=0)} neurons and the model "
            f"{len(expected)} of {max(expected.values())}: they belong to another model; scan this one."
        )


def collect(
    model: Any,
    ffns: Sequence[FFN],
    samples: Sequence[Sequence[int]],
    progress: Progress | None = None,
    *,
    saliency: bool = True,
) -> list[Tokens]:
    """What every token of the samples does in every FFN: one forward and backward pass per sample.

    Args:
        samples: token ids, at least two each. Calibration text, never what is judged on.
        saliency: False spares the backward pass.

    Returns:
        `Tokens` per layer, on the CPU.
    """
    from tinyonn_lib.scan.scan import device_of, frozen_eval, next_token_loss

    inputs: list[list[Tensor]] = [[] for _ in ffns]
    salient: list[list[Tensor]] = [[] for _ in ffns]

    def keep_x(layer: int) -> Callable[..., None]:
        return lambda module, args: inputs[layer].append(args[0].detach()[0].cpu())

    def keep_saliency(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            h = args[0]
            h.register_hook(lambda gradient: salient[layer].append((h.detach() * gradient).abs()[0].bfloat16().cpu()))

        return hook

    handles = [ffn.module.register_forward_pre_hook(keep_x(i)) for i, ffn in enumerate(ffns)]
    if saliency:
        handles += [ffn.down.register_forward_pre_hook(keep_saliency(i)) for i, ffn in enumerate(ffns)]
    embedding = model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda module, args, out: out.requires_grad_()))
    try:
        with frozen_eval(model), torch.set_grad_enabled(saliency):
            for number, ids in enumerate(samples):
                tokens = torch.tensor([ids], device=device_of(model))
                if saliency:
                    next_token_loss(model, tokens).backward()
                else:
                    model.get_decoder()(input_ids=tokens, use_cache=False)
                for ffn, x, s in zip(ffns, inputs, salient, strict=True):
                    if not all(kept.isfinite().all() for kept in (x[-1], *s[-1:])):
                        raise BenchError(
                            f"NaN or infinite activations in {ffn.name}, calibration sample "
                            f"{number}: load the model with dtype=float32, or it is damaged."
                        )
                if progress:
                    progress(number + 1, len(samples), "")
    finally:
        for handle in handles:
            handle.remove()
    sample = torch.from_numpy(np.repeat(np.arange(len(samples)), [len(ids) for ids in samples]))
    found = []
    while inputs:  # a layer's pieces go before the next layer's are joined
        pieces = salient.pop(0) or [torch.empty(len(sample), 0, dtype=torch.bfloat16)]
        found.append(Tokens(torch.cat(inputs.pop(0)), sample, torch.cat(pieces)))
    return found


def weight_norms(ffns: Sequence[FFN]) -> pd.DataFrame:
    """`layer, neuron, weight`: the norm of a neuron's gate row, up row and down column together."""
    frames = []
    for ffn in ffns:
        rows = ((ffn.gate, 1), (ffn.up, 1), (ffn.down, 0))
        squares = torch.stack([dense_weight(linear).float().square().sum(axis) for linear, axis in rows])
        norms = squares.sum(0).sqrt().cpu().double().numpy()
        frames.append(pd.DataFrame({"layer": ffn.layer, "neuron": np.arange(len(norms)), "weight": norms}))
    return pd.concat(frames, ignore_index=True)


def add_profile(
    scores: pd.DataFrame,
    model: Any,
    ffns: Sequence[FFN],
    neurons: pd.DataFrame,
    samples: Sequence[Sequence[int]],
    size: int,
    seed: int,
) -> pd.DataFrame:
    """The scores with `size` more columns `p0 …`, the co-activation profile on these samples; unchanged with size 0."""
    if not size:
        return scores
    tokens = collect(model, ffns, samples, saliency=False)
    found = profile(Evidence(ffns, neurons, scores, tokens), size, seed)
    return scores.merge(found, on=["layer", "neuron"])


def profile(evidence: Evidence, size: int, seed: int, top: int = 10) -> pd.DataFrame:
    """Co-activation profile: neurons that are among the strongest of the same tokens are near each other.

    The leading left singular vectors of each layer's (neurons × tokens) matrix of markers, columns scaled by their
    singular values, then to a mean square of 1.

    Args:
        size: number of columns, `p0 …`.
        top: how many neurons mark a token.
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD

    frames = []
    for layer in evidence:
        marks = layer.markers(top).numpy()
        tokens = np.repeat(np.arange(len(marks)), marks.shape[1])
        matrix = csr_matrix((np.ones(marks.size), (marks.ravel(), tokens)), shape=(len(layer.rows), len(marks)))
        found = TruncatedSVD(min(size, len(layer.rows) - 1), random_state=seed).fit_transform(matrix)
        found = found / max(float(np.sqrt((found**2).mean())), 1e-12)
        frame = pd.DataFrame(found, columns=[f"p{column}" for column in range(found.shape[1])])
        frames.append(layer.rows[["layer", "neuron"]].join(frame))
    return pd.concat(frames, ignore_index=True)
