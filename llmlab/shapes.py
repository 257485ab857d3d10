"""ModelSpec: what a model is made of, from a config.json, a GGUF header, a hub id or the catalogue."""

import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from json import JSONDecodeError, loads
from math import prod
from pathlib import Path
from types import MappingProxyType

from .architectures import Layer, Tensor, Traits, layers, tensors
from .catalog import entries, entry, unknown
from .errors import BadConfig, BadFile, LabError, UnknownName
from .gguf import GGUFFile, read_gguf
from .hf_config import Config, translate

_MAX_CONFIG = 16 * 2**20   # bytes; the largest published config.json is under 1 MB


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A model's shape. Compared and hashed by identity.

    `metadata`: GGUF keys without the architecture prefix. `tensors`: every tensor; types are set for a GGUF
    (`stored` then names the mix) and otherwise only where the converter fixes them. `file_bytes` and
    `header_bytes` are None unless read from a file.
    """

    name: str
    architecture: str
    metadata: Mapping[str, object]
    layers: tuple[Layer, ...]
    tensors: tuple[Tensor, ...]
    source: str                          # "catalogue", "config", "gguf", "hub"
    stored: str | None = None            # quant of a GGUF, as its general.file_type says
    dtype: str = "BF16"                  # of the checkpoint
    path: str | None = None              # of the GGUF (on the hub: owner/repo/file) or the config.json it was read from
    file_bytes: int | None = None
    header_bytes: int | None = None
    config: Mapping[str, object] | None = field(default=None, repr=False)
    full_name: str = ""                  # "Llama 3 8B"; empty where only `name` is known
    checkpoint: int | None = None        # elements the safetensors of a hub repository hold, by their headers

    def __repr__(self) -> str:
        from .units import format_count
        return (f"<{self.title}: {self.architecture}, {format_count(self.params)} parameters"
                f"{f' ({format_count(self.params_active)} active)' if self.experts else ''}, {len(self.blocks)} layers, "
                f"context {self.context_train}{f', stored as {self.stored}' if self.stored else ''}>")

    def __post_init__(self):
        for name in ("metadata", "config"):       # specs are shared: nobody changes one under another
            value = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, MappingProxyType(value))

    @property
    def title(self) -> str:
        """What to call it in a sentence."""
        return self.full_name or self.name

    @property
    def width(self) -> int:
        """Embedding length."""
        return self.metadata["embedding_length"]

    @property
    def vocab(self) -> int:
        """Rows of the token embedding."""
        return self.metadata.get("vocab_size", 0)

    @property
    def context_train(self) -> int:
        """The context the model was trained for, in tokens."""
        return self.metadata.get("context_length", 0)

    @property
    def experts(self) -> int:
        return self.metadata.get("expert_count", 0) or 0

    @property
    def published(self) -> str | None:
        """The quant a checkpoint was published in, where it was not 16 bits: MXFP4_MOE for gpt-oss."""
        config = self.config or {}
        method = config.get("quantization_config")
        method = method.get("quant_method") if isinstance(method, Mapping) else config.get("quantization")
        return "MXFP4_MOE" if str(method).lower().startswith("mxfp4") else None

    @cached_property
    def blocks(self) -> tuple[Layer, ...]:
        """The layers that run: without multi-token-prediction blocks."""
        return tuple(b for b in self.layers if not b.mtp)

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        return {t.name: t for t in self.tensors}

    @cached_property
    def tied(self) -> bool:
        """Whether one table serves as embedding and output."""
        return "output.weight" not in self.by_name

    @cached_property
    def params(self) -> int:
        """Elements of all tensors that run (no multi-token-prediction blocks, no rope tables)."""
        return sum(t.elements for t in self.tensors if not t.name.startswith("rope_") and not self.is_mtp(t))

    @cached_property
    def params_active(self) -> int:
        """Elements touched for one generated token: routed experts by their share, no input embedding unless tied."""
        total = 0
        for t in self.tensors:
            if t.name.startswith("rope_") or self.is_mtp(t) or t.name == "per_layer_token_embd.weight":
                continue
            if t.name == "token_embd.weight" and not self.tied:
                continue
            if "_exps." in t.name and not t.name.endswith(".scale"):
                block = self.layers[t.layer]
                total += t.elements * block.experts_used // block.experts
            else:
                total += t.elements
        return total

    def is_mtp(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to a multi-token-prediction block."""
        return tensor.layer >= 0 and self.layers[tensor.layer].mtp


_MOST_REMEMBERED = 2048   # results kept a model, far more than a session of sliders makes


def remembered(function: Callable) -> Callable:
    """Keep what `function(spec, ...)` returned on the spec itself: looked up like lru_cache, gone with the spec."""
    @wraps(function)
    def wrapper(spec: ModelSpec, *arguments):
        table = spec.__dict__.setdefault("_remembered", {})
        key = function, arguments
        try:
            return table[key]
        except KeyError:
            if len(table) >= _MOST_REMEMBERED:
                table.clear()
            found = table[key] = function(spec, *arguments)
            return found
    return wrapper


def model_spec(source, mtp: bool | None = None) -> ModelSpec:
    """The spec of a slug, a GGUF (the first of a sharded set too), a config.json or its folder, a config dict, or a hub id.

    A bare name that is in the catalogue means the catalogue; "./name" means a folder of that name.
    `mtp`: for configs, whether to count multi-token-prediction blocks into the file (see hf_config.translate).
    Raises UnknownName ("did you mean"), BadFile, BadConfig or Unreachable, each with one line.
    """
    if isinstance(source, ModelSpec):
        return source
    if isinstance(source, Mapping):
        return from_config(dict(source), "config", mtp=mtp)
    if not isinstance(source, (str, Path)) or not str(source).strip():
        raise UnknownName(f"{source!r:.60} names no model; llmlab.models() lists what is known")
    text = str(source)
    is_path = not isinstance(source, str) or text.startswith((".", "/", "~")) or text.endswith("/")
    if not is_path and len(text) < 4096 and "\n" not in text:
        found = _catalogued(text, mtp)
        if found is not None:
            return found
    return _from_path_or_hub(text, mtp)


@lru_cache(maxsize=512)
def _catalogued(name: str, mtp: bool | None) -> ModelSpec | None:
    """A catalogue model, or None where the name looks like a path or is not listed."""
    if name.endswith((".gguf", ".json")):
        return None
    try:
        row = entry(name)
    except UnknownName:
        return None
    return replace(from_config(dict(row.config), row.id, source="catalogue", mtp=mtp), full_name=row.name)


def _from_path_or_hub(text: str, mtp: bool | None) -> ModelSpec:
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):      # RuntimeError: no such user's home
        exists = False
    if exists:
        return _from_path(path, mtp)
    from .sources import find_local
    if local := find_local(text):
        return _from_path(Path(local.path), mtp)
    if _looks_like_hub(text):
        return _from_hub(text, mtp)
    if text.endswith((".gguf", ".json")) or "\\" in text or text.startswith((".", "/", "~")):
        raise BadFile(f"{text!r:.200} is not there; check the path")
    raise unknown("model", text, entries(), "llmlab.models()")


def _from_path(path: Path, mtp: bool | None) -> ModelSpec:
    if path.is_dir():
        if (path / "config.json").is_file():
            path = path / "config.json"
        else:
            ggufs = sorted(p for p in path.glob("*.gguf") if "mmproj" not in p.name.lower())
            if not ggufs:
                raise BadFile(f"{path} holds neither a config.json nor a GGUF")
            path = ggufs[0]
    try:
        now = path.stat()
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(now.st_mode):
        raise BadFile(f"{path} is not a regular file; give a GGUF or a config.json")
    return _read(str(path), (now.st_size, now.st_mtime_ns, now.st_ino), mtp)


@lru_cache(maxsize=64)
def _read(path: str, version: tuple[int, int, int], mtp: bool | None) -> ModelSpec:
    """The spec of a file at one moment: asked again, it is read again only once it has changed."""
    return _from_config_file(Path(path), mtp) if path.endswith(".json") else from_gguf(read_gguf(path))


def _looks_like_hub(text: str) -> bool:
    parts = text.split("/")
    return 2 <= len(parts) <= 6 and all(parts) and not text.startswith((".", "/", "~")) and " " not in text


def _from_config_file(path: Path, mtp: bool | None) -> ModelSpec:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG + 1)
        if len(text) > _MAX_CONFIG:
            raise BadConfig(f"{path} is larger than any config.json (over {_MAX_CONFIG} bytes); is it the right file?")
        fields = loads(text.decode("utf-8-sig"))
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise BadConfig(f"{path} nests too deeply to be a config.json") from None
    except (JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, LabError):
            raise
        raise BadConfig(f"{path} is not JSON: {str(error)[:80]}") from None
    name = path.parent.name if path.name == "config.json" else path.stem
    return replace(from_config(fields, name or "config", where=str(path), mtp=mtp), path=str(path))


def from_config(fields: dict, name: str, source: str = "config", where: str = "config.json",
                mtp: bool | None = None) -> ModelSpec:
    """A spec from the fields of a config.json; a catalogued config is complete, any other leaves fields to its class.

    Raises BadConfig.
    """
    try:
        architecture, kv, traits = translate(fields, where, mtp, complete=source == "catalogue")
        blocks = layers(architecture, kv)
        return ModelSpec(name, architecture, kv, blocks, _ordered(tensors(architecture, kv, traits)), source,
                         dtype=_dtype(fields), config=fields)
    except LabError as error:
        raise BadConfig(str(error)) from None
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise BadConfig(f"{where} cannot be read as a model: {type(error).__name__} {str(error)[:80]}") from None


def _dtype(fields: dict) -> str:
    config = Config(fields)
    given = str(config.raw("torch_dtype", "dtype", default="bfloat16")).removeprefix("torch.")
    return {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}.get(given, "BF16")


def _ordered(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """By block number, then name: the order in which llama-quantize visits them."""
    return tuple(sorted(found, key=lambda t: (t.layer, t.name)))


def from_gguf(file: GGUFFile, source: str = "gguf") -> ModelSpec:
    """A spec from a GGUF header. Raises BadFile for projectors and files without a model."""
    where = file.paths[0]
    if file.is_projector:
        raise BadFile(f"{where} is a vision or audio projector, not a language model; give the model's own GGUF")
    architecture = file.architecture
    prefix = architecture + "."
    kv = {key[len(prefix):]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    found = tuple(Tensor(t.name, t.shape, t.type) for t in file.tensors.values())
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) < 2:
        raise BadFile(f"{where} has no token_embd.weight; it is not a whole language model")
    kv["vocab_size"] = embedding.shape[1]
    try:
        blocks = layers(architecture, kv)
        ordered = _ordered(found)
    except LabError as error:
        raise BadFile(f"{where}: {error}") from None
    except (TypeError, KeyError, ValueError, OverflowError, IndexError, ZeroDivisionError) as error:
        raise BadFile(f"{where} has metadata that does not fit together: {str(error)[:80]}") from None
    if any(t.layer >= len(blocks) for t in ordered):
        raise BadFile(f"{where} has tensors of block {max(t.layer for t in ordered)}, but says it has {len(blocks)} blocks")
    name = file.metadata.get("general.name")
    stored = _stored(file)
    return ModelSpec(name if isinstance(name, str) and name else Path(where).stem, architecture, kv, blocks, ordered, source,
                     stored=stored, path=where, file_bytes=file.file_bytes, header_bytes=file.header_bytes,
                     full_name=_file_title(where, stored))


def _file_title(where: str, stored: str) -> str:
    """What people call a file: its name without shard number and quant (the name inside is often an export's log line)."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", Path(where).name.removesuffix(".gguf"))
    return re.sub(rf"[-._]{re.escape(stored)}$", "", stem, flags=re.IGNORECASE) or stem


FILE_TYPES = {  # general.file_type, llama.h's llama_ftype
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}


def _stored(file: GGUFFile) -> str:
    """The quant a file says it is, else its commonest type by bytes."""
    said = file.metadata.get("general.file_type")
    if isinstance(said, int) and said in FILE_TYPES:
        return FILE_TYPES[said]
    by_type: dict[str, int] = {}
    for t in file.tensors.values():
        by_type[t.type] = by_type.get(t.type, 0) + t.bytes
    return max(by_type, key=by_type.get)


def _from_hub(text: str, mtp: bool | None) -> ModelSpec:
    """A spec from a hub repository by range requests, nothing downloaded: owner/repo, owner/repo:QUANT or
    owner/repo/file.gguf."""
    from . import hub
    name = hub.parse_name(text)
    files = hub.tree(name.repo)
    if not name.file and not name.quant and any(f.path == "config.json" for f in files):
        spec = from_config(hub.read_json(name.repo), name.repo, source="hub", where=f"{name.repo}/config.json", mtp=mtp)
        if any(f.path.endswith(".safetensors") for f in files):
            held = hub.safetensors_headers(name.repo)
            return replace(spec, checkpoint=sum(prod(shape) for _, shape in held.values()))
        return spec
    chosen = hub.pick_gguf(name, files)
    if not chosen:
        raise BadFile(f"{name.repo} holds neither a config.json nor a GGUF")
    return from_gguf(hub.open_gguf(name.repo, chosen[0].path), source="hub")


__all__ = ["Layer", "ModelSpec", "Tensor", "Traits", "from_config", "from_gguf", "model_spec"]
