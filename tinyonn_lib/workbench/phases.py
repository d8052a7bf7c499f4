"""The table of phases: what each asks, what it reads, and which parameters it takes.

A phase is one notebook. Adding one is a notebook, a `params/<name>.yaml` and an entry in `PHASES`
(docs/adding.md). Defaults live in the YAML alone; the models here hold types and bounds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: where `notebooks/` and `params/` are."""


def home() -> Path:
    """Where `runs/` and `reports/` go: `TINYONN_HOME`, else the checkout."""
    return Path(os.environ.get("TINYONN_HOME") or ROOT)


def runs_root() -> Path:
    return home() / "runs"


def reports_root() -> Path:
    return home() / "reports"


# A run is a folder name: no separators, nothing hidden.
RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+,=-]{0,199}$")]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=0.5)]
Positive = Annotated[float, Field(gt=0)]


def _fractions(text: str) -> str:
    try:
        good = all(0 < float(part) <= 1 for part in text.split())
    except ValueError:
        good = False
    if not text.split() or not good:
        raise ValueError("expected numbers in (0, 1], separated by blanks")
    return text


Fractions = Annotated[str, BeforeValidator(str), AfterValidator(_fractions)]
"""Several fractions in one flat value, such as `0.25 0.5 0.75`."""


def _no_password(url: str) -> str:
    # Parameters end up in manifests, notebooks and reports.
    if urlsplit(url).password:
        raise ValueError("leave the password out of the URL and give it as TINYONN_REDIS_PASSWORD in the environment")
    return url


class Params(BaseModel):
    """What every phase takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    run: RunName
    base: RunName | Literal[""]


class Pretrain(Params):
    texts: str
    corpus_packages: str
    device: str
    calibration: Share
    heldout: Share
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)]
    width: Annotated[int, Field(ge=16, multiple_of=2)]
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Annotated[int, Field(ge=8, multiple_of=2)]
    ffn: Annotated[int, Field(ge=16)]
    student_width: Annotated[int, Field(ge=16, multiple_of=2)]
    student_layers: Count
    student_ffn: Annotated[int, Field(ge=16)]
    tokens: Count
    student_tokens: Count
    seconds: Annotated[float, Field(ge=0)]
    batch: Count
    length: Annotated[int, Field(ge=8)]
    lr_matrix: Positive
    lr_other: Positive
    ngram_order: Annotated[int, Field(ge=1, le=6)]
    checkpoint_seconds: Positive
    prompts: str
    seed: Seed

    @model_validator(mode="after")
    def _heads(self) -> Pretrain:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        return self


class Scan(Params):
    model: str
    texts: str
    dtype: Literal["float32", "bfloat16", "nf4"]
    device: str
    tokens: Count
    batch: Literal[1]
    length: Annotated[int, Field(ge=8)]
    targets: str
    rows: bool
    rho: Fraction
    redis_url: Annotated[str, AfterValidator(_no_password)]
    flush_seconds: Positive
    shards: Count
    workers: Count
    budget: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed


class Cluster(Params):
    device: str
    w_act: Annotated[float, Field(ge=-10, le=10)]
    w_grad: Annotated[float, Field(ge=-10, le=10)]
    w_freq: Annotated[float, Field(ge=-10, le=10)]
    scope: Literal["layer", "global"]
    log: bool
    method: Literal["kmeans", "hdbscan", "balanced"]
    clusters: Annotated[int, Field(ge=2)]
    coactivation: Annotated[int, Field(ge=0, le=64)]
    neighbours: Annotated[int, Field(ge=2)]
    min_dist: Annotated[float, Field(ge=0, le=1)]
    tokens: Count
    length: Annotated[int, Field(ge=8)]
    choice: str
    seed: Seed


class Experts(Params):
    device: str
    dtype: Literal["float32", "bfloat16", "nf4"]
    methods: str
    partition: str
    experts: Annotated[int, Field(ge=2)]
    size: Annotated[int, Field(ge=0)]
    shared: Annotated[float, Field(ge=0, lt=1)]
    shared_scope: Literal["fixed", "layer"]
    pool: Count
    pool_size: Count
    active: Fractions
    tokens: Count
    eval_tokens: Count
    other_texts: str
    other_tokens: Count
    length: Annotated[int, Field(ge=8)]
    project: Fraction
    alpha: Annotated[float, Field(ge=0, le=100)]
    beta: Annotated[float, Field(ge=0, le=100)]
    project_steps: Count
    project_lr: Positive
    seeds: Count
    seed: Seed


class Router(Params):
    device: str
    dtype: Literal["float32", "bfloat16", "nf4"]
    active: Fraction
    partition: str
    refine: Annotated[int, Field(ge=0, le=100)]
    init: Literal["random", "centroid", "analytic", "cmoe"]
    variable: bool
    goal: Literal["kl", "lm"]
    warm_tokens: Annotated[int, Field(ge=0)]
    tokens: Count
    batch: Count
    accumulate: Count
    length: Annotated[int, Field(ge=17)]
    processes: Count
    strategy: Literal["ddp", "zero2"]
    lr: Positive
    schedule: Literal["trapezoidal", "cosine", "constant"]
    precision: Literal["float32", "bfloat16", "auto"]
    balance: Annotated[float, Field(ge=0)]
    z_loss: Annotated[float, Field(ge=0)]
    revive: bool
    lr_experts: Annotated[float, Field(ge=0, lt=1)]
    unfreeze: Fraction
    patience: Count
    fit_tokens: Count
    eval_tokens: Count
    speed_seconds: Positive
    checkpoint_seconds: Positive
    seed: Seed

    @model_validator(mode="after")
    def _fits(self) -> Router:
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} must be a multiple of accumulate={self.accumulate}")
        if self.dtype == "nf4" and self.lr_experts:
            raise ValueError("quantised experts cannot train: choose dtype=bfloat16 or lr_experts=0")
        return self


@dataclass(frozen=True)
class Phase:
    """One notebook: its place in the story and what it hands over."""

    name: str
    number: int
    title: str
    inputs: tuple[str, ...]
    schema: type[Params]

    @property
    def notebook(self) -> Path:
        return ROOT / "notebooks" / f"{self.number:02d}_{self.name}.ipynb"

    def reads(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The inputs with these parameters: a model and texts of one's own replace the pretrained ones."""
        own = values.get("model") and values.get("texts")
        return tuple(name for name in self.inputs if not (own and name == "pretrain"))

    @property
    def params_file(self) -> Path:
        return ROOT / "params" / f"{self.name}.yaml"

    def upstream(self) -> set[str]:
        """Every phase that this one stands on, directly or not."""
        return {name for parent in self.inputs for name in (parent, *PHASES[parent].upstream())}


PHASES: dict[str, Phase] = {
    phase.name: phase
    for phase in (
        Phase("pretrain", 1, "Can two cores grow a language model worth taking apart?", (), Pretrain),
        Phase("scan", 2, "What does every neuron do?", ("pretrain",), Scan),
        Phase("cluster", 3, "Which neurons belong together?", ("scan",), Cluster),
        Phase("experts", 4, "Do the experts still add up to the model?", ("scan", "cluster"), Experts),
        Phase("router", 5, "Does a trained router earn its keep?", ("scan", "experts"), Router),
    )
}
