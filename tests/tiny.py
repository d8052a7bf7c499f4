"""The smallest run that has every part: synthetic texts, a model of a few thousand weights."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

HOSTILE = "<script>alert(4711)</script><img src=x onerror=alert(1)>"


def write_texts(path: Path, count: int = 600) -> Path:
    """A jsonl file of sentences with some structure to learn, one of them hostile."""
    rng = random.Random(0)
    nouns, verbs = (
        ["router", "neuron", "expert", "layer", "token", "model"],
        ["scans", "feeds", "splits", "joins", "prunes"],
    )
    with path.open("w") as file:
        for number in range(count):
            words = [f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(8)]
            text = " ".join(words) + (HOSTILE if number % 7 == 0 else "")
            file.write(json.dumps({"text": text}) + "\n")
    return path


def overrides(texts: Path) -> list[str]:
    """For `tinyonn all`."""
    values = {
        "pretrain": f"texts={texts} calibration=0.2 heldout=0.1 vocab_size=320 width=32 layers=2 heads=2 kv_heads=1 "
        "head_dim=16 ffn=64 student_width=16 student_layers=1 student_ffn=32 tokens=24000 student_tokens=6000 "
        "batch=8 length=32 layout=documents ngram_order=3 tokenizers=300",
        "scan": "tokens=1500 length=48 flush_seconds=0.2",
        "cluster": "clusters=3 neighbours=8 tokens=1500 length=48",
        "experts": "experts=4 eval_tokens=1000 other_tokens=300 tokens=600 length=48 seeds=2 pool=6 pool_size=8 "
        "project_steps=4",
        "router": "warm_tokens=1500 tokens=3000 batch=4 length=32 fit_tokens=600 eval_tokens=1000 speed_seconds=0.2",
        "selector": "rows=120 batch=8 judge_rows=40 trash_expert_ratio=0.25",
        "select": "pool_packages=networkx pool_rows=160 compare_rows=64 trash_expert_ratio=0.25",
        "target": "tokens=1500 seeds=2 batch=4 length=32 eval_tokens=600",
        "evaluate": "documents=12 questions=8",
        "kv": "tokens=1500 eval_tokens=600 length=32 steps=4 batch=4 sweep_steps=4 sweep_rates=1.0e-2 "
        "second_tokens=3000 handover=8 student_rates=1.0e-3",
        # Ten numbers, 55 sums: so tiny a model is at least sometimes right.
        "align": "distil_tokens=1500 distil_heldout=12 length=32 size=9 warm_prompts=60 warm_steps=60 prompts=40 "
        "tune_prompts=8 heldout_prompts=16 steps=2 prompts_per_step=4 group=4 updates=2",
    }
    found = [f"{phase}.{item}" for phase, items in values.items() for item in items.split()]
    return [*found, f"pretrain.prompts='The|{HOSTILE}'"]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "TINYONN_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tinyonn_lib.workbench.cli", *arguments]


def tinyonn(home: Path, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        command(*arguments), env=environment(home), capture_output=True, text=True, timeout=timeout, check=False
    )
