"""LoRA by several processes of this host: DistributedDataParallel, or DeepSpeed ZeRO-2 and ZeRO-3.

The caller writes down what there is to do, `lm.launch` starts the processes, each of them loads the base model and runs
`target.train_blocks` on its rows of every batch, and the caller takes back the adapter that the first one saved.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import worker
from tinyonn_lib.lm.engine import check_rows
from tinyonn_lib.lm.launch import launch
from tinyonn_lib.lm.load import Dtype, load_model, pick_device
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection import target
from tinyonn_lib.selection.lora import Lora, load_adapter, save_adapter

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

_CONFIGS = Path(__file__).parents[2] / "params" / "accelerate"
STRATEGIES = {"ddp": None, "zero2": _CONFIGS / "zero2.yaml", "zero3": _CONFIGS / "zero3.yaml"}
"""How the processes share the work, and accelerate's config for it: see the files."""

_MODULE = "tinyonn_lib.selection.target_worker"
_ADAPTER, _HISTORY, _TIMING = "adapter", "history.parquet", "timing.json"


def together(
    model: Any, blocks: Tensor, dtype: Dtype, device: str, processes: int, strategy: str, *, lora: Lora = Lora(),  # noqa: B008
    checkpoint: Path | None = None, tensorboard: Path | None = None, progress: Progress | None = None,
    timing: dict[str, float] | None = None, **options: Any,
) -> tuple[PeftModel, pd.DataFrame]:  # fmt: skip
    """As `target.train_blocks`. With a `checkpoint`, the same call goes on after a kill.

    Args:
        model: folder or hub id of the base.
        device: where the tuned model is loaded when the processes are done; they have a GPU each if there are any.
        options: of `train_blocks`, plain values and tensors.

    Raises:
        BenchError: as `train_blocks` and `lm.launch.launch`; see `_check`.
    """
    _check(model, blocks, dtype, device, processes, strategy, options)
    # Beside the checkpoint: what a kill leaves behind goes with it, and there is room for weights.
    with tempfile.TemporaryDirectory(prefix="together-", dir=checkpoint and checkpoint.parent) as name:
        file = Path(name) / "job.pt"
        job = {
            "model": model, "dtype": dtype, "blocks": blocks, "lora": asdict(lora), "options": options,
            "checkpoint": checkpoint and str(checkpoint.resolve()),
            "tensorboard": tensorboard and str(tensorboard.resolve()),
        }  # fmt: skip
        torch.save(job, file)
        launch(
            _MODULE, file, processes=processes, config=STRATEGIES[strategy], progress=progress,
            log=lambda line: None,  # DeepSpeed's own; errors come anyway
        )  # fmt: skip
        adapted = load_adapter(load_model(model, dtype, device), file.with_name(_ADAPTER))
        if timing is not None:
            timing.update(json.loads(file.with_name(_TIMING).read_text()))
        return adapted, pd.read_parquet(file.with_name(_HISTORY))


def _check(
    model: Any, blocks: Tensor, dtype: str, device: str, processes: int, strategy: str, options: dict[str, Any]
) -> None:
    """What would fail after the processes have started.

    Raises:
        BenchError: no path, NF4, an unknown strategy, rows that cannot be shared out, or GPUs that are not enough.
    """
    if not isinstance(model, str):
        raise BenchError(f"{processes} processes load the model themselves: give its folder or hub id.")
    if dtype == "nf4":
        raise BenchError("dtype=nf4 trains in one process: choose processes=1, or bfloat16.")
    if strategy not in STRATEGIES:
        raise BenchError(f"Unknown strategy '{strategy}': choose one of {', '.join(STRATEGIES)}.")
    check_rows(blocks[:1].expand(options["batch"], -1, -1), options.get("accumulate", 1), processes)
    gpus = torch.cuda.device_count()
    if gpus and pick_device(device).type == "cpu":
        raise BenchError(f"{processes} processes train on GPUs where there are any: choose device=auto.")
    if gpus and processes > gpus:
        raise BenchError(f"{processes} processes need a GPU each and there are {gpus}: choose fewer.")


def take_part(path: Path) -> None:
    """One of the processes: train, and, as the first one, save what came out."""
    job = torch.load(path, map_location="cpu", weights_only=True)
    accelerator, timing = worker.accelerator(), dict[str, float]()
    adapted, history = target.train_blocks(
        _load(job["model"], job["dtype"], accelerator), job["blocks"], lora=Lora(**job["lora"]),
        checkpoint=job["checkpoint"] and Path(job["checkpoint"]), progress=worker.report(), name=job["model"],
        tensorboard=job["tensorboard"] and Path(job["tensorboard"]), accelerator=accelerator, timing=timing,
        **job["options"],
    )  # fmt: skip
    if accelerator.is_main_process:
        save_adapter(adapted, path.with_name(_ADAPTER))
        history.to_parquet(path.with_name(_HISTORY), index=False)
        path.with_name(_TIMING).write_text(json.dumps(timing))


def _load(name: str, dtype: Dtype, accelerator: Accelerator) -> Any:
    """The base. With ZeRO-3 it is shared out while it is made, so that no process ever holds all of it."""
    from transformers.integrations import deepspeed_config

    plugin = accelerator.state.deepspeed_plugin
    if dtype == "bfloat16" and plugin is not None and plugin.zero_stage == 3:
        # Or DeepSpeed would make it float32. Only while loading: its training in bfloat16 would round the adapter, too.
        config: dict[str, Any] = deepspeed_config()
        config["bf16"] = {"enabled": True}
        try:
            return load_model(name, dtype, str(accelerator.device))
        finally:
            del config["bf16"]
    return load_model(name, dtype, str(accelerator.device))


if __name__ == "__main__":
    sys.exit(worker.run(take_part))
