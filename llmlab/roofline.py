"""Where the time of one token goes: each operation's bytes, operations and seconds, held against what the machine allows.

A decoder reads tokens as it always does while its multiplications are watched: a matrix is as cold in the cache as in life, and
what lies between two multiplications is the small operations. An operation cannot take less than its bytes over the memory's
bandwidth, nor than its operations over the rate of multiplication (the roofline: Williams, Waterman and Patterson, 2009).
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import hardware
from .calibration.rates import WIDTH, last_cache
from .errors import LabError
from .formats import FORMATS
from .kernels import Packed
from .kernels.nibbles import Nibbles
from .kernels.words import Words
from .memory import CACHE_TYPES
from .runtime.decoder import Decoder
from .runtime.generating import Memory
from .runtime.modules import PackedExperts
from .units import MIB

SMALL, EMBEDDING, ATTENTION = "small operations", "embedding", "attention"
KINDS = {"qkv": "qkv", "q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate, up", "up": "gate, up", "gate_up": "gate, up",
         "out": "out", "down": "down", "output": "output"}     # a matrix's name, of llmlab's layers -> its operation
_MODULES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "o_proj": "out", "gate_proj": "gate, up",
            "up_proj": "gate, up", "gate_up_proj": "gate, up", "c_fc": "gate, up", "down_proj": "down", "c_proj": "down",
            "lm_head": "output", "experts": "experts", "embed_tokens": EMBEDDING}       # of transformers' modules
TOKENS, READ_AT_ONCE, _FEWEST = 16, 256, 3
_LEAST, _MOST, _SQUARE, _ROUNDS = 64 * MIB, 512 * MIB, 1024, 3


@dataclass(frozen=True)
class Op:
    """One kind of operation of one token, all of its calls together. bytes: what it reads of weights or cache, exact; flops:
    two for each multiply-add, exact; seconds: measured. Small operations read what was just written: no bytes, no operations
    that count."""

    name: str
    calls: int
    bytes: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches with all of torch's threads, measured: bytes a second from memory, operations a second of a
    large multiplication. `how` says of what."""

    bandwidth: float
    flops: float
    how: str

    def floor(self, op: Op) -> float:
        """Seconds that an operation takes at least."""
        return max(op.bytes / self.bandwidth, op.flops / self.flops)


@dataclass(frozen=True)
class Profile:
    """One token after `context` others, by one way of running a model.

    ops: each as it was in its quickest token of those that were watched. seconds: of the quickest token that was not.
    """

    ops: tuple[Op, ...]
    seconds: float
    context: int
    why: str

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.ops)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return 1 / self.seconds

    def fraction(self, ceilings: Ceilings) -> float:
        """Of the roofline: the least time that its bytes and operations take, over the time it took. Above one where weights
        are read from the processor's cache."""
        return sum(map(ceilings.floor, self.ops)) / self.seconds


def ceilings() -> Ceilings:
    """Measured in half a second: the best of some reads of a buffer that no cache holds (a sum, a matrix times a vector), and
    of some multiplications of square matrices in float32 and, where it is quicker, in bfloat16."""
    size = min(max(8 * (last_cache() or 0), _LEAST), _MOST, max(_LEAST, hardware.ram_available() // 8)) // MIB * MIB
    buffer, vector = torch.ones(size // 4), torch.ones(WIDTH)
    matrix = buffer.view(-1, WIDTH)
    seconds = min(_took(read) for _ in range(_ROUNDS) for read in (buffer.sum, lambda: matrix @ vector))
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.ones(_SQUARE, _SQUARE, dtype=dtype)
        found = [2 * _SQUARE ** 3 / _took(lambda one=one: one @ one)]
        if found[0] > max(rates.values(), default=0) / 4:           # the first one may find the machine asleep
            found += [2 * _SQUARE ** 3 / _took(lambda one=one: one @ one) for _ in range(_ROUNDS)]
        rates[str(dtype).removeprefix("torch.")] = max(found)
    kind, threads = max(rates, key=rates.get), torch.get_num_threads()
    return Ceilings(size / seconds, rates[kind], f"{size // MIB} MiB read by {threads} thread{'s' * (threads != 1)}, "
                    f"{_SQUARE} x {_SQUARE} multiplied in {kind}")


def profile(reader: Decoder | Memory, context: int = 64, tokens: int = TOKENS) -> Profile:
    """One reader's Profile; see `profiles`."""
    return profiles({"": reader}, context, tokens)[""]


def profiles(readers: dict[str, Decoder | Memory], context: int = 64, tokens: int = TOKENS, seconds: float = 10.0,
             stopped: Callable[[], bool] = lambda: False) -> dict[str, Profile] | None:
    """Where a token's time goes in each of several ways to run a model: they read `context` tokens, then take turns at `tokens`
    watched ones and as many that are not watched, fewer where they take more than `seconds`, but three at least; None where it
    was `stopped`. A reader is a lean decoder, compiled or not, or `generating.Memory` of a model of `llmlab.load`. On
    processors only. Raises LabError for a context that has no room."""
    if isinstance(context, bool) or not isinstance(context, int) or context < 2:
        raise LabError(f"context is {context!r:.40}; give how many tokens were read before, 2 at least")
    for reader in readers.values():
        if _device(reader) != "cpu":
            raise LabError("operations are timed on processors; a card does them while the next ones are being sent")
        if reader.context and context >= reader.context:
            raise LabError(f"context is {context:,} tokens, and this model has room for {reader.context:,}; give less")
    text = [2 + at * 7919 % 97 for at in range(context + tokens)]
    watched, plain = ({name: [] for name in readers} for _ in range(2))
    end = None
    for turn in range(-1, tokens):                  # a first one that does not count
        if turn == 0:
            end = time.perf_counter() + seconds
        elif turn >= _FEWEST and time.perf_counter() > end:
            break
        for name, reader in readers.items():
            token = [text[context + turn]]
            if not _rewound(reader, text[:context], stopped):
                return None
            took = _took(lambda reader=reader, token=token: reader.read(token))
            if not _rewound(reader, text[:context], stopped):
                return None
            with _watching(reader) as watch:
                start = time.perf_counter()
                reader.read(token)
                found = watch.ops(start, time.perf_counter(), reader)
            if turn >= 0:
                plain[name].append(took)
                watched[name].append(found)
    for reader in readers.values():
        reader.forget()
    return {name: Profile(tuple(min(same, key=lambda op: op.seconds) for same in zip(*watched[name], strict=True)),
                          min(plain[name]), context, _why(reader)) for name, reader in readers.items()}


def _rewound(reader: Decoder | Memory, text: list[int], stopped: Callable[[], bool]) -> bool:
    """Whether it has read `text` and nothing else, unless it was stopped."""
    for start in range(reader.keep([*text, 0]), len(text), READ_AT_ONCE):
        if stopped():
            return False
        reader.read(text[start:start + READ_AT_ONCE])
    return not stopped()


def _took(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _device(reader: Decoder | Memory) -> str:
    return (reader.device if isinstance(reader, Decoder) else reader.model.device).type


def _why(reader: Decoder | Memory) -> str:
    if isinstance(reader, Decoder):
        return reader.why
    loaded = getattr(reader.model, "llmlab", None)
    return loaded.why if loaded else ""


# ---- watching -------------------------------------------------------------------------------------------------------


class _Watch:
    """What happened while one token was read: (operation, begin, end, bytes, operations), one after another."""

    def __init__(self):
        self.seen: list[tuple[str, float, float, int, int]] = []

    def around(self, work: Callable, name: str, bytes: int, flops: int) -> Callable:
        """`work`, seen."""
        def watched(*given):
            start = time.perf_counter()
            found = work(*given)
            self.seen.append((name, start, time.perf_counter(), bytes, flops))
            return found
        return watched

    def ops(self, start: float, stop: float, reader: Decoder | Memory) -> tuple[Op, ...]:
        """What was seen by its kind; what lies between is attention where it leads from Q, K and V to the matrix after them,
        the embedding before a lean decoder's first layer, and small operations elsewhere."""
        found: dict[str, list] = {}

        def add(name, seconds, calls=1, bytes=0, flops=0):
            held = found.setdefault(name, [0, 0, 0, 0.0])
            for at, value in enumerate((calls, bytes, flops, seconds)):
                held[at] += value

        lean, first = isinstance(reader, Decoder), True
        last, before, caches = start, "", iter(_cache(reader, len(reader.tokens)))
        for name, begin, end, bytes, flops in self.seen:
            if first and lean:
                add(EMBEDDING, begin - last, 1, reader.weights.embedding.blocks[0].nbytes)
            elif before == "qkv" and name == "out":
                add(ATTENTION, begin - last, 1, *next(caches))
            else:
                add(SMALL, begin - last)
            add(name, end - begin, 1, bytes, flops)
            last, before, first = end, name, False
        add(SMALL, stop - last)
        return tuple(Op(name, *values) for name, values in found.items())


@contextlib.contextmanager
def _watching(reader: Decoder | Memory) -> Iterator[_Watch]:
    """A watch on a reader's multiplications, taken off again at the end."""
    watch = _Watch()
    if not isinstance(reader, Decoder):
        with _hooks(reader.model, watch):
            yield watch
    elif reader.compiled:
        caches = _cache(reader, len(reader.tokens) + 1)
        with reader.compiled.watched(lambda name, package, weights, number: watch.around(
                package, name, *_layer(weights, *(caches[number] if number is not None else (0, 0))))):
            yield watch
    else:
        known = {id(one): _matrix(name.removesuffix(".experts"), one) for part in (*reader.weights.layers, reader.weights.head)
                 for name, value in part.items() for one in (value if isinstance(value, tuple) else (value,))
                 if isinstance(one, Packed)}
        before = reader.multiply

        def multiply(x, packed):
            name, bytes, flops = known[id(packed)]
            return watch.around(before, name, bytes, flops)(x, packed)

        reader.multiply = multiply
        try:
            yield watch
        finally:
            reader.multiply = before


@contextlib.contextmanager
def _hooks(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """The same for transformers' modules."""
    handles, begun = [], []

    def hook(module, name):
        bytes, flops = _module(module, getattr(model.config, "num_experts_per_tok", 0))

        def begin(*_):
            begun.append(time.perf_counter())

        def end(*_):
            watch.seen.append((name, begun.pop(), time.perf_counter(), bytes, flops))

        handles.extend((module.register_forward_pre_hook(begin), module.register_forward_hook(end)))

    for path, module in model.named_modules():
        if name := _MODULES.get(path.rpartition(".")[2]):
            hook(module, name)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- bytes and operations -------------------------------------------------------------------------------------------


def read_by(packed: Packed) -> int:
    """Bytes of a packed matrix that one token reads: nibbles as often as they are gone over, codes, or the file's blocks."""
    return sum(kernel.nibbles.nbytes * kernel.halves + kernel.scales.nbytes if isinstance(kernel, Nibbles) else
               kernel.bytes() or kernel.blocks.nbytes for kernel in packed.kernels)


def _matrix(name: str, packed: Packed) -> tuple[str, int, int]:
    kind = KINDS.get(name.removesuffix("_shared").split("_")[0], KINDS.get(name.removesuffix("_shared"), name))
    return kind, read_by(packed), 2 * packed.rows * packed.cols


def _module(module: nn.Module, used: int) -> tuple[int, int]:
    """Bytes and operations of a module for one token, which uses so many experts."""
    packed = getattr(module, "packed", None)
    if isinstance(module, PackedExperts):
        found = [_matrix("", stack[0])[1:] for stack in (module.gate, module.up, module.down)]
        return used * sum(bytes for bytes, _ in found), used * sum(flops for _, flops in found)
    if isinstance(packed, Packed):
        return (packed.blocks[0].nbytes, 0) if isinstance(module, nn.Embedding) else _matrix("", packed)[1:]
    weights = [p for p in module.parameters() if p.ndim == 2]
    if isinstance(module, nn.Embedding):
        return weights[0][0].nbytes, 0
    return sum(p.nbytes for p in weights), sum(2 * p.numel() for p in weights)


def _layer(weights: dict, read: int, flops: int) -> tuple[int, int]:
    """Bytes and operations of a compiled layer or the head: its tensors, and of a layer what it does with its cache."""
    for value in weights.values():
        tensors = value.tensors if isinstance(value, Words) else (value,) if isinstance(value, torch.Tensor) else ()
        read += sum(tensor.nbytes for tensor in tensors)
        if isinstance(value, Words):
            flops += 2 * value.rows * value.cols
        elif tensors and value.ndim == 2:
            flops += 2 * value.numel()
    return read, flops


def _cache(reader: Decoder | Memory, tokens: int) -> list[tuple[int, int]]:
    """For each layer: bytes of keys and values that a token looks at, itself the last of `tokens`, and operations with them."""
    kv = getattr(reader, "kv", None) if isinstance(reader, Decoder) else getattr(reader.model, "kv", None)
    if isinstance(reader, Decoder):
        size = reader.cache_dtype.itemsize
        shapes = [(s.heads, s.kv_heads, s.head_dim, s.window) for s in reader.weights.shapes]
    else:
        config, size = reader.model.config, reader.model.dtype.itemsize
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None) or 0
        shapes = [(config.num_attention_heads, config.num_key_value_heads, dim, window * (kind == "sliding_attention"))
                  for kind in kinds]
    formats = [FORMATS[CACHE_TYPES[name]] for name in kv or ()]
    return [(kv_heads * (sum(f.bytes(dim) for f in formats) or 2 * dim * size) * min(tokens, window or tokens),
             4 * heads * dim * min(tokens, window or tokens)) for heads, kv_heads, dim, window in shapes]
