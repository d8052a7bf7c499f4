"""One optimiser step by several processes, through accelerate: DistributedDataParallel, or DeepSpeed ZeRO-2 and ZeRO-3.

Every process holds the whole batch and takes its rows of it, so the curve is that of one process up to rounding.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import resume
from tinyonn_lib.lm.engine import LossFn, check_rows, part, rows
from tinyonn_lib.lm.record import HeldOut


class _Loss(nn.Module):
    """The loss as a module's forward: the one thing that DDP and DeepSpeed watch."""

    def __init__(self, loss_fn: LossFn, model: nn.Module | None, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._loss_fn = loss_fn
        if model is not None:
            self.model = model
        for number, param in enumerate(params if model is None else ()):
            self.register_parameter(f"weight{number}", param)  # its own: ZeRO-3 gathers them before this forward

    def forward(self, data: Any) -> Tensor:
        if isinstance(data, HeldOut):  # through here, too, or ZeRO-3 would not fetch the weights
            return torch.tensor(data.loss(), dtype=torch.float64)
        return self._loss_fn(data)


class Accelerated:
    """This process and its peers. See `engine.Engine` for the methods.

    Raises:
        BenchError: the processes did not start alike, the batch cannot be shared out, or DeepSpeed cannot keep the
            optimizers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        key: str,
        loss_fn: LossFn,
        params: Sequence[nn.Parameter],
        module: nn.Module | None,
        optimizers: Sequence[torch.optim.Optimizer],
        first: Any,
        clip: float | None,
        accumulate: int,
    ) -> None:
        self._accelerator, self._accumulate = accelerator, accumulate
        self._params, self._module, self._optimizers = list(params), module, optimizers
        self._clip = math.inf if clip is None else clip
        self._world, self._rank = accelerator.num_processes, accelerator.process_index
        self.main = accelerator.is_main_process
        if len(set(gather_object([key]))) > 1:
            raise BenchError("The processes start from different weights, data or settings: give all the same seeds.")
        check_rows(first, accumulate, self._world)
        whole = _Loss(loss_fn, module, params)
        self._all = list(whole.parameters())
        self._zero = 0
        accelerator.gradient_accumulation_steps = accumulate
        if accelerator.distributed_type == "DEEPSPEED":
            _one_by_element(optimizers)
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            self._zero = int(config["zero_optimization"]["stage"])
            config |= {
                "train_micro_batch_size_per_gpu": rows(first) // (accumulate * self._world),
                "train_batch_size": rows(first),
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": clip or 0.0,
            }
        self._kind = f" {accelerator.distributed_type} {self._zero} {self._world}"  # whose checkpoint it is
        self._own_names = [set(vars(param)) for param in self._all]
        self._watched, *self._stepping = accelerator.prepare(whole, *optimizers)
        self._modules = list(whole.modules())

    def step(self, data: Any) -> tuple[Tensor, Tensor]:
        check_rows(data, self._accumulate, self._world)
        total, norm = torch.zeros((), device=self._accelerator.device), torch.zeros(())
        for number in range(self._accumulate):
            place = self._rank * self._accumulate + number
            piece = send_to_device(part(data, place, self._accumulate * self._world), self._accelerator.device)
            with self._accelerator.accumulate(self._watched):
                loss = self._watched(piece)
                self._accelerator.backward(loss)  # with DeepSpeed the last piece's also clips and steps
                total = total + loss.detach() / self._accumulate
                if self._accelerator.sync_gradients:
                    norm = torch.as_tensor(self._accelerator.clip_grad_norm_(self._params, self._clip))
                for optimizer in self._stepping:
                    optimizer.step()
                    optimizer.zero_grad()
        mean: Tensor = self._accelerator.reduce(total, "mean")
        return mean, norm.where(norm >= 0, torch.nan)  # DeepSpeed's -1 stands for a norm that is not finite

    def agree(self, value: float) -> float:
        own = torch.tensor(value, dtype=torch.float64, device=self._accelerator.device)
        return float(self._accelerator.reduce(own, "mean"))

    @torch.no_grad()
    def look(self, held_out: HeldOut) -> float:
        return self.agree(float(self._watched(held_out)))

    def values(self) -> list[Tensor]:
        # ZeRO-3 keeps a share of each parameter here and fetches the rest when it is needed.
        return [param.ds_tensor.data if self._zero == 3 else param.data for param in self._params]  # type: ignore[attr-defined]

    def save(self, path: Path, key: str, step: int, history: Mapping[str, list[float]], best: list[Tensor]) -> None:
        key, rng = key + self._kind, gather_object([resume.rng_state()])
        if not self._zero:
            if self.main:
                resume.save(path, key, step, self._params, self._module, self._optimizers, history, best, rng)
            return
        folder = _parts(path) / str(step)
        try:
            self._accelerator.save_state(str(folder), exclude_frozen_parameters=True)
            torch.save(best, folder / f"best{self._rank}.pt")
        except (OSError, RuntimeError) as error:
            raise resume.unwritable(path, error) from error
        self._accelerator.wait_for_everyone()
        if self.main:
            resume.save(path, key, step, [], None, [], history, [], rng)  # from here on the new parts count
            for old in _parts(path).iterdir():
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

    def restore(self, path: Path, key: str) -> resume.Found | None:
        held = ([], None, []) if self._zero else (self._params, self._module, self._optimizers)
        found = resume.restore(path, key + self._kind, *held, self._rank)
        if len(set(gather_object([found.step if found else 0]))) > 1:
            raise BenchError(f"Not all processes see the checkpoint {path.name}: put it on a disk that they share.")
        if found is None or not self._zero:
            return found
        folder, rng = _parts(path) / str(found.step), resume.rng_state()
        self._accelerator.load_state(str(folder), load_module_strict=False)  # without the frozen weights
        resume.set_rng_state(rng)
        return found._replace(best=torch.load(folder / f"best{self._rank}.pt", "cpu", weights_only=True))

    def finish(self) -> None:
        if self._zero:
            self._back()
        self._accelerator.free_memory()  # or the next `fit` would still step this engine
        for param in self._params:
            param.grad = None

    @torch.no_grad()
    def _back(self) -> None:
        """Take the parameters out of DeepSpeed's hands: whole, and as if it had never been there."""
        if self._zero == 3:
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            for module in self._modules:
                module._parameters = module._original_parameters  # type: ignore[assignment]
        param: Any
        for param, own in zip(self._all, self._own_names, strict=True):
            if self._zero == 3:
                if param.ds_status.name == "AVAILABLE":
                    param.partition()  # small ones stay whole; the shares are the ones that count
                with GatheredParameters([param]):
                    value = param.detach().to("cpu", copy=True)
            else:
                value = param.detach().clone()
            for name in set(vars(param)) - own:
                delattr(param, name)
            param.data = value


def _parts(path: Path) -> Path:
    """Where DeepSpeed's processes leave their parts of a checkpoint."""
    return path.with_name(f"{path.name}.zero")


def _one_by_element(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    if len(optimizers) > 1 or isinstance(optimizers[0], torch.optim.Muon):
        raise BenchError(
            "DeepSpeed cuts the weights into flat pieces and keeps one optimizer for them: give it one that works "
            "element by element, such as AdamW, with a parameter group for each learning rate."
        )
