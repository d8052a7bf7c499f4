"""The norms of every single sample of a scan: one `.mscan` file per shard while it runs, one file at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import mscan
from tinyonn_lib.scan.shards import Shard
from tinyonn_lib.scan.statistics import Target


class Records:
    """The folder of a scan's records; step = global index of the sample.

    Args:
        folder: where `shard-NNN.mscan` lie; shared by all workers of the scan.
        targets: what is watched.
        facts: JSON-able facts about the scan, for the files' headers.
        sequences: id of the text that each sample is from.
    """

    def __init__(
        self, folder: Path, targets: Sequence[Target], facts: Mapping[str, object], sequences: Sequence[int]
    ) -> None:
        self.folder = Path(folder)
        self._targets = targets
        self._facts = json.loads(json.dumps(dict(facts), sort_keys=True, default=str))
        self._sequences = sequences

    def open(self, shard: Shard, position: int) -> mscan.Writer:
        """The file of a shard that goes on at `position`, with everything that is not committed cut off.

        It becomes a new file, put in the old one's place: a worker that lost the shard without knowing it yet may still
        write into the old one, and harms nobody.

        Raises:
            BenchError: the folder cannot be written, or lacks what an earlier worker wrote.
        """
        path = self.folder / f"shard-{shard.number:03d}.mscan"
        begun = position > shard.samples.start
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if begun:
                fresh = path.with_suffix(".part")
                shutil.copyfile(path, fresh)
                fresh.replace(path)
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            raise BenchError(
                f"{path} is missing, which holds the records of samples {shard.samples.start} to {position - 1}: give "
                "every worker of the scan the same folder, or start a new scan"
            ) from None
        except OSError as error:
            raise BenchError(f"cannot write {path}: {error.strerror}") from None
        return mscan.Writer(path, self._targets, self._facts, append=begun, before_step=position)

    def recorder(self, writer: mscan.Writer) -> Callable[[int, int | Tensor, Tensor, np.ndarray], None]:
        """What an observer calls at the end of every sample."""

        def record(step: int, tokens: int | Tensor, norms: Tensor, methods: np.ndarray) -> None:
            writer.write(step, self._sequences[step], tokens, norms, methods)

        return record


def merge_records(folder: Path, out: Path) -> Path:
    """One `.mscan` file of the records of all shards, ordered by sample.

    Args:
        folder: as given to `scan_samples` as `records`.
        out: the file to write.

    Returns:
        `out`.

    Raises:
        BenchError: samples that are missing (the line names them) or there twice with different values,
            or damaged files.
    """
    paths = sorted(Path(folder).glob("shard-*.mscan"))
    if not paths:
        raise BenchError(f"there are no records in {folder}: scan with records first")
    files = [mscan.File(path) for path in paths]
    samples, targets = int(files[0].header.meta["samples"]), len(files[0].header.targets)
    rows = np.zeros(samples, dtype=np.int64)
    for file in files:
        rows += np.bincount(file.all_codes()["step"], minlength=samples)[:samples]
    missing = np.flatnonzero(rows < targets)
    if len(missing):
        raise BenchError(f"{folder} lacks the records of samples {_ranges(missing)}: finish the scan, then merge again")
    # A worker killed after its last commit leaves a file without its end, and with every record.
    mscan.merge(paths, out, strict=False)
    return out


def _ranges(numbers: np.ndarray) -> str:
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs[:5]]
    return ", ".join(shown) + (f" and {len(runs) - 5} more stretches" if len(runs) > 5 else "")
