"""Which parameters each phase takes, of which type and within which bounds.

Defaults live in `params/<phase>.yaml` alone; the types are those of `values`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from tinyonn_lib.workbench.values import (
    Corruptions,
    Count,
    Fraction,
    Fractions,
    Methods,
    NotNegative,
    Positive,
    Ranking,
    Rankings,
    Rates,
    RatesOrZero,
    RunName,
    Seed,
    Share,
    Url,
)


class Params(BaseModel):
    """What every phase takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    run: RunName
    base: RunName | Literal[""]


class Pretrain(Params):
    texts: str
    corpus_packages: str
    device: str
    calibration: Share
    heldout: Share
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)]
    tokenizers: Annotated[str, BeforeValidator(str)]
    architecture: Literal["qwen3", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gemma3n"]
    width: Annotated[int, Field(ge=16, le=2**20, multiple_of=2)]
    layers: Annotated[int, Field(ge=1, le=10_000)]
    heads: Annotated[int, Field(ge=1, le=2**16)]
    kv_heads: Count
    head_dim: Annotated[int, Field(ge=8, le=2**16, multiple_of=2)]
    ffn: Annotated[int, Field(ge=16, le=2**20)]
    experts: Annotated[int, Field(ge=2, le=2**16)]
    active: Count
    student_width: Annotated[int, Field(ge=16, le=2**20, multiple_of=2)]
    student_layers: Annotated[int, Field(ge=1, le=10_000)]
    student_ffn: Annotated[int, Field(ge=16, le=2**20)]
    tokens: Count
    student_tokens: Count
    seconds: NotNegative
    batch: Count
    ramp: Annotated[float, Field(ge=0, lt=1)]
    length: Annotated[int, Field(ge=8)]
    layout: Literal["packed", "documents", "padded"]
    optimizer: Literal["muon", "adamw"]
    lr_matrix: Positive
    lr_other: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative
    schedule: Literal["trapezoidal", "cosine", "constant"]
    decay_share: Annotated[float, Field(gt=0, le=1)]
    clip: NotNegative
    balance: NotNegative
    mtp: NotNegative
    precision: Literal["auto", "float32", "bfloat16"]
    ablation_tokens: Annotated[int, Field(ge=0)]
    ablation_seeds: Count
    ngram_order: Annotated[int, Field(ge=1, le=6)]
    checkpoint_seconds: Positive
    prompts: str
    seed: Seed

    @model_validator(mode="after")
    def _heads(self) -> Pretrain:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.active > self.experts:
            raise ValueError(f"active={self.active} must be at most experts={self.experts}")
        if self.mtp and self.architecture == "gemma3n":
            raise ValueError("gemma3n has no multi-token prediction: choose mtp=0 or another architecture")
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
    redis_url: Url
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


class Training(Params):
    """What phases take that train through `lm.train.fit`, in one process or in several."""

    device: str
    dtype: Literal["float32", "bfloat16", "nf4"]
    tokens: Count
    batch: Count
    accumulate: Count
    processes: Count
    lr: Positive
    schedule: Literal["trapezoidal", "cosine", "constant"]
    precision: Literal["float32", "bfloat16", "auto"]
    eval_tokens: Count
    checkpoint_seconds: Positive
    seed: Seed

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} must be a multiple of accumulate={self.accumulate}")
        return self


class Router(Training):
    active: Fraction
    partition: str
    refine: Annotated[int, Field(ge=0, le=100)]
    init: Literal["random", "centroid", "analytic", "cmoe"]
    variable: bool
    goal: Literal["kl", "lm"]
    warm_tokens: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=17)]
    strategy: Literal["ddp", "zero2"]
    balance: NotNegative
    z_loss: NotNegative
    revive: bool
    lr_experts: Annotated[float, Field(ge=0, lt=1)]
    unfreeze: Fraction
    patience: Count
    fit_tokens: Count
    speed_seconds: Positive

    @model_validator(mode="after")
    def _fits(self) -> Router:
        if self.dtype == "nf4" and self.lr_experts:
            raise ValueError("quantised experts cannot train: choose dtype=bfloat16 or lr_experts=0")
        return self


class Selector(Params):
    device: str
    dtype: Literal["float32", "bfloat16"]
    model: str
    texts: str
    rows: Annotated[int, Field(ge=16)]
    length: Annotated[int, Field(ge=0)]
    loss: Literal["contrastive", "lm"]
    corruptions: Corruptions
    trash_expert_ratio: Fraction
    epochs: Count
    batch: Count
    lr: Positive
    full: bool
    seeds: Count
    judge_rows: Annotated[int, Field(ge=16)]
    checkpoint_seconds: Positive
    seed: Seed


class Select(Params):
    device: str
    dtype: Literal["float32", "bfloat16"]
    selector: str
    epoch: Annotated[int, Field(ge=0)]
    texts: str
    column: str
    pool_packages: str
    pool_rows: Annotated[int, Field(ge=64)]
    dirt: Fraction
    heldout: Share
    score: Ranking
    trash: Literal["last", "calibrated"]
    trash_expert_ratio: Fraction
    selection_percentage: Annotated[float, Field(gt=0, le=1)]
    against: Rankings
    unique: Annotated[float, Field(ge=0, le=1)]
    length: Annotated[int, Field(ge=0)]
    batch_tokens: Count
    processes: Count
    compare_rows: Annotated[int, Field(ge=64)]
    seed: Seed

    @model_validator(mode="after")
    def _calibrated(self) -> Select:
        if "combined" in (self.score, *self.against.split()) and self.trash != "last":
            raise ValueError(
                "combined was calibrated with the last experts as trash: choose trash=last or another score"
            )
        return self


class Target(Training):
    model: str
    heldout_texts: str
    seeds: Annotated[int, Field(ge=1)]
    r: Count
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: str
    length: Annotated[int, Field(ge=8)]
    gradient_checkpointing: bool
    strategy: Literal["ddp", "zero2", "zero3"]

    @model_validator(mode="after")
    def _fits(self) -> Target:
        if self.dtype == "nf4" and self.processes > 1:
            raise ValueError("a 4-bit base trains in one process: choose processes=1, or dtype=bfloat16")
        return self


class Evaluate(Params):
    device: str
    dtype: Literal["float32", "bfloat16"]
    tasks: str
    mmlu: str
    fewshot: Annotated[int, Field(ge=0)]
    limit: Annotated[int, Field(ge=0)]
    documents: Count
    questions: Count
    batch: Count
    seed: Seed


class KV(Params):
    device: str
    dtype: Literal["float32", "bfloat16"]
    teacher: str
    student: str
    texts: str
    second: Annotated[str, StringConstraints(min_length=1)]
    second_tokens: Count
    tokens: Annotated[int, Field(ge=256)]
    eval_tokens: Annotated[int, Field(ge=64)]
    length: Annotated[int, Field(ge=8)]
    layers: Literal["depth", "similarity"]
    sources: Count
    mlp_ratio: Positive
    steps: Count
    batch: Count
    rates: Rates
    seeds: Count
    sweep_steps: Count
    sweep_rates: Rates
    sweep_seeds: Count
    handover: Count
    student_rates: RatesOrZero
    checkpoint_seconds: Positive
    seed: Seed

    @model_validator(mode="after")
    def _handed_over(self) -> KV:
        if self.handover > self.length - 2:
            raise ValueError(
                f"handover={self.handover} leaves nothing to predict: at most length - 2 = {self.length - 2}"
            )
        return self


class Align(Params):
    device: str
    model: str
    student: str
    texts: str
    distil_tokens: Count
    distil_heldout: Count
    distil_rate: Positive
    distil_seeds: Count
    length: Annotated[int, Field(ge=8)]
    task: Literal["arithmetic", "brackets", "format"]
    size: Annotated[int, Field(ge=0)]
    warm_prompts: Count
    warm_steps: Count
    prompts: Count
    answers: Annotated[int, Field(ge=2)]
    tune_prompts: Count
    heldout_prompts: Count
    methods: Methods
    rates: Annotated[int, Field(ge=1, le=3)]
    seeds: Count
    steps: Count
    prompts_per_step: Count
    group: Annotated[int, Field(ge=2)]
    updates: Count
    temperature: Positive
    beta: NotNegative
    checkpoint_seconds: Positive
    seed: Seed

    @model_validator(mode="after")
    def _divides(self) -> Align:
        if self.prompts_per_step * self.group % self.updates:
            raise ValueError(
                f"updates={self.updates} must divide the {self.prompts_per_step * self.group} answers of a round"
            )
        return self
