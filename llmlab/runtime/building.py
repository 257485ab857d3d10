"""A transformers model around packed weights: its own classes made without numbers, then each module filled from the source."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import BadFile, LabError
from ..kernels import Packed
from . import rope
from .families import TOP, Family, family_of
from .keys import Keys
from .model import as_packed
from .modules import ClampedExperts, PackedEmbedding, PackedExperts, PackedLinear
from .packer import Packer, start
from .tensors import Source, reader

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def build(source: Source, keys: Keys, dtype: torch.dtype, strategy: str = "auto",
          device: torch.device | str = "cpu") -> nn.Module:
    """A transformers model for causal language modelling whose matrices are packed, in eval mode, nothing in it trainable.

    `dtype` is that of the activations, norms and biases; `strategy` as `kernels.pack` has it, "auto" decided once for all
    matrices (the model's `chosen` says how). Raises LabError (an architecture that is not run) and BadFile (a tensor that is
    missing, of another shape than the hyperparameters say, or that the model has no place for), naming tensor and file.
    """
    family, device = family_of(keys), torch.device(device)
    packer, chosen = start(source, keys, strategy, dtype, device)
    model = _empty_model(family, source, keys, dtype)
    packer.tensors.split = _split(model.config, "self_attn.qkv_proj" in family.block)
    _Filling(model, family, packer).fill()
    _turn(model, source, keys, device)
    packer.finish()
    if bare := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise LabError(_changed(model, bare[0]))
    model.chosen = chosen
    return as_packed(model).eval().requires_grad_(False)


def special_tokens(metadata: Mapping, vocab: int) -> dict[str, int | list[int] | None]:
    """Which tokens begin a text, end an answer (several where the file names several) and fill up a batch."""
    def token(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < vocab else None

    ends = list(dict.fromkeys(found for name in ("eos", "eot", "eom") if (found := token(name)) is not None))
    pad = token("padding")
    return {"bos_token_id": token("bos"), "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": pad if pad is not None else ends[0] if ends else None}


def _empty_model(family: Family, source: Source, keys: Keys, dtype: torch.dtype) -> nn.Module:
    """transformers' class for the file's hyperparameters, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    if int(__version__.split(".")[0]) < 5:
        raise LabError(f"packed models need transformers 5, and {__version__} is installed; pip install --upgrade transformers")
    vocab = source.shape("token_embd.weight")[0]
    fields = {**family.config(keys, reader(source)), **special_tokens(keys.metadata, vocab), "vocab_size": vocab,
              "tie_word_embeddings": "output.weight" not in source}
    try:
        config = AutoConfig.for_model(family.model_type, **fields, dtype=dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:      # transformers checks a configuration in many places and raises as many kinds of error
        said = " ".join(str(error).split())[:200]
        raise BadFile(f"{keys.file}: transformers refuses the file's hyperparameters ({said}); download it again or convert "
                      "the model again") from error


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _split(config, fused_qkv: bool) -> dict[str, tuple[int, ...]]:
    """The rows of each part of tensors that a file may hold fused."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, _head_dim(config)
    ff = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    split = {"ffn_gate_up_exps": (ff, ff)}
    return split if fused_qkv else split | {"attn_qkv": (heads * dim, kv_heads * dim, kv_heads * dim)}


def _changed(model: nn.Module, name: str) -> str:
    return (f"transformers' {type(model).__name__} has a part {name!r} that llmlab knows no tensor for: the installed "
            "transformers is too old or too new; install transformers 5")


class _Filling:
    """Walks through a model on the meta device and gives each module its tensors."""

    def __init__(self, model: nn.Module, family: Family, packer: Packer):
        self.model, self.family, self.packer, self.config = model, family, packer, model.config
        self.tensors, self.dtype = packer.tensors, packer.dtype
        kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype == torch.float16:
            kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        self.kept = kept

    def fill(self) -> None:
        tied = "output.weight" not in self.tensors
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear):
                stem = "token_embd" if name == "lm_head" and tied else self.stem(name)
                self.model.set_submodule(name, self.linear(name, module, stem))
            elif isinstance(module, nn.Embedding):
                self.model.set_submodule(name, self.embedding(module, tied))
            elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                self.model.set_submodule(name, self.experts(module, self.stem(name)))
            else:
                self.parameters(name, module)
        if tied:
            self.model.lm_head.weight = self.model.get_input_embeddings().weight

    def stem(self, name: str) -> str:
        """The GGUF name of a module's tensors, without .weight and .bias."""
        found = _LAYER.fullmatch(name)
        bare = self.family.block.get(found[2]) if found else TOP.get(name)
        if bare is None:
            raise LabError(_changed(self.model, name))
        return f"blk.{found[1]}.{bare}" if found else bare

    def packed(self, name: str, shape: tuple[int, ...]) -> Packed:
        return self.packer.packed((name,), (shape,))

    def linear(self, name: str, module: nn.Linear, stem: str) -> PackedLinear:
        rows = module.out_features
        heads = rows // _head_dim(self.config) if self.family.interleaved and name.endswith(self.family.interleaved) else 0
        bias = self.packer.dense(f"{stem}.bias", (rows,)) if f"{stem}.bias" in self.tensors else None
        return PackedLinear(self.packed(f"{stem}.weight", (rows, module.in_features)), bias, self.dtype, heads)

    def embedding(self, module: nn.Embedding, tied: bool) -> PackedEmbedding:
        packed = self.packer.embedding((module.num_embeddings, module.embedding_dim), tied)
        return PackedEmbedding(packed, self.dtype, module.padding_idx, getattr(module, "scalar_embed_scale", 1.0))

    def experts(self, module: nn.Module, stem: str) -> PackedExperts:
        clamped = self.family.experts == "clamped"
        count, width, ff = module.num_experts, self.config.hidden_size, module.down_proj.shape[1 if clamped else 2]
        shapes = {"gate": (count, ff, width), "up": (count, ff, width), "down": (count, width, ff)}
        gate, up, down = (self.packed(f"{stem.format(part)}.weight", shape) for part, shape in shapes.items())
        if not clamped:
            return PackedExperts(gate, up, down, module.act_fn, self.dtype)
        biases = tuple(self.packer.dense(f"{stem.format(part)}.bias", shape[:2]) for part, shape in shapes.items())
        return ClampedExperts(gate, up, down, biases, module.alpha, module.limit, self.dtype)

    def parameters(self, name: str, module: nn.Module) -> None:
        """What a norm, a router or a vector of sinks holds, as plain numbers."""
        for own, parameter in list(module.named_parameters(recurse=False)):
            tensor = f"{self.stem(name)}.{own}" if own in ("weight", "bias") else f"{self.stem(f'{name}.{own}')}.weight"
            value = self.packer.dense(tensor, tuple(parameter.shape), torch.float32)
            if self.family.norm_shift and name.endswith("norm"):
                value = value - self.family.norm_shift
            dtype = torch.float32 if self.kept.intersection(name.split(".")) else self.dtype
            setattr(module, own, nn.Parameter(value.to(dtype), requires_grad=False))


def _turn(model: nn.Module, source: Source, keys: Keys, device: torch.device) -> None:
    """Rotary embeddings anew: their frequencies are not saved anywhere and were made without numbers."""
    factors = reader(source)("rope_freqs.weight")
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            made = type(module)(config=model.config)
            if factors is not None:
                rope.divide(made, factors, keys.file)
            model.set_submodule(name, made.to(device))
