"""The smallest model and tokenizer that can answer a task, for tests and for the processes that they kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tinyonn_lib.align.contest import Contest, contest
from tinyonn_lib.align.methods import Budget, Rate
from tinyonn_lib.align.prefer import prefer
from tinyonn_lib.align.reinforce import reinforce
from tinyonn_lib.align.tasks import TASKS, prompts
from tinyonn_lib.lm.models import new_model
from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.progress import Progress


def small_tokenizer() -> Any:
    table = pd.concat([prompts(task, 60) for task in TASKS])
    return train_bpe((table["prompt"] + table["solution"]).tolist(), 320)


def small_model(seed: int = 0) -> Any:
    model = new_model(
        vocab_size=320, width=32, layers=2, ffn=64, heads=2, kv_heads=1, head_dim=16, max_length=64, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # the branches start at zero: let every weight have a gradient
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, 0, 0.05, generator=generator)
    return model.eval()


def small_prompts() -> pd.DataFrame:
    return prompts("arithmetic", 20, size=4)


SETTINGS: dict[str, Any] = {"steps": 6, "prompts_per_step": 4, "group": 8, "updates": 4}


def train_small(method: str, model: Any, checkpoint: Path | None = None, progress: Progress | None = None) -> Any:
    """A training of some rounds, always the same."""
    tokenizer, sums = small_tokenizer(), small_prompts()
    rest: dict[str, Any] = {"checkpoint": checkpoint, "every_seconds": 0.0, "progress": progress}
    if method == "gspo":
        return reinforce(model, tokenizer, sums, **SETTINGS, **rest)
    table = sums.assign(chosen=sums["solution"], rejected=" 9 9 9")
    return prefer(model, tokenizer, table, steps=6, batch=8, **rest)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def contest_small(
    warm: Any,
    folder: Path | None = None,
    progress: Any = None,
    *,
    methods: Sequence[str] = ("gspo", "rejection", "dpo"),
    seeds: int = 1,
    seed: int = 0,
    size: int = 9,
    tune_size: int = 9,
    learned: int = 20,
    rate: float = 1.0e-2,
    tried: int = 1,
    tokenizer: Any = None,
    **plan: Any,
) -> Contest:
    """A contest of two rounds, always the same."""
    budget = Budget(**({"steps": 2, "prompts_per_step": 4, "group": 8, "updates": 2} | plan))
    tune = prompts("arithmetic", 8, size=tune_size, split="tune")
    heldout = prompts("arithmetic", 8, size=size, split="heldout")
    rates: dict[str, list[Rate]] = {name: [("gains", rate), ("gains", rate / 2)][:tried] for name in methods}
    return contest(
        warm, tokenizer or small_tokenizer(), small_prompts().head(learned), tune, heldout, rates, budget=budget,
        seeds=seeds, seed=seed, folder=folder, every_seconds=0.0, progress=progress,
    )  # fmt: skip


def contested(start: str, folder: str) -> None:
    """The contest in a process of its own, which says where it is."""
    torch.set_num_threads(1)

    def reporter(what: str, unit: str) -> Progress:
        return lambda done, total, note: print(f"{what}: {done}", flush=True)

    contest_small(AutoModelForCausalLM.from_pretrained(start), Path(folder), reporter)


def main(start: str, checkpoint: str) -> None:
    """In a process of its own, which says where it is."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(start)
    train_small("gspo", model, Path(checkpoint), lambda done, total, note: print(f"done {done} ", flush=True))
