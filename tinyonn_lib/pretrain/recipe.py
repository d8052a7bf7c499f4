"""How a model is trained: the recipe as data, its optimisers, its loss.

A choice is a field of `Recipe`; a recipe with a name is one line in `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.schedule import Precision, Schedule
from tinyonn_lib.pretrain.forward import forward, next_token_nats
from tinyonn_lib.pretrain.layout import Layout, Rows
from tinyonn_lib.pretrain.mtp import asked_after
from tinyonn_lib.pretrain.muon import Muon

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tinyonn_lib.pretrain.mtp import MTPHead

Optimizer = Literal["muon", "adamw"]
STACKED = {"gate_up_proj": 2}
"""Parameters of transformers' experts that hold several matrices one below the other."""


@dataclass(frozen=True)
class Recipe:
    """Everything that is chosen about a training but the model, the texts and the budget.

    Attributes:
        optimizer: "muon" for the matrices of the layers with AdamW for the rest, or "adamw" for all.
        lr_matrix: peak rate of the matrices; lr_other: AdamW's, of embeddings, head and norms.
        momentum: Muon's, lower than the usual 0.95 because the runs are short. weight_decay: of the matrices.
        schedule, warmup_steps, decay_share, clip, precision: see `lm.train.fit`.
        layout: see `layout.lay`.
        batch: rows per step; ramp: share of the tokens over which it grows from a quarter of that to all of it.
        balance: weight of the load-balance loss of an MoE.
        mtp: weight of the loss of predicting the token after the next; 0: no such head.
    """

    optimizer: Optimizer = "muon"
    lr_matrix: float = 0.02
    lr_other: float = 0.05
    momentum: float = 0.85
    weight_decay: float = 0.01
    schedule: Schedule = "trapezoidal"
    warmup_steps: int = 20
    decay_share: float = 0.5
    layout: Layout = "packed"
    batch: int = 16
    ramp: float = 0.0
    balance: float = 0.01
    mtp: float = 0.0
    clip: float | None = 1.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name, known in (("optimizer", Optimizer), ("layout", Layout), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(known):
                raise BenchError(f"Unknown {name} '{getattr(self, name)}': choose one of {', '.join(get_args(known))}.")
        if self.batch < 1 or not 0 <= self.ramp < 1 or min(self.balance, self.mtp) < 0:
            raise BenchError(
                f"batch={self.batch} must be 1 or more, ramp={self.ramp} in [0, 1), balance={self.balance} and "
                f"mtp={self.mtp} 0 or more."
            )

    @classmethod
    def of(cls, values: Any) -> Recipe:
        """From anything with attributes of these names, such as the parameters of 01_pretrain; `clip` 0 is None."""
        given = {item.name: getattr(values, item.name) for item in fields(cls) if hasattr(values, item.name)}
        return cls(**given | ({"clip": given["clip"] or None} if "clip" in given else {}))

    def faster(self, factor: float) -> Recipe:
        """The same with all learning rates times a factor."""
        return replace(self, lr_matrix=factor * self.lr_matrix, lr_other=factor * self.lr_other)

    def sizes(self, tokens: int, length: int) -> list[int]:
        """Rows of every step of a training of about `tokens` tokens."""
        sizes: list[int] = []
        ramped, done = self.ramp * tokens, 0
        while not sizes or done + self.batch * length / 2 <= tokens:
            share = min(1.0, 0.25 + 0.75 * done / ramped) if ramped else 1.0
            sizes.append(max(1, round(self.batch * share)))
            done += sizes[-1] * length
        return sizes


ADAMW = replace(Recipe(), optimizer="adamw", lr_matrix=3e-3, lr_other=0.1, schedule="cosine")
RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    # The control to beat: packed, with a rate of its own for embeddings; the contest tunes both.
    "adamw": ADAMW,
    # What a first script does: one rate for everything, one text a row.
    "plain": replace(ADAMW, lr_other=3e-3, layout="padded"),
}


def optimizers(model: nn.Module, recipe: Recipe, parts: int = 1) -> list[torch.optim.Optimizer]:
    """The optimisers of a recipe over everything in `model` that requires a gradient.

    Args:
        model: a causal language model, or a list of modules the first of which is one.
        parts: Muon comes in so many optimisers of about equal work, for as many threads.
    """
    head = cast("Any", model[0] if isinstance(model, nn.ModuleList) else model).get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    matrices = [(name, param) for name, param in named if param.ndim >= 2 and id(param) not in tables]
    rest = [param for _, param in named if param.ndim < 2 or id(param) in tables]
    if recipe.optimizer == "adamw":
        groups = [
            {"params": [p for _, p in matrices], "lr": recipe.lr_matrix, "weight_decay": recipe.weight_decay},
            {"params": rest, "lr": recipe.lr_other, "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)]
    shares: list[list[dict[str, Any]]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name, param in sorted(matrices, key=lambda found: -_work(found[1])):
        lightest = loads.index(min(loads))
        shares[lightest].append({"params": [param], "parts": STACKED.get(name.rpartition(".")[2], 1)})
        loads[lightest] += _work(param)
    opts: list[torch.optim.Optimizer] = [
        Muon(share, lr=recipe.lr_matrix, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        for share in shares
        if share
    ]
    if rest:
        opts.append(torch.optim.AdamW(rest, lr=recipe.lr_other, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    return opts


def _work(matrix: Tensor) -> int:
    return matrix.numel() * min(matrix.shape[-2:])


def loss(
    model: PreTrainedModel, rows: Rows, recipe: Recipe, mtp: MTPHead | None = None
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The loss of a batch of `rows.batches`: next token, plus balance, plus the token after the next.

    Divided by the tokens that a row of the whole set asks for on average, so that equal shards weigh alike.
    """
    per_row, after = rows.targets, 1.0
    if mtp is not None:
        after = max(1, int(asked_after(rows.ids, rows.positions, rows.pad).sum())) / len(rows.ids)

    def of(batch: dict[str, Tensor]) -> Tensor:
        ids, positions = batch["ids"], batch.get("positions")
        inside = None if positions is None else positions[:, :-1]
        out = forward(model, ids[:, :-1], inside)
        nll = next_token_nats(out.logits, rows.asked(ids)).sum()
        total = nll / (per_row * len(ids)) + recipe.balance * out.balance
        if mtp is None:
            return total
        return total + recipe.mtp * mtp.loss(model, out.hidden, ids, positions, pad=rows.pad, count=after * len(ids))

    return of
