"""Bad input where caches are carried over: one clear line, nothing earlier harmed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from .mistakes import bad, finished, refused, stops, stranger


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `default` with its two models; beside it folders with models whose caches are not keys and values."""
    with finished(tmp_path_factory.mktemp("bad"), "pretrain") as folder:
        stranger(folder, "Mamba", state_size=4)
        stranger(
            folder, "DeepseekV3", intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
            kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=1,
            n_routed_experts=8, moe_intermediate_size=8, max_position_embeddings=32,
        )  # fmt: skip
        stranger(folder, "Bloom", n_head=2)
        lines = [json.dumps({"text": f"The router feeds the expert {n}.", "source": "one"}) for n in range(60)]
        (folder / "one.jsonl").write_text("\n".join(lines))
        (folder / "empty.jsonl").write_text("")
        yield folder


# name → (arguments, what its line says); {} is the home
MISTAKES = {
    "no attention": (["teacher={}/Mamba"], "A mamba has linear_attention, not plain keys and values per layer"),
    "latent attention": (["teacher={}/DeepseekV3"], "A deepseek_v3 has latent attention, not plain keys and values"),
    "no rotation": (["teacher={}/Bloom"], "BloomForCausalLM .*choose another model"),
    "student": (["student={}/Mamba"], "A mamba has linear_attention, not plain keys"),
    "missing teacher": (["teacher=/no/such"], "No such file or folder: /no/such"),
    "missing student": (["student=/no/such"], "No such file or folder: /no/such"),
    "hub teacher": (["teacher=owner/name"], "hf download owner/name"),
    "half a folder": (["teacher={}"], "holds no config.json"),
    "missing texts": (["texts=/no/such.jsonl"], "No such file or folder: /no/such.jsonl"),
    "empty texts": (["texts={}/empty.jsonl"], "empty.jsonl is empty"),
    "too long": (["length=64"], "Texts of 64 tokens are longer than the context of 'student' .32.: cut them"),
    "layers": (["layers=random"], "kv.layers = 'random': Input should be 'depth' or 'similarity'"),
    "handover": (["handover=31"], "handover=31 leaves nothing to predict: at most length - 2 = 30"),
    "rates": (["rates='1.0e-3 fast'"], "kv.rates = '1.0e-3 fast': .*learning rates below 1"),
    "no rates": (["rates=''"], "kv.rates = '': .*learning rates below 1"),
    "rate 0": (["rates='0 1.0e-3'"], "kv.rates = '0 1.0e-3'"),
    "no number": (["sweep_rates=nan"], "kv.sweep_rates = nan: .*learning rates below 1"),
    "student rates": (["student_rates=-1.0e-3"], "kv.student_rates = -0.001: .*learning rates below 1"),
    "sources": (["sources=0"], "kv.sources = 0: Input should be greater than or equal to 1"),
    "no second": (["second=''"], "kv.second = ''"),
    "missing second": (["second=/no/such"], "No such file or folder: /no/such"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_gives_one_clear_line(home: Path, name: str) -> None:
    stops("kv", home, name, *MISTAKES[name])


def test_texts_of_a_single_source(home: Path, tmp_path: Path) -> None:
    import pandas as pd

    rows = [(f"The router feeds the expert {n} and the neuron.", split, split) for n in range(40)
            for split in ("calibration", "heldout")]  # fmt: skip
    pd.DataFrame(rows, columns=["text", "source", "split"]).to_parquet(tmp_path / "one.parquet")
    says = "All texts to learn from have one source: give texts from several"
    stops("kv", home, "single", [f"texts={tmp_path}/one.parquet"], says)


def test_through_the_command(home: Path, subtests: pytest.Subtests) -> None:
    says = ("A deepseek_v3 has latent attention", "choose another model")
    refused(home, {"latent": bad("kv", f"teacher={home}/DeepseekV3", says=says)}, subtests)
