"""The divided model in training: what is learned in each layer, and the loss of the whole.

It runs as the dense model with scaled neurons (`routing.scaled`), so experts that were not chosen are at hand, too,
and the loss can say whether they would have helped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.assemble import dense_weight
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.routing import Scale, per_neuron, scaled, top_mask
from tinyonn_lib.experts.soft import soft_top_k
from tinyonn_lib.lm.models import FFN

Goal = Literal["layer", "kl", "lm"]
"""What is minimised: "layer", each FFN's squared error relative to the dense one's output, on the dense model's own
inputs; "kl", KL of the divided model's next tokens from the dense model's, nats per token; "lm", the loss on text."""


class Routed(nn.Module):
    """One layer under a learning router: k experts per token softly, k hard ones once it has learned.

    Attributes:
        router: what is learned.
        budget: with a variable number of experts, log share of all layers' budget that this layer takes, `(1,)`.
        threshold: of the choice, `()`, once it is calibrated (`calibrate`); NaN before.
    """

    threshold: Tensor

    def __init__(self, router: Router, partition: Partition, layer: int, k: int, *, variable: bool = False) -> None:
        super().__init__()
        self.router, self.k, self.variable = router, k, variable
        self.experts = partition.experts[layer].shape[0]
        self._widen = per_neuron(partition, layer)
        device = router.weight.device
        self.budget = nn.Parameter(torch.zeros(1, device=device), requires_grad=variable)  # DeepSpeed takes no scalars
        self.register_buffer("threshold", torch.tensor(float("nan"), device=device))

    def forward(self, x: Tensor, h: Tensor, temperature: Tensor, k: Tensor | float) -> tuple[Tensor, Tensor]:
        """Factor on h `(…, d_ffn)` of the soft choice, and this layer's balance and z losses, `(2,)`."""
        choice, gates, logits = self.router(x)
        if self.variable:  # the tokens share out k per token among themselves
            soft = soft_top_k(choice.flatten(), k * (choice.numel() // self.experts), temperature).view_as(choice)
        else:
            soft = soft_top_k(choice, k, temperature)
        load = soft.flatten(0, -2).mean(0) / soft.sum(-1).mean().clamp(min=1e-6) * self.experts
        penalties = torch.stack([load.square().mean() - 1, logits.logsumexp(-1).square().mean()])
        return self._widen((soft * gates).to(h)), penalties

    def hard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts are on, 0 or 1, and the gates' factors, each `(…, experts)`."""
        choice, gates, _ = self.router(x)
        return ((choice > self.threshold).float() if self.variable else top_mask(choice, self.k)), gates

    def scale(self, x: Tensor, h: Tensor) -> Tensor:
        """The factor on h as the finished model has it."""
        on, gates = self.hard(x)
        return self._widen((on * gates).to(h))

    def calibrate(self, k: float) -> Scale:
        """A scale that first sets the threshold so that k experts are on per token of what it sees, in the mean."""

        def scale(x: Tensor, h: Tensor) -> Tensor:
            choice = self.router(x)[0].flatten()
            on = min(round(k * len(choice) / self.experts), len(choice) - 1)
            # Between two of the values, so that rounding in a checkpoint flips neither.
            self.threshold.copy_(choice.topk(on + 1).values[-2:].mean())
            return self.scale(x, h)

        return scale


class Pruned(nn.Module):
    """One layer after static pruning, with all that the control may learn: every remaining weight row's scale and bias.

    Attributes:
        keep: 1 for neurons that stay, else 0, `(d_ffn,)`.
        gate, up: scale and bias of each neuron's pre-activations, `(2, d_ffn)`.
        factor: scale of each neuron's output, `(d_ffn,)`; pruned neurons stay at 0.
        bias: of the layer's output, `(d_model,)`.
    """

    keep: Tensor

    def __init__(self, keep: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep.float())
        start = torch.stack([torch.ones_like(keep, dtype=torch.float32), torch.zeros_like(keep, dtype=torch.float32)])
        self.gate, self.up = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        self.factor = nn.Parameter(start[0].clone())
        self.bias = nn.Parameter(bias.detach().float().clone())

    def forward(self, x: Tensor, h: Tensor, temperature: Tensor, k: Tensor | float) -> tuple[Tensor, Tensor]:
        """Factor on h, and no penalties."""
        return self.scale(x, h), self.factor.new_zeros(2)

    def scale(self, x: Tensor, h: Tensor) -> Tensor:
        """The factor on h."""
        return (self.keep * self.factor).to(h)

    @contextmanager
    def adapting(self, ffn: FFN, on: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Within the block the FFN has the scales and biases of gate and up and the output's bias, while `on()`."""

        def affine(how: Tensor) -> Callable[..., Tensor]:
            return lambda module, args, out: out * how[0].to(out) + how[1].to(out) if on() else out

        def shift(module: Any, args: Any, out: Tensor) -> Tensor:
            return out + self.bias.to(out) if on() else out

        with ExitStack() as stack:
            for linear, hook in ((ffn.gate, affine(self.gate)), (ffn.up, affine(self.up)), (ffn.down, shift)):
                stack.enter_context(linear.register_forward_hook(hook))
            yield


@contextmanager
def adapted(layers: Iterable[nn.Module], ffns: Sequence[FFN], on: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """`Pruned.adapting` of every layer that is one; routed layers have nothing but their scale."""
    with ExitStack() as stack:
        for ffn, layer in zip(ffns, layers, strict=True):
            if isinstance(layer, Pruned):
                stack.enter_context(layer.adapting(ffn, on))
        yield


class Student(nn.Module):
    """A dense model whose FFNs run with what `layers` learn; `loss` is for `lm.train.fit`.

    Args:
        model: frozen unless its parameters require gradients; then `teacher` must be another.
        layers: a `Routed` or `Pruned` per FFN.
        teacher: whose next tokens are imitated; None: the same model, undivided.
        balance, z_loss: weights of the load-balancing loss (mean squared load over experts, minus 1; Shazeer et al.
            2017, arXiv:1701.06538) and of the mean squared log-sum-exp of the logits (Zoph et al. 2022,
            arXiv:2202.08906).
    """

    def __init__(
        self,
        model: Any,
        ffns: Sequence[FFN],
        layers: Sequence[nn.Module],
        *,
        goal: str = "kl",
        teacher: Any = None,
        balance: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        if goal not in get_args(Goal):
            raise BenchError(f"Unknown loss '{goal}': choose one of {', '.join(get_args(Goal))}.")
        if goal == "layer" and any(isinstance(layer, Pruned) for layer in layers):
            raise BenchError("Pruning learns from the whole model's loss: choose goal=kl or lm.")
        super().__init__()
        self.model, self.layers = model, nn.ModuleList(layers)
        self.goal, self.weights = goal, (balance, z_loss)
        self._ffns, self._teacher = list(ffns), [teacher]  # in a list: no parameters of the student's
        # ZeRO-3 would take the weights out of reach between two forwards.
        self._down = [dense_weight(f.down).detach().clone().float() for f in ffns] if goal == "layer" else []
        self._here = threading.local()  # shards of a batch run side by side

    @property
    def teacher(self) -> Any:
        """Whose next tokens are imitated."""
        return self._teacher[0] or self.model

    def loss(self, data: dict[str, Tensor]) -> Tensor:
        """The loss on `ids` `(B, T)` at `temperature` `(B,)`; call it within `running`."""
        ids, here = data["ids"], self._here
        here.temperature, here.mode, here.found = data["temperature"][:1], "off", []
        here.budgets = budgets(self.layers)
        try:
            if self.goal == "layer":
                here.mode = "watch"
                with torch.no_grad():
                    self.model.model(input_ids=ids, use_cache=False)
                loss = torch.stack([error for error, _ in here.found]).mean()
            else:
                target = self._target(ids) if self.goal == "kl" else None
                here.mode = "on"
                logits = self.model(input_ids=ids, use_cache=False).logits
                loss = next_token(logits, ids) if target is None else divergence(logits, target)
            penalties = torch.stack([penalty for _, penalty in here.found]).mean(0)
        finally:
            here.mode = "off"
        return loss + (penalties * penalties.new_tensor(self.weights)).sum()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this block the model's FFNs ask the student; outside of `loss` they are dense."""
        here = self._here
        with (
            adapted(self.layers, self._ffns, lambda: getattr(here, "mode", "off") == "on"),
            scaled(self._ffns, [self._scale(place) for place in range(len(self.layers))]),
        ):
            yield

    def _scale(self, place: int) -> Scale:
        def scale(x: Tensor, h: Tensor) -> Tensor:
            here, mode = self._here, getattr(self._here, "mode", "off")
            if mode == "off":
                return h.new_ones(())
            with torch.enable_grad():
                factor, penalties = self.layers[place](x, h, here.temperature, here.budgets[place])
                error = factor.new_zeros(())
                if mode == "watch":
                    down = self._down[place]
                    error = (((factor - 1) * h).float() @ down.T).square().sum() / (h.float() @ down.T).square().sum()
            here.found.append((error, penalties))
            return factor if mode == "on" else h.new_ones(())

        return scale

    @torch.no_grad()
    def _target(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.teacher(input_ids=ids, use_cache=False).logits
        return logits


def budgets(layers: Iterable[nn.Module]) -> list[Any]:
    """Experts per token in each layer: k, or what the layers have agreed on, with k as their mean."""
    routed = [layer for layer in layers if isinstance(layer, Routed)]
    if not routed or not routed[0].variable:
        return [layer.k for layer in routed] or [0] * len(list(layers))
    k, experts = routed[0].k, routed[0].experts
    return list(experts * soft_top_k(torch.cat([layer.budget for layer in routed]), len(routed) * k / experts, 1.0))


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token loss, nats per token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL of the next tokens from the target's, nats per token."""
    ours, theirs = (each.flatten(0, 1).float().log_softmax(-1) for each in (logits, target))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
