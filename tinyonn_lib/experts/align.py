"""Alignment of small FFNs with a large model's (document 000 §2): the comparison of the ways to start them.

What is aligned is layer-local: the dense model runs unchanged, and each small FFN, given the same input, learns its
layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib import evaluate
from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.assemble import TinyONNExpert
from tinyonn_lib.experts.projection import INITS, Small, capture, initial
from tinyonn_lib.lm.models import FFN
from tinyonn_lib.lm.samples import blocks, shuffled
from tinyonn_lib.lm.train import fit
from tinyonn_lib.progress import Progress
from tinyonn_lib.scan.scan import device_of, frozen_eval

Tap = Callable[[Tensor, Tensor], Tensor | None]
"""`(x, y) → output`: input and output of an FFN, both `(…, d_model)`; None leaves the output as it is."""


@contextmanager
def tapped(ffns: Sequence[FFN], taps: Sequence[Tap]) -> Iterator[None]:
    """Within the block every FFN's output passes through its tap."""
    handles = []
    try:
        for ffn, tap in zip(ffns, taps, strict=True):
            hook = lambda module, args, out, tap=tap: tap(args[0], out)  # noqa: E731
            handles.append(ffn.module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def instead(small: Small) -> list[Tap]:
    """The small FFNs' outputs in place of the large ones': `tapped(ffns, instead(small))` is the small model."""
    return [lambda x, y, ffn=ffn: _out(ffn, x).to(y) for ffn in small]  # type: ignore[misc]


def exchanged(new: Small, old: Small) -> list[Tap]:
    """The large model with the neurons of `old` replaced by those of `new`: an FFN is the sum of its neurons."""
    return [lambda x, y, n=n, o=o: y + (_out(n, x) - _out(o, x)).to(y) for n, o in zip(new, old, strict=True)]  # type: ignore[misc]


def _out(expert: TinyONNExpert, x: Tensor) -> Tensor:
    """In the small FFN's own precision."""
    out: Tensor = expert(x.to(expert.gate_proj.weight.dtype))
    return out


def align(
    model: Any,
    ffns: Sequence[FFN],
    smalls: Sequence[Small],
    batch: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    **options: Any,
) -> pd.DataFrame:
    """Train small FFNs to give the large ones' outputs: MSE(f_large(x), f_small(x)), layer by layer, in place.

    The large model runs unchanged; in each layer every small FFN sees the same x. A layer's error is divided by the
    mean square of the large output on the first batch, so 1 is as bad as giving zero, and layers weigh alike. All of
    `smalls` share that one pass and nothing else: each is trained as it would be alone.

    Args:
        batch: step → token ids `(B, T)`.
        options: passed to `fit` (checkpoint, progress, shards, warmup_steps …).

    Returns:
        The history of `fit`; `loss` is the relative MSE, mean over layers and `smalls`.
    """
    power: dict[int, Tensor] = {}
    errors: dict[int, list[Tensor]] = {}

    def watch(layer: int) -> Tap:
        def tap(x: Tensor, y: Tensor) -> None:
            with torch.enable_grad():
                for small in smalls:
                    out = _out(small[layer], x)
                    errors[get_ident()].append(F.mse_loss(out, y.to(out)) / power[layer].to(out))

        return tap

    def loss(ids: Tensor) -> Tensor:
        errors[get_ident()] = []
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
        found = errors.pop(get_ident())
        return torch.stack([error.to(found[0].device) for error in found]).sum() / len(ffns)

    def measure(layer: int) -> Tap:
        return lambda x, y: power.__setitem__(layer, y.float().square().mean())

    params = [weight for small in smalls for expert in small for weight in expert.parameters()]
    with frozen_eval(model):
        with torch.no_grad(), tapped(ffns, [measure(layer) for layer in range(len(ffns))]):
            model.model(input_ids=batch(0), use_cache=False)
        if not all(value > 0 for value in power.values()):
            raise BenchError("An FFN of the large model gives nothing but zeros: there is no output to align to.")
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        with tapped(ffns, [watch(layer) for layer in range(len(ffns))]):
            history = fit(params, loss, batch, optimizer, steps=steps, clip=None, **options)
    return history.assign(loss=history["loss"] / len(smalls))


@torch.no_grad()
def relative_mse(
    model: Any, ffns: Sequence[FFN], candidates: Sequence[Sequence[Tap]], samples: Sequence[Sequence[int]]
) -> list[float]:
    """Per candidate Σ‖f_large(x) − f_candidate(x)‖² / Σ‖f_large(x)‖² over samples of token ids, mean over layers."""
    errors = torch.zeros(len(candidates), len(ffns), dtype=torch.float64)
    power = torch.zeros(len(ffns), dtype=torch.float64)

    def watch(layer: int) -> Tap:
        def tap(x: Tensor, y: Tensor) -> None:
            power[layer] += y.double().square().sum().cpu()
            for number, taps in enumerate(candidates):
                out = taps[layer](x, y)
                errors[number, layer] += 0.0 if out is None else (out - y).double().square().sum().cpu()

        return tap

    with frozen_eval(model), tapped(ffns, [watch(layer) for layer in range(len(ffns))]):
        for ids in samples:
            model.model(input_ids=torch.tensor([list(ids)], device=device_of(model)), use_cache=False)
    return [float(mean) for mean in (errors / power).mean(1)]


def compare(
    model: Any,
    ffns: Sequence[FFN],
    chosen: Sequence[Tensor],
    calibration: pd.DataFrame,
    held: pd.DataFrame,
    *,
    steps: int,
    lr: float,
    seeds: Sequence[int] = (0, 1, 2),
    alpha: float = 0.8,
    beta: float = 0.3,
    batch: int = 4,
    length: int = 128,
    shards: int = 2,
    progress: Progress | None = None,
    resume: Path | None = None,
    every_seconds: float = 10.0,
) -> pd.DataFrame:
    """Every init of `INITS` before and after equal training: same batches, learning rate and held-out text.

    Args:
        calibration: samples with `ids`: for the gradient one by one, for training end to end in blocks of `length`.
        held: samples with `ids` and `source`, for judging.
        steps, lr, batch: training of each init: AdamW steps, peak learning rate, blocks per step.
        seeds: of W_base; inits without W_base have nothing random and run once. The first gives the order of batches.
        shards: threads, on a CPU.
        resume: private folder; a call that was killed goes on from it and gives the same numbers.

    Returns:
        One row per init and moment ("before", "after"): `mse` (relative, layer by layer, on `held`), `delta_nll` (small
        model minus large, nats per token) with its 95 % interval `low, high` over sources, the difference to the random
        init at the same moment `vs_random, vs_low, vs_high`, `wins` (seeds in which it is below random), `seeds`,
        `files`. The first two rows are about the large model itself, its chosen neurons moved by one step along +∇W
        and −∇W; `delta_seen` is their ΔNLL on calibration samples, as many as in `held`: the texts that ∇W is the
        gradient of.

    Raises:
        BenchError: as `capture`, `align` and `samples.blocks`; no seed.
    """
    if not seeds:
        raise BenchError("No seed to compare with: give at least one, three to see what chance does.")
    ids, sources, drawn = held["ids"].tolist(), held["source"].tolist(), calibration["ids"].tolist()
    order = shuffled(blocks(calibration, length), batch, seeds[0], device_of(model))
    total = len(drawn) + steps * len(seeds)
    mses: dict[tuple[str, str], list[float]] = {}
    losses: dict[tuple[str, str], list[evaluate.Loss]] = {}

    def told(before: int) -> Progress | None:
        return None if progress is None else lambda done, _, note: progress(before + done, total, note)

    def judge(moment: str, candidates: Mapping[str, Sequence[Tap]]) -> None:
        found = relative_mse(model, ffns, list(candidates.values()), ids)
        for (init, taps), mse in zip(candidates.items(), found, strict=True):
            with tapped(ffns, taps):
                losses.setdefault((init, moment), []).append(evaluate.loss(model, ids))
            mses.setdefault((init, moment), []).append(mse)

    def gap(taps: Sequence[Tap]) -> float:
        with tapped(ffns, taps):
            moved = evaluate.loss(model, drawn[: len(ids)]).mean
        return moved - evaluate.loss(model, drawn[: len(ids)]).mean

    with frozen_eval(model):
        kept = None if resume is None else resume / "projection_gradient.pt"
        gradients = capture(model, ffns, chosen, drawn, told(0), kept, every_seconds)
        for place, seed in enumerate(seeds):
            kinds = [kind for kind, init in INITS.items() if init.drawn or place == 0]
            smalls = {kind: initial(kind, ffns, chosen, gradients, seed, alpha, beta) for kind in kinds}
            if place == 0:
                moved = {sign: exchanged(smalls[f"copy {sign} gradient"], smalls["copy"]) for sign in "+-"}
                judge("before", {f"large {sign} gradient": taps for sign, taps in moved.items()})
                seen = {f"large {sign} gradient": gap(taps) for sign, taps in moved.items()}
            judge("before", {kind: instead(small) for kind, small in smalls.items()})
            align(
                model, ffns, list(smalls.values()), order, steps=steps, lr=lr, warmup_steps=min(10, steps // 4),
                shards=shards, every_seconds=every_seconds, progress=told(len(drawn) + place * steps),
                checkpoint=None if resume is None else resume / f"projection_seed{seed}.pt",
            )  # fmt: skip
            judge("after", {kind: instead(small) for kind, small in smalls.items()})
        dense = evaluate.loss(model, ids)
    return pd.DataFrame(
        [
            {"init": init, "moment": moment, "mse": sum(mses[init, moment]) / len(each)}
            | _against(each, dense, losses["random", moment] if init in INITS and init != "random" else None, sources)
            | ({"delta_seen": seen[init]} if init in seen else {})
            for (init, moment), each in losses.items()
        ]
    )


def _against(
    each: Sequence[evaluate.Loss],
    dense: evaluate.Loss,
    random: Sequence[evaluate.Loss] | None,
    sources: Sequence[Any],
) -> dict[str, float]:
    gap = evaluate.paired(each, dense, sources)
    row = {"delta_nll": gap.mean, "low": gap.low, "high": gap.high, "seeds": len(each), "files": gap.groups}
    if random is None:
        return row
    versus = evaluate.paired(each, random, sources)
    pairs = zip([*each] * (len(random) // len(each)), random, strict=True)
    row |= {"vs_random": versus.mean, "vs_low": versus.low, "vs_high": versus.high}
    return row | {"wins": sum(one.mean < other.mean for one, other in pairs)}


def verdict(table: pd.DataFrame) -> str:
    """What `compare` found, in Markdown: each start against the random one after alignment, and what +∇W does."""
    after = table[table["moment"] == "after"].set_index("init")
    random = after.loc["random"]
    lines = [f"After alignment the small model loses {random['delta_nll']:+.3f} nats per token from a random start."]
    for init, row in after.drop(index="random").iterrows():
        versus = evaluate.Difference(row["vs_random"], row["vs_low"], row["vs_high"], int(row["files"]))
        won = f", lower in {row['wins']:.0f} of {row['seeds']:.0f} seeds" if row["seeds"] > 1 else ""
        lines.append(f"- `{init}` loses {versus.verdict} it ({versus}{won}).")
    for init, value in table.set_index("init")["delta_seen"].dropna().items():
        lines.append(f"- `{init}`: {value:+.3f} nats per token on the texts that the gradient is of.")
    return "\n".join(lines)
