"""Write tensors as standard safetensors shards, into a folder that appears only when it is whole."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from tinyonn_lib.errors import BenchError

SHARD_BYTES = 2_000_000_000


@contextmanager
def whole_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end of the block; after an error or a kill it never does.

    Several processes may write the same folder at once: each has its own to write into, and the last one counts.

    Args:
        marker: a file by which an earlier result is known; such a folder is replaced, once the new one is whole.

    Raises:
        BenchError: `folder` is something else, or it cannot be written (disk full, no permission).
    """
    folder = folder.absolute()
    old = folder.with_name(f".{folder.name}.old")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    with ExitStack() as held:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent):
                _clear_up(folder, old)
                if folder.exists() and not (
                    folder.is_dir() and ((folder / marker).exists() or not any(folder.iterdir()))
                ):
                    raise BenchError(
                        f"{folder} exists and is no earlier result (it holds no {marker}): choose another folder."
                    )
                partial.mkdir()
                held.enter_context(_locked(partial))  # ends with this process, however that ends
            yield partial
            with _locked(folder.parent):
                if folder.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
                partial.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            raise BenchError(
                f"Cannot write {folder}: {reason}. Nothing was left there; make room and repeat."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a folder, which leaves no file there; on file systems without locks, go on without.

    Raises:
        OSError: with `wait` false, somebody else has it, or there are no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(handle)


def _clear_up(folder: Path, old: Path) -> None:
    """What killed processes have left beside `folder`; an earlier result comes back if its successor never came."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        with suppress(OSError), _locked(partial, wait=False):  # a living writer holds it
            shutil.rmtree(partial)


class Shards:
    """Collects tensors and writes a file whenever the next would make it larger than `limit` bytes."""

    def __init__(
        self, folder: Path, stem: str, limit: int = SHARD_BYTES, metadata: dict[str, str] | None = None
    ) -> None:
        """
        Args:
            stem: files are `{stem}.safetensors`, or `{stem}-00001-of-00002.safetensors` … and an index.
            metadata: of every file; one entry at most, since more come in an order that differs each time.
        """
        self.folder, self.stem, self.limit, self.metadata = folder, stem, limit, metadata or {"format": "pt"}
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total = self.count = 0
        self.places: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """`tensor` must stay unchanged until it is written."""
        if self.pending and self.pending_bytes + tensor.nbytes > self.limit:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and the index if there is more than one file."""
        self._flush()
        if self.count == 1:
            self._shard(1).rename(self.folder / f"{self.stem}.safetensors")
            return
        names = {n: f"{self.stem}-{n:05d}-of-{self.count:05d}.safetensors" for n in range(1, self.count + 1)}
        for number, name in names.items():
            self._shard(number).rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.total},
            "weight_map": {key: names[number] for key, number in sorted(self.places.items())},
        }
        (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")

    def _shard(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:05d}.partial"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self.count += 1
        self.total += self.pending_bytes
        self.places |= dict.fromkeys(self.pending, self.count)
        save_file(self.pending, self._shard(self.count), metadata=self.metadata)
        self.pending, self.pending_bytes = {}, 0


def cut(matrix: Tensor, index: Tensor, axis: int, *, experts: int, size: int) -> Tensor:
    """The neurons of each expert, padded with zeros: one copy of the weights and no more.

    Args:
        matrix: gate or up, `(d_ffn, d_model)`, with axis 0; down, `(d_model, d_ffn)`, with axis 1.
        index: `(count, m)`: the neurons of each expert; `count <= experts`, `m <= size`.
        experts: experts to come out; those past `count` are all zero.
        size: neurons of each; those past m are zero.

    Returns:
        `(experts, size, d_model)`, or `(experts, d_model, size)` with axis 1.
    """
    index = index.to(matrix.device)
    out = matrix.new_zeros((experts, size, matrix.shape[1]) if axis == 0 else (experts, matrix.shape[0], size))
    for e, neurons in enumerate(index):
        out[e].narrow(axis, 0, len(neurons)).copy_(matrix.index_select(axis, neurons))
    return out
