"""Train routers with several processes: DistributedDataParallel, or DeepSpeed ZeRO-2.

The caller writes down what there is to do, `lm.launch` starts the processes, each of them runs `training` on its rows
of every batch, and the caller takes back what the first one wrote. As with as many `shards` in one process, the tokens
of a process share out a variable number of experts among themselves, and a balance loss sees them alone.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import training
from tinyonn_lib.experts.analytic import Linear
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.router import Router
from tinyonn_lib.experts.student import Pruned, Routed
from tinyonn_lib.experts.training import Recipe, Trained
from tinyonn_lib.lm import models, worker
from tinyonn_lib.lm.engine import check_rows
from tinyonn_lib.lm.launch import launch
from tinyonn_lib.lm.load import Dtype, load_model
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

STRATEGIES = {"ddp": None, "zero2": Path(__file__).parents[2] / "params" / "accelerate" / "zero2.yaml"}
"""How the processes share the work, and accelerate's config for it: see the files.

ZeRO-3 is none: it takes weights away between two layers, when biases of the control and training experts need them."""

_MODULE = "tinyonn_lib.experts.together"
_DONE, _HISTORY, _USAGE = "done.pt", "history.parquet", "usage.parquet"


@dataclass(frozen=True)
class Batches:
    """`samples.shuffled` as data that another process can be told: step → token ids `(size, length)`.

    Attributes:
        blocks: token ids `(N, length)`.
        size: rows of a batch.
        seed: of the order.
        device: where the batches are; None: where the blocks are.
    """

    blocks: Tensor
    size: int
    seed: int
    device: torch.device | None = None

    def __call__(self, step: int) -> Tensor:
        return self._at(step)

    @cached_property
    def _at(self) -> Any:
        return shuffled(self.blocks, self.size, self.seed, self.device)


@dataclass(frozen=True)
class Together:
    """`training.train` and `training.train_pruned` by several processes of this host, one per GPU.

    The results are those of `shards=processes` in one process, up to rounding. Each process loads the dense model
    itself. With a `checkpoint`, the same call goes on after a kill.

    Attributes:
        model: folder or hub id of the dense model.
        processes: how many; they must share a batch in equal parts.
        strategy: a key of `STRATEGIES`.
        dtype: in which the model is loaded, as the caller's.
    """

    model: str
    processes: int
    strategy: str = "ddp"
    dtype: Dtype = "float32"

    def train(
        self, model: Any, partition: Partition, routers: Iterable[Router], batch: Batches, validation: Tensor, *,
        k: int, **options: Any,
    ) -> Trained:  # fmt: skip
        """As `training.train`; routers are trained in place, too.

        Args:
            options: steps, recipe, checkpoint, progress, and of `fit` what is a plain value.

        Raises:
            BenchError: as `training.train` and `lm.launch.launch`; see `_check`.
        """
        routers = list(routers)
        layers = [Routed(r, partition, i, k, variable=options["recipe"].variable) for i, r in enumerate(routers)]
        parts = [[part.cpu() for part in group] for group in (partition.experts, partition.shared, partition.dropped)]
        what = {
            "method": partition.method, "parts": parts, "k": k,
            "gates": [router.gates for router in routers], "routers": [router.state_dict() for router in routers],
        }  # fmt: skip
        return self._run(what, layers, model, batch, validation, **options)

    def train_pruned(
        self, model: Any, keep: Sequence[Tensor], bias: Sequence[Tensor], batch: Batches, validation: Tensor,
        **options: Any,
    ) -> Trained:  # fmt: skip
        """As `training.train_pruned`; see `train`."""
        device = next(model.parameters()).device
        layers = [Pruned(mask.to(device), start.to(device)) for mask, start in zip(keep, bias, strict=True)]
        what = {"keep": list(keep), "bias": [start.detach() for start in bias]}
        return self._run(what, layers, model, batch, validation, **options)

    def _run(
        self, what: dict[str, Any], layers: Sequence[nn.Module], model: Any, batch: Batches, validation: Tensor, *,
        recipe: Recipe, checkpoint: Path | None = None, progress: Progress | None = None, **options: Any,
    ) -> Trained:  # fmt: skip
        self._check(next(model.parameters()).device, batch, recipe, int(options.get("accumulate", 1)))
        # Beside the checkpoint: what a kill leaves behind goes with it, and there is room for weights.
        with tempfile.TemporaryDirectory(prefix="together-", dir=checkpoint and checkpoint.parent) as name:
            file = Path(name) / "job.pt"
            job = what | {
                "model": self.model, "dtype": self.dtype, "recipe": asdict(recipe), "options": options,
                "checkpoint": str(checkpoint.resolve()) if checkpoint else None,
                "blocks": batch.blocks.cpu(), "size": batch.size, "seed": batch.seed, "validation": validation.cpu(),
            }  # fmt: skip
            torch.save(job, file)
            launch(
                _MODULE, file, processes=self.processes, config=STRATEGIES[self.strategy], progress=progress,
                log=lambda line: None,  # DeepSpeed's own; errors come anyway
            )  # fmt: skip
            return _read(file.parent, model, layers)

    def _check(self, device: torch.device, batch: Batches, recipe: Recipe, accumulate: int) -> None:
        """What would fail after the processes have started, or quietly be something else.

        Raises:
            BenchError: an unknown strategy, rows that cannot be shared out, more processes than GPUs, a CPU
                asked for where there are GPUs, or `revive` with DeepSpeed.
        """
        if self.strategy not in STRATEGIES:
            raise BenchError(f"Unknown strategy '{self.strategy}': choose one of {', '.join(STRATEGIES)}.")
        check_rows(batch(0), accumulate, self.processes)
        gpus = torch.cuda.device_count()
        if gpus and device.type == "cpu":
            raise BenchError(f"{self.processes} processes train on GPUs where there are any: choose device=auto.")
        if gpus and self.processes > gpus:
            raise BenchError(f"{self.processes} processes need a GPU each and there are {gpus}: choose fewer.")
        if recipe.revive and self.strategy != "ddp":
            raise BenchError(
                "revive=true moves routers between two steps, which DeepSpeed's copies would undo: choose strategy=ddp."
            )


def take_part(path: Path) -> None:
    """One of the processes: train, and, as the first one, write down what came out."""
    job = torch.load(path, map_location="cpu", weights_only=True)
    together = worker.accelerator()
    model = load_model(job["model"], job["dtype"], str(together.device))
    found = _train(job, model, together)
    if together.is_main_process:
        weights = [] if found.model is model else [weight.detach() for weight in _weights(found.model)]
        state = {"layers": nn.ModuleList(found.layers).state_dict(), "weights": weights}
        torch.save(state, path.with_name(_DONE))
        found.history.to_parquet(path.with_name(_HISTORY), index=False)
        found.usage.to_parquet(path.with_name(_USAGE), index=False)


def _train(job: dict[str, Any], model: Any, together: Accelerator) -> Trained:
    device = together.device
    batch, validation = Batches(job["blocks"], job["size"], job["seed"], device), job["validation"].to(device)
    same = {
        "recipe": Recipe(**job["recipe"]), "checkpoint": job["checkpoint"] and Path(job["checkpoint"]),
        "progress": worker.report(), "accelerator": together, **job["options"],
    }  # fmt: skip
    if "keep" in job:
        return training.train_pruned(model, job["keep"], job["bias"], batch, validation, **same)
    partition = Partition(job["method"], *(tuple(group) for group in job["parts"]))
    routers = []
    for gates, state in zip(job["gates"], job["routers"], strict=True):
        rows = state["weight"].contiguous()  # DeepSpeed asks for it
        made = Router(Linear(rows, rows.new_zeros(len(rows))), rows, gates)
        made.load_state_dict(state)  # all that it holds: what it was built from does not matter
        made.gain = nn.Parameter(made.gain.detach().view(1))  # DeepSpeed takes no scalars
        routers.append(made.to(device))
    return training.train(model, partition, routers, batch, validation, k=job["k"], **same)


@torch.no_grad()
def _read(folder: Path, model: Any, layers: Sequence[nn.Module]) -> Trained:
    """Back from `take_part`, into these layers, and a copy of the model if experts were trained."""
    state = torch.load(folder / _DONE, map_location="cpu", weights_only=True)
    nn.ModuleList(layers).load_state_dict(state["layers"])
    model.requires_grad_(False)
    if state["weights"]:
        model = copy.deepcopy(model)
        for weight, trained in zip(_weights(model), state["weights"], strict=True):
            weight.copy_(trained)
    return Trained(model, layers, pd.read_parquet(folder / _HISTORY), pd.read_parquet(folder / _USAGE))


def _weights(model: Any) -> list[Tensor]:
    """What unfreezing the experts trains."""
    return [linear.weight for ffn in models.ffns(model) for linear in (ffn.gate, ffn.up, ffn.down)]


if __name__ == "__main__":
    sys.exit(worker.run(take_part))
