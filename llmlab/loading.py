"""`llmlab.load`: the path of a model in, a transformers model and its tokenizer out; the weights of a GGUF stay packed."""

import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .errors import BadFile, LabError
from .gguf import read_gguf
from .gguf.local import LocalFile
from .gguf.words import show_path
from .kernels.packing import STRATEGIES
from .memory import cache_types
from .offload.choosing import opened
from .runtime import GGUFSource, Keys, build
from .stores import place_of
from .units import format_bytes
from .vocabulary import bounded, tokenizer_of

DTYPES = {"float32": torch.float32, "f32": torch.float32, "float16": torch.float16, "f16": torch.float16, "fp16": torch.float16,
          "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
QUANTS = {"nf4": "nf4", "nf4-double": "nf4-double", "nf4_dq": "nf4-double", "int8": "int8"}


@dataclass(frozen=True)
class Loaded:
    """What was loaded and what was chosen for it: `model.llmlab`.

    `strategy` names the kernels ("compact", "fast", "reference", several joined by " + "; for a safetensors folder "dense" or
    the bitsandbytes quant). `resident_bytes`: what the model holds once all of it has run, pages of the mapped file
    among it. `file_bytes`: of the file, set or folder's safetensors. `context`: tokens the model was trained for. `kv`: the
    cache types of keys and of values, None where they are kept as the numbers they are.
    """

    path: str
    architecture: str
    strategy: str
    dtype: str
    resident_bytes: int
    file_bytes: int
    why: str
    context: int
    kv: tuple[str, str] | None = None


def load(path: str | os.PathLike, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
         quant: str | None = None, strategy: str = "auto", compile: bool = False,
         kv: str | tuple[str, str] | None = None, budget=None, plan=None):
    """(model, tokenizer) of a model on this computer; `model.llmlab` says what was chosen.

    `path`: a .gguf (the first file of a sharded set), a folder with config.json and safetensors, or the name of a model that
    `llmlab.local_models()` lists ("smollm2-135m" after `llmlab.fetch("smollm2-135m")`). Nothing is downloaded and no pickle
    is ever read.

    A GGUF's weights stay packed: `strategy` "compact" keeps the file's bytes, mapped; "fast" holds more memory where that
    buys speed; "reference" unpacks each matrix at every use; "auto" chooses by the memory that is free. `compile`: a GGUF's
    layers compiled for this processor, once (a minute; kept on disk, a second time takes a second), by the same strategies:
    "compact" within 1.15 of the file's bytes. `generate` and logits of one text then come from `model.decoder`, everything
    else from transformers' modules as before; where nothing can be compiled, `model.llmlab.why` says so. A folder is loaded by
    transformers as it is, or with `quant` "nf4", "nf4-double" or "int8" by bitsandbytes. `device`: "cpu" or "cuda" (None: a
    card where the model fits on one). `dtype`: of the activations ("float32", "bfloat16", "float16"; None: what this device
    computes well). `kv`: the cache type of keys and values, or a pair for them ("q8_0", ("q8_0", "q4_0"), as llama.cpp has
    them): `generate` and `forward` then begin with a `runtime.packed_cache.PackedCache` unless they are given a cache; None:
    with transformers' own, in the activations' dtype. The tokenizer is None where the file has no vocabulary.

    `budget`, `plan`: of a GGUF that is larger than memory, as `llmlab.decoder` has them: `generate` and logits of one text come
    from `model.decoder`, which holds no more than the budget, and `model.trace` says what it read and when; everything else
    goes through transformers' modules over the mapped file, which the system may hold as much of as it likes.

    Raises LabError (BadFile for a damaged file, UnknownName for a name) with one line naming the thing and the remedy.
    """
    if strategy not in STRATEGIES:
        raise LabError(f"strategy is {str(strategy)[:40]!r}; give one of {', '.join(STRATEGIES)}")
    kv = None if kv is None else cache_types(kv)
    place = place_of(path, "a .gguf file or of a safetensors folder")
    if place.is_dir():
        if budget is not None or plan is not None:
            raise LabError(f"a budget or a plan is for GGUF files; {show_path(str(place))} is a safetensors folder: "
                           "llmlab.quantize_gguf makes one of it")
        if compile:
            raise LabError(f"compile=True is for GGUF files; {show_path(str(place))} is a safetensors folder: give "
                           "torch.compile the model that load returns")
        return _load_folder(place, device, dtype, quant, strategy, kv)
    if quant is not None:
        raise LabError(f"quant={quant!r:.40} is for safetensors folders; {show_path(str(place))} is a GGUF, which is packed "
                       "already")
    return _load_gguf(place, device, dtype, strategy, compile, kv, budget, plan)


# ---- GGUF ---------------------------------------------------------------------------------------------------

def _load_gguf(path: Path, device, dtype, strategy: str, compile: bool, kv: tuple[str, str] | None, budget, plan):
    file = read_gguf(path)
    shown = show_path(file.paths[0])
    if file.is_projector:
        raise LabError(f"{shown} is the projector of a model, not a model; give the model's own file")
    keys, asked = Keys(file.metadata, file.architecture, shown), device
    if budget is not None or plan is not None:
        device, where, streamed = torch.device("cpu"), "its layers where the budget has room", True
        there = _device(asked, 0)[0]
        dtype, precision = _dtype(dtype, there)
        decoder = opened(file, budget, plan, strategy, dtype, there, None, compile, _tell, kv)
    else:
        device, where = _device(device, file.tensor_bytes)
        dtype, precision = _dtype(dtype, device)
        decoder = _decoder(file, dtype, strategy, kv) if compile and device.type == "cpu" else None
        streamed = False
    compiled = decoder is not None and (streamed or decoder.compiled is not None)
    model = build(GGUFSource(file), keys, dtype, "compact" if compiled else strategy, device)
    model.config._name_or_path = model.name_or_path = file.paths[0]
    if kv:
        _keep(model, kv)
    packed = [matrix for _, matrix in model.packed()]
    if any(matrix.mapped for matrix in packed):
        # of the decoder, which an adapter's wrapping calls as well
        model.base_model.register_forward_pre_hook(partial(_check_in_place, file.sources))
    ways, reasons = Counter(p.strategy for p in packed), Counter((p.strategy, p.why) for p in packed)
    told = [model.chosen] if model.chosen else []
    told += [f"{count} of {len(packed)} matrices {way} ({why})" for (way, why), count in reasons.most_common(3)]
    model.llmlab = Loaded(path=file.paths[0], architecture=file.architecture, dtype=_name(dtype), file_bytes=file.file_bytes,
                          strategy=" + ".join(way for way, _ in ways.most_common()), why="; ".join([*told, where, precision]),
                          resident_bytes=model.get_memory_footprint(), context=model.config.max_position_embeddings, kv=kv)
    if compile and not compiled:
        stands = decoder.why.split(";")[0] if decoder else "not compiled: llmlab.decoder(path, compile=True) is, on a card"
        model.llmlab = replace(model.llmlab, why=f"{stands}; {model.llmlab.why}")
    if compiled:
        from .runtime.delegating import delegate

        model.llmlab = replace(model.llmlab, strategy=decoder.strategy, why=f"{decoder.why}; {where}; {precision}",
                               resident_bytes=decoder.resident_bytes)
        delegate(model, decoder)
        if streamed:
            model.trace = decoder.trace
    tokenizer = tokenizer_of(file) if file.metadata.get("tokenizer.ggml.tokens") else None
    if tokenizer is not None and tokenizer.stop_ids:
        model.generation_config.eos_token_id = list(tokenizer.stop_ids)
    return model, tokenizer


def _decoder(file, dtype: torch.dtype, strategy: str, kv: tuple[str, str] | None):
    """A decoder compiled for this processor, telling what it compiles: it takes a minute the first time."""
    from .runtime.decoder import Decoder

    return Decoder.open(file, dtype, strategy, compile=True, kv=kv,
                        progress=_tell)


def _tell(said: str) -> None:
    print(f"llmlab: {said}", file=sys.stderr, flush=True)


def _keep(model, kv: tuple[str, str]):
    """The model with a packed cache as its own."""
    from .runtime.keeping import keep_packed

    return keep_packed(model, kv)


def _check_in_place(files: tuple[LocalFile, ...], *_) -> None:
    for file in files:
        file.check_in_place()


# ---- safetensors --------------------------------------------------------------------------------------------

def _load_folder(path: Path, device, dtype, quant: str | None, strategy: str, kv: tuple[str, str] | None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown, weights = show_path(str(path)), sorted(path.glob("*.safetensors"))
    if not weights or not (path / "config.json").is_file():
        inside = ", ".join(sorted(p.name for p in path.glob("*.gguf"))[:5])
        remedy = f"give one of its files, {inside}" if inside else "give a .gguf, or a folder with both; pickles are never read"
        raise BadFile(f"{shown} is no model: it has no {'config.json' if weights else 'safetensors'}; {remedy}")
    if strategy != "auto":
        raise LabError(f"strategy={strategy!r} is for GGUF files; {shown} is a safetensors folder: give quant='nf4', "
                       "'nf4-double' or 'int8', or neither")
    if quant is not None and str(quant).lower() not in QUANTS:
        raise LabError(f"quant={str(quant)[:40]!r} is not one of nf4, nf4-double, int8, which {shown} can be loaded in")
    quant = quant and QUANTS[str(quant).lower()]
    size = sum(file.stat().st_size for file in weights)
    device, where = _device(device, size)
    if quant == "int8" and dtype is None:
        dtype = torch.float16                 # what bitsandbytes' INT8 computes in; it says so once a multiplication otherwise
    dtype, precision = _dtype(dtype, device)
    settings = {"local_files_only": True, "trust_remote_code": False}
    has_tokenizer = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map={"": str(device)}, use_safetensors=True, output_loading_info=True,
            quantization_config=_bitsandbytes(quant, dtype), **settings)
        tokenizer = bounded(AutoTokenizer.from_pretrained(path, **settings), str(path)) if has_tokenizer else None
    except Exception as error:      # a folder can be wrong in many ways, and transformers raises as many kinds of error
        raise BadFile(f"{shown}: transformers cannot load it: {_first_line(error)}") from error
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadFile(f"{shown} lacks the tensor {missing[0]!r:.100}{more}; download it again")
    held = {id(t): t for t in (*model.parameters(), *model.buffers(), *_scales(model))}
    model.llmlab = Loaded(path=str(path), architecture=model.config.model_type, strategy=quant or "dense", dtype=_name(dtype),
                          resident_bytes=sum(t.nbytes for t in held.values()), file_bytes=size,
                          why=f"{'packed by bitsandbytes' if quant else 'the numbers themselves'}; {where}; {precision}",
                          context=getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0, kv=kv)
    return (_keep(model, kv) if kv else model).eval(), tokenizer


def _bitsandbytes(quant: str | None, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    if quant is None:
        return None
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=quant == "nf4-double")


def _scales(model):
    """What bitsandbytes holds beside the parameters: the scales of NF4's blocks and of INT8's rows."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))
        if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):
            yield scales


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# ---- what, where, how precise -------------------------------------------------------------------------------

def _device(asked, size: int) -> tuple[torch.device, str]:
    """Where to, and why: a card where one is there and the weights leave a tenth of its free memory."""
    if asked is not None:
        try:
            device = torch.device(asked)
            torch.empty(0, device=device).cpu()      # "meta" can be written to and never read
        except (RuntimeError, AssertionError, TypeError) as error:
            raise LabError(f"device {str(asked)[:40]!r} cannot be used here ({_first_line(error)}); give 'cpu', or leave it "
                           "out") from None
        return device, f"on {device}, as asked"
    if not torch.cuda.is_available():
        return torch.device("cpu"), "on the CPU: torch sees no card"
    free = torch.cuda.mem_get_info()[0]
    if size > 0.9 * free:
        return torch.device("cpu"), f"on the CPU: {format_bytes(size)} do not fit in the card's free {format_bytes(free)}"
    return torch.device("cuda"), "on the card, where it fits"


def _dtype(asked, device: torch.device) -> tuple[torch.dtype, str]:
    """The activations' dtype, and why."""
    if asked is not None:
        dtype = DTYPES.get(str(asked).removeprefix("torch."))
        if dtype is None:
            raise LabError(f"dtype {str(asked)[:40]!r} is not one of float32, bfloat16, float16")
        return dtype, f"{_name(dtype)}, as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16, which the card has"
        return torch.float16, "float16: the card has no bfloat16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return torch.bfloat16, "bfloat16, which this processor has instructions for"
    return torch.float32, "float32: this device has no fast bfloat16"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
