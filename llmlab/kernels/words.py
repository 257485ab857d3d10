"""Words: codes laid out so that torch.compile's C++ multiplies by them straight from memory, one token at a time.

Vectorized code loads whole registers of 32-bit numbers best: partial loads of bytes go through the stack and are twenty times
slower. So codes lie in words, and neighbouring words, one a lane of the processor's registers, belong to neighbouring runs of
32 weights: one scale serves a lane. A code of 6 bits is two of 4 and 2: planes whose widths are powers of two, 32 weights to
as many words as the plane has bits. A code is masked where it lies, not shifted down; the power of two by which it is too large
is taken from the input, which is exact. The highest one of a word has its first bit turned, so that the mask leaves a signed
number, less by half of the range. Words travel as float32 and are seen as int32 inside, for only loads of floats are whole ones
in torch 2.13's code.

y = sum over groups of s * (codes . x) + z * sum(x) of the group, with w = s * code + z, all in float32. How s and z are held:
"floats", or as small as in the file: "bytes" (small whole numbers times one or two numbers a super-block), "halves".
"""

from functools import cache
from typing import NamedTuple

import torch

from ..formats import FORMATS
from ..formats.iq4 import LEVELS
from . import scratch
from .unpacking import apart, levels

RUN = 32                                # weights of a lane: as many words as their codes have bits
GROUPS = (16, 32, 64, 128, 256)
SUPER = 256                             # weights of a super-block
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
ROOM = 1.15                             # of the file's bytes a weight: what a small layout may take

# IQ4's sixteen levels are what these polynomials of a code, and of a code less 8, are rounded to: a table would be looked up
# lane by lane. Of degree 4 and least maximal error (0.433, by linear programming); degree 3 is off by more than a half.
CURVE = (-126.56701030927766, 24.17383029342741, -1.3719270420300242, 0.031086439333852495, 0.0015860428231565023)
CURVE_SIGNED = (1.432989690721669, 11.43980967486123, -0.016812053925467377, 0.08183980967486057, 0.0015860428231565023)


class Layout(NamedTuple):
    """How a format's codes lie: `planes`, bits from the lowest on; a scale for every `group` (16 or 32) weights; codes are
    counted from `low`, or are places in IQ4's `table`; whether groups have offsets of their own; how scales are held; how
    many runs lie side by side."""

    planes: tuple[int, ...]
    group: int
    low: int
    table: bool
    offset: bool
    held: str
    lanes: int

    @property
    def bits(self) -> int:
        """Of a code; words of a run as well."""
        return sum(self.planes)

    @property
    def halves(self) -> int:
        """Groups of a run."""
        return RUN // self.group

    @property
    def tile(self) -> int:
        """Weights that lie side by side; rows are filled up to a multiple of them."""
        return RUN * self.lanes

    @property
    def scale_bits(self) -> int:
        """Bits of a small scale among "bytes": two tiles share a word."""
        return 16 // (self.halves * (1 + self.offset) if self.halves > 1 else 2)

    def tiles(self, cols: int) -> int:
        """Of a row; an even number where two of them share a word of scales."""
        found = -(-cols // self.tile)
        return found + found % 2 if self.held == "bytes" else found

    def bits_per_weight(self, cols: int) -> float:
        """What is held for each weight of a row."""
        scale = {"floats": 32 * self.halves * (1 + self.offset) / RUN, "halves": 32 / RUN,
                 "bytes": 16 / RUN + 32 * (1 + self.offset) / SUPER}[self.held]
        return self.tiles(cols) * self.tile / cols * (self.bits + scale)


def lanes() -> int:
    """32-bit numbers in a register here."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


@cache
def layout(format: str, side: int | None = None, small: bool = False) -> Layout | None:
    """How that format's codes lie here, or with `side` lanes: the quickest way, or one that is `small`, within `ROOM` of the
    file. None where codes are no integers, groups are of an odd size, or no small way is known."""
    known = levels(format)
    if known is None or known.group not in GROUPS:
        return None
    group, side, range_ = min(known.group, RUN), side or lanes(), known.high - known.low + 1
    if not small:
        return Layout((4,) if range_ <= 16 else (8,), group, known.low, False, known.offset, "floats", side)
    table = FORMATS[format].family == "iq" and known.low == LEVELS[0]
    planes = PLANES.get(4 if table else (range_ - 1).bit_length())
    if planes is None or known.offset and known.low:
        return None
    names = [field.name for field in FORMATS[format].fields]
    held = ("bytes" if known.block == SUPER and "scale" in names and "block scales" in names else
            "halves" if known.offset and group == RUN else "floats")
    found = Layout(planes, group, 0 if table else known.low, table, known.offset, held, side)
    return found if found.bits_per_weight(known.block * 64) <= ROOM * FORMATS[format].bits else None


class Words(NamedTuple):
    """A matrix [rows, cols]: `tensors` float32, the words [rows, tiles, bits, lanes] first, then what gives scales and offsets:
    "floats" one or two [rows, tiles, halves, lanes]; "halves" words [rows, tiles, lanes] of two float16; "bytes" words [rows,
    tiles / 2, lanes] of small integers and the one or two numbers they are multiplied by, [rows, tiles, super-blocks]."""

    layout: Layout
    rows: int
    cols: int
    tensors: tuple[torch.Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


def parts(known: Layout) -> int:
    """How many tensors a matrix consists of."""
    return {"floats": 2 + known.offset, "halves": 2, "bytes": 3 + known.offset}[known.held]


# ---- laying out -------------------------------------------------------------------------------------------------

def lay_out(blocks: torch.Tensor, format: str, cols: int, known: Layout | None) -> Words | None:
    """Blocks uint8 [rows, row_bytes] as words; None where there is no layout."""
    if known is None:
        return None
    rows, step, made = blocks.shape[0], scratch.rows_at_once(cols, blocks.device), None
    for start in range(0, rows, step):
        codes, scale, offset = apart(blocks[start:start + step], format)
        found = _words(codes, known), *_scales(blocks[start:start + step], format, scale, offset, cols, known)
        if made is None:
            made = [torch.empty(rows, *part.shape[1:]) for part in found]
        for whole, part in zip(made, found, strict=True):
            whole[start:start + step] = part
    return Words(known, rows, cols, tuple(made))


def _words(codes: torch.Tensor, known: Layout) -> torch.Tensor:
    """int8 codes [n, cols] -> float32 [n, tiles, bits, lanes]; the first code of a word lies in its lowest bits."""
    if known.table:
        codes = torch.searchsorted(torch.tensor(LEVELS, dtype=torch.int8), codes).to(torch.uint8)
    else:
        codes = (codes.to(torch.int16) - known.low).to(torch.uint8)
    tiles = known.tiles(codes.shape[1])
    codes = torch.nn.functional.pad(codes, (0, tiles * known.tile - codes.shape[1]))
    found, base = [], 0
    for bits in known.planes:
        part = codes >> base & (1 << bits) - 1
        for wide in (width for width in (1, 2, 4) if width >= bits):       # two neighbours become one of twice the width
            part = part[:, ::2] | part[:, 1::2] << wide
        found.append(part.contiguous().view(torch.int32).view(-1, tiles, known.lanes, bits) ^ -1 << 31)
        base += bits
    return torch.cat(found, 3).transpose(2, 3).contiguous().view(torch.float32)


def _scales(blocks: torch.Tensor, format: str, scale: torch.Tensor, offset: torch.Tensor | None, cols: int,
            known: Layout) -> tuple[torch.Tensor, ...]:
    """Scale and offset [n, groups of any size] as the layout holds them."""
    if known.held == "floats":
        scale = _by_lane(scale, cols, known)
        return (scale, torch.add(_by_lane(offset, cols, known), scale, alpha=known.low)) if known.offset else (scale,)
    if known.held == "halves":      # they were float16 in the file
        pair = torch.stack((_by_lane(scale, cols, known), _by_lane(offset, cols, known)), -1).to(torch.float16)
        return (pair.view(torch.float32)[:, :, 0, :, 0].contiguous(),)
    fields = {field.name: field for field in FORMATS[format].fields}
    flat, many = blocks.reshape(-1, FORMATS[format].block_bytes), cols // SUPER
    numbers, small = [], []
    for name, of in (("scale", scale), ("minimum", offset if offset is None else -offset)):
        if of is None:
            continue
        field = fields[name]
        number = flat[:, field.start:field.stop].contiguous().view(torch.float16).float().view(-1, many, 1)
        numbers.append(number[..., 0])
        small.append((of.view(len(of), many, -1) / number).nan_to_num_(0, 0, 0).round_().flatten(1))
    runs = torch.stack([_by_lane(part, cols, known) for part in small], 2)       # [n, tiles, scale and minimum, halves, lanes]
    wide = known.scale_bits
    runs = runs.flatten(2, 3).to(torch.int32) & (1 << wide) - 1
    runs = runs.view(len(runs), -1, 2, runs.shape[2], known.lanes).flatten(2, 3) if runs.shape[2] * wide == 16 else \
        torch.nn.functional.pad(runs, (0, 0, 0, 1)).view(len(runs), -1, 4, known.lanes)
    words = sum(runs[:, :, at] << wide * at for at in range(runs.shape[2]))
    blocks_a_tile = known.tile // SUPER
    return words.view(torch.float32), *(torch.nn.functional.pad(number, (0, known.tiles(cols) * blocks_a_tile - many)).view(
        len(number), -1, blocks_a_tile) for number in numbers)


def _by_lane(values: torch.Tensor, cols: int, known: Layout) -> torch.Tensor:
    """[n, groups of any size] -> [n, tiles, halves, lanes], groups of the layout's size, zero beyond the row's end."""
    values = values.repeat_interleave(cols // values.shape[1] // known.group, 1)
    tiles = known.tiles(cols)
    values = torch.nn.functional.pad(values, (0, tiles * known.lanes * known.halves - values.shape[1]))
    return values.view(-1, tiles, known.lanes, known.halves).transpose(2, 3)


# ---- multiplying ------------------------------------------------------------------------------------------------

def arrange(x: torch.Tensor, known: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token's input [cols] as the words want it: [tiles, planes * 32, lanes], powers of two taken away; and for each group
    [tiles, halves, lanes] what the products lack, and the sum of the input."""
    x = torch.nn.functional.pad(x, (0, known.tiles(x.shape[0]) * known.tile - x.shape[0])).view(-1, known.lanes, RUN)
    down, lacking, base = [], [0.0 if known.offset else float(known.low)] * RUN, 0
    for bits in known.planes:
        per = RUN // bits
        for w in range(RUN):
            j = w % per
            down.append(1.0 if known.table else 2.0 ** (base - bits * j))
            if j == per - 1 and not known.table:
                lacking[w] += 2.0 ** (base + bits - 1)
        base += bits
    down, lacking = x.new_tensor(down).view(-1, RUN), x.new_tensor(lacking)
    found = (x[:, :, None] * down).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    groups = x.unflatten(2, (known.halves, known.group))
    return found, (groups * lacking.view(known.halves, -1)).sum(3).mT.contiguous(), groups.sum(3).mT.contiguous()


def code(word: torch.Tensor, j: int, bits: int) -> torch.Tensor:
    """The j-th codes of int32 words as float32, times 2^(bits * j); the last, where the sign is, are less by half of the
    range."""
    mask = (1 << bits) - 1 << bits * j
    return (word & (mask - (1 << 32) if mask >> 31 else mask)).float()


def level(found: torch.Tensor, j: int) -> torch.Tensor:
    """IQ4's levels of codes as `code` gives them."""
    curve = CURVE_SIGNED if j == 7 else CURVE
    value = found * (curve[4] * 2.0 ** (-16 * j)) + curve[3] * 2.0 ** (-12 * j)
    for k in (2, 1, 0):
        value = value * found + curve[k] * 2.0 ** (-4 * j * k)
    return value.round()


def multiply(x: tuple[torch.Tensor, torch.Tensor, torch.Tensor], by: Words) -> torch.Tensor:
    """An arranged input times the weights' transpose -> [rows]. Written to be compiled: one loop, nothing in between."""
    (x, lacking, sums), known = x, by.layout
    words, at = by.tensors[0].view(torch.int32), 0
    chains: list[dict[tuple[int, int], torch.Tensor]] = [{} for _ in range(known.halves)]
    for plane, bits in enumerate(known.planes):
        per = RUN // bits
        for w in range(RUN):
            j, chain = w % per, (at + w // per, w % 2)      # two for each word: one alone would wait for its own additions
            found = code(words[:, :, at + w // per], j, bits)
            term = (level(found, j) if known.table else found) * x[:, plane * RUN + w]
            of = chains[w // known.group]
            of[chain] = of[chain] + term if chain in of else term
        at += bits
    scales, zeros, numbers = _factors(by)
    total = _sum([scales[half] * (_sum(list(of.values())) + lacking[:, half]) for half, of in enumerate(chains)])
    offset = _sum([zero * sums[:, half] for half, zero in enumerate(zeros)]) if zeros else None
    if numbers:
        total, offset = numbers[0] * total, numbers[1] * offset if zeros else None
    return (total if offset is None else total + offset).sum((1, 2))


def _sum(found: list[torch.Tensor]) -> torch.Tensor:
    """By pairs, and pairs of pairs: none waits long for another."""
    while len(found) > 1:
        found = [found[i] + found[i + 1] if i + 1 < len(found) else found[i] for i in range(0, len(found), 2)]
    return found[0]


def _factors(by: Words) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Scales and zeros [rows, tiles, lanes] of each half, and the numbers that multiply them, of the same shape or smaller."""
    known, (_, *held) = by.layout, by.tensors
    if known.held == "floats":
        return ([held[0][:, :, half] for half in range(known.halves)],
                [held[1][:, :, half] for half in range(known.halves)] if known.offset else [], [])
    word = held[0].view(torch.int32)
    if known.held == "halves":
        return [_half(word & 0xFFFF)], [_half(word >> 16)], []
    word = word[:, :, None].expand(-1, -1, 2, -1).flatten(1, 2)
    tiles, wide = word.shape[1], known.scale_bits
    second = torch.arange(tiles, dtype=torch.int32) % 2 * 16
    found = []
    for at in range(known.halves * (1 + known.offset)):
        left = 32 - wide * (at + 1) - second            # the first tile's in the low half of the word
        value = word << left[:, None]
        found.append((value >> 32 - wide if wide == 8 else value >> 32 - wide & 15).float())
    spread = [number[..., None].expand(-1, -1, -1, SUPER // RUN).flatten(2) for number in held[1:]]
    if known.offset:
        spread[1] = -spread[1]
    return found[:known.halves], found[known.halves:], spread


def _half(bits: torch.Tensor) -> torch.Tensor:
    """float16 numbers, the low 16 bits of int32, as float32: exact but for infinities and NaN, which no scale is."""
    return ((bits & 0x7FFF) << 13 | (bits & 0x8000) << 16).view(torch.float32) * 2.0 ** 112


def unpack(by: Words, shifts: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights as they lie, [rows, tiles, 32, lanes] flat in each row: what `side_by_side` inputs are multiplied by.
    `shifts` is what `shifts` gives. Written to be compiled: whole registers from end to end."""
    known, at, base, start, codes = by.layout, 0, 0, 0, 0
    words = by.tensors[0].view(torch.int32) ^ -1 << 31
    for bits in known.planes:
        per = RUN // bits
        part = words[:, :, at:at + bits, None] >> shifts[start:start + per] & (1 << bits) - 1
        codes = codes + (part.flatten(2, 3) << base)
        at, base, start = at + bits, base + bits, start + per
    scales, zeros, numbers = _factors(by)
    found = level(codes.float(), 0) if known.table else codes.float()
    if not known.offset:
        found = found + known.low
    found = found.unflatten(2, (known.halves, known.group)) * torch.stack(scales, 2)[:, :, :, None]
    if numbers:
        found = found * numbers[0][:, :, None, None]
    if zeros:
        zeros = torch.stack(zeros, 2)
        found = found + (zeros * numbers[1][:, :, None] if numbers else zeros)[:, :, :, None]
    return found.to(dtype).flatten(1)


def shifts(known: Layout) -> torch.Tensor:
    """By how many bits each code of a word is shifted, plane after plane: int32 [n, 1]."""
    return torch.tensor([bits * j for bits in known.planes for j in range(RUN // bits)], dtype=torch.int32)[:, None]


def side_by_side(x: torch.Tensor, known: Layout) -> torch.Tensor:
    """Inputs [tokens, cols] in the order in which `unpack` gives weights, zero where rows are filled up."""
    x = torch.nn.functional.pad(x, (0, known.tiles(x.shape[1]) * known.tile - x.shape[1])).view(len(x), -1, known.lanes, RUN)
    return x.mT.flatten(1)


class Columns:
    """Many inputs [tokens, cols] times weights as `unpack` gives them: side by side, without what rows are filled up by where
    that is half of a tile at least."""

    def __init__(self, x: torch.Tensor, known: Layout):
        whole, left = divmod(x.shape[1], known.tile)
        self.known, self.lanes = known, -(-left // RUN)
        self.whole = whole * known.tile if 2 * self.lanes <= known.lanes else known.tiles(x.shape[1]) * known.tile
        x = side_by_side(x, known)
        self.x, self.rest = x[:, :self.whole], self._last(x) if self.whole < x.shape[1] and self.lanes else None

    def times(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """weights [rows, ..] -> out [tokens, rows]."""
        torch.mm(self.x, weights[:, :self.whole].T, out=out)
        if self.rest is not None:
            out.addmm_(self.rest, self._last(weights).T)

    def _last(self, numbers: torch.Tensor) -> torch.Tensor:
        """Of [n, ..] the lanes in use of the last tile."""
        tile = numbers[:, self.whole:self.whole + self.known.tile]
        return tile.unflatten(1, (RUN, -1))[:, :, :self.lanes].flatten(1)
