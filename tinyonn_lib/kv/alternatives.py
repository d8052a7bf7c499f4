"""What else the same means could do: fine-tune the student itself, or let it train along with the projector."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib import evaluate
from tinyonn_lib.evaluate import Loss
from tinyonn_lib.kv import judge
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import DOCUMENT, LORA, Contest
from tinyonn_lib.kv.data import Batch, Caches, own_of
from tinyonn_lib.kv.train import LOOKS, train
from tinyonn_lib.lm.record import HeldOut
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.train import fit

SLOWER = (0.1, 0.3, 1.0)
"""LoRA's learning rates in multiples of a projector's: a student that is trained already wants smaller ones."""

COLLAPSED = 0.7
"""Share of its former spread below which a student's cache counts as collapsed: an easy aim, whatever the error."""


def lora_student(ring: Contest) -> None:
    """Enter the student, fine-tuned (LoRA on all linear layers) on the same texts and steps, with its own cache.

    What our projector's parameters would bring inside the student: the rank is what comes nearest to as many, at most
    full rank. The learning rate with the least validation loss is taken, as for everybody, of `SLOWER` times those that
    projectors try.
    """
    from tinyonn_lib.selection.lora import Lora, adapt

    texts, recipe, parameters = ring.texts, ring.recipe, ring.parameters[ring.best(["ours"])]

    def tuned(rate: float, seed: int) -> tuple[Loss, Loss, int]:
        model = copy.deepcopy(texts.train.student.model)
        probe = adapt(model, Lora(r=1), seed)
        # With rank 1 a layer of (in, out) has in + out parameters.
        each = sum(p.numel() for p in probe.parameters() if p.requires_grad)
        full = min(p.numel() for p in probe.parameters() if p.requires_grad)
        rank = max(1, min(round(parameters / each), full))
        adapted = adapt(probe.unload(), Lora(r=rank, alpha=2 * rank), seed)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        rows = shuffled(torch.arange(len(texts.train))[:, None], min(recipe.batch, len(texts.train)), seed)

        def batch(step: int) -> dict[str, Tensor]:
            places = rows(step)[:, 0]
            return {"ids": texts.train.ids[places].to(model.device), "mask": texts.train.mask[places].to(model.device)}

        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        chosen_by = _rows(texts.validation)
        look = HeldOut(lambda: evaluate.loss(adapted, chosen_by).mean, max(1, recipe.steps // LOOKS), LOOKS)
        fit(trained, lambda data: _next_token(adapted, data), batch, optimizer, steps=recipe.steps, held_out=look,
            warmup_steps=min(20, recipe.steps // 4), tag=f"{LORA} {rank} {seed}",
            **ring.training(f"{LORA}, {rate:g}, seed {seed}"))  # fmt: skip
        held, chosen = (evaluate.loss(adapted.eval(), _rows(each)) for each in (texts.heldout, texts.validation))
        return held, chosen, sum(p.numel() for p in trained)

    rates = sorted({float(f"{slower * rate:.3g}") for rate in ring.rates_tried for slower in SLOWER})
    trials = {rate: tuned(rate, recipe.seed) for rate in rates}
    best = min(trials, key=lambda rate: trials[rate][1].mean)
    more = [tuned(best, recipe.seed + number)[0] for number in range(1, ring.seeds)]
    held, validation, size = trials[best]
    ring.add(LORA, "another way", [held, *more], validation.mean, size, best, rates)


def co_trained(ring: Contest, student_rates: Sequence[float]) -> pd.DataFrame:
    """The document's loop, in which student and projector move towards each other: is a low loss a good student?

    Args:
        ring: whose texts and steps are taken; the projector is the document's, 1×, from its first seed, at the rate
            that suited it best there.
        student_rates: each is tried; 0 leaves the student frozen.

    Returns:
        One row per rate, on held-out texts: `lr_student, kv_error` (mean squared, in units of the student's own
        variance then), `spread` (standard deviation of its own cache ÷ what it was), `own` and `projected` (its loss
        with its own and with the projected cache, nats per token), `own_change` with `low, high` (95 %, against the
        student as it was), `harmed` (its own loss is clearly higher) and `collapsed` (spread below `COLLAPSED`).
    """
    texts, seed = ring.texts, ring.recipe.seed
    before = judge.loss(own_of, texts.heldout)
    was = _spread(texts.heldout)
    rows = []
    for rate in student_rates:
        moved, mine = copy.copy(texts.train), ring.fresh(DOCUMENT, seed)
        moved.student = KVModel(copy.deepcopy(texts.train.student.model))
        recipe = replace(ring.recipe, objective="mse", lr=ring.rates["MLP 1×"], lr_student=rate)
        train(mine, moved, recipe, **ring.training(f"student along at {rate:g}"))
        held = texts.heldout.of_student(moved.student)
        own, said = judge.loss(own_of, held), judge.loss(judge.projected(mine), held)
        change, spread = evaluate.paired([own], before, held.source, seed=seed), _spread(held)
        rows.append(
            {"lr_student": rate, "kv_error": judge.error(judge.projected(mine), held)["mse"] / (2 * spread**2),
             "spread": spread / was, "own": own.mean, "projected": said.mean, "own_change": change.mean,
             "low": change.low, "high": change.high, "harmed": bool(change.low > 0),
             "collapsed": spread < COLLAPSED * was}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _next_token(model: object, data: Batch) -> Tensor:
    targets = data["ids"].masked_fill(~data["mask"], -100)
    logits = model(input_ids=data["ids"], use_cache=False).logits  # type: ignore[operator]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())


def _rows(caches: Caches) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(caches.ids, caches.mask, strict=True)]


def _spread(caches: Caches) -> float:
    """Standard deviation of the student's own cache about its mean over tokens."""
    sums, squares, count = torch.zeros(()), torch.zeros(()), 0
    for batch in caches.batches():
        both = torch.stack([batch["own.keys"], batch["own.values"]]).transpose(2, 3)[:, batch["mask"]].double().cpu()
        sums, squares, count = sums + both.sum(1), squares + both.square().sum(1), count + both.shape[1]
    return float((squares / count - (sums / count) ** 2).mean().sqrt())
