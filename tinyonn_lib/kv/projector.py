"""`KVDimensionProjector`: a teacher's cache → a student's (document 003)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv.adapter import adapter
from tinyonn_lib.kv.align import by_depth
from tinyonn_lib.kv.cache import KV, as_kv, widths

BEST: dict[str, Any] = {
    "kind": "residual",
    "mlp_ratio": 0.5,
    "dropout": 0.0,
    "shared": False,
    "sources": 3,
    "joint": True,
}
"""What `from_configs` builds unless told otherwise: the best of `benchmarks/kv_projector.py`."""

SIDES = ("keys", "values")

PIECE = 2**19
"""Entries mapped at a time on a CPU without gradients: what lies between stays in the processor's cache."""

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class KVDimensionProjector(nn.Module):
    """Per teacher an adapter for keys and one for values; what several teachers say is mixed by learned gates.

    With the arguments of document 003 alone it is the document's: LayerNorm → Linear → SiLU → Dropout → Linear, one
    pair of adapters per teacher for all layers. Keys are those before the rotation (`cache.KVModel.read`).
    """

    def __init__(
        self,
        teacher_configs: Mapping[str, Mapping[str, Any]],
        student_d_model: int,
        mlp_ratio: float = 1.0,
        dropout: float = 0.1,
        init_method: str = "xavier",
        trainable: bool = True,
        *,
        student_layers: int = 0,
        kind: str = "mlp",
        layernorm: bool = True,
        activation: str = "silu",
        shared: bool = True,
        sources: int = 1,
        joint: bool = False,
        layer_maps: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> None:
        """
        Args:
            teacher_configs: name → `d_model` (width of its cache: KV heads × head_dim) and `num_layers`.
            student_d_model: width of the student's cache.
            mlp_ratio: hidden width ÷ width of what an adapter reads.
            dropout: share of hidden units left out in training.
            init_method: "xavier", "kaiming" or "normal" (std 0.02); biases start at 0.
            trainable: False freezes it.
            student_layers: layers of the student's cache; 0: as many as the shallowest teacher has.
            kind: "mlp", "linear" or "residual"; see `adapter.adapter`.
            layernorm: normalise what an adapter reads.
            activation: "silu", "relu" or "gelu".
            shared: one adapter for all layers; else one per student layer.
            sources: teacher layers that a student layer reads, side by side.
            joint: read keys and values together for either.
            layer_maps: name → per student layer its teacher layers; default `align.by_depth`.

        Raises:
            BenchError: an argument out of its range, or a map that does not fit.
        """
        super().__init__()
        _check(teacher_configs, student_d_model, student_layers, sources)
        self.teachers = {name: dict(config) for name, config in teacher_configs.items()}
        depth = student_layers or min(config["num_layers"] for config in self.teachers.values())
        maps = layer_maps or {n: by_depth(config["num_layers"], depth, sources) for n, config in self.teachers.items()}
        self.layer_maps = {name: [list(layers) for layers in maps.get(name, ())] for name in self.teachers}
        self._check_maps(depth)
        shape: dict[str, Any] = {
            "mlp_ratio": mlp_ratio, "dropout": dropout, "init_method": init_method, "kind": kind,
            "layernorm": layernorm, "activation": activation,
        }  # fmt: skip
        self.options: dict[str, Any] = shape | {
            "student_d_model": student_d_model, "student_layers": depth, "trainable": trainable,
            "shared": shared, "sources": sources, "joint": joint,
        }  # fmt: skip
        # By number, for a teacher's name may hold a dot, which a module's may not: teacher, side, layer.
        self.adapters = nn.ModuleList()
        for name, config in self.teachers.items():
            read = len(self.layer_maps[name][0]) * config["d_model"] * (1 + joint)
            self.adapters.append(
                nn.ModuleList(
                    nn.ModuleList(adapter(read, student_d_model, **shape) for _ in range(1 if shared else depth))
                    for _ in SIDES
                )
            )
        # Of each teacher's answer, per layer and side: how much it counts for this token. Zeros: all alike.
        several = len(self.teachers) > 1
        self.gates = nn.Parameter(torch.zeros(2, len(self.teachers), depth, student_d_model)) if several else None
        self.requires_grad_(trainable)

    @classmethod
    def from_configs(cls, teachers: Mapping[str, Any], student: Any, **options: Any) -> KVDimensionProjector:
        """From `transformers` configs: true widths under grouped-query attention, depths, and kinds of RoPE.

        Args:
            teachers: name → config.
            student: config.
            options: of the constructor; those not given are `BEST`.
        """
        given = {}
        for name, config in teachers.items():
            sizes = widths(config)
            given[name] = {"d_model": sizes.width, "num_layers": sizes.layers, "rope": _rope(config)}
        sizes = widths(student)
        return cls(given, sizes.width, student_layers=sizes.layers, **(BEST | options))

    @property
    def student_layers(self) -> int:
        return int(self.options["student_layers"])

    def reads(self, name: str, kv: KV, side: str, layer: int) -> Tensor:
        """What a teacher's adapter for "keys" or "values" of a student layer reads: `(batch, tokens, width)`."""
        sides = (kv.keys, kv.values) if self.options["joint"] else (getattr(kv, side),)
        parts = [each[:, place] for each in sides for place in self.layer_maps[name][layer]]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def project_teacher_kv(self, teacher_name: str, teacher_kv: Any) -> KV:
        """One teacher's cache as the student would have it.

        Args:
            teacher_kv: anything `as_kv` takes, keys before the rotation: `(batch, teacher layers, tokens, width)`.

        Returns:
            `(batch, student layers, tokens, student width)`, keys before the rotation.

        Raises:
            BenchError: unknown teacher, another depth or width than it was made for, or values that are not finite.
        """
        return self._project(teacher_name, self._checked(teacher_name, teacher_kv))

    def project_multi_teacher_kv(self, teacher_kvs: Mapping[str, Any]) -> KV:
        """All teachers' caches of the same tokens as one of the student; each token weighs the teachers anew.

        Args:
            teacher_kvs: name → cache, for every teacher it was made for. See `align.onto_tokens` for other tokenizers.

        Raises:
            BenchError: as `project_teacher_kv`; teachers missing, or batches that do not match.
        """
        if missing := [name for name in self.teachers if name not in teacher_kvs]:
            raise BenchError(f"No cache of the teacher '{missing[0]}': this projector was made for {self._names()}.")
        checked = {name: self._checked(name, kv) for name, kv in teacher_kvs.items()}
        sizes = {name: (kv.shape[0], kv.shape[2]) for name, kv in checked.items()}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{name}: {batch} × {tokens}" for name, (batch, tokens) in sizes.items())
            raise BenchError(f"The teachers' caches differ in batch or tokens ({said}): align them to the same tokens.")
        return self(checked)

    def forward(self, teacher_kvs: Mapping[str, KV]) -> KV:
        """As `project_multi_teacher_kv`, unchecked."""
        said = self._said(teacher_kvs)
        if self.gates is None:
            return KV(said[0][0], said[1][0])
        both = zip(said, self.gates, strict=True)
        return KV(*((self._gated(each, gates)[..., None] * each).sum(0) for each, gates in both))

    def weights(self, teacher_kvs: Mapping[str, KV]) -> Tensor:
        """How much each teacher counts: `(keys and values, teachers, batch, layers, tokens)`, 1 over all teachers."""
        said = self._said(teacher_kvs)
        if self.gates is None:
            return torch.ones_like(torch.stack(said)[..., 0])
        return torch.stack([self._gated(each, gates) for each, gates in zip(said, self.gates, strict=True)])

    def _said(self, teacher_kvs: Mapping[str, KV]) -> list[Tensor]:
        """Keys and values of all teachers: two of `(teachers, batch, layers, tokens, width)`."""
        each = [self._project(name, teacher_kvs[name]) for name in self.teachers]
        sides = [[getattr(kv, side) for kv in each] for side in SIDES]
        return [torch.stack(side) if len(side) > 1 else side[0][None] for side in sides]

    @staticmethod
    def _gated(said: Tensor, gates: Tensor) -> Tensor:
        """Weights `(teachers, batch, layers, tokens)` of `said` by gates `(teachers, layers, width)`."""
        return torch.einsum("gblnw,glw->gbln", said, gates).softmax(0)

    def of(self, name: str, side: str) -> nn.ModuleList:
        """A teacher's adapters for "keys" or "values": one for each student layer, or a single one for all."""
        return self.adapters[list(self.teachers).index(name)][SIDES.index(side)]  # type: ignore[index]

    def _project(self, name: str, kv: KV) -> KV:
        like = next(self.adapters.parameters())  # a teacher in bfloat16, or on another device, fills its cache there
        read: list[Tensor] = []
        kv, sides = KV(kv.keys.to(like), kv.values.to(like)), []
        for side in SIDES:
            layers = self.of(name, side)
            if not (read and self.options["joint"]):  # jointly, keys and values are made of the same input
                read = [self.reads(name, kv, side, n) for n in range(self.student_layers)]
            sides.append(torch.stack([_applied(layers[n % len(layers)], x) for n, x in enumerate(read)], 1))
        return KV(*sides)

    def count_parameters(self) -> dict[str, Any]:
        """How large it is.

        Returns:
            `per_adapter`: teacher → parameters of one adapter (for keys or for values, of one layer or shared);
            `weights_per_adapter`: the same, matrices alone (the document's formula d·h + h·d_student);
            `per_layer`: teacher → keys and values of one student layer; `per_teacher`: all of a teacher's; `gates`;
            `total`.
        """
        one = {name: self.of(name, "keys")[0] for name in self.teachers}
        per_adapter = {name: sum(p.numel() for p in module.parameters()) for name, module in one.items()}
        matrices = {name: sum(p.numel() for p in module.parameters() if p.ndim == 2) for name, module in one.items()}
        copies = 1 if self.options["shared"] else self.student_layers
        return {
            "per_adapter": per_adapter,
            "weights_per_adapter": matrices,
            "per_layer": {name: 2 * count for name, count in per_adapter.items()},
            "per_teacher": {name: 2 * copies * count for name, count in per_adapter.items()},
            "gates": 0 if self.gates is None else self.gates.numel(),
            "total": sum(p.numel() for p in self.parameters()),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors.

        Raises:
            BenchError: the folder cannot be written, or a teacher's config holds what JSON cannot.
        """
        folder = Path(folder)
        content = {"teacher_configs": self.teachers, "layer_maps": self.layer_maps, **self.options}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        parts = {name: folder / f".{name}.{os.getpid()}.part" for name in (_WEIGHTS, _CONFIG)}
        try:
            text = json.dumps(content, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise BenchError(f"Cannot write teacher_configs as JSON: {error}. Leave that entry out.") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, parts[_WEIGHTS], metadata={"format": "pt"})
            parts[_CONFIG].write_text(text, encoding="utf-8")
            for name, part in parts.items():
                part.replace(folder / name)
        except (OSError, SafetensorError) as error:
            for part in parts.values():
                with contextlib.suppress(OSError):
                    part.unlink()
            raise BenchError(
                f"Cannot write the projector to {folder}: {error}. Free space or choose another."
            ) from error

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KVDimensionProjector:
        """Read what `save_pretrained` wrote, in its dtype; in eval mode, so that dropout is off.

        Raises:
            BenchError: no projector there, or damaged files.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            projector = cls(content.pop("teacher_configs"), content.pop("student_d_model"), **content)
            tensors = load_file(folder / _WEIGHTS)
            projector.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        except FileNotFoundError as error:
            missing = _WEIGHTS if (folder / _CONFIG).exists() else _CONFIG  # safetensors does not name its file
            raise BenchError(f"{folder} holds no projector: {missing} is missing.") from error
        except (BenchError, SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError,
                RuntimeError, StopIteration, MemoryError) as error:  # fmt: skip
            why = " ".join(str(error).split())[:200].rstrip(".:")
            raise BenchError(f"The projector in {folder} is damaged ({why}): save or copy it again.") from error
        return projector.eval()

    def _names(self) -> str:
        return ", ".join(self.teachers)

    def _checked(self, name: str, teacher_kv: Any) -> KV:
        if name not in self.teachers:
            raise BenchError(f"Unknown teacher '{name}': this projector was made for {self._names()}.")
        kv, config = as_kv(teacher_kv), self.teachers[name]
        _, layers, _, width = kv.shape
        if (layers, width) != (config["num_layers"], config["d_model"]):
            raise BenchError(
                f"The cache of '{name}' has {layers} layers of width {width}; the projector was made for "
                f"{config['num_layers']} of {config['d_model']} (KV heads × head_dim)."
            )
        # A sum is not finite if one of its terms is not; float32 holds it for every cache in 16 bits.
        if not torch.isfinite(kv.keys.sum(dtype=torch.float32) + kv.values.sum(dtype=torch.float32)):
            raise BenchError(f"The cache of '{name}' holds NaN or infinite values: check the model that made it.")
        return kv

    def _check_maps(self, depth: int) -> None:
        for name, layers in self.layer_maps.items():
            deep, sizes = self.teachers[name]["num_layers"], {len(each) for each in layers}
            known = all(layer in range(deep) for each in layers for layer in each)
            if len(layers) != depth or len(sizes) != 1 or 0 in sizes or not known:
                raise BenchError(
                    f"The layer map of '{name}' must name, for each of {depth} student layers, equally many of the "
                    f"teacher's layers 0 to {deep - 1}; got {layers}."
                )


def _applied(adapter: nn.Module, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return adapter(x)
    parts = [adapter(part) for part in x.reshape(-1, x.shape[-1]).split(max(1024, PIECE // x.shape[-1]))]
    return torch.cat(parts).view(*x.shape[:-1], -1)


def _rope(config: Any) -> dict[str, Any]:
    found: Any = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    return dict(found or {})


def _check(teachers: Mapping[str, Mapping[str, Any]], student_d_model: int, student_layers: int, sources: int) -> None:
    if not teachers:
        raise BenchError("A projector needs at least one teacher: teacher_configs={name: {d_model, num_layers}}.")
    for name, config in teachers.items():
        for key in ("d_model", "num_layers"):
            value = config.get(key)
            if not isinstance(value, int) or value < 1:
                raise BenchError(f"The teacher '{name}' needs {key}, a whole number from 1; got {value!r}.")
    for key, number, least in (("student_d_model", student_d_model, 1), ("student_layers", student_layers, 0),
                               ("sources", sources, 1)):  # fmt: skip
        if not isinstance(number, int) or number < least:
            raise BenchError(f"{key} is {number!r}: give a whole number from {least}.")
