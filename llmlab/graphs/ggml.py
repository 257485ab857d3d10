"""ggml's graph in sizes only: tensors with shapes, sources and places, in the order in which ggml would compute them.

Shapes may hold symbols (tokens, cells, outputs), so that one graph serves every context and batch: a `Dim` is a whole
number times symbols. Operators follow ggml.c of llama-cpp-python 0.3.36: shape, type and sources of each result, and
which are mere views; `expand` visits sources depth first as ggml_build_forward_expand does.
"""

from ..formats import FORMATS

HOST = -1                       # a place: the host's memory; cards count from 0
VIEWS = ("view", "reshape", "permute", "transpose")

_ELEMENT = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "i32": (1, 4), "i64": (1, 8)}      # elements a block, bytes a block


def block_of(type: str) -> tuple[int, int]:
    """(elements, bytes) of one block of a type."""
    found = _ELEMENT.get(type)
    if found is None:
        format = FORMATS[type.upper()]
        found = _ELEMENT[type] = (format.block, format.bytes(format.block))
    return found


class Dim:
    """A whole number times symbols, like 4096*t. Equal ones are the same object; one without symbols is an int."""

    __slots__ = ("number", "symbols")
    _known: dict[tuple, "Dim"] = {}

    @classmethod
    def of(cls, number: int, symbols: tuple[str, ...]) -> "Dim | int":
        if not symbols or not number:
            return number
        key = number, symbols
        found = cls._known.get(key)
        if found is None:
            found = cls._known[key] = object.__new__(cls)
            found.number, found.symbols = key
        return found

    def __mul__(self, other: "Dim | int") -> "Dim | int":
        if isinstance(other, int):
            return self if other == 1 else Dim.of(self.number * other, self.symbols)
        return Dim.of(self.number * other.number, tuple(sorted(self.symbols + other.symbols)))

    __rmul__ = __mul__

    def __floordiv__(self, other: "Dim | int") -> "Dim | int":
        """Exact division; ValueError where it is not."""
        if isinstance(other, int):
            number, rest = divmod(self.number, other)
            symbols = self.symbols
        else:
            number, rest = divmod(self.number, other.number)
            left = list(self.symbols)
            for symbol in other.symbols:
                left.remove(symbol)
            symbols = tuple(left)
        if rest:
            raise ValueError(f"{self} is not a multiple of {other}")
        return Dim.of(number, symbols)

    def __repr__(self) -> str:
        return "*".join((str(self.number), *self.symbols))


def symbol(name: str) -> Dim:
    """A quantity known only when a graph is measured; the name is a Python identifier."""
    return Dim.of(1, (name,))


def value(dim: Dim | int, values: dict[str, int]) -> int:
    """A dimension as a number."""
    if isinstance(dim, int):
        return dim
    number = dim.number
    for name in dim.symbols:
        number *= values[name]
    return number


class Tensor:
    """One tensor. `root`: what it is a view of (never itself a view). `place`: where it already lies (weights, caches).

    `pinned`: the backend it was put on by hand. `label`: what a person would call it. `at`: number of its layer.
    """

    __slots__ = ("op", "shape", "type", "src", "root", "place", "weight", "input", "output", "pinned", "label", "at",
                 "contiguous", "bytes", "backend", "norm")

    def __init__(self, op: str, shape: tuple, type: str, src: tuple = (), root: "Tensor | None" = None):
        self.op, self.shape, self.type, self.src = op, shape, type, src
        self.root = root.root or root if root is not None else None
        self.place = self.pinned = self.bytes = None
        self.weight = self.input = self.output = self.norm = False
        self.contiguous = True
        self.label, self.at, self.backend = "", -1, None

    def size(self) -> Dim | int | str:
        """Bytes, unaligned; as a Python expression where they are no product."""
        if self.bytes is None:
            a, b, c, d = self.shape
            block, per = block_of(self.type)
            count = a * b * c * d
            self.bytes = count * per if block == 1 else count * per // block
        return self.bytes

    def __repr__(self) -> str:
        return f"<{self.op} {self.label} {self.shape} {self.type}>"


class Graph:
    """Nodes and leaves in ggml's order, and the operators that make them.

    `label` and `at` are given to every tensor made meanwhile. `derived`: symbols that follow from others, as Python
    expressions in their order. `splits`, once it is scheduled: (first node, one past the last, backend, what is copied to it).
    """

    def __init__(self):
        self.nodes: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._seen: set[int] = set()
        self._kept: list[Tensor] = []        # identities stay unique as long as the graph lives
        self.derived: dict[str, str] = {}
        self.splits: list[tuple[int, int, int, list[Tensor]]] = []      # as `schedule` cuts it
        self.label = ""
        self.at = -1

    # ---- making tensors -------------------------------------------------------------------------------------

    def op(self, name: str, shape: tuple, type: str, *src: Tensor | None) -> Tensor:
        """The result of an operator: a new contiguous tensor. `shape`: up to four dimensions."""
        if None in src:
            src = tuple(s for s in src if s is not None)
        made = Tensor(name, (*shape, 1, 1, 1)[:4], type, src)
        made.label, made.at = self.label, self.at
        self._kept.append(made)
        return made

    def like(self, name: str, a: Tensor, *src: Tensor | None) -> Tensor:
        """An operator whose result has the shape and type of its first source."""
        return self.op(name, a.shape, a.type, a, *src)

    def leaf(self, shape: tuple, type: str, label: str, input: bool = False) -> Tensor:
        made = self.op("none", shape, type)
        made.label, made.input = label, input
        return made

    def input(self, shape: tuple, type: str, label: str) -> Tensor:
        """What the caller fills before each run (ggml_set_input): it lies on the host."""
        return self.leaf(shape, type, label, input=True)

    def stored(self, shape: tuple, type: str, place: int, label: str, weight: bool = True, bytes=None) -> Tensor:
        """A weight, or a cache, that already has its memory."""
        made = self.leaf(shape, type, label)
        made.place, made.weight, made.bytes = place, weight, bytes
        return made

    def symbol(self, name: str, expression: str) -> Dim:
        """A symbol that follows from others: `g.symbol("chunks", "-(-t // 64)")`."""
        self.derived[name] = expression
        return symbol(name)

    # ---- views ----------------------------------------------------------------------------------------------

    def view(self, a: Tensor, *shape, contiguous: bool = False, op: str = "view", bytes=None) -> Tensor:
        """A view; say where it is contiguous. `bytes`: its extent where that is not its elements'."""
        made = Tensor(op, (*shape, 1, 1, 1)[:4], a.type, (a,), a)
        made.label, made.at, made.contiguous, made.bytes = a.label, self.at, contiguous, bytes
        self._kept.append(made)
        return made

    def reshape(self, a: Tensor, *shape) -> Tensor:
        return self.view(a, *shape, contiguous=True, op="reshape", bytes=a.bytes)

    def permute(self, a: Tensor, *axes: int) -> Tensor:
        """ggml_permute: axis i of the source becomes axis axes[i]."""
        shape = [1, 1, 1, 1]
        for i, axis in enumerate(axes):
            shape[axis] = a.shape[i]
        return self.view(a, *shape, op="permute", bytes=a.size())

    def transpose(self, a: Tensor) -> Tensor:
        return self.view(a, a.shape[1], a.shape[0], a.shape[2], a.shape[3], op="transpose", bytes=a.size())

    # ---- operators ------------------------------------------------------------------------------------------

    def mul_mat(self, a: Tensor, b: Tensor) -> Tensor:
        return self.op("mul_mat", (a.shape[1], b.shape[1], b.shape[2], b.shape[3]), "f32", a, b)

    def mul_mat_id(self, experts: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        return self.op("mul_mat_id", (experts.shape[1], ids.shape[0], b.shape[2]), "f32", experts, b, ids)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self.like("add", a, b)

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        return self.like("sub", a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self.like("mul", a, b)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return self.like("div", a, b)

    def add_id(self, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        return self.like("add_id", a, b, ids)

    def scale(self, a: Tensor) -> Tensor:
        return self.like("scale", a)

    def clamp(self, a: Tensor) -> Tensor:
        return self.like("clamp", a)

    def unary(self, a: Tensor) -> Tensor:
        """silu, gelu, relu, tanh, sigmoid, softplus, exp, neg, ...: GGML_OP_UNARY, which may work in place."""
        return self.like("unary", a)

    def rms_norm(self, a: Tensor) -> Tensor:
        return self.like("rms_norm", a)

    def norm(self, a: Tensor) -> Tensor:
        return self.like("norm", a)

    def rope(self, a: Tensor, positions: Tensor, factors: Tensor | None = None) -> Tensor:
        return self.like("rope", a, positions, factors)

    def soft_max(self, a: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        return self.like("soft_max", a, mask, sinks)

    def glu(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """swiglu, geglu, ...: of two tensors, or of the halves of one."""
        if up is not None:
            return self.op("glu", gate.shape, gate.type, gate, up)
        return self.op("glu", (gate.shape[0] // 2, *gate.shape[1:]), gate.type, gate)

    def get_rows(self, a: Tensor, ids: Tensor) -> Tensor:
        type = "i32" if a.type == "i32" else "f32"
        return self.op("get_rows", (a.shape[0], ids.shape[0], ids.shape[1], ids.shape[2]), type, a, ids)

    def set_rows(self, into: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        made = self.view(into, *into.shape, op="set_rows", bytes=into.bytes)
        made.src = (rows, ids, into)
        return made

    def copy(self, a: Tensor, into: Tensor) -> Tensor:
        """ggml_cpy: the result is a view of the target."""
        made = self.view(into, *into.shape, op="cpy", bytes=into.bytes)
        made.src = (a, into)
        return made

    def cont(self, a: Tensor, *shape) -> Tensor:
        return self.op("cont", shape or a.shape, a.type, a)

    def cast(self, a: Tensor, type: str) -> Tensor:
        return self.op("cpy", a.shape, type, a)

    def concat(self, a: Tensor, b: Tensor, shape: tuple) -> Tensor:
        """`shape` of the whole: a sum of symbols is not a Dim."""
        return self.op("concat", shape, a.type, a, b)

    def repeat(self, a: Tensor, *shape) -> Tensor:
        return self.op("repeat", shape, a.type, a)

    def pad(self, a: Tensor, *shape) -> Tensor:
        return self.op("pad", shape, a.type, a)

    def argsort(self, a: Tensor) -> Tensor:
        return self.op("argsort", a.shape, "i32", a)

    def top_k(self, a: Tensor, k: int) -> Tensor:
        """ggml_argsort_top_k: a whole argsort, and a view of its first k."""
        n, rows, more, _ = a.shape
        return self.view(self.argsort(a), k, rows, more, bytes=f"({rows * more}-1)*{4 * n}+{4 * k}")

    def sum_rows(self, a: Tensor) -> Tensor:
        return self.op("sum_rows", (1, *a.shape[1:]), a.type, a)

    def flash_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None = None) -> Tensor:
        return self.op("flash_attn_ext", (v.shape[0], q.shape[2], q.shape[1], q.shape[3]), "f32", q, k, v, mask, sinks)

    # ---- order ----------------------------------------------------------------------------------------------

    def expand(self, tensor: Tensor) -> None:
        """ggml_build_forward_expand."""
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        for source in tensor.src:
            self.expand(source)
        (self.leaves if tensor.op == "none" else self.nodes).append(tensor)
