"""Formats made up on the spot: bits, block size, with or without a minimum, a scale of some precision; round to nearest.

Laid out as the legacy formats are: scale, minimum, then the codes one behind the other, lowest bits first. A toy is a format
like any other: once made, sizes, kernels and panels know it by its name. It is here to see what each choice buys; formats
that are used choose their scales with more care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import LabError
from .bits import halves, words
from .registry import Field, Format, Unpacked, register

if TYPE_CHECKING:
    import torch

BITS = range(2, 9)
BLOCKS = (8, 16, 32, 64, 96, 128, 192, 256)
SCALES = {"F16": 2, "F32": 4, "E8M0": 1}      # bytes; E8M0: a power of two, 2^(byte - 127)
_WORDS = {"F16": "float16", "F32": "float32", "E8M0": "a power of two: 2^(byte - 127)"}


@dataclass(frozen=True)
class Toy:
    """A block format: `block` weights of `bits` bits each share a scale, and a minimum where `minimum` is true.

    Without a minimum weight = scale x code, codes from -2^(bits-1) to 2^(bits-1) - 1; the weight farthest from zero gets
    the lowest, as in Q4_0. With one weight = scale x code + minimum, codes from 0, as in Q4_1. `scale` is stored as "F16",
    "F32" or "E8M0" (the next power of two, without a sign); the minimum as float32 beside an F32 scale, else as float16.
    Raises LabError.
    """

    bits: int = 4
    block: int = 32
    minimum: bool = True
    scale: str = "F16"

    def __post_init__(self):
        for name, allowed in (("bits", BITS), ("block", BLOCKS), ("scale", SCALES)):
            value, said = getattr(self, name), "block size" if name == "block" else name
            if isinstance(value, bool | float) or value not in tuple(allowed):
                raise LabError(f"{said} is {value!r:.40}; a toy format has one of {', '.join(map(str, allowed))}")
        if not isinstance(self.minimum, bool):
            raise LabError(f"minimum is {self.minimum!r:.40}; give True or False")

    @property
    def name(self) -> str:
        """"TOY4_32M_F16": bits, block, M with a minimum, the scale's type."""
        return f"TOY{self.bits}_{self.block}{'M' if self.minimum else ''}_{self.scale}"

    def __str__(self) -> str:
        zero = "with a minimum" if self.minimum else "symmetric"
        return f"{self.bits} bits, a {_SAID[self.scale]} scale for {self.block} weights, {zero}"

    @property
    def format(self) -> Format:
        """The format, from now on known by its name."""
        codes = self._codes_at
        fields = [Field("scale", 0, SCALES[self.scale], f"{_WORDS[self.scale]}: multiplies every code of the block")]
        if self.scale == "E8M0":
            fields = [Field("scale", 0, 1, _WORDS["E8M0"], _powers)]
        if self.minimum:
            kind = "float32" if self._wide else "float16"
            fields.append(Field("minimum", SCALES[self.scale], codes, f"{kind}: what code 0 stands for; added to every weight"))
        less = "" if self.minimum else f", less {self._low}"
        fields.append(Field("codes", codes, self._bytes, f"{self.bits} bits a weight{less}, lowest bits first", self._stored))
        return register(self.name, None, self.block, self._bytes, "toy", self.unpack, tuple(fields))

    @property
    def _wide(self) -> bool:
        return self.scale == "F32"

    @property
    def _codes_at(self) -> int:
        return SCALES[self.scale] + self.minimum * (4 if self._wide else 2)

    @property
    def _bytes(self) -> int:
        return self._codes_at + self.block * self.bits // 8

    @property
    def _low(self) -> int:
        """What is taken from a stored code: half the levels where zero lies in their middle."""
        return 0 if self.minimum else 1 << self.bits - 1

    # ---- numbers -> bytes -------------------------------------------------------------------------------

    def quantize(self, weights: torch.Tensor) -> torch.Tensor:
        """float [..., cols] -> uint8 [..., row_bytes], each weight rounded to the nearest level of its block.

        Raises LabError where rows do not divide into blocks, and where a number is none or too large for the scale.
        """
        import torch
        if weights.ndim == 0 or weights.shape[-1] % self.block:
            width = weights.shape[-1] if weights.ndim else 0
            raise LabError(f"{self.name}: rows of {width} weights do not divide into blocks of {self.block}")
        numbers = weights.float().reshape(-1, self.block)
        least, most = numbers.amin(1), numbers.amax(1)
        if not (torch.isfinite(least) & torch.isfinite(most)).all():
            raise LabError(f"{self.name}: there are weights that are no numbers; nothing can be rounded to them")
        head, scale, offset = self._head(least, most)
        codes = numbers if offset is None else numbers - offset[:, None]
        codes = codes / torch.where(scale == 0, torch.inf, scale)[:, None]
        codes = codes.round_().add_(self._low).clamp_(0, (1 << self.bits) - 1)
        out = torch.cat([*head, _joined(codes.to(torch.uint8), self.bits)], 1)
        return out.view(*weights.shape[:-1], weights.shape[-1] // self.block * self._bytes)

    def _head(self, least: torch.Tensor, most: torch.Tensor):
        """(bytes of scale and minimum, scale as it is stored, minimum as it is stored or None), from each block's ends."""
        import torch
        if self.minimum:
            stored = [_number(least, self._wide)]
            offset = _read(stored[0], self._wide)
            scale = (most - offset) / ((1 << self.bits) - 1)
        else:
            stored, offset = [], None
            scale = torch.where(-least > most, least, most) / -self._low
        if self.scale == "E8M0":        # up to the next, so that all levels together still reach the ends
            mantissa, exponent = torch.frexp(scale.abs())       # 0.5 <= mantissa < 1, or 0
            head = (exponent - (mantissa <= 0.5).int()).clamp_(-127, 127).add_(127).to(torch.uint8)[:, None]
            scale = _powers(head)[:, 0]
        else:
            head = _number(scale, self._wide)
            scale = _read(head, self._wide)
        if not torch.isfinite(scale).all() or offset is not None and not torch.isfinite(offset).all():
            raise LabError(f"{self.name}: a weight is too large for a float16 scale or minimum; take an F32 scale")
        return [head, *stored], scale, offset

    # ---- bytes -> numbers -------------------------------------------------------------------------------

    def unpack(self, blocks: torch.Tensor) -> Unpacked:
        """What `Format.unpack` asks: uint8 [n, bytes] -> codes, scale and offset."""
        import torch
        at, low = SCALES[self.scale], self._low
        scale = _powers(blocks[:, :1]) if self.scale == "E8M0" else _read(blocks[:, :at], self._wide)[:, None]
        offset = _read(blocks[:, at:self._codes_at], self._wide)[:, None] if self.minimum else None
        codes = _split(blocks[:, self._codes_at:], self.bits)
        if self.bits == 8 and self.minimum:     # 0 to 255 as int8: from the middle, which the offset then stands for
            low, offset = 128, torch.add(offset, scale, alpha=128)
        return Unpacked(codes.sub_(low).view(torch.int8), scale, offset)

    def _stored(self, piece: torch.Tensor) -> torch.Tensor:
        """The codes as they are multiplied, for people who look at a block."""
        return _split(piece, self.bits).int() - self._low


_SAID = {"F16": "float16", "F32": "float32", "E8M0": "power-of-two"}


def _number(values: torch.Tensor, wide: bool) -> torch.Tensor:
    """float32 [n] -> the bytes of each as float32 or float16, uint8 [n, 4 or 2]."""
    import torch
    return (values if wide else values.half()).contiguous().view(torch.uint8).view(len(values), -1)


def _read(part: torch.Tensor, wide: bool) -> torch.Tensor:
    """The other way round: float32 [n]."""
    import torch
    return (words(part, torch.float32) if wide else halves(part))[:, 0]


def _powers(part: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) as float32 of the same shape."""
    import torch
    return torch.ldexp(torch.ones(part.shape, dtype=torch.float64, device=part.device), part.int() - 127).float()


def _joined(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [n, k] below 2^bits -> bytes [n, k * bits / 8]: eight codes are one number of 8 x bits bits."""
    import torch
    if bits == 8:
        return codes
    eights = codes.view(len(codes), -1, 8)
    word = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for at in range(8):
        word |= eights[..., at].long() << at * bits
    return word[..., None].view(torch.uint8)[..., :bits].reshape(len(codes), -1)


def _split(part: torch.Tensor, bits: int) -> torch.Tensor:
    """The other way round: uint8 [n, k], in memory of its own."""
    import torch
    if bits == 8:
        return part.clone(memory_format=torch.contiguous_format)
    word = torch.zeros(len(part), part.shape[1] // bits, 8, dtype=torch.uint8, device=part.device)
    word[..., :bits] = part.reshape(len(part), -1, bits)
    word = word.view(torch.int64)
    out = torch.empty(*word.shape[:2], 8, dtype=torch.uint8, device=part.device)
    for at in range(8):
        out[..., at] = word[..., 0] >> at * bits & (1 << bits) - 1
    return out.view(len(part), -1)
