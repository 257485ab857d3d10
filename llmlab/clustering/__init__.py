"""A model over several hosts: which layers go to which card of which host, what travels between them, what that costs.

llama.cpp's RPC hands whole layers to the cards of other hosts and sends every tensor through the head; vLLM on Ray splits
matrices between the cards of a host and layers between hosts. Both are counted here, with the terms of a fit:

- `hosts`: the hosts and the network as they are named
- `wire`: llama.cpp's RPC messages, byte for byte
- `stages`: vLLM's pipeline and its exchanges
- `planning`: `fit_hosts` and the plan
- `saying`, `commands`: the plan in words, and as the commands of each host
"""

from .planning import HostsPlan, fit_hosts
from .wire import Traffic

__all__ = ["HostsPlan", "Traffic", "fit_hosts"]
