"""Which device computes each node, and what is copied between devices: ggml_backend_sched_split_graph in sizes only.

Follows ggml-backend.cpp of llama-cpp-python 0.3.36. Backends are the cards in order and, last, the host; all of them
support every operator. A card reads only its own memory, the host only its own.
"""

from .ggml import VIEWS, Graph, Tensor, block_of, value

OFFLOAD_BATCH = 32           # GGML_OP_OFFLOAD_MIN_BATCH of the CUDA backend: rows from which a host weight is copied to a card
PIPELINE_COPIES = 4          # GGML_SCHED_MAX_COPIES
ROW_PADDING = 512            # MATRIX_ROW_PADDING of the CUDA backend


def schedule(graph: Graph, cards: int, values: dict[str, int], pipelined: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Nodes and leaves as the allocator sees them, each with its `backend`: a card's number, or `cards` for the host.

    Sources on another device are replaced by copies, in place; so a graph is scheduled once. `values`: what the symbols
    may be, for a weight on the host is copied to the first card where a batch has OFFLOAD_BATCH rows or more.
    """
    host = cards
    values = dict(values)
    for name, expression in graph.derived.items():
        values[name] = eval(expression, {}, values)
    leaves, nodes = graph.leaves, graph.nodes
    if not cards:
        for tensor in (*leaves, *nodes):
            tensor.backend = 0
        return nodes, leaves

    def home(tensor: Tensor) -> int | None:
        """The backend of the memory a tensor already has."""
        place = tensor.place if tensor.root is None else tensor.root.place
        return None if place is None else host if place < 0 else place

    def given(tensor: Tensor) -> int | None:
        """Pass 1: by its memory, as an input, or by its weights."""
        if tensor.pinned is not None:
            return host if tensor.pinned < 0 else tensor.pinned
        at = home(tensor)
        if at is not None:
            return at
        if tensor.input:
            return host
        if tensor.op in ("rope", "flash_attn_ext"):
            return None
        for source in tensor.src:
            if source.weight:
                at = home(source)
                return 0 if at == host and _rows(tensor, values) >= OFFLOAD_BATCH else at
        return None

    for tensor in leaves:
        tensor.backend = given(tensor)
    for tensor in nodes:
        tensor.backend = given(tensor)

    work = [tensor for tensor in nodes if tensor.op not in VIEWS]
    for order, host_spreads in ((work, False), (work[::-1], False), (work, True), (work[::-1], True)):      # pass 2
        current = None
        for tensor in order:
            if tensor.backend is not None:
                current = tensor.backend if host_spreads or tensor.backend != host else None
            elif current is not None:
                tensor.backend = current

    for tensor in nodes:                                                                    # passes 3 and 4
        if tensor.backend is None:
            tensor.backend = tensor.root.backend if tensor.root is not None else 0
        for source in tensor.src:
            if source.backend is None:
                source.backend = source.root.backend if source.root is not None else tensor.backend

    def readable(tensor: Tensor, backend: int) -> bool:
        at = home(tensor)
        return (tensor.backend if at is None else at) == backend

    copies: dict[tuple[int, int], Tensor] = {}                                              # pass 5
    splits: list[tuple[int, int, list[Tensor]]] = []
    backend = next((tensor.backend for tensor in work), host)
    start, inputs = 0, []
    for i, tensor in enumerate(nodes):
        if tensor.op in VIEWS:
            continue
        again = tensor.backend == backend and inputs and any(
            source.weight and source.backend != backend and not readable(source, backend) for source in tensor.src)
        if tensor.backend != backend or again:
            splits.append((start, backend, inputs))
            start, backend, inputs = i, tensor.backend, []
        for j, source in enumerate(tensor.src):
            if source.backend == backend or readable(source, backend):
                continue
            key = id(source), backend
            if key not in copies:
                copies[key] = _copy(graph, source, backend, pipelined)
                inputs.append(source)
            tensor.src = (*tensor.src[:j], copies[key], *tensor.src[j + 1:])
    splits.append((start, backend, inputs))

    ordered: list[Tensor] = []
    first: list[Tensor] = []          # copies of inputs that a pipeline keeps four of
    if pipelined:
        for leaf in leaves:
            if leaf.input:
                leaf.output = True
                first.append(leaf)
                first += [_copy(graph, leaf, leaf.backend, True) for _ in range(PIPELINE_COPIES - 1)]
    ends = [split[0] for split in splits[1:]] + [len(nodes)]
    graph.splits = [(start, end, backend, inputs) for (start, backend, inputs), end in zip(splits, ends, strict=True)]
    for (start, backend, inputs), end in zip(splits, ends, strict=True):
        for source in inputs:
            copied = copies[id(source), backend]
            copied.at = nodes[start].at
            keep = Tensor("none", source.shape, source.type, (source,), source)
            keep.backend, keep.at = source.backend, copied.at
            ordered += (keep, copied)
            if pipelined:
                first.append(copied)
                first += [_copy(graph, source, backend, True) for _ in range(PIPELINE_COPIES - 1)]
        ordered += nodes[start:end]
    return ordered, first + leaves


def _copy(graph: Graph, source: Tensor, backend: int, kept: bool) -> Tensor:
    made = graph.op("none", source.shape, source.type)
    made.bytes, made.backend, made.label = source.size(), backend, f"a copy of {source.label}" if source.label else "a copy"
    if block_of(source.type)[0] > 1 and source.shape[0] % ROW_PADDING:
        block, per = block_of(source.type)                # part of a quantized cache, on a card: one more row's rest
        made.bytes = f"{made.bytes}+{(ROW_PADDING - source.shape[0] % ROW_PADDING) * per // block}"
    made.input = made.output = kept
    return made


def _rows(tensor: Tensor, values: dict[str, int]) -> int:
    """Rows of a batch by which the CUDA backend decides whether to take an operator over (get_op_batch_size)."""
    _, a, b, c = tensor.shape
    if tensor.op == "get_rows":
        return 0
    if tensor.op == "mul_mat":
        return value(a, values)
    if tensor.op in ("mul_mat_id", "rope"):
        return value(b, values)
    return value(a, values) * value(b, values) * value(c, values)
