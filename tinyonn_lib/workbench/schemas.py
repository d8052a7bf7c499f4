"""Which parameters each phase takes, of which type and within which bounds.

Defaults live in `params/<phase>.yaml` alone.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

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


Ranking = Literal[
    "literal",
    "centred",
    "log_mass",
    "contrastive",
    "combined",
    "random",
    "length",
    "longest",
    "perplexity",
    "perplexity_fitted",
    "ifd",
]


def _rankings(text: str) -> str:
    if unknown := [name for name in text.split() if name not in get_args(Ranking)]:
        raise ValueError(f"unknown ranking '{unknown[0]}'; name some of {' '.join(get_args(Ranking))}")
    return text


Corruption = Literal["byte_noise", "word_shuffle", "repetition", "boilerplate", "wrong_answer"]


def _corruptions(text: str) -> str:
    if not text.split() or (unknown := [name for name in text.split() if name not in get_args(Corruption)]):
        what = f"unknown corruption '{unknown[0]}'" if text.split() else "no corruption given"
        raise ValueError(f"{what}; name some of {' '.join(get_args(Corruption))}")
    return text


def _numbers(text: str, least: float) -> str:
    try:
        good = all(least <= float(part) < 1 for part in text.split())
    except ValueError:
        good = False
    if not text.split() or not good:
        raise ValueError("expected learning rates below 1, separated by blanks, such as '1.0e-3 3.0e-3'")
    return text


def _rates(text: str) -> str:
    return _numbers(text, 1e-12)


def _rates_or_none(text: str) -> str:
    return _numbers(text, 0.0)


Method = Literal["gspo", "grpo", "rejection", "dpo", "gold"]


def _methods(text: str) -> str:
    if unknown := [name for name in text.split() if name not in get_args(Method)]:
        raise ValueError(f"unknown method '{unknown[0]}'; name some of {' '.join(get_args(Method))}")
    if "gspo" not in text.split():
        raise ValueError("gspo is missing: the others are its controls")
    return text


def _no_password(url: str) -> str:
    # Parameters end up in manifests, notebooks and reports.
    if urlsplit(url).password:
        raise ValueError("leave the password out of the URL and give it as TINYONN_REDIS_PASSWORD in the environment")
    return url


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
    width: Annotated[int, Field(ge=16, multiple_of=2)]
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Annotated[int, Field(ge=8, multiple_of=2)]
    ffn: Annotated[int, Field(ge=16)]
    experts: Annotated[int, Field(ge=2)]
    active: Count
    student_width: Annotated[int, Field(ge=16, multiple_of=2)]
    student_layers: Count
    student_ffn: Annotated[int, Field(ge=16)]
    tokens: Count
    student_tokens: Count
    seconds: Annotated[float, Field(ge=0)]
    batch: Count
    ramp: Annotated[float, Field(ge=0, lt=1)]
    length: Annotated[int, Field(ge=8)]
    layout: Literal["packed", "documents", "padded"]
    optimizer: Literal["muon", "adamw"]
    lr_matrix: Positive
    lr_other: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["trapezoidal", "cosine", "constant"]
    decay_share: Annotated[float, Field(gt=0, le=1)]
    clip: Annotated[float, Field(ge=0)]
    balance: Annotated[float, Field(ge=0)]
    mtp: Annotated[float, Field(ge=0)]
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
    balance: Annotated[float, Field(ge=0)]
    z_loss: Annotated[float, Field(ge=0)]
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
    corruptions: Annotated[str, AfterValidator(_corruptions)]
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
    against: Annotated[str, AfterValidator(_rankings)]
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
    rates: Annotated[str, BeforeValidator(str), AfterValidator(_rates)]
    seeds: Count
    sweep_steps: Count
    sweep_rates: Annotated[str, BeforeValidator(str), AfterValidator(_rates)]
    sweep_seeds: Count
    handover: Count
    student_rates: Annotated[str, BeforeValidator(str), AfterValidator(_rates_or_none)]
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
    methods: Annotated[str, AfterValidator(_methods)]
    rates: Annotated[int, Field(ge=1, le=3)]
    seeds: Count
    steps: Count
    prompts_per_step: Count
    group: Annotated[int, Field(ge=2)]
    updates: Count
    temperature: Positive
    beta: Annotated[float, Field(ge=0)]
    checkpoint_seconds: Positive
    seed: Seed

    @model_validator(mode="after")
    def _divides(self) -> Align:
        if self.prompts_per_step * self.group % self.updates:
            raise ValueError(
                f"updates={self.updates} must divide the {self.prompts_per_step * self.group} answers of a round"
            )
        return self
