"""What each tensor of a source becomes in a quant, and how large the file is then: known before anything is written.

The types are llama-quantize's (formats/mixes.py), for tensors in its order: by block, then name. Patterns of the caller's
come before its rules, as with its --tensor-type: searched in the name, the first that is found counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from ..architectures import Tensor
from ..catalog import Table
from ..errors import LabError, UnknownName
from ..formats import FORMATS
from ..formats.encoders import ENCODERS
from ..formats.mixes import Mix, chooser, fallback, find_mix, needs_importance, quantizable, roles
from ..gguf.words import show
from ..gguf.writing import gguf_bytes
from ..memory import circumstances
from ..shapes import FILE_TYPES, from_gguf
from ..units import align, format_bytes
from .matrices import Matrix, read_matrix
from .sources import NUMBERS, Source, open_source

KEEP = "keep"      # in a mapping of patterns to types: as it is in the source
_SPLIT = ("split.no", "split.count", "split.tensors.count")
_QUANTIZATION_VERSION = 2      # GGML_QNT_VERSION
_FILE_TYPE = {name: number for number, name in FILE_TYPES.items()}


class Row(NamedTuple):
    """One tensor: `shape` in ggml's order, its type in the source and in the target, `bytes` of it there, unpadded."""

    name: str
    shape: tuple[int, ...]
    stored: str
    type: str
    bytes: int

    @property
    def elements(self) -> int:
        return Tensor(self.name, self.shape).elements


@dataclass(frozen=True)
class Plan:
    """A source in a quant. `file_bytes`: exact, header and padding too. `unimportant`: tensors that llama-quantize refuses to
    write without an importance matrix and that have none. `requantized`: tensors quantized already, which change their
    type."""

    source: str
    quant: str
    rows: tuple[Row, ...]
    file_bytes: int
    unimportant: tuple[str, ...] = ()
    requantized: tuple[str, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict, repr=False, compare=False)
    alignment: int = 32

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, each rounded up to the file's alignment."""
        return sum(align(row.bytes, self.alignment) for row in self.rows)

    @cached_property
    def bits_per_weight(self) -> float:
        """Unpadded bytes * 8 over the elements of all tensors."""
        return 8 * sum(row.bytes for row in self.rows) / sum(row.elements for row in self.rows)

    @property
    def table(self) -> Table:
        """The rows, to look at."""
        shown = {"shape": lambda shape: " x ".join(map(str, shape)), "bytes": lambda size: f"{size:,}"}
        return Table([dict(zip(("tensor", "shape", "from", "to", "bytes"), row, strict=True)) for row in self.rows], shown)

    def to_dict(self) -> dict:
        """For JSON."""
        return {"source": self.source, "quant": self.quant, "file_bytes": self.file_bytes, "tensor_bytes": self.tensor_bytes,
                "bits_per_weight": self.bits_per_weight, "needs_importance": list(self.unimportant),
                "requantized": list(self.requantized), "tensors": list(self.table)}

    @property
    def answer(self) -> str:
        """In a sentence or two; every number is exact."""
        before = sum(FORMATS[row.stored].bytes(row.elements) for row in self.rows)
        said = [f"{self.source} in {self.quant}: {format_bytes(before)} of tensors become {format_bytes(self.tensor_bytes)}, "
                f"{self.bits_per_weight:.4f} bits per weight; the file has {self.file_bytes:,} bytes (exact)."]
        if self.unimportant:
            said.append(f"Without an importance matrix cannot be written: {_some(self.unimportant)}.")
        if self.requantized:
            said.append(f"Already quantized: {_some(self.requantized)}; that takes allow_requantize.")
        return " ".join(said)

    def __repr__(self) -> str:
        return f"<{self.answer}>"


def _some(names: tuple[str, ...]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def planned(source, quant: str, importance=None, *, types: Mapping[str, str] | None = None) -> Plan:
    """What `quantize_gguf` would write, without reading a weight; its arguments mean the same. Every number is exact.

    Raises LabError as `quantize_gguf` does, but for tensors that it would refuse for want of importance or for having been
    quantized before: the plan lists those.
    """
    opened = open_source(source, mix_named(quant))
    return plan_of(opened, mix_named(quant), read_matrix(importance, opened), types)


def mix_named(quant: str) -> Mix:
    mix = find_mix(quant)
    if mix.engine == "llama.cpp" and mix.name not in _FILE_TYPE:
        raise LabError(f"{mix.name} is no quant that a GGUF file can be of; choose another, such as Q4_K_M")
    if mix.engine != "llama.cpp":
        raise LabError(f"{mix.name} is made by {mix.engine} as it loads a model, and is no type of GGUF files; choose one of "
                       "llama.cpp's, such as Q4_K_M")
    return mix


def plan_of(source: Source, mix: Mix, matrix: Matrix | None = None, types: Mapping[str, str] | None = None) -> Plan:
    """The plan of an opened source. Raises LabError for types that cannot be."""
    spec = from_gguf(source.file)
    chosen = _chosen(types, spec.tensors)
    targets = _targets(spec, mix, chosen, matrix is not None)
    rows = []
    for tensor, type in zip(spec.tensors, targets, strict=True):
        if type != tensor.type and type not in ENCODERS:
            raise LabError(f"{show(tensor.name)} would become {type}, which llmlab cannot write; it writes "
                           f"{', '.join(ENCODERS)}")
        shape = _shape(tensor.shape)
        rows.append(Row(tensor.name, shape, tensor.type, type, FORMATS[type].bytes(tensor.elements)))
    metadata = _metadata(source, mix, matrix)
    size = gguf_bytes(metadata, ((row.name, row.shape, row.type) for row in rows), source.file.alignment)
    changed = [row for row in rows if row.type != row.stored]
    return Plan(source.shown, mix.name, tuple(rows), size,
                tuple(row.name for row in changed if needs_importance(mix, [row.name], [row.type])
                      and (matrix is None or row.name not in matrix.values)),
                tuple(row.name for row in changed if _narrow(row)), metadata, source.file.alignment)


def _narrow(row: Row) -> bool:
    """Whether a tensor was quantized before to something that writing it again cannot be meant to start from: all but Q8_0
    on its way to fewer bits."""
    if row.stored in NUMBERS:
        return False
    return row.stored != "Q8_0" or row.type in NUMBERS or FORMATS[row.type].bits > FORMATS["Q8_0"].bits


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without ones at its end, as ggml writes it."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _chosen(types: Mapping[str, str] | None, tensors: tuple[Tensor, ...]) -> dict[str, str]:
    """The caller's type of each tensor that a pattern of his finds. Raises LabError for a pattern that finds none."""
    patterns = [(text, _pattern(text), _format(text, type)) for text, type in (types or {}).items()]
    found = {}
    for text, pattern, type in patterns:
        names = [t.name for t in tensors if pattern.search(t.name)]
        if not names:
            raise LabError(f"no tensor has {show(str(text))} in its name; llmlab mix lists them, such as "
                           f"{', '.join(t.name for t in tensors if t.layer in (-1, 0))[:120]}")
        for name in names:
            found.setdefault(name, type)
    return found


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise LabError(f"{show(str(text))} is no pattern of tensor names ({error}); give part of a name, or a regular "
                       "expression") from None


def _format(pattern: str, type: str) -> str:
    key = str(type).strip().upper().replace("-", "_") if isinstance(type, str) else ""
    if key == KEEP.upper():
        return KEEP
    if key not in ENCODERS:
        near = " (a quant is a recipe; a type is one block layout)" if key.endswith(("_S", "_M", "_L", "_XL")) else ""
        raise UnknownName(f"{show(str(type))} for {show(str(pattern))} is no type that llmlab writes{near}; there are "
                          f"{', '.join(ENCODERS)}, and {KEEP}")
    return key


def _targets(spec, mix: Mix, chosen: dict[str, str], importance: bool) -> list[str]:
    """The type of each tensor of a spec. What the caller chose is not counted by the rules that count layers: neither does
    llama-quantize."""
    ruled = tuple(replace(t, shape=t.shape[:1]) if t.name in chosen else t for t in spec.tensors)
    rule = chooser(mix, circumstances(spec), importance)
    found = []
    for tensor, role in zip(spec.tensors, roles(ruled, len(spec.layers)), strict=True):
        own = chosen.get(tensor.name, "")
        if not quantizable(tensor) or own == KEEP:
            found.append(tensor.type)
        else:
            found.append(_divided(own, tensor) if own else rule(role))
    return found


def _divided(type: str, tensor: Tensor) -> str:
    try:
        return fallback(type, tensor.shape[0])
    except LabError as error:
        raise LabError(f"{tensor.name}: {error}") from None


def _metadata(source: Source, mix: Mix, matrix: Matrix | None) -> dict:
    """The source's, and at its end what llama-quantize sets, in its order."""
    own = {"general.quantization_version": ("uint32", _QUANTIZATION_VERSION),
           "general.file_type": ("uint32", _FILE_TYPE[mix.name]), **(matrix.metadata() if matrix else {})}
    return {key: value for key, value in source.metadata.items() if key not in own and key not in _SPLIT} | own
