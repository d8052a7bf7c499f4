"""What came out of a contest: checkpoints, measured again as others will load them, and the verdict in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tinyonn_lib import evaluate
from tinyonn_lib.experts import router, variable
from tinyonn_lib.experts.contest import Contest
from tinyonn_lib.experts.export import export
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm.load import load_model

FIXED, VARIABLE, PRUNED, RIVAL = "trained router", "trained, variable k", "pruning, trained", "cmoe, trained router"
"""Labels of 05_router's contest."""


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

    Args:
        folders: label → folder. One with a variable k is also loaded as plain transformers does, with its fixed k.
    """
    rows = []
    for label, folder in folders.items():
        ways: dict[str, Callable[[str], Any]] = {"transformers": load_model}
        if ring.trained[label].layers[0].variable:
            ways["tinyonn_lib.experts.variable"] = variable.load
        for way, load in ways.items():
            model = load(str(folder)).to(ring.court.model.device).eval()
            gap = evaluate.loss(model, ring.court.ids, ring.court.batch).mean - ring.court.dense.mean
            told = ring.mean(label) if (way == "transformers") != ring.trained[label].layers[0].variable else None
            rows.append({"checkpoint": folder.name, "loaded with": way, "ΔNLL": gap, "trained": told})
    return pd.DataFrame(rows)


def closed(ring: Contest, label: str, partition: str) -> float:
    """Share of the gap between analytic router and oracle, over a partition, that a trained router closes."""
    analytic, oracle = ring.mean(f"{partition}, analytic"), ring.mean(f"{partition}, oracle")
    return (analytic - ring.mean(label)) / (analytic - oracle)


def verdict(ring: Contest, partition: str) -> str:
    """What was learned, in words that follow from the numbers."""
    static = ring.court.best_static(ring.losses)
    ours = [label for label in (FIXED, VARIABLE) if label in ring.losses]
    before, after = f"{partition}, analytic", "refined, analytic"
    lines = [
        f"Refinement alone, before any training: {ring.mean(before):+.3f} → {ring.mean(after):+.3f} nats per token "
        f"(difference {ring.between(after, before)})."
    ]
    for label in ours:
        against, rival = ring.between(label, PRUNED), ring.between(label, RIVAL)
        lines.append(
            f"**{label}**: {ring.mean(label):+.3f} at {ring.share[label]:.1%} active. It loses **{against.verdict}** "
            f"pruning with the same training ({ring.mean(PRUNED):+.3f}; difference {against}; untrained "
            f"{ring.mean(static):+.3f}) and {rival.verdict} CMoE's experts with the same training "
            f"({ring.mean(RIVAL):+.3f}; {rival}). Of the gap between analytic router and oracle over the same experts "
            f"it closes {closed(ring, label, 'refined'):.0%}."
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
            found[f"{_name(label)}_minus_cmoe"] = ring.between(label, RIVAL).mean
            found[f"{_name(label)}_gap_closed"] = closed(ring, label, "refined")
    gap = (back["ΔNLL"] - back["trained"]).abs().max()
    return found | {"dense_nll": ring.court.dense.mean, "export_gap": float(gap)}


def headline(ring: Contest) -> tuple[str, str]:
    """The best of ours next to the control, for the report's index."""
    ours = min((label for label in (FIXED, VARIABLE) if label in ring.losses), key=ring.mean)
    return f"ΔNLL, {ring.active:.0%} active, {ours} (pruning {ring.mean(PRUNED):+.3f})", f"{ring.mean(ours):+.3f}"


def _name(label: str) -> str:
    return "_".join(label.replace(",", "").replace("+", "").split())
