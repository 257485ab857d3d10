"""llama.cpp's compute buffers: the worst graph it builds, its split over devices, and where its allocator puts the tensors.

llama.cpp has no formula for its working memory. It builds the graph of a full batch over a full cache (llama-context.cpp,
sched_reserve), lets the scheduler give every node a device, and lets the allocator place what is alive at the same time.
So does this room, with sizes in place of memory:

- `ggml`: tensors, operators and their order; shapes may hold symbols, so that one graph serves all contexts and batches
- `parts`: a `Builder` with the pieces of every graph (norms, attention over a cache, feed-forward, experts, output)
- `decoders`, `recurrent`, ...: the graphs of architectures, out of those pieces
- `scheduler`: which device computes each node, and the copies between them
- `allocator`: a scheduled graph compiled to a plan, and the plan measured for any sizes
- `buffers`: all of it for one request; `terms`: as lines of a report

To add an architecture, write a function that takes a `Builder` and returns its finished `Graph`, node for node as
llama.cpp's src/models/<name>.cpp does, and register it: `family("name", build, kind=...)`. Only some of a model's layers are
built, one period of those that repeat a few times, so whatever besides a block's hyperparameters and tensors changes its graph
(a layer without rope, say) is returned by `kind(spec, index)`.
"""

from . import gemma as gemma
from . import recurrent as recurrent
from .allocator import Peak
from .buffers import Buffers, Request, compute_buffers, family_of, representatives
from .families import FAMILIES, Family, family
from .terms import compute_high, compute_terms

__all__ = ["Buffers", "FAMILIES", "Family", "Peak", "Request", "compute_buffers", "compute_high", "compute_terms", "family",
           "family_of", "representatives"]
