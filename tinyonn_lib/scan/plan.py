"""Which hooks feed which sums: the weights and experts behind the targets, and the banks they write to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.bank import Bank
from tinyonn_lib.scan.fused import PARTS, Experts
from tinyonn_lib.scan.statistics import METHODS, Layout, Totals
from tinyonn_lib.scan.targets import Found, fused
from tinyonn_lib.scan.watch import Watch
from tinyonn_lib.scan.weight import Sinks, Weight


@dataclass(frozen=True)
class Place:
    """Where a target's sums are: its bank, its number there, and its columns within its kind."""

    bank: Bank
    number: int
    columns: slice


class Plan:
    """Everything that is watched, wired up.

    Attributes:
        watched: weights and fused experts, each once, whatever number of targets it serves.
        banks: one per device.
        names: of the targets, in the order of the layout.
    """

    def __init__(self, found: Sequence[Found], layout: Layout, watch: Watch) -> None:
        self.names = [each.target.name for each in found]
        self.watched: list[Weight | Experts] = []
        self._found, self._layout, self._watch = found, layout, watch
        self._of: list[list[Weight | Experts]] = [[] for _ in found]
        devices: dict[torch.device, list[int]] = {}
        for row, each in enumerate(found):
            devices.setdefault(_device(each), []).append(row)
        places: dict[int, Place] = {}
        self.banks = [self._wire(device, rows, places) for device, rows in devices.items()]
        self._places = [places[row] for row in range(len(found))]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every watched module with its name."""
        for each in self.watched:
            yield from each.modules.items()

    def replaced(self) -> str:
        """Name of a module whose weight is no longer the one that was found, "" if there is none."""
        owners = ((name, module, each) for each in self.watched for name, module in each.modules.items())
        return next((name for name, module, each in owners if each.parameter is not own_weight(module)), "")

    def tokens(self) -> list[list[int | Tensor]]:
        """Per target the tokens of the sample in progress, in parts."""
        return [each[-1].tokens for each in self._of]  # of an FFN those of down: that is where neurons are read

    def methods(self) -> np.ndarray:
        """Per target how the norms of the sample in progress were taken, uint8 numbers into `METHODS`."""
        used = [{each.method for each in several} for several in self._of]
        return np.array([METHODS.index(next(iter(m)) if len(m) == 1 else "mixed") for m in used], dtype=np.uint8)

    def good(self) -> Tensor:
        """0-dim bool: whether all gradients of the sample in progress are finite."""
        home = self.banks[0].device
        return ~torch.stack([bank.overflown().to(home, non_blocking=True) for bank in self.banks]).any()

    def last_norms(self) -> Tensor:
        """(targets, 2): norms of inputs and gradients of the sample closed last."""
        if len(self.banks) == 1:
            return self.banks[0].last.clone()
        home = self.banks[0].last.device
        parts = torch.cat([bank.last.to(home, non_blocking=True) for bank in self.banks])
        begin = np.cumsum([0, *(len(bank.last) for bank in self.banks)])
        order = [int(begin[self.banks.index(place.bank)]) + place.number for place in self._places]
        return parts[torch.tensor(order, device=home)]

    def first_bad(self, closed: int) -> tuple[int, bool, int]:
        """(samples that were finite, gradients?, target) of what went wrong first in `closed` samples.

        Target -1: nothing did. Activations come before gradients of the same sample, earlier targets before later ones.
        """
        worst = (closed, False, -1)
        finite = [bank.finite.tolist() for bank in self.banks]
        for row, place in enumerate(self._places):
            for column, good in enumerate(finite[self.banks.index(place.bank)][place.number]):
                found = (good, column == 1, row)
                if good < closed and (worst[2] < 0 or found < worst):
                    worst = found
        return worst

    def collect(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """(sums per target, norms (targets, 2)) of the closed samples, float64 on the host."""
        host = [
            ({kind: part.total.cpu().numpy() for kind, part in bank.kinds.items()}, bank.norms.cpu().numpy())
            for bank in self.banks
        ]
        sums, norms = [], np.zeros((len(self.names), 2))
        for row, (target, place) in enumerate(zip(self._layout.targets, self._places, strict=True)):
            totals, mine = host[self.banks.index(place.bank)]
            sums.append(totals[target.kind][:, place.columns].copy() if target.rows else np.zeros(target.shape))
            norms[row] = mine[place.number]
        return tuple(sums), norms

    def load(self, totals: Totals) -> None:
        """The other way round: sums and norms into the banks."""
        for row, (target, place) in enumerate(zip(self._layout.targets, self._places, strict=True)):
            if target.rows:
                place.bank.kinds[target.kind].total[:, place.columns] = torch.from_numpy(totals.sums[row])
            place.bank.norms[place.number] = torch.from_numpy(totals.norms[row])
        for bank in self.banks:
            bank.recount()

    def _wire(self, device: torch.device, rows: list[int], places: dict[int, Place]) -> Bank:
        """Bank, weights and sinks of the targets on one device."""
        units: dict[str, int] = {}
        columns: list[slice] = []
        numbers: dict[int, int] = {}  # id of a weight -> its number
        weights: list[list[int]] = []
        for row in rows:
            found = self._found[row]
            begin = units.get(found.target.kind, 0)
            units[found.target.kind] = begin + found.target.rows
            columns.append(slice(begin, begin + found.target.rows))
            weights.append([numbers.setdefault(key, len(numbers)) for key in dict.fromkeys(map(_key, _owners(found)))])
        bank = Bank(device, units, weights, len(numbers))
        made: dict[int, Weight | Experts] = {}
        for number, row in enumerate(rows):
            places[row] = Place(bank, number, columns[number])
            found, kind = self._found[row], self._found[row].target.kind
            scratch = bank.kinds[kind].sample[:, columns[number]] if found.target.rows else None
            if kind == "experts":
                [(name, module)] = found.modules.items()
                assert scratch is not None
                each = Experts(name, module, scratch, bank.weight[weights[number][0]], bank.act[number], self._watch)
                self._of[row] = [each]
                self.watched.append(each)
                continue
            for name, module in _owners(found):
                weight = made.get(_key((name, module)))
                if weight is None:
                    owners = found.modules if kind != "neurons" else {name: module}
                    weight = Weight(owners, Sinks(bank.weight[numbers[_key((name, module))]]), self._watch)
                    made[_key((name, module))] = weight
                    self.watched.append(weight)
                self._of[row].append(weight)
            self._connect(row, bank, number, scratch)
        return bank

    def _connect(self, row: int, bank: Bank, number: int, scratch: Tensor | None) -> None:
        """Tell the weights of a target where its sums go."""
        kind, rows = self._found[row].target.kind, self._found[row].target.rows
        weights = [each for each in self._of[row] if isinstance(each, Weight)]
        if kind == "neurons":
            gate, up, down = weights
            assert scratch is not None
            gate.sinks.rows.append(scratch[5])
            up.sinks.rows.append(scratch[6])
            down.sinks.columns = scratch[7]
            down.sinks.neurons, down.sinks.neurons_act = scratch[:5], bank.act[number]
            down.sinks.neurons_top = self._layout.top(rows)
            return
        [weight] = weights
        weight.sinks.act = bank.act[number]
        if scratch is not None:
            weight.sinks.rows.append(scratch[-1])
            weight.sinks.outputs, weight.sinks.top = scratch[:-1], self._layout.top(rows)


def _owners(found: Found) -> list[tuple[str, nn.Module]]:
    """One module per weight of a target: three of an FFN, else the first of those that own the one weight."""
    owners = list(found.modules.items())
    return owners if found.ffn is not None else owners[:1]


def own_weight(module: Any) -> Any:
    """The parameter that stands for a module: its weight, or the first of fused experts."""
    return getattr(module, PARTS[0]) if fused(module) else module.weight


def _key(owner: tuple[str, Any]) -> int:
    return id(own_weight(owner[1]))


def _device(found: Found) -> torch.device:
    name, module = _owners(found)[0]
    device: torch.device = own_weight(module).device
    if device.type == "meta":
        raise BenchError(
            f"{name} is offloaded (its weights are on no device): load the model without offload to scan it"
        )
    return device
