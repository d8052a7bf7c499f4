"""What others would do to look into a training step, each as an arm of `scan_overhead`.

An arm is entered, called once per step, and left; outside its block the model is as it was. None of them gets what the
observer gets. `COLLECTS` says what each one has after a step, and what it lacks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from steps import Step, loss_of
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

INSTALL = "not installed: pip install 'tinyonn[peers]'"
FIELDS = ("avg_act", "freq_act", "avg_grad_norm")  # of document 000 §1.3, in the order of the observer's statistics
COLLECTS = {
    "naive": "per row |y|, top 5 %, gradient norm, in Redis; trainable weights only",
    "torchlens": "every linear's output and its gradient, whole tensors; no norm of a weight's gradient",
    "nnsight": "norms of every linear's input and of its output's gradient; no norm of a weight's gradient",
    "wandb.watch": "histogram of every parameter's gradient; no activations, no rows, trainable weights only",
}
# Those that need `.grad` of the weights have nothing to look at when the weights are frozen.
TRAINABLE_ONLY = ("naive", "wandb.watch")
SLOW = ("naive", "torchlens")
_PACKAGES = {"torchlens": "torchlens", "nnsight": "nnsight"}


def missing(name: str) -> str:
    """Why a peer cannot run here; empty when it can."""
    package = _PACKAGES.get(name)
    return INSTALL if package and importlib.util.find_spec(package) is None else ""


def version(name: str) -> str:
    """` (package version)` of a peer that is a package, else empty."""
    package = _PACKAGES.get(name)
    return f" ({package} {importlib.metadata.version(package)})" if package else ""


def arm(name: str, step: Step, client: Any) -> Arm:
    """A peer around a step. client: redis-py, for the naive version."""
    if name == "naive":
        return Naive(step, client)
    made: dict[str, Callable[[Step], Arm]] = {
        "torchlens": Torchlens,
        "nnsight": Nnsight,
        "wandb.watch": Histograms,
    }
    return made[name](step)


class Arm(AbstractContextManager["Arm"]):
    """One way to run a step. Subclasses put hooks in `_attach`, and what they do per step in `__call__`."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Arm:
        self._attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __call__(self) -> None:
        """One step; the bare one unless a subclass says otherwise."""
        self.step()

    def _attach(self) -> None: ...


class Naive(Arm):
    """The documents' own scanner, as written: forwards replaced (004 §2.3), a hook on every weight's gradient (004
    §3.1), one `.item()` per unit and statistic, one HINCRBYFLOAT per unit, field and sample (000 §1.3).

    Generous where the documents leave it open: norms are computed for all rows of a weight in one operation, and the
    commands of a sample travel in one pipeline. "Frequency" is the top share rho, as the observer counts it, because
    "non-zero" is always true.

    Args:
        step: to observe.
        client: redis-py.
        rho: share of a weight's rows that count as its top on a token.
    """

    def __init__(self, step: Step, client: Any, rho: float = 0.05) -> None:
        super().__init__(step)
        self.linears = linears(step.model)
        self._client, self._rho = client, rho
        self._values: dict[str, dict[str, list[float]]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for module in self.linears.values():
            del module.__dict__["forward"]

    def __call__(self) -> None:
        self.step()
        with self._client.pipeline(transaction=False) as pipe:
            for name, fields in self._values.items():
                for field, values in fields.items():
                    for row, value in enumerate(values):
                        pipe.hincrbyfloat(f"param:{name}.weight:row:{row}", field, value)
            pipe.execute()
        self._values.clear()

    def sums(self, name: str) -> np.ndarray:
        """What Redis holds of one linear, (fields, rows)."""
        with self._client.pipeline(transaction=False) as pipe:
            for row in range(self.linears[name].out_features):
                pipe.hmget(f"param:{name}.weight:row:{row}", FIELDS)
            return np.array(pipe.execute(), dtype=float).T

    def _attach(self) -> None:
        for name, module in self.linears.items():
            module.__dict__["forward"] = self._wrapped(name, module.forward)
            self._handles.append(module.weight.register_hook(self._hook(name)))

    def _wrapped(self, name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def wrapped(x: Tensor) -> Tensor:
            y = forward(x)
            size = y.detach().reshape(-1, y.shape[-1]).abs()
            top = size >= size.topk(max(1, round(self._rho * size.shape[1])), dim=1).values[:, -1:]
            self._values[name] = {"avg_act": _items(size.sum(0)), "freq_act": _items(top.sum(0))}
            return y

        return wrapped

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            self._values[name]["avg_grad_norm"] = _items(grad.norm(dim=1))

        return hook


class Histograms(Arm):
    """What `wandb.watch(model, log="gradients", log_freq=1)` does in a step, without wandb and without its logging.

    From wandb/integration/torch/wandb_torch.py, `TorchHistory.log_tensor_stats`: a hook on every parameter clones the
    gradient, asks whether it is finite, fetches minimum and maximum with `.item()`, takes a histogram of 64 bins and
    copies it to the host. (`log_freq` is 1000 unless given: it samples steps, too.)
    """

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self.found: dict[str, tuple[list[float], list[float]]] = {}

    def _attach(self) -> None:
        for name, parameter in self.step.model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            flat = grad.detach().clone().reshape(-1)
            if (~torch.isfinite(flat)).all().item():
                return
            if not torch.isfinite(flat).all():
                flat = flat[torch.isfinite(flat)]
            low, high = flat.min().item(), flat.max().item()
            counts = flat.histc(bins=64, min=low, max=high)
            self.found[name] = counts.cpu().tolist(), torch.linspace(low, high, steps=65).tolist()

        return hook


class Torchlens(Arm):
    """torchlens: forward and backward under its trace, keeping the linears' outputs and their gradients only."""

    def __call__(self) -> None:
        import torchlens

        which = torchlens.func("linear")
        # It wraps every torch function; the bare arm must not run on wrapped ones.
        capture = torchlens.options.CaptureOptions(save_grads=which, unwrap_when_done=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log = torchlens.trace(self.step.model, self.step.ids, {"use_cache": False}, capture=capture, save=which)
        log.log_backward(loss_of(log[log.output_layers[0]].out, self.step.ids))
        self.step.finish()


class Nnsight(Arm):
    """nnsight: a trace that reads every linear's input, and in the backward the gradient of its output."""

    def _attach(self) -> None:
        from nnsight import NNsight

        self._net = NNsight(self.step.model)
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self) -> None:
        import nnsight

        net, ids, names = self._net, self.step.ids, list(linears(self.step.model))
        with net.trace(input_ids=ids, use_cache=False):
            outputs, inner, outer = {}, nnsight.save({}), nnsight.save({})
            for name in names:  # in the order in which they run
                module = net.get(name)
                inner[name] = module.input.detach().norm()
                outputs[name] = module.output
            with loss_of(net.output.logits, ids).backward():
                for name in reversed(names):
                    outer[name] = outputs[name].grad.norm()
        self.found = {name: (inner[name], outer[name]) for name in names}
        self.step.finish()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside the decoder layers, by name, in the order in which they run."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def _items(values: Tensor) -> list[float]:
    return [value.item() for value in values]
