"""Where ggml's graph allocator puts tensors that live at the same time: ggml-alloc.c of llama-cpp-python 0.3.36.

Which tensors are placed and freed, and when, follows from the graph alone; how large a buffer that takes follows from
the sizes. So a scheduled graph is compiled once into a `Plan`, and a plan measured for any sizes in microseconds.
One chunk a buffer: the CPU's and CUDA's buffer types have no largest size.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from .ggml import Dim, Graph, Tensor

IN_PLACE = frozenset(("fill", "scale", "diag_mask_zero", "diag_mask_inf", "add", "add_id", "add1", "sub", "mul", "div", "sqr",
                      "sqrt", "log", "unary", "rope", "rms_norm", "clamp", "soft_max"))
"""Operators that may overwrite a source (ggml_op_can_inplace)."""
HOST_ALIGNMENT = 32          # TENSOR_ALIGNMENT, ggml-impl.h
CARD_ALIGNMENT = 128         # ggml-cuda.cu
_ENDLESS = 1 << 62


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes of one backend's buffer, and what lies in it when it is fullest, largest first: (label, layer, bytes)."""

    bytes: int
    held: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """A run of steps that stands for `more` further ones like it: steps `first` to `last`. `taken`: slots of the turn before
    it that it still uses; `left`: the slots that it leaves in their place."""

    first: int
    last: int
    more: int
    taken: tuple[int, ...]
    left: tuple[int, ...]


MOST_KNOWN = 64         # sizes whose buffers are kept, a plan


class Irregular(Exception):
    """Layers that look alike are not treated alike; build all of them."""


@dataclass(slots=True)
class Plan:
    """A compiled graph. `steps`: (backend, slot, size) allocates and (~backend, slot, size) frees, `size` an index into what
    `code` evaluates to."""

    backends: int
    steps: list[tuple[int, int, int]]
    slots: list[tuple[str, int]]          # label and layer
    code: object
    derived: tuple[tuple[str, object], ...]
    loops: tuple[Loop, ...] = ()
    known: dict[tuple[int, ...], list[Peak]] = field(default_factory=dict, compare=False, repr=False)

    def sizes(self, values: dict[str, int]) -> tuple[int, ...]:
        """Aligned bytes of every size there is, for values of the symbols."""
        if self.derived:
            values = dict(values)
            for name, code in self.derived:
                values[name] = eval(code, {}, values)
        return eval(self.code, {}, values)

    def measure(self, values: dict[str, int]) -> list[Peak]:
        """The buffer of each backend. Kept: weights on cards change none of it, so a ladder of quants asks again and again."""
        sizes = self.sizes(values)
        if sizes in self.known:
            return self.known[sizes]
        if len(self.known) >= MOST_KNOWN:
            self.known.clear()
        found = self.known[sizes] = self._played(sizes)
        return found

    def _played(self, sizes: tuple[int, ...]) -> list[Peak]:
        memory = _Memory(self.backends, len(self.slots))
        at = 0
        for loop in self.loops:
            memory.play(self.steps, at, loop.first, sizes)
            memory.repeat(self.steps, loop, sizes)
            at = loop.last
        memory.play(self.steps, at, len(self.steps), sizes)
        return [Peak(top, self._held(backend, step, sizes) if top else ()) for backend, (top, step) in
                enumerate(zip(memory.tops, memory.when, strict=True))]

    def _held(self, backend: int, until: int, sizes: tuple[int, ...]) -> tuple[tuple[str, int, int], ...]:
        held: dict[int, int] = {}
        for at, slot, which in self.steps[:until + 1]:
            if at == backend:
                held[slot] = which
            elif at == ~backend:
                del held[slot]
        found = [(*self.slots[slot], sizes[which]) for slot, which in held.items()]
        return tuple(sorted(found, key=lambda one: -one[2])[:6])


class _Memory:
    """The free blocks of each backend by address, the last of them endless; `where` each slot lies; the highest address so
    far, and the step that reached it."""

    def __init__(self, backends: int, slots: int):
        self.starts: list[list[int]] = [[0] for _ in range(backends)]
        self.ends: list[list[int]] = [[_ENDLESS] for _ in range(backends)]
        self.tops, self.when = [0] * backends, [0] * backends
        self.where = [0] * slots
        self.empty = False           # whether there may be free blocks of no bytes

    def play(self, steps: list[tuple[int, int, int]], first: int, last: int, sizes: tuple[int, ...]) -> None:
        """Best fit, as ggml_dyn_tallocr_alloc and ggml_dyn_tallocr_free_bytes do it."""
        starts, ends, tops, when, where = self.starts, self.ends, self.tops, self.when, self.where
        for step, (backend, slot, which) in enumerate(steps[first:last], first):
            if backend >= 0:
                size, start, end = sizes[which], starts[backend], ends[backend]
                best = len(start) - 1                        # the endless one, if no other is large enough
                if best:
                    most = _ENDLESS
                    for i in range(best):
                        free = end[i] - start[i]
                        if size <= free <= most:
                            best, most = i, free
                where[slot] = low = start[best]
                high = low + size
                if high == end[best]:
                    del start[best], end[best]
                else:
                    start[best] = high
                if high > tops[backend]:
                    tops[backend], when[backend] = high, step
            else:
                start, end = starts[~backend], ends[~backend]
                low = where[slot]
                high = low + sizes[which]
                if high == low or self.empty:
                    self.empty |= _free_among_empty(start, end, low, high)
                    continue
                i = bisect_left(start, low)
                if i and end[i - 1] == low:
                    if start[i] == high:
                        end[i - 1] = end[i]
                        del start[i], end[i]
                    else:
                        end[i - 1] = high
                elif start[i] == high:
                    start[i] = low
                else:
                    start.insert(i, low)
                    end.insert(i, high)

    def _state(self, slots: tuple[int, ...]) -> tuple:
        """All that the next turn of a loop depends on, with the slots it takes over."""
        return tuple(map(tuple, self.starts)), tuple(map(tuple, self.ends)), tuple(map(self.where.__getitem__, slots))

    def repeat(self, steps: list[tuple[int, int, int]], loop: Loop, sizes: tuple[int, ...]) -> None:
        """Play a loop and its further turns: until the memory looks as after an earlier turn, then only what is left of the
        cycle."""
        where = self.where
        seen = {self._state(loop.taken): 0}
        left = loop.more + 1
        turn = 0
        while left:
            self.play(steps, loop.first, loop.last, sizes)
            turn, left = turn + 1, left - 1
            if left:
                state = self._state(loop.left)
                if state in seen:
                    left %= turn - seen[state]
                    seen.clear()
                seen[state] = turn
                for to, slot in zip(loop.taken, loop.left, strict=True):
                    where[to] = where[slot]


def _free_among_empty(starts: list[int], ends: list[int], low: int, high: int) -> bool:
    """ggml_dyn_tallocr_free_bytes to the letter: a tensor of no bytes may become a free block of none, which keeps its
    neighbours from merging and the blocks from their order. Whether it did."""
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end == low:
            ends[i] = high
            if i + 1 < len(starts) and starts[i + 1] == high:
                ends[i] = ends[i + 1]
                del starts[i + 1], ends[i + 1]
            return False
        if start == high:
            starts[i] = low
            if i and ends[i - 1] == low:
                ends[i - 1] = end
                del starts[i], ends[i]
            return False
    at = next(i for i, start in enumerate((*starts, low)) if start >= low)
    starts.insert(at, low)
    ends.insert(at, high)
    return low == high


class _Compiler:
    """The bookkeeping of ggml_gallocr_alloc_graph_impl, with slots in place of addresses."""

    def __init__(self, backends: int, alignments: tuple[int, ...], cuda: bool):
        self.alignments, self.cuda = alignments, cuda
        self.children: dict[int, int] = {}
        self.views: dict[int, int] = {}
        self.slot: dict[int, int] = {}              # of tensors that own memory now
        self.on: dict[int, int] = {}                # their backend
        self.sizes: dict[tuple, int] = {}
        self.slots: list[Tensor] = []
        self.steps: list[tuple[int, int, int]] = []
        self.size_of: dict[int, int] = {}           # slot -> index of its size
        self.done: set[int] = set()

    def allocate(self, tensor: Tensor) -> None:
        key = id(tensor)
        if tensor.place is not None or tensor.root is not None or key in self.done:
            return
        self.done.add(key)
        if tensor.op in IN_PLACE:
            for parent in tensor.src:
                mine = id(parent)
                if (mine in self.slot and not parent.output and self.children.get(mine) == 1 and not self.views.get(mine)
                        and parent.type == tensor.type and parent.shape == tensor.shape):
                    self.slot[key] = self.slot.pop(mine)
                    self.on[key] = self.on[mine]
                    return
        backend = tensor.backend
        slot = len(self.slots)
        self.slots.append(tensor)
        self.slot[key], self.on[key] = slot, backend
        self.size_of[slot] = size = self.size_index(tensor, backend)
        self.steps.append((backend, slot, size))

    def size_index(self, tensor: Tensor, backend: int) -> int:
        extra = None
        if self.cuda and tensor.op == "flash_attn_ext" and backend < len(self.alignments) - 1:
            extra = tuple(_unpacked(tensor))
            if extra:
                tensor.label = "attention and the cache it unpacks"
        key = tensor.size(), self.alignments[backend], extra
        return self.sizes.setdefault(key, len(self.sizes))

    def release(self, tensor: Tensor) -> None:
        slot = self.slot.pop(id(tensor), None)
        if slot is not None:
            if tensor.output:
                self.slot[id(tensor)] = slot
                return
            self.steps.append((~self.on[id(tensor)], slot, self.size_of[slot]))

    def used(self, source: Tensor) -> None:
        """One user of a source is done."""
        key = id(source)
        self.children[key] -= 1
        if self.children[key] or self.views.get(key):
            return
        root = source.root
        if root is None:
            self.release(source)
            return
        mine = id(root)
        self.views[mine] -= 1
        if not self.views[mine] and not self.children.get(mine):
            self.release(root)


def _unpacked(attention: Tensor) -> list[Dim | int]:
    """Elements of K and V that a CUDA flash attention unpacks to f16 behind its result (fattn-common.cuh): none where they
    are f16 already, and K's alone where V is a view of K (MLA)."""
    _, k, v = attention.src[:3]
    a, b, c, d = k.shape
    found = [a * b * c * d] if k.type != "f16" else []
    if v.type != "f16" and not (v.root is not None and v.root is k.root):
        a, b, c, d = v.shape
        found.append(a * b * c * d)
    return found


def compile_plan(graph: Graph, nodes: list[Tensor], leaves: list[Tensor], cards: int, cuda: bool = True,
                 turns: Sequence[tuple[int, int, int, int]] = ()) -> Plan:
    """The plan of a scheduled graph; the host is the last backend.

    turns: (layer, layer, layer, more) for layers that stand for others: where each of two turns begins, and what follows;
    the second is to be played `more` times more. Raises Irregular where they are not alike.
    """
    alignments = (*(CARD_ALIGNMENT,) * cards, HOST_ALIGNMENT)
    c = _Compiler(cards + 1, alignments, cuda)
    for leaf in leaves:
        c.allocate(leaf)
    for tensor in nodes:
        if tensor.root is not None and tensor.op != "none":
            c.views[id(tensor.root)] = c.views.get(id(tensor.root), 0) + 1
        if tensor.input:
            c.allocate(tensor)
        for source in tensor.src:
            c.children[id(source)] = c.children.get(id(source), 0) + 1
            if source.input:
                c.allocate(source)
    begins: dict[int, tuple[int, int]] = {}          # layer -> its first step and slot
    for tensor in nodes:
        if tensor.at not in begins:
            begins[tensor.at] = len(c.steps), len(c.slots)
        for source in (*tensor.src, tensor):
            if source.root is None and id(source) not in c.done:
                c.allocate(source)
        for source in tensor.src:
            c.used(source)
    terms = ",".join(_aligned(size, alignment, extra) for size, alignment, extra in c.sizes)
    return Plan(cards + 1, c.steps, [(t.label, t.at) for t in c.slots], compile(f"({terms},)", "<sizes>", "eval"),
                tuple((name, compile(text, "<symbol>", "eval")) for name, text in graph.derived.items()),
                tuple(_loop(c.steps, *(begins[layer] for layer in layers), more) for *layers, more in turns))


def _loop(steps: list[tuple[int, int, int]], one: tuple[int, int], two: tuple[int, int], after: tuple[int, int],
          more: int) -> Loop:
    """A loop over the second of two turns, each given by its first step and slot, if they are alike."""
    (a, x), (b, y), (c, z) = one, two, after
    alike = b - a == c - b and y - x == z - y and all(
        p[0] == q[0] and p[2] == q[2] and (q[1] - p[1] == y - x or p[1] < x and q[1] < y)
        for p, q in zip(steps[a:b], steps[b:c], strict=True))          # what the first frees of others' may lie elsewhere
    if not alike or any(slot < x for _, slot, _ in steps[b:c]) or any(x <= slot < y for _, slot, _ in steps[c:]):
        raise Irregular
    taken = tuple(sorted({slot for _, slot, _ in steps[b:c] if x <= slot < y}))
    return Loop(b, c, more, taken, tuple(slot + y - x for slot in taken))


def _aligned(size: Dim | int, alignment: int, extra: tuple | None) -> str:
    """Python for a size rounded up, with what a CUDA attention keeps behind it."""
    if isinstance(size, int) and not extra:
        return str(-(-size // alignment) * alignment)
    text = str(size)
    for elements in extra or ():
        text = f"-(-({text})//128)*128+2*{elements}"
    return f"-(-({text})//{alignment})*{alignment}"
