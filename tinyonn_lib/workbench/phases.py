"""The table of phases: what each asks, and what it reads.

A phase is one notebook. Adding one is a notebook, a `params/<name>.yaml`, a model of its parameters in `schemas` and an
entry in `PHASES` (docs/adding.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyonn_lib.workbench import schemas
from tinyonn_lib.workbench.schemas import Params

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: where `notebooks/` and `params/` are."""


def home() -> Path:
    """Where `runs/` and `reports/` go: `TINYONN_HOME`, else the checkout."""
    return Path(os.environ.get("TINYONN_HOME") or ROOT)


def runs_root() -> Path:
    return home() / "runs"


def reports_root() -> Path:
    return home() / "reports"


@dataclass(frozen=True)
class Phase:
    """One notebook: its place in the story and what it hands over."""

    name: str
    number: int
    title: str
    inputs: tuple[str, ...]
    schema: type[Params]
    instead: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Input → parameters that replace it when all of them are given."""

    @property
    def notebook(self) -> Path:
        return ROOT / "notebooks" / f"{self.number:02d}_{self.name}.ipynb"

    def reads(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The inputs with these parameters: what is one's own replaces what an earlier phase made."""
        own = {name for name, given in self.instead.items() if all(values.get(key) for key in given)}
        return tuple(name for name in self.inputs if name not in own)

    @property
    def params_file(self) -> Path:
        return ROOT / "params" / f"{self.name}.yaml"

    def upstream(self) -> set[str]:
        """Every phase that this one stands on, directly or not."""
        return {name for parent in self.inputs for name in (parent, *PHASES[parent].upstream())}


PHASES: dict[str, Phase] = {
    phase.name: phase
    for phase in (
        Phase("pretrain", 1, "Can two cores grow a language model worth taking apart?", (), schemas.Pretrain),
        Phase(
            "scan",
            2,
            "What does every neuron do?",
            ("pretrain",),
            schemas.Scan,
            instead={"pretrain": ("model", "texts")},
        ),
        Phase("cluster", 3, "Which neurons belong together?", ("scan",), schemas.Cluster),
        Phase("experts", 4, "Do the experts still add up to the model?", ("scan", "cluster"), schemas.Experts),
        Phase("router", 5, "Does a trained router earn its keep?", ("scan", "experts"), schemas.Router),
        Phase(
            "selector",
            6,
            "Can a router tell text from trash?",
            ("pretrain", "router"),
            schemas.Selector,
            instead={"pretrain": ("texts",), "router": ("model",)},
        ),
        Phase(
            "select", 7, "Which rows would it keep?", ("selector",), schemas.Select, instead={"selector": ("selector",)}
        ),
        Phase(
            "target",
            8,
            "Does a model learn more from them?",
            ("pretrain", "select"),
            schemas.Target,
            instead={"pretrain": ("model",)},
        ),
        Phase("evaluate", 9, "What did training on the selection change?", ("target",), schemas.Evaluate),
        Phase(
            "kv",
            10,
            "Can a student think with its teacher's memory?",
            ("pretrain",),
            schemas.KV,
            instead={"pretrain": ("teacher", "student", "texts")},
        ),
        Phase(
            "align",
            11,
            "Does a reward teach what imitation does not?",
            ("pretrain",),
            schemas.Align,
            instead={"pretrain": ("model", "student", "texts")},
        ),
    )
}
