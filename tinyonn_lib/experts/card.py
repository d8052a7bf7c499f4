"""The model card of an exported checkpoint: its base model, how it was divided, what was padded, how to load it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from tinyonn_lib.experts.families import Family, Layout, Traits
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.weights import Weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})")


Rule = Literal["zero", "linear", "biased"]

RULES: dict[Rule, tuple[str, str]] = {
    "zero": (
        "none: zero rows, every expert on",
        "There is no router: its rows are zero, so all experts tie and all have to be on.",
    ),
    "linear": ("linear", "Those with the highest router logits are on."),
    "biased": (
        "linear, with a bias for the choice",
        "Those with the highest sigmoid(router logit) + `e_score_correction_bias` are on.",
    ),
}
"""How experts are chosen, for the card's table and text."""


def model_card(
    weights: Weights,
    family: Family,
    layout: Layout,
    partition: Partition,
    k: int,
    rule: Rule,
    facts: Mapping[str, Any],
) -> str:
    """The text of README.md, with the front matter that the hub reads."""
    base, revision = lineage(weights)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["moe", "tiny-onn"]}
    front |= {"base_model": base} if _HUB_ID.fullmatch(base) else {}
    front |= _licence(weights.folder)
    dtype = str(weights.dtype).removeprefix("torch.")
    kind = "4-bit (NF4), dequantised" if weights.packed else dtype
    rows = {
        "base model": f"{base} ({weights.config.model_type})",
        "revision": revision,
        "weights of the base model": kind,
        "partition": partition.method,
        "experts per layer": _range([len(index) for index in partition.experts]),
        "neurons per expert": _range([index.shape[1] for index in partition.experts]),
        "shared neurons per layer": _range([len(part) for part in partition.shared]),
        "dropped neurons, all layers": sum(len(part) for part in partition.dropped),
        "padding (zeros), all layers": padding(family, layout, partition),
        "router": RULES[rule][0],
        **facts,
    }
    if family.model_type == "qwen2_moe" and (window := Traits.of(weights.config).window):
        rows["sliding window"] = f"{window} tokens; load with sdpa or eager attention, which know it from the mask"
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items() if value != "")
    rounds = dtype != "float32" and layout.experts & (layout.experts - 1)
    rounded = f" ({dtype} rounds it: {layout.experts} is no power of two)" if rounds else ""
    gates = {
        "softmax": f"softmax over the {layout.experts} router logits, not renormalised; `down_proj` carries the factor "
        f"{layout.experts}{rounded}",
        "sigmoid": "2·sigmoid(router logit), not renormalised",
    }[family.gates]
    fewer = (
        f"model = AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok={max(1, k // 2)})  # fewer active\n"
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---\n\n"
        f"# {html.escape(base)}, its FFNs divided into experts\n\n"
        f"{len(layout.counts)} layers of {layout.experts} experts with {layout.size} neurons each, {k} of them active "
        "per token. An expert is rows of the base model's `gate_proj` and `up_proj` and columns of its `down_proj`.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)  # no remote code\n"
        f"{fewer if rule != 'zero' else ''}tokenizer = AutoTokenizer.from_pretrained(folder)\n```\n\n"
        f"{RULES[rule][1]} An expert's output counts {gates}. With a zero router and every expert on, the model equals "
        "the base model"
        f"{' less its dropped neurons' if any(len(part) for part in partition.dropped) else ''}.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )


_VARIABLE = "## Variable number of experts"


def with_variable_k(text: str, k: int, mean_k: Sequence[float]) -> str:
    """A card's text with the section about `variable_k.json`, in place of an earlier one.

    Args:
        k: what the config asks for.
        mean_k: per layer, see `variable.VariableK`.
    """
    mean = sum(mean_k) / len(mean_k)
    section = (
        f"\n{_VARIABLE}\n\n"
        "Besides its fixed k this model has a threshold per layer, which turns on as many experts as each token needs. "
        "A standard config can only say one number for all tokens, so plain transformers, and all that is made for it, "
        f"runs the {k} best. The thresholds lie beside it in `variable_k.json`: an expert is on if its order, as that "
        f"file says, is above its layer's. By them {mean:.2f} are on in the mean ({min(mean_k):.2f} to "
        f"{max(mean_k):.2f} by layer).\n\n"
        "```python\nfrom tinyonn_lib.experts import variable\n\n"
        "model = variable.load(folder)  # a Transformers model; or variable.attach(model, folder)\n```\n"
    )
    return re.sub(rf"\n{_VARIABLE}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL) + section


def lineage(weights: Weights) -> tuple[str, str]:
    """The base model's hub id, or the last part of its path (never the path), and its revision or ""."""
    path = str(weights.folder.resolve()) if weights.folder else ""
    if found := _SNAPSHOT.search(path):
        return f"{found[1]}/{found[2]}", found[3]
    name = Path(path or weights.config.name_or_path or f"a {weights.config.model_type} model").name
    given = str(weights.config.name_or_path or "")
    if weights.folder is None and _HUB_ID.fullmatch(given):
        name = given
    return name, str(getattr(weights.config, "_commit_hash", None) or "")


def padding(family: Family, layout: Layout, partition: Partition) -> str:
    """The zeros that were added: neurons of real experts, whole experts, shared neurons; "none" if nothing."""
    neurons = sum(len(index) * (layout.size - index.shape[1]) for index in partition.experts)
    experts = sum(layout.experts - count for count in layout.counts)
    shared = sum(family.shared_width(layout) - len(part) for part in partition.shared) if family.shared else 0
    parts = {"neurons in experts": neurons, "whole experts": experts, "shared neurons": shared}
    return ", ".join(f"{number} {name}" for name, number in parts.items() if number) or "none"


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def _cell(value: Any) -> str:
    return html.escape(" ".join(str(value).split())).replace("|", "&#124;")


def _licence(folder: Path | None) -> dict[str, str]:
    """What the base model's own card says about its licence."""
    from huggingface_hub import metadata_load

    try:
        front = (metadata_load(folder / "README.md") if folder else None) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: front[key] for key in keys if isinstance(front.get(key), str)}
