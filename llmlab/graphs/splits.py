"""What each device is told to compute: the graph of one batch as the scheduler cuts it, with the sizes of what is handed over.

`buffers` asks how much memory a graph takes and builds as few layers as stand for all; here every layer is built, for
devices that are told of every node (llama.cpp's RPC sends the graph over the network).
"""

from dataclasses import dataclass

from ..shapes import ModelSpec, remembered
from .buffers import Request, _kinds, _layers, family_of
from .ggml import Graph, Tensor
from .parts import Builder, Setup
from .scheduler import schedule


@dataclass(frozen=True, slots=True)
class Handed:
    """One tensor copied to a split: the backend it comes from, its bytes, what it is."""

    source: int
    bytes: int
    label: str


@dataclass(frozen=True, slots=True)
class Split:
    """Nodes that one backend computes in one go. Backends: cards by number, and after the last the host.

    `tensors`: the nodes and all they are made of, each once, as a message that describes the graph names them.
    """

    backend: int
    nodes: int
    tensors: int
    inputs: tuple[Handed, ...]


@remembered
def splits(spec: ModelSpec, request: Request, where: tuple[int, ...], cards: int, tokens: int, outputs: int, cells: int,
           window: int) -> tuple[Split, ...]:
    """The splits of a batch of `tokens` a sequence, of which `outputs` rows become logits, over `cells` cells of a stream
    (`window` in layers with a window), with every block and the output on the cards `where` says."""
    streams = 1 if request.unified else request.sequences
    setup = Setup(request.flash, request.kv, request.sequences, streams, pinned=True)
    family = family_of(spec)
    ats = [at for at, _ in _layers(spec, where, 0, _kinds(spec, family, ()))]
    graph = family.build(Builder(spec, setup, ats, where[-1]))
    values = {"t": tokens, "o": outputs, "n": cells, "w": window}
    schedule(graph, cards, values, pipelined=False)
    for name, expression in graph.derived.items():
        values[name] = eval(expression, {}, values)
    return tuple(_split(graph, values, *one) for one in graph.splits)


def _split(graph: Graph, values: dict[str, int], start: int, end: int, backend: int, inputs: list[Tensor]) -> Split:
    seen: set[int] = set()
    ahead = list(graph.nodes[start:end])
    while ahead:
        tensor = ahead.pop()
        if id(tensor) not in seen:
            seen.add(id(tensor))
            ahead += tensor.src
            if tensor.root is not None:
                ahead.append(tensor.root)
    handed = tuple(Handed(source.backend, int(eval(repr(source.size()).strip("'"), {}, values)), source.label)
                   for source in inputs)
    return Split(backend, end - start, len(seen), handed)
