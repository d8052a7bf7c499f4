"""Load any causal language model or tokenizer for reading, or say in one line why not."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "nf4"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json", "spiece.model")
NF4_BLOCK = 64  # weights per scale in bitsandbytes' default block


def load_model(path_or_id: str, dtype: Dtype = "float32", device: str = "auto") -> PreTrainedModel:
    """Load any causal language model for reading: eval mode, no remote code, all weights there, safetensors only.

    Args:
        path_or_id: a Hugging Face folder, or a hub id.
        dtype: "float32", "bfloat16", or "nf4" (bitsandbytes with double quantisation; computes in bfloat16 on a GPU
            and float32 on a CPU).
        device: "cpu", "cuda", "cuda:1" …; "auto" takes the GPU if there is one.

    Raises:
        BenchError: no such folder, no config, damaged or incomplete weights, unknown dtype or device, the hub
            unreachable, or sizes that NF4 cannot hold.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in get_args(Dtype):
        raise BenchError(f"Unknown dtype '{dtype}': choose one of {', '.join(get_args(Dtype))}.")
    place = pick_device(device)
    where, options = _origin(path_or_id, "config.json")
    if dtype == "nf4":
        options |= _nf4_options(place)
    else:
        options |= {"dtype": getattr(torch, dtype)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, output_loading_info=True, use_safetensors=True, **options
        )
        model, info = loaded
    except BenchError:
        raise
    except Exception as error:  # transformers raises about ten kinds; for a user they are one: it cannot be loaded
        raise BenchError(f"Cannot load the model {path_or_id}: {_one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info.get(problem) or ()):
            raise BenchError(
                f"The model {path_or_id} is incomplete: {len(names)} {problem.replace('_', ' ')} such as {names[0]}; "
                "save or download it again."
            )
    if dtype == "nf4":
        _guard_nf4(model, path_or_id)
    else:
        model = model.to(place)
    return cast("PreTrainedModel", model.eval())


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id, no remote code.

    A folder need not hold a model: tokenizer.json alone will do.

    Raises:
        BenchError: nothing there, no tokenizer in it, or the hub unreachable.
    """
    from transformers import AutoTokenizer

    where, options = _origin(path_or_id, "config.json", "tokenizer.json")
    # Without any file transformers quietly makes an empty tokenizer of the model's kind.
    if Path(where).is_dir() and not any(any(Path(where).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise BenchError(
            f"The folder {path_or_id} holds no tokenizer (tokenizer.json): copy the model's tokenizer there."
        )
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(where, **options))
    except Exception as error:
        raise BenchError(f"Cannot load a tokenizer from {path_or_id}: {_one_line(error)}") from error


def context_length(model: Any) -> int | None:
    """Tokens that a model takes at once; None where its config names no limit, such as a recurrent model's."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def quiet_bitsandbytes() -> None:
    """To be called before anything imports bitsandbytes, as PEFT does.

    It looks for optional CPU kernels at import and reports at warning level that they are missing.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU if there is one; anything else must be available here.

    Raises:
        BenchError: no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BenchError(f"Device '{device}' is not available here: choose auto, cpu, or cuda with a GPU.") from error
    return place


def _origin(path_or_id: str, *files: str) -> tuple[str, dict[str, Any]]:
    """What to hand to from_pretrained: a folder with one of these files, or a hub id that is cached or reachable."""
    path = hub.local_path(path_or_id, "model")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if path is not None:
        if not path.is_dir():
            raise BenchError(f"{path_or_id} is a file: give the folder that holds it ({' or '.join(files)}).")
        if not any((path / name).exists() for name in files):
            known = " and no ".join(files)
            raise BenchError(f"The folder {path_or_id} holds no {known}: it is not a Hugging Face model folder.")
        return str(path), options
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(path_or_id, "config.json"), str):
        hub.require_hub(path_or_id, "model")
        options["local_files_only"] = False
    return path_or_id, options


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{(lines or [type(error).__name__])[0][:300]} (damaged or incomplete? save or download it again)"


def _nf4_options(place: torch.device) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BenchError("dtype=nf4 needs the extra 'nf4': pip install 'tinyonn[nf4]', or choose bfloat16.")
    quiet_bitsandbytes()
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if place.type == "cuda" else torch.float32
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantisation, "dtype": compute, "device_map": {"": str(place)}}


def _guard_nf4(model: nn.Module, origin: str) -> None:
    """Disarm the CPU traps of bitsandbytes 0.50 (PEERS.md §6): repacked weights and half-filled blocks."""
    import bitsandbytes as bnb

    quantised = [(name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    if not quantised:
        raise BenchError(f"Nothing in {origin} was quantised to NF4: it has no nn.Linear outside the head.")
    for name, module in quantised:
        # On CPUs with AVX512-BF16 the first forward would repack the weights; gradients are garbage afterwards.
        module.support_avx512bf16_for_cpu = False
        if module.in_features % NF4_BLOCK:
            raise BenchError(
                f"NF4 needs widths that are multiples of {NF4_BLOCK}; {name} has {module.in_features}: use bfloat16."
            )
