"""A benchmark whose questions are here: lm-eval's config next to its documents."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Task:
    """One task for `harness.run`, with nothing left to load.

    Attributes:
        config: what lm-eval's YAML would hold, without where the data are.
        documents: split, such as "test", to its documents in order.
        group: the column of a document that says what it belongs to: documents of one group are drawn together in
            `compare`. Empty when every document stands for itself.
        parent: the benchmark that this task is a part of, such as "mmlu"; empty for none.
    """

    config: dict[str, Any]
    documents: dict[str, list[dict[str, Any]]]
    group: str = ""
    parent: str = ""

    @property
    def name(self) -> str:
        return str(self.config["task"])


def shipped_text(name: str) -> str:
    """The YAML file of a task that comes with this package: "bits_per_byte", "cloze" or "mmlu"."""
    return (resources.files("tinyonn_lib.evaluate") / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")


def shipped(name: str) -> dict[str, Any]:
    """Its config without the place of the data."""
    config: dict[str, Any] = yaml.safe_load(shipped_text(name))
    return {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs")}
