"""Rare calls out: servers that speak OpenAI's API, and a router that answers here and asks them only when it is unsure.

`calling` has the Endpoint, over `wiring` (OpenAI's client, one address), `keys`, `spending` (a cap that holds), `failing` and
`replies`; `redacting` takes out what must not leave.
"""

from .calling import Endpoint, Preview
from .redacting import BUILT_IN, Redactor, Vault
from .replies import CallFailed, Reply
from .spending import Ledger, Month, Price

__all__ = ["BUILT_IN", "CallFailed", "Endpoint", "Ledger", "Month", "Preview", "Price", "Redactor", "Reply", "Vault"]
