"""Collecting an importance matrix: a text is read in chunks, and what each matrix is multiplied by is squared and summed.

As llama.cpp's llama-imatrix does (tools/imatrix/imatrix.cpp): every matrix of the layers, experts each for themselves, the
output matrix only if asked for. Of a packed model the matrices are swapped for ones that listen while it lasts; of a plain
transformers model its modules are listened to, which must have the names that GGUF's converters know.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MethodType

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..errors import LabError
from ..gguf import read_gguf
from ..kernels import Packed
from ..runtime.decoder import Decoder
from ..runtime.families import FAMILIES
from . import passes
from .corpus import CONTEXT, Tokens, as_tokens, tokens_of
from .imatrix import Importance

PIECE = 2048        # tokens that go through the layers at once, as in llama-imatrix; a longer context takes several, by cache
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_STEMS = {module: stem for family in FAMILIES.values() for module, stem in family.block.items()}
_FUSED = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate_exps": "ffn_gate_up_exps",
          "ffn_up_exps": "ffn_gate_up_exps"}      # what a file may hold as one
_REMEDY = (f"it knows those of {', '.join(name for name in FAMILIES if ' ' not in name)} and models with modules of the same "
           "names: convert this one to GGUF and collect with llama-imatrix")

Read = Callable[[torch.Tensor], None]       # ids [1, context]: through the layers


def importance(model: nn.Module | Decoder, tokenizer, text: str | Tokens | Sequence[int] | None = None, context: int = CONTEXT,
               progress: bool | Callable[[float, str], None] | None = None, *, chunks: int | None = None, output: bool = False,
               dataset: str | None = None, stopped: Callable[[], bool] = lambda: False) -> Importance:
    """The importance matrix of a model on a text, as `llama-imatrix -c CONTEXT --chunks CHUNKS` collects it: for each matrix
    the mean of the squares of each of its inputs, over all tokens (of an expert: over those that chose it).

    `model`: what `llmlab.load` gives (a packed GGUF, or a safetensors folder), another transformers model, or the decoder of
    `llmlab.decoder`, which forgets its text. `text`: a string, token ids (`tokenizer` may then be None), or None for
    `quality.text()`. It is cut in whole chunks of `context` tokens, each read on its own with the vocabulary's BOS as its first
    token where it adds one; what is left over is dropped (one will do; llama-imatrix wants two). `output`: also the output
    matrix, which llama-imatrix leaves out; as "token_embd.weight" where that is the output matrix, too. `dataset`: the text's
    name, kept in the file. `progress`: None shows a bar, False none, a function is given the share that is done and a few
    words. `stopped` is asked after every chunk, and the sums are then those of the chunks so far.

    Sums are float64, and hold a few numbers a column, whatever the text. Load a model with dtype="float32" to be equal to
    llama.cpp's within rounding: what is squared is as exact as the model's dtype.

    Raises LabError: text shorter than a chunk, ids outside the vocabulary, inputs that are not numbers (naming the tensor), a
    module whose GGUF name is not known.
    """
    from tqdm.auto import tqdm

    tokens = tokens_of(tokenizer, text) if text is None or isinstance(text, str) else as_tokens(text)
    dataset = "alice.txt" if text is None and dataset is None else dataset
    count = _count(tokens, context, chunks)
    tell = progress if callable(progress) else lambda share, words: None
    sums, done = _Sums(), 0
    listening = _decoder if isinstance(model, Decoder) else _modules
    with passes.evaluated(model), listening(model, sums, output) as read, tqdm(
            total=count, desc="importance", unit="chunk", disable=progress is False or callable(progress)) as bar:
        for done in range(1, count + 1):
            read(torch.from_numpy(tokens.chunk(done - 1, context))[None])
            sums.check(done)
            bar.update()
            tell(done / count, f"chunk {done} of {count}")
            if stopped():
                break
    return Importance({name: one.cpu().numpy() for name, one in sums.sums.items()},
                      {name: np.array(one, np.int64) for name, one in sums.counts.items()}, done, context,
                      (dataset,) if dataset else ())


def _count(tokens: Tokens, context: int, chunks: int | None) -> int:
    if not isinstance(context, int) or context < 1:
        raise LabError(f"a context of {context!r:.40} tokens: give a whole number from 1 up; llama-imatrix takes {CONTEXT}")
    if chunks is not None and (not isinstance(chunks, int) or chunks < 1):
        raise LabError(f"chunks={chunks!r:.40}: read 1 chunk or more, or None for the whole text")
    if len(tokens) < context:
        raise LabError(f"the text has {len(tokens)} tokens, and one chunk takes {context}: give more text, or a context of at "
                       f"most {max(1, len(tokens))}")
    return min(chunks or len(tokens), len(tokens) // context)


class _Sums:
    """Sums of squares by tensor: float64 [matrices, cols] where the inputs are, and how many inputs, [matrices]."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, list[int]] = {}
        self._last, self._squares = None, None

    def add(self, name: str, x: torch.Tensor, expert: int = 0, experts: int = 1) -> None:
        """x [..., cols] is what a matrix (of several) is multiplied by now."""
        x = x.reshape(-1, x.shape[-1])
        if name not in self.sums:
            self.sums[name] = torch.zeros(experts, x.shape[-1], dtype=torch.float64,
                                          device="cpu" if x.device.type == "mps" else x.device)     # which has no float64
            self.counts[name] = [0] * experts
        self.sums[name][expert] += self._of(x)
        self.counts[name][expert] += len(x)

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        """Q, K and V read the same numbers, as gate and up do: the last ones are kept, so that they stay where they are, and
        are squared once."""
        if self._last is None or not _same(x, self._last):
            self._last = x
            parts = (x.cpu() if x.device.type == "mps" else x).split(max(1, passes.WORKING // x.shape[-1]))
            self._squares = sum(part.double().square_().sum(0) if part.dtype != torch.float64 else part.square().sum(0)
                                for part in parts)
        return self._squares

    def check(self, chunk: int) -> None:
        """Raises LabError for the first matrix in order whose inputs were not numbers."""
        self._last = self._squares = None
        for name, sums in self.sums.items():
            if not bool(sums.sum().isfinite()):
                raise LabError(f"chunk {chunk}: what {name} is multiplied by is not a number (NaN or infinite): the weights "
                               "before it are damaged, or too large for the model's dtype (load it with dtype='float32')")


def _same(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are one piece of memory."""
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (other.data_ptr(), other.shape, other.stride(), other.dtype)


# ---- transformers' modules ----------------------------------------------------------------------------------------------

@contextmanager
def _modules(model: nn.Module, sums: _Sums, output: bool) -> Iterator[Read]:
    """While it lasts, the matrices of a transformers model add what they are multiplied by to `sums`."""
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "base_model", None), "get_decoder"):
        raise LabError(f"{model!r:.60} is no model whose layers can be listened to; give what llmlab.load returned first, "
                       "llmlab.decoder, or a transformers model")
    # Of the base model: a model compiled by llmlab has a lean decoder by that name.
    decoder, config = model.base_model.get_decoder(), model.config.get_text_config()
    held = _tensors_of(model)
    with ExitStack() as stack:
        found = [_listen(stack, module, layer[1], layer[2], sums, held)
                 for name, module in decoder.named_modules() if (layer := _LAYER.fullmatch(name))]
        if not any(found):
            raise LabError(f"{type(model).__name__} has no layers with modules that llmlab knows; {_REMEDY}")
        head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"

        def read(ids: torch.Tensor) -> None:
            passes.within(ids.numpy(), config.vocab_size)
            ids, cache = ids.to(model.device), None
            whole = ids.shape[1] <= PIECE
            for piece in ids.split(PIECE, 1):
                out = decoder(input_ids=piece, past_key_values=cache, use_cache=not whole)
                cache = None if whole else out.past_key_values
                if output:
                    sums.add(head, out.last_hidden_state)

        yield read


def _tensors_of(model: nn.Module) -> set[str] | None:
    """Names of the tensors of the file that a packed model was loaded from."""
    if not hasattr(model, "packed") or not (path := getattr(getattr(model, "llmlab", None), "path", None)):
        return None
    return set(read_gguf(path).tensors)


def _named(name: str, held: set[str] | None) -> str | None:
    """A tensor's name as the file has it: of parts that it holds as one, the first part is the whole and the others are
    nothing, as they read the same numbers."""
    if held is None or name in held:
        return name
    block, _, stem = name.removesuffix(".weight").rpartition(".")
    if stem not in _FUSED:
        return name
    return f"{block}.{_FUSED[stem]}.weight" if stem in ("attn_q", "ffn_gate_exps") else None


def _listen(stack: ExitStack, module: nn.Module, layer: str, name: str, sums: _Sums, held: set[str] | None) -> bool:
    """Let one module of a layer, if it multiplies by a matrix, add its inputs until `stack` is left; whether it does."""
    packed = {own: value for own, value in vars(module).items() if isinstance(value, Packed)}
    if packed:
        for own, value in packed.items():
            if (tensor := _named(value.name, held)) is not None:
                setattr(module, own, _listening(value, tensor, sums))
                stack.callback(setattr, module, own, value)
        return True
    weight = getattr(module, "weight", None)
    routes = isinstance(weight, nn.Parameter) and weight.ndim == 2 and hasattr(module, "top_k")
    if not (stacked := isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)) and not (
            isinstance(module, nn.Linear) or routes):
        return False
    if name not in _STEMS:
        raise LabError(f"llmlab knows no GGUF name for the module layers.{layer}.{name} ({type(module).__name__}); {_REMEDY}")
    stem = f"blk.{layer}.{_STEMS[name]}.weight"
    if not stacked:
        stack.callback(module.register_forward_pre_hook(lambda module, args: sums.add(stem, args[0])).remove)
        return True
    own = vars(module).get("forward")
    module.forward = MethodType(_experts(stem, sums), module)
    stack.callback(lambda: delattr(module, "forward") if own is None else setattr(module, "forward", own))
    return True


def _listening(packed: Packed, name: str, sums: _Sums) -> Packed:
    """The same matrix or stack, which adds its inputs."""
    many = len(packed)
    return replace(packed, kernels=tuple(_Listening(kernel, lambda x, expert=expert: sums.add(name, x, expert, many))
                                         for expert, kernel in enumerate(packed.kernels)))


class _Listening:
    """A kernel, and somebody who is told what it multiplies."""

    def __init__(self, kernel, told: Callable[[torch.Tensor], None]):
        self._kernel, self._told = kernel, told

    def __getattr__(self, name: str):
        return getattr(self._kernel, name)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        self._told(x)
        return self._kernel.matmul(x)


def _experts(stem: str, sums: _Sums) -> Callable:
    """A forward of transformers' experts (all of one layer, their gate and up in one tensor): one after the other, adding what
    each of their matrices is multiplied by."""
    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        def times(x, weight, bias, expert):
            matrix = weight[expert].T if self.is_transposed else weight[expert]
            return functional.linear(x, matrix, bias[expert] if self.has_bias else None)

        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:              # transformers marks a token without an expert so
                continue
            token, place = torch.where(top_k_index == expert)
            x = hidden_states[token]
            for part in ("gate", "up"):
                sums.add(stem.format(part), x, expert, self.num_experts)
            inner = self._apply_gate(times(x, self.gate_up_proj, getattr(self, "gate_up_proj_bias", None), expert))
            sums.add(stem.format("down"), inner, expert, self.num_experts)
            found = times(inner, self.down_proj, getattr(self, "down_proj_bias", None), expert)
            out.index_add_(0, token, (found * top_k_weights[token, place, None]).to(out.dtype))
        return out

    return forward


# ---- the lean decoder ---------------------------------------------------------------------------------------------------

@contextmanager
def _decoder(decoder: Decoder, sums: _Sums, output: bool) -> Iterator[Read]:
    """While it lasts, a decoder's matrices add what they are multiplied by to `sums`, and nobody else reads with it."""
    if decoder.compiled:
        raise LabError("a compiled decoder's matrices have lost their names; open it without compile=True")
    held = set(read_gguf(decoder.path).tensors) if decoder.path else None
    names, vocabulary = _names(decoder, held), decoder.weights.embedding.rows
    with decoder.lock:
        multiply = decoder.multiply

        def listening(x: torch.Tensor, packed: Packed) -> torch.Tensor:
            for name, expert, many in names.get(id(packed), ()):
                if output or name.startswith("blk."):
                    sums.add(name, x, expert, many)
            return multiply(x, packed)

        def read(ids: torch.Tensor) -> None:
            passes.within(ids.numpy(), vocabulary)
            decoder.forget()
            (decoder.logits if output else decoder.read)(ids[0].tolist())
            _routers(decoder, sums)

        graphed, decoder.graphed, decoder.multiply = decoder.graphed, False, listening     # a graph calls nobody
        try:
            yield read
        finally:
            decoder.graphed, decoder.multiply = graphed, multiply
            decoder.forget()


def _names(decoder: Decoder, held: set[str] | None) -> dict[int, list[tuple[str, int, int]]]:
    """What each matrix, by id, is called: tensors, which expert, of how many."""
    found: dict[int, list[tuple[str, int, int]]] = {}
    for value in (value for part in (*decoder.weights.layers, decoder.weights.head) for value in part.values()):
        many = len(value) if isinstance(value, tuple) else 1
        for expert, packed in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(packed, Packed):
                parts = (_named(part.partition("[")[0], held) for part in packed.name.split(" + "))
                found[id(packed)] = [(part, expert, many) for part in parts if part]
    return found


def _routers(decoder: Decoder, sums: _Sums) -> None:
    """Routers are multiplied as numbers, by what the experts are multiplied by: each token's input, once for each it chose."""
    for layer, shape in enumerate(decoder.weights.shapes):
        if not shape.experts:
            continue
        experts = next(name for part in ("gate", "gate_up") if (name := f"blk.{layer}.ffn_{part}_exps.weight") in sums.sums)
        for end in ("", "_shexp") if shape.shared else ("",):
            router = f"blk.{layer}.ffn_gate_inp{end}.weight"
            sums.sums[router] = sums.sums[experts].sum(0, keepdim=True) / shape.used
            sums.counts[router] = [sum(sums.counts[experts]) // shape.used]
