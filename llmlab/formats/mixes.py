"""Which format each tensor gets: the recipes of llama-quantize, and those of other engines.

A mix, or quant, is a recipe over tensors (`"Q4_K_M"`); a format is a block layout (`"Q4_K"`). The rules are
llama.cpp's (src/llama-quant.cpp, tensor by tensor, as of the version in llama-cpp-python 0.3.36). Shapes
are in ggml order: shape[0] is the row length.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from ..errors import LabError, UnknownName
from .registry import FORMATS


@dataclass(frozen=True, slots=True)
class Mix:
    """A recipe: its name, the format most tensors get, what family it is of."""

    name: str
    default: str
    engine: str                     # "llama.cpp", "transformers" or "vllm"
    note: str = ""


MIXES: dict[str, Mix] = {m.name: m for m in (
    Mix("F32", "F32", "llama.cpp"), Mix("F16", "F16", "llama.cpp"), Mix("BF16", "BF16", "llama.cpp"),
    Mix("Q8_0", "Q8_0", "llama.cpp"), Mix("Q6_K", "Q6_K", "llama.cpp"),
    Mix("Q5_K_M", "Q5_K", "llama.cpp"), Mix("Q5_K_S", "Q5_K", "llama.cpp"), Mix("Q5_1", "Q5_1", "llama.cpp"),
    Mix("Q5_0", "Q5_0", "llama.cpp"), Mix("Q4_K_M", "Q4_K", "llama.cpp"), Mix("Q4_K_S", "Q4_K", "llama.cpp"),
    Mix("Q4_1", "Q4_1", "llama.cpp"), Mix("Q4_0", "Q4_0", "llama.cpp"), Mix("IQ4_NL", "IQ4_NL", "llama.cpp"),
    Mix("IQ4_XS", "IQ4_XS", "llama.cpp"), Mix("Q3_K_L", "Q3_K", "llama.cpp"), Mix("Q3_K_M", "Q3_K", "llama.cpp"),
    Mix("IQ3_M", "IQ3_S", "llama.cpp"), Mix("IQ3_S", "IQ3_S", "llama.cpp"), Mix("Q3_K_S", "Q3_K", "llama.cpp"),
    Mix("IQ3_XS", "IQ3_S", "llama.cpp"), Mix("IQ3_XXS", "IQ3_XXS", "llama.cpp"),
    Mix("Q2_K", "Q2_K", "llama.cpp"), Mix("Q2_K_S", "Q2_K", "llama.cpp"), Mix("IQ2_M", "IQ2_S", "llama.cpp"),
    Mix("IQ2_S", "IQ2_XS", "llama.cpp"), Mix("IQ2_XS", "IQ2_XS", "llama.cpp"),
    Mix("IQ2_XXS", "IQ2_XXS", "llama.cpp"), Mix("IQ1_M", "IQ1_M", "llama.cpp"),
    Mix("IQ1_S", "IQ1_S", "llama.cpp"), Mix("TQ2_0", "TQ2_0", "llama.cpp"), Mix("TQ1_0", "TQ1_0", "llama.cpp"),
    Mix("Q2_0", "Q2_0", "llama.cpp"), Mix("Q1_0", "Q1_0", "llama.cpp"),
    Mix("MXFP4_MOE", "MXFP4", "llama.cpp", note="experts in MXFP4, the rest Q8_0"),
    Mix("FP8", "I8", "vllm", note="linear layers one byte a weight, one float32 scale a row"),
    Mix("NF4", "NF4", "transformers", note="linear layers; float32 maxima of 64 weights"),
    Mix("NF4_DQ", "NF4", "transformers", note="linear layers; maxima quantized again (double quant)"),
    Mix("FP4", "FP4", "transformers", note="linear layers; float32 maxima of 64 weights"),
    Mix("FP4_DQ", "FP4", "transformers", note="linear layers; maxima quantized again (double quant)"),
    Mix("INT8", "I8", "transformers", note="linear layers one byte a weight, one float32 scale a row"),
    Mix("GPTQ_INT4", "Q4_0", "vllm", note="linear layers; groups of 128 with a half-precision scale and a 4-bit zero"),
    Mix("AWQ_INT4", "Q4_0", "vllm", note="linear layers; groups of 128 with a half-precision scale and a 4-bit zero"),
)}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32", "MXFP4": "MXFP4_MOE",
           "NF4_DOUBLE": "NF4_DQ", "GPTQ": "GPTQ_INT4", "AWQ": "AWQ_INT4", "INT4": "GPTQ_INT4"}


def find_mix(name: str) -> Mix:
    """The mix of that name, case forgiven; a format that no recipe is named after makes one by itself.

    Raises UnknownName with the nearest ones.
    """
    from ..catalog import nearest
    key = str(name).strip().upper().replace("-", "_") if isinstance(name, str) else ""
    key = ALIASES.get(key, key)
    if key not in MIXES and key in FORMATS and FORMATS[key].unpack is not None:
        return Mix(key, key, "llama.cpp", note=f"{key} wherever rows divide; the output matrix as llama-quantize keeps it")
    if key not in MIXES:
        near = nearest(key, MIXES) if 0 < len(key) < 64 else []
        says = f"did you mean {', '.join(near)}?" if near else "there are Q4_K_M, Q5_K_M, Q8_0, IQ4_XS and more"
        raise UnknownName(f"{str(name)[:60]!r} is not a quant; {says}")
    return MIXES[key]


class Shaped(Protocol):
    """What a rule needs of a tensor: its block's number (-1: none) and its name without it among other things."""

    bare: str
    layer: int
    shape: tuple[int, ...]
    type: str | None


_ATTN_V = ("v", "qkv", "kv_b")


@lru_cache(maxsize=4096)
def category(name: str) -> str:
    """The part a tensor plays, by its name: "output", "embedding", "v", "qkv", "kv_b", "k", "q", "attn_output",
    "up", "gate", "down" or "other"."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    for part, says in (("attn_qkv.weight", "qkv"), ("attn_kv_b.weight", "kv_b"), ("attn_v.weight", "v"),
                       ("attn_k.weight", "k"), ("attn_q.weight", "q"), ("attn_output.weight", "attn_output"),
                       ("ffn_up", "up"), ("ffn_gate", "gate"), ("ffn_down", "down")):
        if part in name:
            return says
    return "other"


_KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
         "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
         ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
         "a.rvq.codebook", "mm.a.code_embd", "time_mix_lerp_fused.weight",
         *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2",
                                                  "decay_w1", "decay_w2")))


@lru_cache(maxsize=4096)
def _kept_by_name(name: str) -> bool:
    """Whether llama-quantize leaves a tensor alone for its name (without the block number)."""
    return (not name.endswith("weight") or name in ("position_embd.weight", "token_types.weight")
            or any(part in name for part in _KEPT))


def quantizable(tensor: Shaped) -> bool:
    """Whether llama-quantize touches a tensor at all: matrices named ...weight, but for norms, routers and the like."""
    shape = tensor.shape
    if len(shape) < 2 or (shape[1] == 1 and (len(shape) < 3 or shape[2] == 1)):
        return False
    return not _kept_by_name(tensor.bare)


class Band(NamedTuple):
    """Where the i-th of n stands, as far as any rule asks; all that the rules know of depth."""

    first_two: bool
    first_four: bool
    sixteenth: bool     # in the first n // 16
    eighth: bool        # in the first n // 8
    last: bool          # in the last eighth
    third: bool         # every third behind the first eighth

    @property
    def more_bits(self) -> bool:
        """The layers that get a wider format in _M mixes: the first and last eighth, and every third between."""
        return self.eighth or self.last or self.third


@lru_cache(maxsize=8192)
def band(i: int, n: int) -> Band:
    """The band of the i-th of n."""
    return Band(i < 2, i < 4, i < n // 16, i < n // 8, i >= 7 * n // 8, (i - n // 8) % 3 == 2)


_ANYWHERE = Band(False, False, False, False, False, False)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the rules ask of a model: `gqa` query heads a KV head in block 0, `experts` in all, blocks in all
    (multi-token-prediction ones too), tied embedding, the 80-layer Llama and Qwen2 models ("70B")."""

    architecture: str
    blocks: int
    gqa: int
    experts: int
    tied: bool
    is_70b: bool


def _attention_v(quant: str, c: Circumstances, at: Band, default: str, importance: bool) -> str:
    wide = c.gqa >= 4
    new = default
    if quant == "Q2_K":
        new = "Q4_K" if wide else "Q3_K"
    elif quant == "Q2_K_S" and wide:
        new = "Q4_K"
    elif quant == "IQ3_XXS":
        new = "Q4_K" if wide else "IQ3_XXS" if importance else "IQ3_S"
    elif quant in ("IQ3_XS", "IQ3_S") and wide or quant == "IQ3_M":
        new = "Q4_K"
    elif quant == "Q3_K_M":
        new = "Q5_K" if at.first_two else "Q4_K"
    elif quant == "Q3_K_L" or quant in ("IQ4_NL", "IQ4_XS") and wide:
        new = "Q5_K"
    elif quant in ("Q4_K_M", "Q5_K_M") and at.more_bits:
        new = "Q6_K"
    elif quant == "Q4_K_S" and at.first_four:
        new = "Q5_K"
    if c.is_70b and new in ("Q3_K", "Q4_K"):
        new = "Q5_K"
    return "Q8_0" if c.experts == 8 else new


def _ffn_down(quant: str, c: Circumstances, at: Band, default: str, importance: bool) -> str:
    early, falcon = at.eighth, c.architecture == "falcon"
    if quant == "Q2_K":
        return "Q3_K"
    if quant == "Q2_K_S":
        return "Q4_K" if early else default
    if quant == "IQ3_XXS" and not importance:
        return "Q4_K" if early else "Q3_K"
    if quant == "Q3_K_M":
        return "Q5_K" if at.sixteenth else "Q4_K" if not falcon or at.more_bits else "Q3_K"
    if quant == "IQ3_M" and (early or c.experts == 8 and at.more_bits):
        return "Q4_K"
    if quant == "Q3_K_L":
        return "Q4_K" if falcon else "Q5_K"
    if quant == "Q4_K_M":
        if falcon:
            return "Q6_K" if at.sixteenth else "Q5_K" if at.more_bits else "Q4_K"
        return "Q6_K" if at.more_bits else default
    if quant in ("IQ4_NL", "IQ4_XS") and early and not importance:
        return "Q5_K"
    if quant == "Q5_K_M" and at.more_bits:
        return "Q6_K"
    if quant == "Q4_K_S" and not falcon and early:
        return "Q5_K"
    if quant in ("Q4_0", "Q5_0") and importance and early:
        return "Q4_1" if quant == "Q4_0" else "Q5_1"
    return default


_SMALL = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
_EIGHT_EXPERTS_Q5 = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
_OUTPUT_PROJECTION = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}


def _small(quant: str, c: Circumstances, part: str, at: Band, default: str) -> str:
    """The rules of the one- and two-bit mixes."""
    roomy = quant in ("IQ2_S", "IQ2_M")
    if part in _ATTN_V:
        return "Q4_K" if c.gqa >= 4 or c.experts >= 4 else "IQ3_S" if roomy else "Q2_K"
    if part == "k" and c.experts == 8:
        return "Q4_K"
    if part == "down" and at.eighth:
        return "IQ3_S" if roomy else "Q2_K"
    if part == "attn_output":
        if c.experts == 8:
            return "Q5_K"
        return "IQ2_XXS" if quant in ("IQ1_S", "IQ1_M") else "IQ3_S" if roomy else default
    return default


def _choose(quant: str, default: str, part: str, row: int, rank3: bool, at: Band, c: Circumstances,
            importance: bool) -> str:
    """The format of one quantizable tensor before it is looked at whether its row divides into blocks."""
    if part == "output" or (c.tied and part == "embedding"):
        if quant == "MXFP4_MOE" or c.architecture == "falcon" or row % FORMATS[default].block:
            return "Q8_0"
        return "Q5_K" if quant in (*_SMALL, "IQ3_XXS") else default if default == "Q8_0" else "Q6_K"
    if quant == "MXFP4_MOE":
        return "MXFP4" if rank3 else "Q8_0"
    if part == "embedding":
        if quant in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if quant in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if quant in ("TQ1_0", "TQ2_0", "Q2_0") else default
    if quant in _SMALL:
        return _small(quant, c, part, at, default)
    if part in _ATTN_V:
        return _attention_v(quant, c, at, default, importance)
    if part in ("k", "q"):
        if part == "k" and c.experts == 8:
            return "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(quant, default)
    if part == "down":
        return _ffn_down(quant, c, at, default, importance)
    if part == "attn_output":
        if c.architecture == "falcon":
            return "Q4_K" if quant == "Q3_K_L" else default
        if c.experts == 8:
            return "Q5_K" if quant in _EIGHT_EXPERTS_Q5 else default
        return _OUTPUT_PROJECTION.get(quant, default)
    if part in ("gate", "up") and quant == "IQ3_XS" and not at.eighth and not at.last:
        return "IQ3_XXS"
    return default


_NARROW = {**dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
           **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
           "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def fallback(type: str, row: int) -> str:
    """The format used where rows of `row` weights do not divide into blocks of `type`."""
    if row % FORMATS[type].block == 0:
        return type
    narrow = _NARROW.get(type)
    if narrow is None:
        if FORMATS[type].block <= 32:
            return "F16"
        raise LabError(f"a row of {row} weights does not divide into {type} blocks of {FORMATS[type].block}, and "
                       f"llama-quantize has no fallback for {type}; choose another quant")
    return narrow if row % FORMATS[narrow].block == 0 else "F16"


class Role(NamedTuple):
    """What the rules ask of one tensor. `running`: its band among its like, counted through the model; `block`: the band
    of its block. `kept`: its type where llama-quantize leaves it alone, else ""."""

    part: str
    row: int
    rank3: bool
    running: Band
    block: Band
    kept: str


def roles(tensors: Sequence[Shaped], blocks: int) -> tuple[Role, ...]:
    """The role of each tensor of a model of so many blocks, given in visiting order: by block, then name.

    attn_v-like tensors count together. In MoE models ffn_down_exps and ffn_down_shexp count as two.
    """
    attn_v = sum(category(t.bare) in _ATTN_V for t in tensors)
    running: dict[str, int] = {}
    found = []
    for tensor in tensors:
        if not quantizable(tensor):
            found.append(Role("", 0, False, _ANYWHERE, _ANYWHERE, tensor.type or "BF16"))
            continue
        part, shape = category(tensor.bare), tensor.shape
        among = within = _ANYWHERE
        if part in _ATTN_V or part in ("down", "gate", "up"):
            group = "v" if part in _ATTN_V else part
            i = running.get(group, 0)
            running[group] = i + 1
            among = band(i, attn_v if part in _ATTN_V else blocks)
            within = band(max(tensor.layer, 0), blocks)
        found.append(Role(part, shape[0], len(shape) > 2 and shape[2] > 1, among, within, ""))
    return tuple(found)


def chooser(mix: Mix, c: Circumstances, importance: bool = False) -> Callable[[Role], str]:
    """The rule of a mix: from a tensor's role to its format."""
    known: dict[Role, str] = {}
    floating = mix.default in ("F32", "F16", "BF16")
    by_block = c.experts > 1 and mix.name not in _SMALL    # the small mixes count on, also through experts

    def decide(role: Role) -> str:
        if role.kept:
            return "F32" if mix.name == "F32" and role.kept in ("F16", "BF16") else role.kept
        if floating:
            return mix.default
        at = role.running if role.part in _ATTN_V or not by_block else role.block
        return fallback(_choose(mix.name, mix.default, role.part, role.row, role.rank3, at, c, importance), role.row)

    def choose(role: Role) -> str:
        chosen = known.get(role)
        if chosen is None:
            chosen = known[role] = decide(role)
        return chosen

    return choose


_IMPORTANT = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")


def needs_importance(mix: Mix, names: Iterable[str], types: Iterable[str]) -> bool:
    """Whether llama-quantize refuses this mix for these tensors without an importance matrix."""
    return any(type in _IMPORTANT or (type == "Q2_K" and mix.name == "Q2_K_S")
               for name, type in zip(names, types, strict=True)
               if name not in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"))
