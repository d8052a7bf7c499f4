"""Private files for going on after a kill: written atomically, read only if they belong to the same training."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError

_FINGERPRINT_VALUES = 4096


class Found(NamedTuple):
    """What a checkpoint gives back besides the weights: steps done, history, best values on held-out text."""

    step: int
    history: dict[str, list[float]]
    best: list[Tensor]


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors of a batch: a tensor, or tuples, lists and dictionaries of them."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors_in(value)]
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return [tensor for value in batch for tensor in tensors_in(value)]
    return []


def fingerprint(plan: Mapping[str, Any], params: Sequence[Tensor], batch: Any) -> str:
    """Hash of a training: its settings, its starting values and its first batch.

    Large tensors enter with their shape, their sum and some thousand evenly spread values: enough to tell another
    seed or other data apart, and cheap for a billion parameters.
    """
    sha = hashlib.sha256(repr(sorted(plan.items())).encode())
    for tensor in [*params, *tensors_in(batch)]:
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].double()
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype} {float(flat.double().sum())!r}".encode())
        sha.update(picked.cpu().numpy().tobytes())
    return sha.hexdigest()


def rng_state() -> list[Tensor]:
    """Where the random numbers of this process are: the CPU's generator, then every GPU's if they are in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def set_rng_state(states: Sequence[Tensor]) -> None:
    """Back to `rng_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(states[1:]))


def save(
    path: Path,
    key: str,
    step: int,
    params: Sequence[Tensor],
    model: nn.Module | None,
    optimizers: Sequence[torch.optim.Optimizer],
    history: Mapping[str, Sequence[float]],
    best: Sequence[Tensor],
    rng: Sequence[Sequence[Tensor]],
) -> None:
    """Write the whole state so that a kill at any moment leaves the old file or the new one, never half a file.

    Args:
        best: the values of `params` at the best look at held-out text; empty for none.
        rng: `rng_state` of each process.

    Raises:
        BenchError: no space, or no right to write there.
    """
    state = {
        "key": key,
        "step": step,
        "params": [param.detach() for param in params],
        "buffers": {name: buffer.detach() for name, buffer in _buffers(model).items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "history": {name: torch.tensor(values, dtype=torch.float64) for name, values in history.items()},
        "best": list(best),
        "rng": [list(states) for states in rng],
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` afterwards; a kill leaves the old file or the new one.

    Raises:
        BenchError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name: a kill leaves at most one behind
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError in torch.save
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Remember a value for `read_json`.

    Raises:
        BenchError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` left; None if there is no such file, or a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def unwritable(path: Path, error: Exception) -> BenchError:
    """The one line for a checkpoint that cannot be written."""
    reason = (str(error).splitlines() or ["?"])[0][:160]
    return BenchError(f"Cannot write the checkpoint {path.name} ({reason}): free disk space and run again.")


def restore(
    path: Path,
    key: str,
    params: Sequence[Tensor],
    model: nn.Module | None,
    optimizers: Sequence[torch.optim.Optimizer],
    process: int = 0,
) -> Found | None:
    """Put the saved state back in place, for the process of that number; None if there is none of this training."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # truncated or foreign: as good as none, the training starts anew
        return None
    if not isinstance(state, dict) or state.get("key") != key:
        return None
    with torch.no_grad():
        for param, saved in zip(params, state["params"], strict=True):
            param.copy_(saved)
        buffers = _buffers(model)
        for name, saved in state["buffers"].items():
            buffers[name].copy_(saved)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    set_rng_state(state["rng"][process])
    history = {name: values.tolist() for name, values in state["history"].items()}
    return Found(int(state["step"]), history, state["best"])


def _buffers(model: nn.Module | None) -> dict[str, Tensor]:
    return dict(model.named_buffers()) if model is not None else {}
