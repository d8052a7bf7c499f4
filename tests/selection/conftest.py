"""Tiny mixtures of every kind the bench knows, their routers loud enough to tell tokens apart; what goes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.selection.routers import routers

from .cuts import write
from .warmed_selectors import based

torch.set_num_threads(1)

WORDS = ["router", "neuron", "expert", "layer", "token", "model", "scans", "feeds", "splits", "joins", "prunes"]
COMMON = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {  # model type → fields beyond the common ones; every one has two routers
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "logits_scaling": 3.0},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24
    },
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1],
        "num_hidden_layers": 3,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "num_hidden_layers": 3, "routed_scaling_factor": 2.0, "norm_topk_prob": False,
        "partial_rotary_factor": 1.0,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]
    },
    "lfm2_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_dense_layers": 1,
        "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3,
    },
}  # fmt: skip


def moe(kind: str = "olmoe", seed: int = 0, **fields: Any) -> Any:
    """A mixture of random weights, in evaluation mode. Router rows have length 1, so that logits are about 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | CONFIGS.get(kind, {}) | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
        for layer in routers(model) if kind in CONFIGS else []:
            layer.weight.normal_(0, layer.weight.shape[1] ** -0.5)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_moe() -> Callable[..., Any]:
    """`moe(kind, seed, **fields)`; tests that change weights make their own."""
    return moe


@pytest.fixture(scope="session")
def olmoe() -> Any:
    """For reading only."""
    return moe()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 300 tokens: any text has one token for each byte or fewer."""
    return train_bpe([" ".join(WORDS)] * 3, 300)


def sentences(count: int, seed: int = 0, least: int = 2, most: int = 9) -> list[str]:
    """Texts of `least` to `most` words, numbered, so that no two are alike."""
    make = torch.Generator().manual_seed(seed)
    sizes = torch.randint(least, most + 1, (count,), generator=make).tolist()
    picks = [torch.randint(len(WORDS), (size,), generator=make).tolist() for size in sizes]
    return [f"{number} " + " ".join(WORDS[pick] for pick in chosen) for number, chosen in enumerate(picks)]


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., list[str]]:
    return sentences


@pytest.fixture
def data(tmp_path: Path) -> str:
    """99 rows, 1 too long, 1 empty, 1 not text, 1 broken, 1 torn, in two files."""
    source = write(
        tmp_path / "data", b=[f"text {n}" for n in range(60)], a=[f"über {n}" for n in range(39)] + [" ", "zzz"]
    )
    with (tmp_path / "data" / "a.jsonl").open("ab") as file:
        file.write(b'{"text": 5}\n{"text": "\xff"}\n{"text": "to')
    return source


@pytest.fixture
def base(tmp_path: Path, make_moe: Callable[..., Any], tokenizer: Any) -> Path:
    return based(tmp_path / "models/base", make_moe, tokenizer)
