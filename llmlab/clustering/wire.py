"""llama.cpp's RPC, byte for byte: what the head sends to each worker and gets back, for weights, for a token, for a prompt.

Follows ggml-rpc.cpp of llama-cpp-python 0.3.36 (protocol 7). A message is one byte of command, eight of length, and its body; a
tensor is described in 296 bytes. The graph of a worker is sent when it changes and named after that: in decode every 256
tokens, as the cache it attends to grows by as many. Workers do not talk to each other: what one hands to another passes
through the head, and what lies between two devices of one worker stays there. TCP's own headers are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..formats import FORMATS
from ..graphs import Request
from ..graphs.splits import Split, splits
from ..memory import Weights, llama_cells
from ..shapes import ModelSpec

COMMAND, LENGTH = 9, 8
TENSOR = 296                             # sizeof(rpc_tensor)
SET = COMMAND + TENSOR + 1 + 8           # and the data
GET, REPLY = COMMAND + TENSOR + 16, LENGTH
COPY, COPIED = COMMAND + 2 * TENSOR, LENGTH + 1
AGAIN = COMMAND + 4                      # compute the same graph again
INIT = COMMAND + TENSOR
HASH, HASHED = COMMAND + TENSOR + 16, LENGTH + 1
HASHED_FROM = 10 * 2**20                 # bytes of a tensor from which its hash is asked for first
GROWS = 256                              # cells by which the part of the cache that is attended to grows
ROW = 512                                # a quantized row that is no multiple of it has a worker pad its buffer


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes between the head and one worker: to it and from it. `rounds`: answers that the head waits for."""

    sent: float = 0
    received: float = 0
    rounds: float = 0

    @property
    def bytes(self) -> float:
        return self.sent + self.received

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.sent + other.sent, self.received + other.received, self.rounds + other.rounds)

    def __mul__(self, by: float) -> "Traffic":
        return Traffic(self.sent * by, self.received * by, self.rounds * by)

    __rmul__ = __mul__


def loading(spec: ModelSpec, w: Weights, where: Sequence[int], owner: Sequence[int], cached: bool = False) -> list[Traffic]:
    """What the weights take to each host (entry 0, the head, is nothing): every tensor of a worker's layers once.

    where: the card of each block and last of the output, -1 the host. owner: the host of each card. cached: the workers were
    started with --cache and have seen this file: large tensors are only named. Not counted: allocations and questions about
    sizes, a few kilobytes for each shape.
    """
    found = [Traffic() for _ in range(max(owner, default=0) + 1)]
    for tensor, type, size in zip(spec.tensors, w.types, w.bytes, strict=True):
        if spec.is_mtp(tensor):
            continue
        for host in {owner[card] for card in _cards_of(spec, tensor, where) if card >= 0} - {0}:
            format = FORMATS[type]
            sent, received, rounds = 0, 0, 0
            if format.block > 1 and tensor.shape[0] % ROW:
                sent += INIT
            if size > HASHED_FROM:
                sent, received, rounds = sent + HASH, HASHED, 1
            if not (cached and size > HASHED_FROM):
                sent += SET + size
            found[host] += Traffic(sent, received, rounds)
    return found


def _cards_of(spec: ModelSpec, tensor, where: Sequence[int]) -> set[int]:
    """The cards that hold a tensor."""
    if tensor.layer >= 0:
        return {where[tensor.layer]}
    if tensor.name.startswith("rope_"):
        return set(where[:-1])               # each device that has layers keeps its own
    if tensor.name.startswith("output") or spec.tied and tensor.name == "token_embd.weight":
        return {where[-1]}
    return {-1}


def step(spec: ModelSpec, request: Request, where: tuple[int, ...], owner: Sequence[int], used: int, tokens: int = 1,
         new: bool = False) -> list[Traffic]:
    """One run of the graph: `tokens` of each sequence, the last of which becomes logits, with `used` cells in use afterwards.

    new: the graph is sent (it is when the batch or the cells attended to differ from the last run's, and after every prompt).
    """
    cells, window = _attended(spec, request, used)
    cut = splits(spec, request, where, len(owner), tokens, request.sequences, cells, window)
    return _handed(cut, [*owner, 0], 4 * spec.vocab * request.sequences, where[-1], new)


def decode(spec: ModelSpec, request: Request, where: tuple[int, ...], owner: Sequence[int], used: int) -> list[Traffic]:
    """One generated token (one of each sequence) on average at that depth: a run, and a share of the graph that is sent
    every 256 tokens."""
    again, new = (step(spec, request, where, owner, used, 1, sent) for sent in (False, True))
    return [(GROWS - 1) / GROWS * a + 1 / GROWS * b for a, b in zip(again, new, strict=True)]


def prompt(spec: ModelSpec, request: Request, where: tuple[int, ...], owner: Sequence[int], length: int,
           batch: int) -> list[Traffic]:
    """All of a prompt of `length` tokens, `batch` at a time: bytes grow evenly with the cells in use, so the first and the
    last full batch stand for all."""
    full, rest = divmod(length, batch)
    one = Request(request.context, request.ubatch, request.flash, request.kv)
    total = [Traffic() for _ in range(max(owner, default=0) + 1)]
    if full:
        first, last = (step(spec, one, where, owner, used, batch, True) for used in (batch, full * batch))
        total = [full / 2 * (a + b) for a, b in zip(first, last, strict=True)]
    if rest:
        total = [a + b for a, b in zip(total, step(spec, one, where, owner, length, rest, True), strict=True)]
    return total


def _attended(spec: ModelSpec, request: Request, used: int) -> tuple[int, int]:
    """Cells of a stream that a run attends to, in full layers and in those with a window: padded, at most all there are."""
    streams = 1 if request.unified else request.sequences
    cells, window = llama_cells(spec, request.context, request.sequences, min(request.context, request.ubatch),
                                request.swa_full, request.unified)
    padded = max(-(-used // GROWS), 1) * GROWS
    return min(cells // streams, padded), min(window // streams, padded)


def _handed(cut: Sequence[Split], owner: Sequence[int], logits: int, output: int, new: bool) -> list[Traffic]:
    """What a run takes to each host: inputs set, results fetched, the graph sent or named. `owner` of each backend."""
    found = [Traffic() for _ in range(max(owner) + 1)]
    backends = [split.backend for split in cut]
    for split in cut:
        at = owner[split.backend]
        for one in split.inputs:
            source = owner[one.source]
            if source == at:
                found[at] += Traffic(COPY, COPIED, 1) if at else Traffic()
                continue
            if source:
                found[source] += Traffic(GET, REPLY + one.bytes, 1)
            if at:
                found[at] += Traffic(SET + one.bytes)
        if at:
            whole = new or backends.count(split.backend) > 1     # a device remembers one graph only
            found[at] += Traffic(COMMAND + 12 + 8 * split.nodes + TENSOR * split.tensors if whole else AGAIN)
    if output >= 0 and owner[output]:
        found[owner[output]] += Traffic(GET, REPLY + logits, 1)
    found[0] = Traffic()
    return found
