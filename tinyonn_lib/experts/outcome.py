"""What came out of a contest: checkpoints, measured again as others will load them, and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tinyonn_lib import evaluate
from tinyonn_lib.experts import router, variable
from tinyonn_lib.experts.contest import Contest
from tinyonn_lib.experts.export import export
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm.load import Dtype, load_model

FIXED, VARIABLE, PRUNED = "trained router", "trained, variable k", "pruning, trained"
RIVALS = {FIXED: "cmoe, trained router", VARIABLE: "cmoe, trained, variable k"}
"""Labels of 05_router's contest: ours, and CMoE's experts with the same training."""


def checkpoint(ring: Contest, label: str, partition: Partition, folder: Path, tokenizer: Any) -> Path:
    """Export a trained router with its experts; the thresholds of a variable k go beside it."""
    found, k = ring.trained[label], partition.k(ring.active)
    rows, biases = router.exported(found.routers)
    card = {
        "partition": partition.method,
        "router": f"{label}, {len(found.history)} steps",
        "ΔNLL, nats per token": f"{ring.mean(label):+.3f}",
    }
    export(found.model, partition, folder, tokenizer=tokenizer, k=k, routers=rows, biases=biases, card=card)
    if found.layers[0].variable:
        thresholds = [layer.router.exported_threshold(layer.threshold) for layer in found.layers]
        variable.save(folder, thresholds, ring.k[label], [index.shape[0] for index in partition.experts])
    return folder


def read_back(ring: Contest, folders: Mapping[str, Path]) -> pd.DataFrame:
    """ΔNLL of checkpoints as they are loaded: `checkpoint, loaded with, ΔNLL, trained` (what the contest said).

    In the dense model's precision; bfloat16 for a quantised one.

    Args:
        folders: label → folder. One with a variable k is also loaded as plain transformers does, with its fixed k.
    """
    rows, court = [], ring.court
    for label, folder in folders.items():
        variable_k = ring.trained[label].layers[0].variable
        for way in ["transformers", *(["tinyonn_lib.experts.variable"] if variable_k else [])]:
            model = load_model(str(folder), precision(court.model), str(court.model.device))
            if way != "transformers":
                variable.attach(model, folder)
            gap = evaluate.loss(model, court.ids, court.batch).mean - court.dense.mean
            del model  # before the next one is loaded
            told = ring.mean(label) if (way == "transformers") != variable_k else None
            rows.append({"checkpoint": folder.name, "loaded with": way, "ΔNLL": gap, "trained": told})
    return pd.DataFrame(rows)


def precision(model: Any) -> Dtype:
    """In which to load what was made of a dense model."""
    return "bfloat16" if getattr(model, "is_loaded_in_4bit", False) or model.dtype == torch.bfloat16 else "float32"


def closed(ring: Contest, label: str, partition: str) -> float:
    """Share of the gap between analytic router and oracle, both with a fixed k, that a trained router closes.

    NaN where there is no gap, as with all experts on.
    """
    analytic, oracle = ring.mean(f"{partition}, analytic"), ring.mean(f"{partition}, oracle")
    return (analytic - ring.mean(label)) / (analytic - oracle) if analytic > oracle else float("nan")


def verdict(ring: Contest, partition: str) -> str:
    """What was learned, in words that follow from the numbers."""
    static = ring.court.best_static(ring.losses)
    ours = [label for label in (FIXED, VARIABLE) if label in ring.losses]
    before, after = f"{partition}, analytic", "refined, analytic"
    lines = [
        f"Refinement alone, before any training: {ring.mean(before):+.3f} → {ring.mean(after):+.3f} nats per token "
        f"(difference {ring.between(after, before)}). `benchmarks/router_quality.py` begins with a random one, too."
    ]
    for label in ours:
        against, rival = ring.between(label, PRUNED), ring.between(label, RIVALS[label])
        part = closed(ring, label, "refined")
        lines.append(
            f"**{label}**: {ring.mean(label):+.3f} at {ring.share[label]:.1%} active. It loses **{against.verdict}** "
            f"pruning with the same training ({ring.mean(PRUNED):+.3f} at {ring.share[PRUNED]:.1%}, the router's "
            f"weights granted; difference {against}; untrained {ring.mean(static):+.3f}) and {rival.verdict} CMoE's "
            f"experts with the same training ({ring.mean(RIVALS[label]):+.3f}; {rival})."
        )
        if part == part:
            lines[-1] += (
                f" It closes {part:.0%} of the gap from the analytic router to the oracle, both with a fixed k."
            )
    return "\n\n".join(lines)


def metrics(ring: Contest, back: pd.DataFrame) -> dict[str, float]:
    """The headline numbers of the phase: ΔNLL of each label, and the differences that count.

    Args:
        back: from `read_back`.
    """
    found = {f"delta_nll_{_name(label)}": ring.mean(label) for label in ring.losses}
    found |= {f"share_{_name(label)}": ring.share[label] for label in ring.trained}
    for label in (FIXED, VARIABLE):
        if label in ring.losses:
            found[f"{_name(label)}_minus_pruning"] = ring.between(label, PRUNED).mean
            found[f"{_name(label)}_minus_cmoe"] = ring.between(label, RIVALS[label]).mean
            if (part := closed(ring, label, "refined")) == part:
                found[f"{_name(label)}_gap_closed"] = part
    gap = (back["ΔNLL"] - back["trained"]).abs().max()
    return found | {"dense_nll": ring.court.dense.mean, "export_gap": float(gap)}


def headline(ring: Contest) -> tuple[str, str]:
    """The best of ours next to the control, for the report's index."""
    ours = min((label for label in (FIXED, VARIABLE) if label in ring.losses), key=ring.mean)
    return f"ΔNLL, {ring.active:.0%} active, {ours} (pruning {ring.mean(PRUNED):+.3f})", f"{ring.mean(ours):+.3f}"


def _name(label: str) -> str:
    return "_".join(label.replace(",", "").replace("+", "").split())
