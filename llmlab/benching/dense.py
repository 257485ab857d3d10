"""The peers in torch, as people run them: transformers on the GGUF, and the unpacked weights in bfloat16 or bitsandbytes NF4.

The latter two are transformers' own modules with plain weights in them, unpacked one matrix at a time from what `llmlab.load`
maps, so that no file has to be written and the peak is theirs.
"""

from pathlib import Path

import numpy as np

from ..errors import LabError


def prepare(job: dict) -> None:
    """Import what loading needs. Raises LabError naming what is not here."""
    set_threads(job)
    try:
        import transformers
        transformers.AutoModelForCausalLM, transformers.AutoConfig, transformers.DynamicCache      # noqa: B018 - lazy there
        if job["way"] == "nf4":
            import bitsandbytes.nn  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise LabError(f"it cannot be imported here: {' '.join(str(error).split())[:200]}") from None
    transformers.logging.set_verbosity_error()


def warm(job: dict) -> None:
    """A model of two layers that knows nothing."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    warm_torch()
    for dtype in (torch.float32, torch.bfloat16):
        model, cache = LlamaForCausalLM(config).to(dtype), DynamicCache(config=config)
        with torch.inference_mode():
            for count in (32, 1):
                model(torch.ones(1, count, dtype=torch.int64), past_key_values=cache, use_cache=True)


def warm_torch() -> None:
    """What a decoder does, on next to nothing."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention, silu
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(64, 64, dtype=dtype)
            y = silu(torch.nn.functional.linear(x, x)) * x.pow(2).mean(-1, keepdim=True).rsqrt()
            scaled_dot_product_attention(y.view(1, 2, 32, 64), x.view(1, 2, 32, 64), x.view(1, 2, 32, 64), is_causal=True)
            torch.bmm(y[None], x[None]).softmax(-1).argmax().item()


def set_threads(job: dict) -> None:
    import torch
    torch.set_num_threads(job["threads"])


class open:
    """A transformers model and its usual cache. With `kv` in the job one that transformers quantizes ("quanto-4", "hqq-8"), or
    llmlab's packed one, for a pair of types."""

    def __init__(self, job: dict):
        import torch
        self._torch = torch
        if job["way"] == "transformers":
            self._model, why = _of_file(job["path"]), "from_pretrained(gguf_file=...), as it does by itself"
        elif job["way"] == "packed":
            self._model, why = _packed(job["path"], job.get("dtype"))
        else:
            self._model, why = _UNPACKED[job["way"]](job["path"])
        self._model.requires_grad_(False).eval()
        self._kv = job.get("kv")
        why += f"; its cache in {self._kv}" if self._kv else ""
        self.about = {"dtype": str(self._model.dtype).removeprefix("torch."), "held": _held(self._model), "why": why}
        self.forget()

    def room(self, tokens: int) -> None:
        self.forget()                          # it grows as it reads

    def forget(self) -> None:
        from transformers import DynamicCache
        self._cache = _other_cache(self._kv, self._model) if self._kv else DynamicCache(config=self._model.config)

    def deepen(self, tokens: int) -> None:
        """As if so many tokens had been read: noise as keys and values, given to the cache at once."""
        config = self._model.config.get_text_config()
        heads, width = config.num_key_value_heads, getattr(config, "head_dim", None)
        shape = 1, heads, tokens, width or config.hidden_size // config.num_attention_heads
        self.forget()
        with self._torch.inference_mode():
            for layer in range(config.num_hidden_layers):
                keys, values = (self._torch.randn(shape).to(self._model.dtype) for _ in range(2))
                self._cache.update(keys, values, layer)

    def read(self, tokens: list[int]) -> int:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

    def scores(self, tokens: list[int]) -> np.ndarray:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor([tokens]), past_key_values=self._cache, use_cache=True)
            return out.logits[0].float().numpy()


def _other_cache(kv: str | list[str], model):
    """llmlab's PackedCache by its types, or transformers' QuantizedCache by a backend and its bits, grouped along the axis that
    its documentation recommends for the backend (docs/source/en/kv_cache.md). Raises LabError."""
    if not isinstance(kv, str):
        from ..runtime.packed_cache import PackedCache
        return PackedCache(model, tuple(kv))
    from transformers import QuantizedCache
    backend, _, bits = kv.partition("-")
    axis = 1 if backend == "hqq" else 0
    try:
        return QuantizedCache(backend, model.config, nbits=int(bits), axis_key=axis, axis_value=axis, q_group_size=64)
    except (ImportError, ValueError) as error:
        raise LabError(f"transformers has no cache in {kv} here: {' '.join(str(error).split())[:200]}") from None


def _of_file(path: str):
    from transformers import AutoModelForCausalLM
    place = Path(path)
    try:
        return AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name, local_files_only=True)
    except Exception as error:                 # it raises as many kinds of error as there are ways to fail
        raise LabError(f"transformers does not load this GGUF: {' '.join(str(error).split())[:200]}") from error


def _bf16(path: str):
    import torch
    return _unpacked(path, torch.bfloat16, None), "torch's own matmul on the unpacked weights"


def _nf4(path: str):
    import bitsandbytes
    import torch

    from ..loading import load
    dtype = load(path, device="cpu", strategy="compact")[0].dtype      # what this processor computes well

    def quantized(weight: torch.Tensor, bias):
        made = bitsandbytes.nn.Linear4bit(*reversed(weight.shape), bias=bias is not None, compute_dtype=dtype, quant_type="nf4",
                                          device="meta")
        made.weight = bitsandbytes.nn.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4", module=made)
        made.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        return made.to("cpu")
    return _unpacked(path, dtype, quantized), f"bitsandbytes {bitsandbytes.__version__}; output matrix and embedding unpacked"


def _packed(path: str, dtype: str | None):
    from ..loading import load
    return load(path, device="cpu", dtype=dtype, strategy="fast")[0], "llmlab's packed matrices in transformers' own modules"


_UNPACKED = {"bf16": _bf16, "nf4": _nf4}


def _unpacked(path: str, dtype, quantized):
    """transformers' model of a GGUF with numbers in its modules; its Linears but the output by `quantized(weight, bias)`."""
    import torch

    from ..kernels import dense
    from ..loading import load
    from ..runtime.heap import give_back
    from ..runtime.modules import PackedEmbedding, PackedExperts, PackedLinear, in_order
    model, _ = load(path, device="cpu", dtype=dtype, strategy="compact")
    numbers: dict[int, torch.nn.Parameter] = {}

    def weights(module) -> torch.nn.Parameter:
        made = dense(module.packed, dtype)
        if getattr(module, "heads", 0):
            made = in_order(made.T, module.heads).T.contiguous()
        return torch.nn.Parameter(made, requires_grad=False)

    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            raise LabError("its experts stay packed in llmlab, so there is no unpacked model of it to run beside")
        if isinstance(module, PackedEmbedding):
            if module.scale != 1.0:
                continue                       # stays ours: only looked up, and transformers' has a class of its own for it
            made = torch.nn.Embedding(1, 1, device="meta")
            made.num_embeddings, made.embedding_dim, made.padding_idx = module.num_embeddings, module.embedding_dim, None
            made.weight = numbers.setdefault(id(module.packed), weights(module))
        elif isinstance(module, PackedLinear):
            held = numbers.get(id(module.packed))
            if quantized and name != "lm_head":
                made = quantized(weights(module).data, None if module.bias is None else module.bias.data)
            else:
                made = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                made.weight, made.bias = weights(module) if held is None else held, module.bias
        else:
            continue
        model.set_submodule(name, made)
        give_back()
    return model


def _held(model) -> int:
    """Bytes of parameters and buffers, and of the scales that bitsandbytes keeps beside them."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for parameter in list(tensors.values()):
        state = getattr(parameter, "quant_state", None)
        for one in (getattr(state, "absmax", None), getattr(state, "code", None)):
            if one is not None:
                tensors[id(one)] = one
    return sum(t.nbytes for t in tensors.values())

