"""Write a divided model as a standard checkpoint that plain `AutoModelForCausalLM` loads, with no code of ours.

One tensor after another: memory holds about one FFN matrix twice and the output shard, however large the model is.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts.card import Rule, model_card
from tinyonn_lib.experts.checkpoint import SHARD_BYTES, Shards, cut, whole_folder
from tinyonn_lib.experts.families import Family, Layout, family
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.experts.weights import Weights, open_weights

_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
_COPIED = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
           "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip


def export(
    source: nn.Module | Path | str,
    partition: Partition,
    folder: Path,
    *,
    tokenizer: Any = None,
    k: int | None = None,
    routers: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the divided model to `folder`: config, safetensors, tokenizer, generation config and a model card.

    Args:
        source: the dense model, or its folder or hub id (then it is never loaded as a whole). 4-bit weights are
            dequantised, those of attention included.
        folder: appears when it is whole; an earlier checkpoint there is replaced.
        tokenizer: None: the source folder's files are copied.
        k: Active experts per token that the config asks for; all of them when None. It stays adjustable at load:
            `from_pretrained(folder, num_experts_per_tok=k)`.
        routers: Per layer the router's rows `(experts of the layer, d_model)`, written as they are; zero when None,
            which is exact with every expert on, and with fewer no choice at all.
        biases: Per layer `(experts of the layer,)`, added to σ(x·row) for the choice and not to the gate: see
            `router_file.unit_gates`.
        card: Facts for the model card, printed as a table; "router" says how it came about.
        shard_bytes: largest size of one weights file.

    Raises:
        BenchError: no standard class for this model and partition, a partition or router of another model, fewer than
            all experts without a router, weights that cannot be read, or a folder that cannot be written.
    """
    weights, folder = open_weights(source), Path(folder)
    target, layout = family(weights.config, partition, bias=biases is not None), Layout.of(partition)
    partition.check(weights.neurons())
    k = layout.experts if k is None else k
    _check_routers(routers, biases, layout, weights.config.hidden_size, k)
    if weights.folder is not None and folder.exists() and folder.samefile(weights.folder):
        raise BenchError(f"{folder} is the dense model itself: choose another folder for the divided one.")
    with whole_folder(folder, "config.json") as partial:
        config = target.config(weights.config, layout, k)
        config.dtype = weights.dtype
        config.save_pretrained(partial)
        shards = Shards(partial, "model", shard_bytes)
        for name in weights.shapes:
            for new, tensor in _divided(name, weights, target, layout, partition, routers, biases):
                shards.add(new, tensor)
        shards.close()
        _copy_rest(source, weights, tokenizer, partial)
        rule: Rule = "zero" if routers is None else "linear" if biases is None else "biased"
        text = model_card(weights, target, layout, partition, k, rule, card or {})
        (partial / "README.md").write_text(text, "utf-8")
    return folder


def _check_routers(
    routers: Sequence[Tensor] | None, biases: Sequence[Tensor] | None, layout: Layout, width: int, k: int
) -> None:
    if not 1 <= k <= layout.experts:
        raise BenchError(f"k={k} active experts: choose 1 to {layout.experts}.")
    if routers is None:
        if biases is not None:
            raise BenchError("Selection biases without routers choose the same experts for every token: give both.")
        if k < layout.experts:
            raise BenchError(
                f"k={k} of {layout.experts} experts without a router: with zero rows all experts tie, so give routers."
            )
        return
    for what, given, wanted in (
        ("rows", routers, [(count, width) for count in layout.counts]),
        ("biases", biases, [(count,) for count in layout.counts]),
    ):
        shapes = [tuple(tensor.shape) for tensor in given or ()]
        if given is not None and shapes != wanted:
            at = next((i for i, pair in enumerate(zip(shapes, wanted, strict=False)) if pair[0] != pair[1]), None)
            found = f"{len(shapes)} layers instead of {len(wanted)}"
            if at is not None and len(shapes) == len(wanted):
                found = f"layer {at} has {shapes[at]} instead of {wanted[at]}"
            raise BenchError(f"The routers' {what} do not belong to this partition and model: {found}.")
        if bad := [i for i, tensor in enumerate(given or ()) if not tensor.isfinite().all()]:
            raise BenchError(f"The routers' {what} of layer {bad[0]} hold NaN or infinity: train or fit them again.")


def _divided(
    name: str,
    weights: Weights,
    target: Family,
    layout: Layout,
    partition: Partition,
    routers: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """What becomes of one dense tensor: itself, or the parts of an FFN matrix (with the gate, also the router)."""
    tensor = weights.read(name)
    if (found := _FFN.fullmatch(name)) is None:
        yield name, tensor
        return
    layer, part, prefix = int(found[1]), found[2], name.partition(".mlp.")[0] + ".mlp."
    axis, down = (1, True) if part == "down_proj" else (0, False)
    if part == "gate_proj":
        rows = tensor.new_zeros(layout.experts, tensor.shape[1])
        if routers is not None:
            rows[: layout.counts[layer]] = routers[layer].detach().to(rows)
        yield f"{prefix}gate.weight", rows
        bias = None if biases is None else biases[layer]
        for key, extra in target.extras(layout, layer, tensor.shape[1], bias).items():
            yield prefix + key, extra.to(tensor.dtype) if extra.ndim > 1 else extra
    if width := target.shared_width(layout):
        shared = cut(tensor, partition.shared[layer][None], axis, experts=1, size=width)[0]
        yield f"{prefix}{target.shared}.{part}.weight", shared.mul_(target.shared_gain if down else 1)
    experts = cut(tensor, partition.experts[layer], axis, experts=layout.experts, size=layout.size)
    experts.mul_(target.routed_gain(layout) if down else 1)
    for e, expert in enumerate(experts):
        yield f"{prefix}experts.{e}.{part}.weight", expert


def _copy_rest(source: Any, weights: Weights, tokenizer: Any, folder: Path) -> None:
    """Tokenizer, chat template, generation config and licence."""
    for pattern in _COPIED:
        for file in weights.folder.glob(pattern) if weights.folder else ():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if getattr(source, "generation_config", None) is not None:
        source.generation_config.save_pretrained(folder)


# Runs where our package cannot be imported: what it proves is that a stranger's plain transformers is enough.
_STRANGER = """
import json, sys
sys.modules["tinyonn_lib"] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for folder, tokens, out, options in json.loads(sys.argv[1]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    ids = torch.from_numpy(np.load(tokens))
    with torch.no_grad():
        np.save(out, model(ids).logits.numpy())
        new = model.generate(ids[:1, :8], max_new_tokens=16, do_sample=False)[0].tolist()
    try:
        text = AutoTokenizer.from_pretrained(folder).decode(new)
    except (OSError, ValueError):
        text = ""
    missing, unexpected = (sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys"))
    found.append({"class": type(model).__name__, "missing": missing, "unexpected": unexpected,
                  "tokens": new, "generated": text})
print(json.dumps(found))
"""


def verify(folder: Path, dense: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """Load `folder` in a fresh process that cannot import this package and compare its logits with `dense`.

    Args:
        tokens: Token ids `(B, T)`.

    Returns:
        `relative_error` (max |Δlogits| / max |logits|), `class`, `missing` and `unexpected` keys, and the greedy
        continuation of 8 tokens: `tokens`, and as text `generated` ("" without a tokenizer).
    """
    return verify_all([(folder, dense, tokens)])[0]


def verify_all(
    items: Sequence[tuple[Path, nn.Module, Tensor]], options: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """`verify` for many `(folder, dense, tokens)`, all in one fresh process.

    Args:
        options: per item what `from_pretrained` is given besides, such as `num_experts_per_tok`.

    Raises:
        BenchError: one does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        jobs: list[list[Any]] = []
        for i, (folder, _, tokens) in enumerate(items):
            ids, out = Path(scratch, f"{i}.ids.npy"), Path(scratch, f"{i}.npy")
            np.save(ids, tokens.cpu().numpy())
            jobs.append([str(folder.resolve()), str(ids), str(out), dict(options[i]) if options else {}])
        command = [sys.executable, "-c", _STRANGER, json.dumps(jobs)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
            raise BenchError(f"The exported checkpoint does not load with plain transformers: {reason}")
        found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
        logits = [np.load(out) for _, _, out, _ in jobs]
    for result, theirs, (_, dense, tokens) in zip(found, logits, items, strict=True):
        with torch.no_grad():
            ours = dense(tokens.to(next(dense.parameters()).device)).logits.float().cpu().numpy()
        result["relative_error"] = float(np.abs(theirs - ours).max() / np.abs(ours).max())
    return found
