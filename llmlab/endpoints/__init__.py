"""Rare calls out: servers that speak OpenAI's API, and a router that answers here and asks them only when it is unsure.

`calling` has the Endpoint, over `wiring` (OpenAI's client, one address), `keys`, `spending` (a cap that holds), `failing` and
`replies`; `redacting` takes out what must not leave. `routing` has the router, over `near` (a model in this process), `signals`
(how unsure it is), `calibrating`, `allowing` (how many may go out) and `deciding` (what was decided, and its log); `curves`
says what it is worth.
"""

from .calibrating import Calibration
from .calling import Endpoint, Preview
from .curves import Curve, recorded, recorded_curve, route_curve
from .deciding import REASONS, Decision, Log
from .redacting import BUILT_IN, Redactor, Vault
from .replies import CallFailed, Reply
from .routing import Leaving, Routed, Router, router
from .signals import Rule
from .spending import Ledger, Month, Price

__all__ = ["BUILT_IN", "REASONS", "Calibration", "CallFailed", "Curve", "Decision", "Endpoint", "Leaving", "Ledger", "Log",
           "Month", "Preview", "Price", "Redactor", "Reply", "Routed", "Router", "Rule", "Vault", "recorded", "recorded_curve",
           "route_curve", "router"]
