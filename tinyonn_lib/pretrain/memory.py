"""What a training takes in memory, known before anything is built.

Sizes with a digit too many are told so in one line; otherwise the system kills the process without a word.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.load import pick_device
from tinyonn_lib.pretrain.architectures import counts, new

_BYTES_PER_LOGIT, _BYTES_PER_WEIGHT = 16, 24
"""Of a training step in float32: logits, their log-softmax, both gradients; a weight, its gradient in each thread, the
optimiser's moments and scratch."""
_OWN = ("width", "layers", "ffn")  # of the parameters that the student has for itself, as `student_width`


def needed(weights: int, logits: int, activations: int = 0) -> int:
    """Bytes that a training takes, about.

    Peaks measured on two cores with 5 to 58 million weights were 0.5 to 1.1 times as high.

    Args:
        weights: parameters of the model.
        logits: of one optimiser step: its tokens × the entries of the vocabulary.
        activations: numbers that the layers keep of one step for its backward pass.
    """
    return _BYTES_PER_WEIGHT * weights + _BYTES_PER_LOGIT * logits + 4 * activations


def free(place: torch.device | None = None) -> int:
    """Bytes that are free in the memory of a device; None is the processor."""
    import psutil

    if place is not None and place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0])
    return int(psutil.virtual_memory().available)


def parameters(name: str, *, layers: int, **sizes: Any) -> int:
    """Parameters that a model of `architectures.new` would have, in milliseconds for however many layers.

    Raises:
        BenchError: as `architectures.new`.
    """

    def total(layers: int) -> int:
        with torch.device("meta"):  # shapes only
            return counts(new(name, layers=layers, **sizes))["total"]

    # From the second on all layers are alike.
    return total(layers) if layers < 3 else total(2) + (layers - 2) * (total(3) - total(2))


def check(values: Any) -> None:
    """Refuse before the work what cannot be built or does not fit into memory.

    Args:
        values: the parameters of 01_pretrain.

    Raises:
        BenchError: for model or student; names the parameters that are to be changed.
    """
    names = ("vocab_size", "heads", "kv_heads", "head_dim", "experts", "active")
    shared = {name: getattr(values, name) for name in names} | {"max_length": values.length}
    place = pick_device(values.device)
    for who, prefix in (("model", ""), ("student", "student_")):
        own = {name: getattr(values, prefix + name) for name in _OWN}
        try:
            count = parameters(values.architecture, **shared, **own)
        except BenchError as error:
            raise BenchError(re.sub(rf"\b({'|'.join(_OWN)})=", rf"{prefix}\1=", str(error))) from error
        step = values.batch * values.length
        # About five vectors of neurons and sixteen of the stream's width stay of each token in each layer.
        kept = step * own["layers"] * (5 * own["ffn"] + 16 * own["width"])
        wanted, there = needed(count, step * values.vocab_size, kept), free(place)
        if wanted > there:
            asked = {prefix + name: value for name, value in own.items()}
            asked |= {name: getattr(values, name) for name in ("vocab_size", "batch", "length")}
            raise BenchError(
                f"The {who} would have {count:,} parameters; its training needs about {wanted / 1e9:.1f} GB and "
                f"{there / 1e9:.1f} GB are free: lower some of {', '.join(f'{k}={v}' for k, v in asked.items())}."
            )
