"""The modules that take the place of transformers' own: the same calls, packed weights inside.

Each keeps an empty `weight`: transformers and peft ask it for a dtype and a device. A module is made for one dtype and one
device; moving it elsewhere is refused in words, because a kernel chose its packing for them.
"""

import torch
from torch import nn

from ..errors import LabError
from ..kernels import Packed, linear, rows


class EmptyWeight(nn.Parameter):
    """A parameter whose numbers are elsewhere; it refuses to be added to (what merging an adapter would do).

    `ds_numel`, DeepSpeed's name, is where transformers and peft look for the size of a parameter that is not here.
    """

    __torch_function__ = classmethod(torch.Tensor.__torch_function__.__func__)      # so that weight.data is one, too

    def __iadd__(self, other):
        raise LabError("packed weights cannot be changed, so an adapter cannot be merged into them; keep it beside them, or "
                       "load the model's safetensors and merge there")

    def __deepcopy__(self, memo):
        return empty_weight(self.dtype, self.device, self.ds_numel)

    def __reduce_ex__(self, protocol):
        raise LabError("packed weights are not pickled; hand on the path of their file and load it there")


def empty_weight(dtype: torch.dtype, device: torch.device, size: int) -> EmptyWeight:
    made = torch.empty(0, dtype=dtype, device=device).as_subclass(EmptyWeight).requires_grad_(False)
    made.ds_numel = size
    return made


class _Packed:
    """What packed modules share: they stay what and where they were made."""

    def _apply(self, fn, recurse=True):
        asked = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        if asked.dtype != self.weight.dtype or asked.device != self.weight.device:
            dtype = str(self.weight.dtype).removeprefix("torch.")
            raise LabError(f"a packed model stays where and as it was made ({self.weight.device}, {dtype}); load it again with "
                           "llmlab.load(path, device=..., dtype=...)")
        return super()._apply(fn, recurse)


class PackedLinear(_Packed, nn.Linear):
    """y = x W^T + b for a packed W [out_features, in_features]; x [..., in_features] of the model's dtype.

    `heads`: W's rows (and b's) are interleaved within each of that many heads, as llama.cpp's rope wants them; the output is
    put back into transformers' order, so that the bytes stay as they lie in the file.
    """

    def __init__(self, packed: Packed, bias: torch.Tensor | None, dtype: torch.dtype, heads: int = 0):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.heads, self.packed = packed.cols, packed.rows, heads, packed
        self.weight = empty_weight(dtype, packed.device, packed.rows * packed.cols)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.packed, self.bias)
        return in_order(y, self.heads) if self.heads else y

    def reset_parameters(self) -> None:
        pass

    def extra_repr(self) -> str:
        return (f"{self.in_features}, {self.out_features}, {self.packed.format}, {self.packed.strategy}, "
                f"bias={self.bias is not None}")


def in_order(y: torch.Tensor, heads: int) -> torch.Tensor:
    """[..., heads * head_dim] interleaved in halves (0, d/2, 1, d/2+1, ...) -> in order. The converter's `permute` undone."""
    return y.unflatten(-1, (heads, -1, 2)).transpose(-1, -2).flatten(-3)


class PackedEmbedding(_Packed, nn.Embedding):
    """Rows of a packed [num_embeddings, embedding_dim], looked up by token and multiplied by `scale`."""

    def __init__(self, packed: Packed, dtype: torch.dtype, padding_idx: int | None = None, scale: float = 1.0):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = packed.rows, packed.cols, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.packed, self.weight = packed, empty_weight(dtype, packed.device, packed.rows * packed.cols)
        self.scale = float(torch.tensor(scale, dtype=dtype))       # rounded as transformers rounds it: Gemma was trained so

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found = rows(self.packed, input_ids, self.weight.dtype)
        return found if self.scale == 1.0 else found * self.scale

    def reset_parameters(self) -> None:
        pass

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed.format}, {self.packed.strategy}"


class PackedExperts(_Packed, nn.Module):
    """The experts of one layer: packed stacks gate, up [experts, ff, width] and down [experts, width, ff].

    Called as transformers 5 calls its own: hidden states [tokens, width], for each token the experts chosen [tokens, k] and
    their shares [tokens, k] -> [tokens, width]. An expert nobody chose is not touched.
    """

    def __init__(self, gate: Packed, up: Packed, down: Packed, activation: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.gate, self.up, self.down, self.act_fn = gate, up, down, activation
        self.num_experts, self.hidden_dim, self.intermediate_dim = len(gate), gate.cols, gate.rows
        self.weight = empty_weight(dtype, gate.device, sum(p.rows * p.cols * len(p) for p in (gate, up, down)))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:              # transformers marks a token without an expert so
                continue
            token, place = torch.where(top_k_index == expert)
            found = self.one(hidden_states[token], expert) * top_k_weights[token, place, None]
            out = out.index_add(0, token, found.to(out.dtype))
        return out

    def one(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """What one expert makes of [n, width]."""
        inner = self.act_fn(linear(x, self.gate, expert=expert)) * linear(x, self.up, expert=expert)
        return linear(inner, self.down, expert=expert)

    def extra_repr(self) -> str:
        return (f"{self.num_experts} experts, {self.hidden_dim}, {self.intermediate_dim}, {self.gate.format}, "
                f"{self.gate.strategy}")


class ClampedExperts(PackedExperts):
    """gpt-oss: biased projections, gate and up clamped to `limit`, gate * sigmoid(alpha * gate) * (up + 1)."""

    def __init__(self, gate: Packed, up: Packed, down: Packed, biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
                 alpha: float, limit: float, dtype: torch.dtype):
        super().__init__(gate, up, down, nn.Identity(), dtype)
        self.alpha, self.limit = alpha, limit
        self.gate_bias, self.up_bias, self.down_bias = (nn.Parameter(bias, requires_grad=False) for bias in biases)

    def one(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        gate = linear(x, self.gate, self.gate_bias[expert], expert=expert).clamp(max=self.limit)
        up = linear(x, self.up, self.up_bias[expert], expert=expert).clamp(-self.limit, self.limit)
        return linear((up + 1) * (gate * torch.sigmoid(gate * self.alpha)), self.down, self.down_bias[expert], expert=expert)
