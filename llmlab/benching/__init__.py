"""How fast this computer runs one file, engine beside engine in the same minutes: `llmlab bench FILE`.

`entries` says who can take part, `children` keeps each in a process of its own, `child` is that process, `llama`, `lean` and
`dense` are the engines in it, `rounds` lets them take turns, `result` is what came of it.
"""

from .result import Bench
from .rounds import bench

__all__ = ["Bench", "bench"]
