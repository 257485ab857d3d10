"""What llama.cpp's processors do before each matmul with a quantized matrix: round the activations to 8 bits a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..formats import FORMATS


def rounded(x: torch.Tensor, block: int = 32) -> torch.Tensor:
    """x [..., n] rounded as llama.cpp's Q8_0 and Q8_1 (blocks of 32, the scale in float16) or Q8_K (256, in float32) hold it:
    each block's largest magnitude becomes 127. Same dtype and shape. A last block may be shorter."""
    n = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -n % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0).round()
    kept = scale if block == 256 else scale.half().float()
    return (codes * kept).flatten(-2)[..., :n].to(x.dtype)


def block_of(layer: torch.nn.Linear) -> int:
    """Activations a scale before this layer in llama.cpp: 256 where its weights lie in super-blocks, else 32; 0 where they
    are not quantized (a layer of floats that was not loaded from a GGUF counts as quantized in blocks of 32)."""
    packed = getattr(layer, "packed", None)
    block = FORMATS[packed.format].block if packed else 32
    return 256 if block == 256 else 32 if block > 1 else 0


@contextmanager
def rounded_activations(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """While it lasts, the model's linear layers read their inputs rounded to 8 bits a block, as llama.cpp's do on a CPU.

    There, quantized weights are multiplied with 8-bit activations; here with the activations as they are. That rounding is
    the difference between llama.cpp's answers and ours on the same file, and this measures what it costs. It does not repeat
    llama.cpp's answers token by token: where one input is rounded the other way, all that follows is rounded otherwise, so
    after many layers the two errors are of one size, and of different direction.
    """
    def hook(layer, args):
        return (rounded(args[0], block_of(layer)), *args[1:])

    handles = [layer.register_forward_pre_hook(hook) for layer in model.modules()
               if isinstance(layer, torch.nn.Linear) and block_of(layer)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
