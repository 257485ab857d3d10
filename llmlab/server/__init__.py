"""OpenAI's API over the engine: `running` begins and ends a server, `app` has its addresses, `protocol` says what may be asked.

A request goes through `guarding` (who asks), `bodies` (bytes to JSON), `protocol` (JSON to a request), `asking` (a request to
tokens and options), `talking` (the engine) and `answering` (its answers as JSON), within `limits`; `streaming` sends what
comes, `metrics` counts.
"""

from .limits import Limits
from .running import Server, serve

__all__ = ["Limits", "Server", "serve"]
