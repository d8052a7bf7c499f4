"""Every kind of dense model becomes a standard checkpoint: equal logits, equal text, no missing or unexpected key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import export
from tinyonn_lib.experts.families import FAMILIES, NEVER, SOURCES, Layout, family
from tinyonn_lib.experts.weights import Weights

from .dense import dense, divide

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
Q2, Q3, G4 = "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # name → class, dense model, partition
    f"{kind}{' tied' if tied else ''}{' shared' if shared else ''}": (
        {"qwen2": Q2, "qwen3": G4 if shared else Q3}.get(kind, G4),
        {"kind": kind, "tie_word_embeddings": tied, **({} if kind == "qwen2" else {"head_dim": 16})},
        {"shared": shared},
    )
    for kind in SOURCES
    for tied in (False, True)
    for shared in (0, 16)
} | {
    "Llama-3's rope": (G4, {"kind": "llama", "rope_parameters": LLAMA3}, {"shared": 8}),
    "YaRN": (Q2, {"kind": "qwen2", "rope_parameters": YARN}, {}),
    "window in all layers, Mistral": (Q2, {"kind": "mistral", "sliding_window": 5}, {}),
    "window in one layer, Qwen2": (
        Q2, {"kind": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}
    ),
    "window in all layers, Qwen3": (
        Q3, {"kind": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, {}
    ),
    "a window that is never full": (G4, {"kind": "mistral", "sliding_window": 64}, {}),
    "biases, Qwen3": (Q3, {"kind": "qwen3", "attention_bias": True}, {}),
    "another activation": (G4, {"kind": "llama", "hidden_act": "gelu_pytorch_tanh"}, {}),
    "layers with 3 and 6 experts": (G4, {"kind": "qwen2"}, {"counts": (3, 6), "sizes": (20, 9)}),
    "narrow and unequal widths": (Q2, {"kind": "qwen2"}, {"sizes": (15, 9)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, dict[str, Any]]]:
    """Case → folder, dense model, what a stranger's one process found in it."""
    base = tmp_path_factory.mktemp("families")
    models = {name: dense(**options) for name, (_, options, _) in CASES.items()}
    folders = {
        name: export.export(models[name], divide(**CASES[name][2]), base / str(i)) for i, name in enumerate(CASES)
    }
    found = export.verify_all([(folders[name], models[name], IDS) for name in CASES])
    return {name: (folders[name], models[name], proof) for name, proof in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_model(name: str, exported: dict[str, tuple[Path, Any, dict[str, Any]]]) -> None:
    _, model, proof = exported[name]
    assert proof["class"] == CASES[name][0]
    assert proof["missing"] == proof["unexpected"] == []
    assert proof["relative_error"] <= 1e-5
    assert proof["tokens"] == model.generate(IDS[:1, :8], max_new_tokens=16, do_sample=False)[0].tolist()


def test_the_card_says_which_attention_knows_the_window(
    exported: dict[str, tuple[Path, Any, dict[str, Any]]],
) -> None:
    told = {name for name, (folder, _, _) in exported.items() if "sdpa or eager" in (folder / "README.md").read_text()}
    assert told == {"window in all layers, Mistral", "window in one layer, Qwen2"}


def by_hand(model: Any, part: Any, routers: list[torch.Tensor], gates: str, k: int) -> torch.Tensor:
    """Logits of the divided model: the FFNs written out, expert by expert, in float64."""
    model = model.double()

    def ffn(layer: int, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        logits = x @ routers[layer].double().T
        weights = logits.softmax(-1) * max(len(r) for r in routers) if gates == "softmax" else 2 * logits.sigmoid()
        on = torch.zeros_like(h)
        on[..., part.shared[layer]] = 1
        for row in logits.topk(min(k, logits.shape[-1]), -1).indices.unbind(-1):
            for e, neurons in enumerate(part.experts[layer]):
                on[..., neurons] += (weights[..., e] * (row == e))[..., None]
        return (h * on) @ mlp.down_proj.weight.T

    for layer, block in enumerate(model.model.layers):
        mlp = block.mlp
        mlp.forward = lambda x, layer=layer, mlp=mlp: ffn(layer, mlp, x)
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("kind", "gates", "division"),
    [
        ("qwen2", "softmax", {"shared": 16, "dropped": 8}),
        ("qwen3", "softmax", {"dropped": 4}),
        ("qwen3", "sigmoid", {"shared": 16}),
        ("llama", "sigmoid", {"counts": (3, 6), "sizes": (20, 9), "dropped": 2}),
        ("mistral", "sigmoid", {}),
    ],
)
def test_routed_as_the_gates_say_and_k_adjustable(
    kind: str, gates: str, division: dict[str, Any], tmp_path: Path
) -> None:
    model, part = dense(kind), divide(**division)
    assert family(model.config, part).gates == gates
    generator = torch.Generator().manual_seed(1)
    routers = [torch.randn(len(index), 32, generator=generator) for index in part.experts]
    folder = export.export(model, part, tmp_path / "moe", k=2, routers=routers)
    for k, options in ((2, {}), (4, {"num_experts_per_tok": 4})):  # with k=4, a layer of 3 experts must take padding
        moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        with torch.no_grad():
            found = moe(IDS).logits
        expected = by_hand(dense(kind), part, routers, gates, k)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("low", [None, 0.0, -100.0])
def test_padding_is_chosen_last_whatever_the_router(low: float | None, tmp_path: Path) -> None:
    """Only the selection bias keeps an expert of zeros from taking a real one's place."""
    model, part = dense("llama"), divide(counts=(3, 6), sizes=(20, 9))
    rows = [torch.zeros(count, 32) for count in (3, 6)]
    biases = None if low is None else [torch.full((count,), low) for count in (3, 6)]
    folder = export.export(model, part, tmp_path / "moe", k=3, routers=rows, biases=biases)
    moe: Any = AutoModelForCausalLM.from_pretrained(folder)
    bias = moe.model.layers[0].mlp.gate.e_score_correction_bias
    assert bias.tolist() == [low or 0] * 3 + [(low or 0) + NEVER] * 3
    _, _, chosen = moe.model.layers[0].mlp.gate(torch.randn(50, 32))
    assert chosen.sort(-1).values.tolist() == [[0, 1, 2]] * 50
    assert (moe.model.layers[0].mlp.experts.down_proj[3:] == 0).all()


def test_small_routers_keep_gates_near_one_and_the_choice(tmp_path: Path) -> None:
    """Rows are written as they are: scaled by 1e-4, they choose the same experts with gates of 1."""
    model, part = dense("qwen3"), divide()
    rows = [1e-4 * torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    moe: Any = AutoModelForCausalLM.from_pretrained(export.export(model, part, tmp_path / "moe", k=2, routers=rows))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(9))
    _, gates, chosen = moe.model.layers[1].mlp.gate(x)
    torch.testing.assert_close(gates * 4, torch.ones(50, 2), atol=3e-3, rtol=0)
    assert chosen.sort(-1).values.tolist() == (x @ rows[1].T).topk(2).indices.sort(-1).values.tolist()


def test_the_shared_gate_is_half_but_not_zero(tmp_path: Path) -> None:
    """A zero row would do in transformers; llama.cpp's own converter would then give 0/0."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = export.export(dense("qwen2").to(dtype), divide(shared=8), tmp_path / "moe")
        moe: Any = AutoModelForCausalLM.from_pretrained(folder)
        gate = moe.model.layers[0].mlp.shared_expert_gate
        assert (gate.weight > 0).all()
        assert (gate(100 * torch.randn(9, 32, dtype=dtype)).sigmoid() == 0.5).all()


def test_bfloat16_stays_bfloat16_but_for_the_selection_bias(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = dense("llama").to(torch.bfloat16)
    folder = export.export(model, divide(shared=8), tmp_path / "moe")
    kinds = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert {name for name, kind in kinds.items() if kind != torch.bfloat16} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(2)
    }
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "options", "division", "message"),
    [
        ("gpt2", {}, {}, "No standard MoE checkpoint continues a 'gpt2' model; exportable: qwen2, qwen3, llama"),
        ("llama", {"mlp_bias": True}, {}, r"FFNs have biases \(mlp_bias\)"),
        ("llama", {"attention_bias": True}, {}, "Glm4Moe has no bias after attention"),
        ("qwen3", {"attention_bias": True}, {"shared": 8}, "Qwen3Moe has no shared experts; Glm4Moe has no bias after"),
        ("mistral", {"sliding_window": 5}, {"counts": (3, 6), "sizes": (20, 9)}, "Glm4Moe has no sliding window; "),
        (
            "qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {},
            "Qwen3Moe has no sliding window in some layers only; Glm4Moe has no sliding window",
        ),
        ("llama", {}, {"counts": (1, 1)}, "Glm4Moe has no layers of a single expert"),
    ],
)  # fmt: skip
def test_what_no_class_can_hold(kind: str, options: dict[str, Any], division: dict[str, Any], message: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, num_hidden_layers=2, **options)
    with pytest.raises(BenchError, match=message):
        family(config, divide(**division))


def test_a_selection_bias_asks_for_sigmoid_gates() -> None:
    from transformers import AutoConfig

    for kind in SOURCES:
        assert family(dense(kind).config, divide(), bias=True).architecture == G4
    for kind, options, message in (
        ("qwen3", {"attention_bias": True}, "Qwen3Moe has no selection bias; Glm4Moe has no bias after attention"),
        ("mistral", {"sliding_window": 5}, "Glm4Moe has no sliding window; Qwen2Moe has no selection bias"),
    ):
        with pytest.raises(BenchError, match=message):
            family(AutoConfig.for_model(kind, num_hidden_layers=2, **options), divide(), bias=True)


def test_every_source_has_families_and_every_family_a_source() -> None:
    assert {name for names in SOURCES.values() for name in names} == set(FAMILIES)


def test_layout_rounds_up_to_the_grouped_kernels_step() -> None:
    layout = Layout.of(divide(counts=(3, 6), sizes=(20, 9)))
    assert (layout.counts, layout.experts, layout.size, layout.shared, layout.even) == ((3, 6), 6, 24, 10, False)


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # as in their config.json, two layers of each
    "Qwen1.5-4B": (
        {"kind": "qwen2", "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20,
         "num_key_value_heads": 20, "vocab_size": 151936, "use_sliding_window": False, "sliding_window": 32768,
         "max_window_layers": 21, "rope_theta": 5000000.0},
        {"neurons": 6912, "counts": (64, 64), "sizes": (64, 64)}, Q2,
    ),
    "Qwen3-4B": (
        {"kind": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
         "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36, "rope_theta": 1000000},
        {"neurons": 9728, "counts": (128, 128), "sizes": (64, 64)}, G4,
    ),
    "Llama-3.2-1B": (
        {"kind": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
         "rope_theta": 500000.0, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
         "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "max_position_embeddings": 131072},
        {"neurons": 8192, "counts": (100, 100), "sizes": (81, 81)}, G4,
    ),
    "Mistral-7B-v0.1": (
        {"kind": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 32768, "rope_theta": 10000.0},
        {"neurons": 14336, "counts": (128, 128)}, Q2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_shapes_without_weights(name: str) -> None:
    """What would be written for published models is what the class expects: names and shapes, on no memory at all."""
    from transformers import AutoConfig

    options, division, architecture = PUBLISHED[name]
    own = {key: value for key, value in options.items() if key != "kind"}
    config = AutoConfig.for_model(options["kind"], num_hidden_layers=2, **own)
    with torch.device("meta"):
        shapes = {key: tuple(p.shape) for key, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    source = Weights(config, shapes, lambda key: torch.empty(shapes[key], device="meta"), None, False)
    part = divide(**division)
    target, layout = family(config, part), Layout.of(part)
    assert target.architecture == architecture
    written = {}
    for key in shapes:
        written |= {new: tuple(t.shape) for new, t in export._divided(key, source, target, layout, part)}
    with torch.device("meta"):
        moe = AutoModelForCausalLM.from_config(target.config(config, layout, 4))
    wanted = {key: tuple(p.shape) for key, p in moe.named_parameters()}
    wanted |= {key: tuple(b.shape) for key, b in moe.named_buffers() if "e_score" in key}
    for layer in range(2):  # fused in memory, one by one in the file
        prefix = f"model.layers.{layer}.mlp.experts."
        experts, double, width = wanted.pop(f"{prefix}gate_up_proj")
        assert wanted.pop(f"{prefix}down_proj") == (experts, width, double // 2)
        for e in range(experts):
            wanted |= {f"{prefix}{e}.{part}_proj.weight": (double // 2, width) for part in ("gate", "up")}
            wanted[f"{prefix}{e}.down_proj.weight"] = (width, double // 2)
    assert written == wanted
