"""A worker of a tiny training: what the tests of `launch` start, and the same runs in this process."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import worker
from tinyonn_lib.lm.record import HeldOut
from tinyonn_lib.lm.train import fit

ROWS = 24


class Interrupted(Exception):
    pass


class Model(nn.Module):
    """A frozen layer, routers in a list without a forward of their own, dropout: what sharing out must cope with."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.frozen.requires_grad_(False)
        self.routers = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2)])
        self.dropout = nn.Dropout(dropout)

    def loss(self, data: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(self.body(self.frozen(data["x"])))
        for router in self.routers:
            hidden = hidden + torch.tanh(hidden @ router.T)
        return (self.head(self.dropout(hidden)) - data["y"]).square().mean()


def rows(step: int, count: int = ROWS) -> dict[str, Tensor]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x[:, :1] - x[:, 1:2].square()}


def train(
    accelerator: Any = None, *, dropout: float = 0.0, listed: bool = False, look: bool = False, broken: bool = False,
    kill_at: int = -1, stop_at: int = -1, count: int = ROWS, clip: float | None = 0.5, **options: Any,
) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
    """One run: its history, and all weights afterwards.

    Args:
        listed: train the bare routers instead of the module.
        look: watch a held-out loss that soon only rises.
        broken: a gradient that is not a number, of a loss that is one.
        kill_at, stop_at: step at which the first process kills itself, or all raise.
    """
    model = Model(dropout)
    torch.manual_seed(7 + (accelerator.process_index if accelerator else 0))
    trained = list(model.routers) if listed else [p for p in model.parameters() if p.requires_grad]
    if listed:
        model.requires_grad_(False)
        for router in trained:
            router.requires_grad_(True)

    def batch(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise Interrupted
        if step == kill_at and accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows(step, count)

    @torch.no_grad()
    def held() -> float:
        return float(model.loss(rows(0)) - 2 * model.loss(rows(1)))

    def loss(data: dict[str, Tensor]) -> Tensor:
        found = model.loss(data)
        return found + (found * 0).sqrt() if broken else found

    history = fit(
        trained if listed else model, loss, batch, torch.optim.AdamW(trained, lr=0.01), steps=8, warmup_steps=2,
        clip=clip, accelerator=accelerator, every_seconds=0.0, held_out=HeldOut(held, 2, 2) if look else None,
        progress=worker.report() if accelerator else None,
        **{name: Path(value) if name == "checkpoint" else value for name, value in options.items()},
    )  # fmt: skip
    return history, {name: value.detach().clone() for name, value in model.state_dict().items()}


def listens() -> list[str]:
    """Addresses on which this process and its launcher can be reached."""
    seen = [process.net_connections("inet") for process in (psutil.Process(), psutil.Process(os.getppid()))]
    return [c.laddr.ip for connections in seen for c in connections if c.status == psutil.CONN_LISTEN]


def take_part(path: Path) -> None:
    job = json.loads(path.read_text())
    accelerator = worker.accelerator()
    for name, run in job.items():
        if accelerator.distributed_type == "DEEPSPEED":  # otherwise all of this is too small to be shared out
            zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = 1000 if name == "small" else 0
        try:
            history, weights = train(accelerator, **run)
        except (Interrupted, BenchError) as error:
            if isinstance(error, BenchError) and name not in ("refused", "broken"):
                raise
            accelerator.free_memory()
            history, weights = None, {"error": str(error)}
        found = {"history": None if history is None else history.to_dict("list"), "weights": weights}
        found |= {
            "listens": listens(),
            "world": accelerator.num_processes,
            "kind": str(accelerator.distributed_type.value),
        }
        torch.save(found, path.parent / f"{name}.{accelerator.process_index}.pt")
    print("everything is done")


if __name__ == "__main__":
    sys.exit(worker.run(take_part))
