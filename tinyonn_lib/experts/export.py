"""Write experts as a standard checkpoint that plain `AutoModelForCausalLM` loads, with no code of ours.

Softmax-routed families (PEERS: Qwen3Moe with `norm_topk_prob=False`): a zero router gives every expert the gate 1/E,
so `down_proj` carries the factor E, and with every expert on the checkpoint equals the dense model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.assemble import assemble
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm.models import FFN

FAMILIES: dict[str, tuple[str, str]] = {"qwen3": ("qwen3_moe", "Qwen3MoeForCausalLM")}
"""Dense model type → (MoE model type, class). Adding a family: a line here and, if its keys differ, a branch below."""

WIDTH_STEP = 8
"""Rows of 16 bytes in bfloat16, which `grouped_mm`, the default way to run experts, requires."""


def target_config(dense: Any, partition: Partition, k: int) -> Any:
    """The MoE configuration: the dense one's own fields plus the experts' shape.

    Raises:
        BenchError: No standard MoE class continues this dense class.
    """
    from transformers import AutoConfig

    if dense.model_type not in FAMILIES:
        raise BenchError(
            f"No standard MoE checkpoint continues a '{dense.model_type}' model; exportable: {', '.join(FAMILIES)}."
        )
    if partition.size % WIDTH_STEP:
        raise BenchError(
            f"{partition.count} experts of {partition.size} neurons: transformers' grouped kernels need a multiple of "
            f"{WIDTH_STEP}; choose a number of experts that divides d_ffn into such parts."
        )
    kind, architecture = FAMILIES[dense.model_type]
    known = AutoConfig.for_model(kind)
    own = {name: value for name, value in dense.to_dict().items() if hasattr(known, name) and name != "model_type"}
    own |= {
        "num_experts": partition.count,
        "num_experts_per_tok": k,
        "moe_intermediate_size": partition.size,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "architectures": [architecture],
    }
    return AutoConfig.for_model(kind, **own)


def export(
    model: Any,
    tokenizer: Any,
    ffns: Sequence[FFN],
    partition: Partition,
    folder: Path,
    *,
    k: int | None = None,
    routers: Sequence[Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write the divided model to `folder`: config, safetensors, tokenizer, generation config and a model card.

    Args:
        k: Active experts per token that the config asks for; all of them when None. It stays adjustable at load:
            `from_pretrained(folder, num_experts_per_tok=k)`.
        routers: Per layer the router's rows `(experts, d_model)`; zero when None, which is exact with every expert on.
        card: Facts for the model card, printed as a table.
    """
    from huggingface_hub import save_torch_state_dict

    if getattr(model, "is_quantized", False):  # its attention weights are packed, which no plain checkpoint holds
        raise BenchError("Cannot export a 4-bit model: load it with dtype=bfloat16 for this, the scan may stay in nf4.")
    config = target_config(model.config, partition, k or partition.count)
    config.save_pretrained(folder)
    names = {id(module): name for name, module in model.named_modules()}
    replaced = {f"{names[id(m)]}.weight" for ffn in ffns for m in (ffn.gate, ffn.up, ffn.down)}
    # Tied weights under one name: the others would go into the file's metadata, in an order that differs each time.
    once = {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named} - replaced
    state = {key: value.detach() for key, value in model.state_dict().items() if key in once}
    for layer, experts in enumerate(assemble(ffns, partition)):
        prefix = names[id(ffns[layer].module)]
        for e, expert in enumerate(experts):
            state[f"{prefix}.experts.{e}.gate_proj.weight"] = expert.gate_proj.weight.data
            state[f"{prefix}.experts.{e}.up_proj.weight"] = expert.up_proj.weight.data
            state[f"{prefix}.experts.{e}.down_proj.weight"] = expert.down_proj.weight.data * partition.count
        like = experts[0].gate_proj.weight
        gate = torch.zeros(partition.count, like.shape[1]) if routers is None else routers[layer].detach()
        state[f"{prefix}.gate.weight"] = gate.to(like)
    save_torch_state_dict(state, folder)
    tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    (folder / "README.md").write_text(_card(model, config, card or {}), "utf-8")
    return folder


def _card(model: Any, config: Any, facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [moe, tiny-onn]\n---\n\n"
        f"# {config.num_experts} experts per layer, cut from a dense {model.config.model_type} model\n\n"
        f"{config.num_hidden_layers} layers, {config.num_experts} experts of {config.moe_intermediate_size} neurons "
        f"each, {config.num_experts_per_tok} active per token. `AutoModelForCausalLM.from_pretrained(folder)` loads "
        "it; `num_experts_per_tok=k` there changes how many are active.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


# Runs where our package cannot be imported: what it proves is that a stranger's plain transformers is enough.
_STRANGER = """
import json, sys
sys.modules["tinyonn_lib"] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
ids = torch.from_numpy(np.load(tokens))
with torch.no_grad():
    np.save(out, model(ids).logits.numpy())
    text = model.generate(ids[:1, :8], max_new_tokens=16, do_sample=False)
print(json.dumps({
    "class": type(model).__name__,
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "generated": AutoTokenizer.from_pretrained(folder).decode(text[0]),
}))
"""


def verify(folder: Path, dense: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """Load `folder` in a fresh process that cannot import this package and compare its logits with `dense`.

    Args:
        tokens: Token ids `(B, T)`.

    Returns:
        `relative_error` (max |Δlogits| / max |logits|), `class`, `missing` and `unexpected` keys, `generated` text.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ids, out = Path(scratch, "ids.npy"), Path(scratch, "logits.npy")
        np.save(ids, tokens.cpu().numpy())
        done = subprocess.run(
            [sys.executable, "-c", _STRANGER, str(folder.resolve()), str(ids), str(out)],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
            raise BenchError(f"The exported checkpoint does not load with plain transformers: {reason}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        logits = np.load(out)
    with torch.no_grad():
        expected = dense(tokens.to(next(dense.parameters()).device)).logits.float().cpu().numpy()
    found["relative_error"] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return found
