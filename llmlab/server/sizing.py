"""How large a KV cache a server takes where nobody says."""

import torch

from ..hardware import ram_available
from ..runtime.batching import longest
from ..runtime.decoder import Decoder
from ..runtime.engine import SIZE
from ..runtime.paged import block_bytes

_CONTEXTS = 4            # whole ones: requests that begin alike share, and few are as long as they may be
_SHARE = 4               # of the memory that is free, a fourth


def cache_bytes(decoder: Decoder, kv: str | tuple[str, str]) -> int:
    """Bytes for four whole contexts, or a quarter of the memory that is free now where that is less; two blocks at least."""
    block = block_bytes(decoder.weights.shapes, SIZE, kv)
    wanted = _CONTEXTS * -(-longest(decoder) // SIZE)
    free = torch.cuda.mem_get_info(decoder.cache_device)[0] if decoder.cache_device.type == "cuda" else ram_available()
    return block * max(2, min(wanted, free // _SHARE // block))
