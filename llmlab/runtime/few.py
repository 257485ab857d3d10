"""Few rows: multiplied by codes as they are unpacked, to the bit as many rows are by numbers, from fewer bytes.

Few rows are bound by the bytes of the matrix. `kernels.crosswise` reads a fifth of them, and sums in the order in which some
libraries multiply many rows by numbers. Whether this machine's does so is not known beforehand: every matrix is tried, and one
whose results differ in any bit, or whose kind takes longer, is multiplied as numbers for few rows too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.nn import functional

from ..kernels import Packed, crosswise
from ..kernels.arithmetic import quicker
from ..kernels.crosswise import Apart, Crosswise, Layout
from ..kernels.tuning import remembered
from ..kernels.words import Words
from .compiling import NotPackaged, Package, package

MOST = 16               # rows
COUNTS = (1, 2, 4)      # of rows that there is code for: three are filled up, more go by fours
SHARE = 3 / 8           # of the bytes of numbers: what codes take at most
_FOUR = COUNTS[-1]
_MEASURED = *COUNTS, *range(2 * _FOUR, MOST + 1, _FOUR)
_ROUNDS = 12            # of measuring
_ENOUGH = 1 << 27       # bytes of numbers of one kind that are measured: more than caches hold
_TILES = 128            # of the matrix that code is made with
_USUAL = 192            # inputs of a block: looked for first, then all multiples of _STEP to the _LONGEST
_STEP, _LONGEST = 16, 1024
_ROWS, _TRIED = 1024, 16        # of a matrix it is measured with, at most, and those that are looked at


class Both:
    """A matrix [rows, cols] as `numbers` and as codes. packages: by a number of rows of x, what multiplies so many; most: rows
    that are multiplied so."""

    def __init__(self, numbers: torch.Tensor, codes: Crosswise, packages: dict[int, Package], most: int = MOST):
        self.numbers, self.codes, self.packages, self.most = numbers, codes, packages, most

    def few(self, x: torch.Tensor) -> torch.Tensor | None:
        """x [n, cols] float32 -> [n, rows]; None where so many are multiplied as numbers."""
        if len(x) > self.most:
            return None
        found = [self._some(part) for part in x.split(_FOUR)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _some(self, x: torch.Tensor) -> torch.Tensor:
        count = len(x)
        room = next(n for n in self.packages if count <= n)
        x = crosswise.arranged(x, self.codes, room)
        return self.packages[room](x, *self.codes.tensors)[0][:count, :self.codes.rows]


class Few:
    """What few rows are multiplied by. found: by the id of its numbers, each matrix that has codes, too. most: rows that any of
    them is multiplied by so. bytes: of the codes. why: what was chosen, in a line."""

    def __init__(self, matrices: Iterable[tuple[torch.Tensor, Sequence[Packed | Words]]], even: Callable[[int], int],
                 progress: Callable[[str], None] | None = None):
        """matrices: numbers float32, and the matrices that lie under one another in them. even: the number of rows that so many
        are filled up to, so that they are multiplied as any larger number is."""
        self.found: dict[int, Both] = {}
        kinds, count = defaultdict(list), 0
        for numbers, sources in matrices:
            count += 1
            if (codes := _codes(numbers, sources, even(MOST))) is not None:
                kinds[codes.layout, numbers.shape].append((numbers, codes))
        try:
            layouts = dict.fromkeys(known for known, _ in kinds)
            made = {known: {n: _package(known, n, progress) for n in COUNTS} for known in layouts}
        except NotPackaged as error:
            self.most, self.bytes, self.why = 0, 0, f"few rows likewise; not compiled: {error}"
            return
        for (known, _), pairs in kinds.items():
            both = [one for one in (Both(*pair, made[known]) for pair in pairs) if _alike(one, even)]
            quick = _quick(*both[0].numbers.shape, known.bits, known.group, known.block) if both else 0
            counts = [n for n in _MEASURED if quick >> n & 1]
            for one in both if counts else ():
                one.packages = {n: made[known][n] for n in COUNTS if n in counts}
                one.most = counts[-1]
                self.found[id(one.numbers)] = one
        self.most = max((one.most for one in self.found.values()), default=0)
        self.bytes = sum(one.codes.bytes for one in self.found.values())
        self.why = f"up to {self.most} rows by the codes of {len(self.found)} of {count}, to the bit the same"


def _codes(numbers: torch.Tensor, sources: Sequence[Packed | Words], many: int) -> Crosswise | None:
    """None where the matrix cannot be laid out so, or would not be the same to the bit."""
    parts = [crosswise.parted(one) for one in sources]
    if any(part is None for part in parts) or numbers.dtype != torch.float32:
        return None
    whole: Apart = crosswise.under(parts)
    block = _block(min(len(numbers), _ROWS), numbers.shape[1], many)
    if not block or block % whole.group:
        return None
    found = crosswise.lay_out(whole, block)
    return found if torch.equal(crosswise.unpack(found), numbers) else None


@remembered
def _block(rows: int, cols: int, many: int) -> int:
    """How many inputs the library sums before its sums begin anew, `many` rows times a matrix [rows, cols]; 0 where it sums in
    another way."""
    random = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(count, cols, generator=random) for count in (many, rows))
    true = torch.mm(x, matrix.T)[:_FOUR, :_TRIED]
    x, matrix = (functional.pad(one.double(), (0, _LONGEST)) for one in (x[:_FOUR, None], matrix[None, :_TRIED]))
    for block in sorted({*range(_STEP, min(cols, _LONGEST) + 1, _STEP)}, key=lambda size: (size != _USUAL, size)):
        count = -(-cols // block)
        a, b = (one[..., :count * block].unflatten(2, (count, block)) for one in (x, matrix))
        sums = torch.zeros(_FOUR, true.shape[1], count)
        for at in range(block):         # by way of float64, whose second rounding shows once in 2^29
            sums = (sums + a[..., at] * b[..., at]).float()
        total = sums[..., 0]
        for at in range(1, count):
            total = total + sums[..., at]
        if (total == true).float().mean() > 0.95:
            return block
    return 0


def _package(known: Layout, count: int, progress: Callable[[str], None] | None) -> Package:
    """`count` rows times any matrix of that layout. Raises NotPackaged."""
    def multiply(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (crosswise.multiply(x, Crosswise(known, 0, 0, tensors), count),)

    random = torch.Generator().manual_seed(0)
    rows, cols = _TILES * known.tile, 2 * known.block
    codes = torch.randint(0, 1 << known.bits, (rows, cols), dtype=torch.uint8, generator=random)
    scale, zero = torch.rand(2, rows, 2 * known.groups, generator=random)
    example = crosswise.lay_out(Apart(codes, scale, zero, known.bits, known.group), known.block, known.lanes)
    x = torch.randn(cols, max(2, count), generator=random)
    return package(multiply, [x, *example.tensors], f"multiplying_of_{count}_rows {known}", (crosswise, _package),
                   {0: {0: f"{known.block}*blocks"}, **{i: {0: "tiles", 1: "blocks"} for i in (1, 2, 3)}}, progress)


def _many(x: torch.Tensor, numbers: torch.Tensor, even: Callable[[int], int]) -> torch.Tensor:
    """x [n, cols] -> [n, rows], as many rows are multiplied."""
    count = len(x)
    return torch.mm(torch.cat([x, x[:1].expand(even(count) - count, -1)]), numbers.T)[:count]


def _alike(one: Both, even: Callable[[int], int]) -> bool:
    """Whether few rows come out as many do, to the bit."""
    x = torch.randn(MOST, one.codes.cols, generator=torch.Generator().manual_seed(one.codes.rows))
    wanted = _many(x, one.numbers, even)
    return all(torch.equal(one.few(x[:n]), wanted[:n]) for n in _MEASURED)


@remembered
def _quick(rows: int, cols: int, bits: int, group: int, block: int) -> int:
    """The sum of 2^n for those numbers n of rows that codes multiply in less time than numbers do, with as many matrices [rows,
    cols] as no cache holds. More than four only where four are among them."""
    many = -(-_ENOUGH // (4 * rows * cols))
    numbers = torch.ones(many, rows, cols)
    scale, zero = torch.ones(2, rows, cols // group)
    codes = crosswise.lay_out(Apart(torch.ones(rows, cols, dtype=torch.uint8), scale, zero, bits, group), block)
    packages, found = {n: _package(codes.layout, n, None) for n in COUNTS}, 0
    every = [Both(one, codes._replace(tensors=tuple(t.clone() for t in codes.tensors)), packages) for one in numbers]
    for n in _MEASURED:
        some, filled = torch.ones(n, cols), torch.ones(-(-n // _FOUR) * _FOUR, cols)
        if quicker(lambda x=some: [one.few(x) for one in every], lambda x=filled: [torch.mm(x, one.T) for one in numbers],
                   _ROUNDS):
            found |= 1 << n
        elif n >= _FOUR:
            break
    return found
