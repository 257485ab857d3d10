"""An importance matrix: for every matrix of a model how large the numbers are that it is multiplied by; and llama.cpp's files.

Rounding a weight w by e changes the answer by e * x, so what an error costs goes with the mean of x^2, column by column.
Files are those of llama.cpp's llama-imatrix (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp): GGUF, and the older binary
one, which is read only.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..catalog import Table
from ..errors import BadFile, LabError, UnknownName
from ..gguf import Array, read_gguf, write_gguf
from ..gguf.words import show, show_path
from .corpus import CONTEXT

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, eq=False, repr=False)
class Importance(Mapping):
    """Mean squared inputs by GGUF tensor name ("blk.0.attn_q.weight"); measured, on the texts named in `datasets`.

    `sums` [matrices, cols] float64 are the sums of squares over tokens, `counts` [matrices] int64 the tokens: one matrix, or as
    many as a stack has experts. `chunks` of `context` tokens were read. `importance[name]` is what a quantizer takes.
    """

    sums: dict[str, np.ndarray] = field(repr=False)
    counts: dict[str, np.ndarray] = field(repr=False)
    chunks: int
    context: int = CONTEXT
    datasets: tuple[str, ...] = ()

    __eq__, __hash__ = object.__eq__, object.__hash__       # a mapping's would compare arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """Means over tokens, float32 [cols], or [experts, cols] of a stack. An expert that no token chose is all ones, as
        llama-quantize takes it: nothing is known of its columns, so all of them weigh the same (`unseen` counts them). Raises
        KeyError (an UnknownName) where there is none of that name."""
        if name not in self.sums:
            raise _NoSuchTensor(f"this importance matrix has no tensor {show(str(name))}; it has {len(self)}, such as "
                                f"{show(next(iter(self.sums), ''))}")
        sums, counts = self.sums[name], self.counts[name][:, None]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0).astype(np.float32)
        return means if len(means) > 1 else means[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def unseen(self) -> dict[str, int]:
        """How many experts of a stack no token chose, by tensor, where there are some: their columns all count alike. More and
        more varied text reaches them."""
        return {name: int((counts == 0).sum()) for name, counts in self.counts.items() if (counts == 0).any()}

    def concentration(self, top: float = 0.01) -> dict[str, float]:
        """For each tensor the share of all squares that lies in its `top` most important columns (0.01: the hundredth part, one
        at least). As much as `top` where all columns weigh the same, and a matrix changes nothing; near 1 where a few columns
        are nearly everything. Of a stack the mean over the experts that were chosen, by how often each was. Exact arithmetic
        on measured sums."""
        if not 0 < top <= 1:
            raise LabError(f"top={top!r:.40} is a share of the columns: give a number above 0, such as 0.01, and 1 at most")
        found = {}
        for name, sums in self.sums.items():
            most = -np.partition(-sums, (many := max(1, round(top * sums.shape[1]))) - 1)[:, :many].sum(1)
            whole, counts = sums.sum(1), self.counts[name]
            shares = np.where(whole > 0, most / np.where(whole > 0, whole, 1), many / sums.shape[1])
            found[name] = float(np.average(shares, weights=counts if counts.any() else None))
        return found

    def table(self, top: float = 0.01) -> Table:
        """A row a tensor, those first whose importance is most concentrated."""
        shares = self.concentration(top)
        return Table([{"tensor": name, "columns": self.sums[name].shape[1], "tokens": int(self.counts[name].max()),
                       f"top {top:.0%}" if top >= 0.01 else f"top {top:.1%}": f"{shares[name]:.1%}"}
                      for name in sorted(shares, key=lambda name: -shares[name])])

    def __add__(self, other: "Importance") -> "Importance":
        """Both as if one run had read both texts, as llama-imatrix joins several --in-file. Raises LabError where a tensor has
        two widths: these are of two models."""
        if not isinstance(other, Importance):
            return NotImplemented
        sums, counts = dict(self.sums), dict(self.counts)
        for name, theirs in other.sums.items():
            if name not in sums:
                sums[name], counts[name] = theirs, other.counts[name]
                continue
            many = max(len(counts[name]), len(other.counts[name]))      # one count for a whole stack is every expert's
            if sums[name].size != theirs.size or many % len(counts[name]) or many % len(other.counts[name]):
                raise LabError(f"tensor {show(name)} has {sums[name].size} columns in one importance matrix and {theirs.size} "
                               "in the other: they are of two models and cannot be added")
            sums[name] = sums[name].reshape(many, -1) + theirs.reshape(many, -1)
            counts[name] = np.broadcast_to(counts[name], many) + other.counts[name]
        most = max((int(count.max()) for count in counts.values()), default=0)
        return Importance(sums, counts, most // self.context, self.context, self.datasets + other.datasets)

    @staticmethod
    def merge(several: "Sequence[Importance]") -> "Importance":
        """The sum of one or more. Raises LabError where there are none, and as `+` does."""
        if not several:
            raise LabError("there is no importance matrix to merge; give one at least")
        first, *rest = several
        for one in rest:
            first = first + one
        return first

    def save(self, path: str | os.PathLike) -> None:
        """Write llama.cpp's imatrix GGUF, whole or not at all: sums in float32, experts that no token chose with a count of 0.
        Raises LabError where it cannot be written."""
        def tensors():
            for name in sorted(self.sums):
                sums, counts = self.sums[name], self.counts[name]
                many, cols = sums.shape
                rows = [many] if many > 1 else []       # ggml writes no last dimension of 1
                yield name + SUMS, [cols, *rows], "F32", sums.astype("<f4").tobytes()
                yield name + COUNTS, [1, *rows], "F32", counts.astype("<f4").tobytes()

        write_gguf(path, {"general.type": "imatrix", "imatrix.datasets": ("array:string", list(self.datasets)),
                          "imatrix.chunk_count": ("uint32", self.chunks), "imatrix.chunk_size": ("uint32", self.context)},
                   tensors())

    def __repr__(self) -> str:
        of = f" of {', '.join(map(show, self.datasets[:3]))}" if self.datasets else ""
        lack = f", {sum(self.unseen.values())} experts unseen" if self.unseen else ""
        return (f"importance of {len(self)} matrices (measured: {self.chunks} chunk{'s' * (self.chunks != 1)} of "
                f"{self.context} tokens{of}{lack})")


class _NoSuchTensor(UnknownName, KeyError):
    """Both, so that `get` and `in` of a mapping work."""

    __str__ = UnknownName.__str__


def read_importance(path: str | os.PathLike, context: int = CONTEXT) -> Importance:
    """An importance matrix from a file that `Importance.save` or llama-imatrix wrote. `context`: for the older binary format,
    which counts chunks and does not say how long they were, their tokens.

    Raises BadFile if it is neither, damaged, or has a number that cannot be a mean of squares.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BadFile(f"cannot read the importance matrix {show_path(str(path))}: {error.strerror or error}") from error
    found = _read_gguf(path) if start == b"GGUF" else _read_binary(path, context)
    for name, sums in found.sums.items():
        if not np.isfinite(sums).all() or (sums < 0).any() or (found.counts[name] < 0).any():
            raise BadFile(f"{show_path(str(path))}: tensor {show(name)} has numbers that are no sums of squares (negative, NaN "
                          "or infinite): it is damaged, or the run that made it was; make it anew")
    return found


def _read_gguf(path: Path) -> Importance:
    file, shown = read_gguf(path), show_path(str(path))
    names = dict.fromkeys(name.removesuffix(end) for name in file.tensors for end in (SUMS, COUNTS) if name.endswith(end))
    if file.metadata.get("general.type", "imatrix") != "imatrix" or not names:
        kind = file.metadata.get("general.type") or file.metadata.get("general.architecture") or "file"
        raise BadFile(f"{shown} is no importance matrix but a GGUF {show(str(kind))}; give one that llmlab.importance or "
                      "llama-imatrix wrote")
    sums, counts = {}, {}
    for name in names:
        for end in (SUMS, COUNTS):
            if name + end not in file.tensors or file.tensors[name + end].type != "F32":
                raise BadFile(f"{shown} has no tensor {show(name + end)} in F32, which belongs to an importance matrix: it is "
                              "damaged; make it anew")
        tokens = file.data(name + COUNTS).view("<f4")
        values = file.data(name + SUMS).view("<f4")
        if not tokens.size or not values.size or values.size % tokens.size or not np.isfinite(tokens).all():
            raise BadFile(f"{shown}: tensor {show(name)} has {values.size} sums and {tokens.size} counts, which do not belong "
                          "together: it is damaged; make it anew")
        counts[name] = np.rint(tokens).astype(np.int64)
        sums[name] = values.reshape(tokens.size, -1).astype(np.float64)
    known = file.metadata.get("imatrix.datasets")
    known = known.values() if isinstance(known, Array) else known if isinstance(known, tuple) else ()
    chunks, context = (file.metadata.get(f"imatrix.chunk_{what}") for what in ("count", "size"))
    if not isinstance(chunks, int) or not isinstance(context, int) or context < 1:
        raise BadFile(f"{shown} does not say of how many chunks of how many tokens it was made (imatrix.chunk_count, "
                      "imatrix.chunk_size), and llama-quantize refuses it; make it anew")
    return Importance(sums, counts, chunks, context, tuple(map(str, known)))


def _read_binary(path: Path, context: int) -> Importance:
    """llama.cpp's format before GGUF: int32 entries; of each the name's length, the name, int32 chunks, int32 numbers, and the
    means times chunks in float32; then int32 chunks, and the length and name of the text."""
    if not isinstance(context, int) or context < 1:
        raise LabError(f"context={context!r:.40} is how many tokens a chunk had: a whole number from 1 up, such as {CONTEXT}")
    data, at = path.read_bytes(), 0

    def take(size: int) -> bytes:
        nonlocal at
        if size > len(data) - at:
            raise BadFile(f"{show_path(str(path))} is no importance matrix (neither of llama.cpp's formats), or ends too "
                          "early; give one that llmlab.importance or llama-imatrix wrote")
        at += size
        return data[at - size:at]

    def number(least: int = 1) -> int:
        found = struct.unpack("<i", take(4))[0]
        return found if found >= least else len(take(len(data) + 1))        # what is no number of things is no such file

    sums, counts = {}, {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        chunks = max(number(0), 1)       # llama-quantize takes numbers without a count as they are
        values = np.frombuffer(take(4 * number()), "<f4")
        sums[name] = values[None].astype(np.float64) * context
        counts[name] = np.array([chunks * context])
    most, known = max(int(count[0]) for count in counts.values()) // context, ""
    if at < len(data):      # the end may lack
        most = number(0)
        known = take(number(0)).decode("utf-8", "replace") if at < len(data) else ""
    return Importance(sums, counts, most, context, (known,) if known else ())
