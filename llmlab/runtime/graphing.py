"""CUDA graphs: a step of many small operations recorded once and started as one, over tensors that stay where they are.

Starting an operation costs a processor some microseconds; a layer of a decoder has two dozen that a card does in less. What is
recorded always reads and writes the same memory, so what changes from step to step is copied into it: the token's numbers and
its position. Attention looks at every cell of the cache and masks those that are not filled yet.
"""

from collections.abc import Callable

import torch

from .layers import Matmul, block
from .weights import Weights

WARM = 3    # rounds before a capture: libraries choose their ways and take their memory then


class Replay:
    """`function` of static tensors, captured; called with their new values, tensors or numbers, it gives what the function
    gives: the same tensor each time, overwritten by the next call.

    why: whether it is captured, or what stood in the way: then the function is called as it is.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor):
        self.function, self.inputs, self.graph, self.output = function, inputs, None, None
        device = inputs[0].device
        if device.type != "cuda":
            self.why = f"not captured: CUDA graphs need an NVIDIA or AMD card, this is {device.type}"
            return
        try:
            self.graph, self.output = _capture(function, inputs, device)
            self.why = "captured as a CUDA graph"
        except RuntimeError as error:       # an operation that waits for the card, memory that does not suffice, ...
            torch.cuda.synchronize(device)
            self.why = f"not captured: {_line(error)}"

    def __call__(self, *values: torch.Tensor | float) -> torch.Tensor:
        for held, value in zip(self.inputs, values, strict=True):
            held.copy_(value) if isinstance(value, torch.Tensor) else held.fill_(value)
        if self.graph is None:
            return self.function(*self.inputs)
        self.graph.replay()
        return self.output


def _capture(function: Callable, inputs: tuple[torch.Tensor, ...], device: torch.device):
    """(graph, what the function gave in it); warmed up on the stream that it is captured on."""
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            function(*inputs)
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Only what this thread does must keep to a capture's rules; a notebook's other threads may go on.
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        output = function(*inputs)
    return graph, output


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


class Step:
    """All layers for one token, over caches that are there already; made anew where these grow.

    caches: [2, kv_heads, cells, head_dim] a layer, of which the first `filled` cells are; tables: (cos, sin) [cells, 1, turned]
    for each way of turning. fused: torch.compile makes one operation of several small ones, a layer of each kind in some ten
    seconds (on a card it needs Triton, which comes with torch for CUDA); where it cannot, `why` says so.
    """

    def __init__(self, weights: Weights, caches: list[torch.Tensor], tables: list[tuple[torch.Tensor, torch.Tensor]],
                 matmul: Matmul, x: torch.Tensor, filled: int, fused: bool = False):
        for cache in caches:
            cache[:, :, filled:] = 0        # what lies there is multiplied by nothing, and must be a number
        cells, run = torch.arange(caches[0].shape[2], device=x.device), block

        def layers(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            turns = [(cos.index_select(0, at), sin.index_select(0, at)) for cos, sin in tables]
            masks: dict[int, torch.Tensor] = {}
            for layer, shape, turning, cache in zip(weights.layers, weights.shapes, weights.turning, caches, strict=True):
                if shape.window not in masks:
                    near = cells <= at
                    masks[shape.window] = (near & (cells > at - shape.window) if shape.window else near)[None]

                def remember(new, cache=cache):
                    cache.index_copy_(2, at, new.to(cache.dtype))
                    return cache.unbind()

                x = run(x, layer, shape, matmul, remember, *turns[turning], masks[shape.window])
            return x

        held, note = (x.clone(), torch.full((1,), filled, device=x.device)), ""
        if fused:
            try:
                run = torch.compile(block, fullgraph=True, dynamic=False)
                layers(*held)
                note = "fused by torch.compile; "
            except RuntimeError as error:       # all of the compiler's own faults are
                run, note = block, f"not fused: {_line(error)}; "
        self.replay = Replay(layers, *held)
        self.why = note + self.replay.why

    def __call__(self, x: torch.Tensor, at: int) -> torch.Tensor:
        """x [1, width] float32 of the token at position `at` -> the same after all layers."""
        return self.replay(x, at)
