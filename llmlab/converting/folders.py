"""A folder with config.json, safetensors and tokenizer, as a source of a GGUF: header first, rows when they are asked for."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..architectures import Tensor
from ..errors import BadConfig, BadFile, LabError
from ..formats import FORMATS, quantize
from ..gguf import GGUFFile, TensorInfo
from ..gguf.words import show_path
from ..shapes import ModelSpec, from_config
from .cutting import check_tokens
from .hyperparameters import hyperparameters
from .origins import family_named, origins, read
from .tensor_files import TYPES, TensorFiles, read_json
from .words import words

_COPY = 1 << 22      # weights read and stored at a time


class Checkpoint:
    """A folder of the families in `origins.KNOWN`. `type`: of the matrices ("F32", "F16", "BF16"; None: what most of them are
    in). Norms, biases and routers are float32, as the converter writes them.

    Raises BadFile, BadConfig or LabError, each one line that names file and remedy, for what cannot be converted.
    """

    def __init__(self, folder: Path, type: str | None = None):
        self.shown, self._files = show_path(str(folder)), TensorFiles(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
        if config is None:
            raise BadFile(f"{self.shown} has no config.json; download it into the folder")
        fields = _text_fields(folder, config, self.shown)
        family = family_named(fields["model_type"], self.shown)
        spec = from_config(config, folder.resolve().name, where=f"{self.shown}/config.json")
        self._origins = origins(spec.tensors, family, self._files, fields, self.shown)
        self._tensors = spec.by_name
        matrices = type or self._commonest()
        infos = {t.name: _info(t, t.type if t.type and len(t.shape) > 1 else "F32" if len(t.shape) == 1 else matrices)
                 for t in spec.tensors}
        self.metadata = {
            "general.architecture": spec.architecture, "general.type": "model", **_sampling(folder),
            "general.name": _title(folder), "general.size_label": _size_label(spec), **_licence(folder),
            **hyperparameters(spec.architecture, fields, spec.vocab, self.shown),
            "general.file_type": ("uint32", {"F32": 0, "F16": 1, "BF16": 32}[matrices]),
            "general.quantization_version": ("uint32", 2), **words(folder, config, spec.vocab, self.shown)}
        self.paths = (*self._files.paths, str(folder))
        plain = {key: value[1] if isinstance(value, tuple) else value for key, value in self.metadata.items()}
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
        size = sum(info.bytes for info in infos.values())
        self.file = GGUFFile((self.shown,), 3, 32, plain, infos, 0, size)
        if not (folder / "tokenizer.model").is_file():
            check_tokens(self.file, folder / "tokenizer.json")

    def numbers(self, name: str, start: int, stop: int) -> torch.Tensor:
        return read(self._origins[name], self._files, self._tensors[name], start, stop)

    def stored(self, name: str) -> Iterator[Any]:
        info = self.file.tensors[name]
        rows = info.elements // info.shape[0]
        step = max(1, _COPY // info.shape[0])
        for start in range(0, rows, step):
            numbers = self.numbers(name, start, min(start + step, rows))
            try:
                yield quantize(numbers, info.type).view(-1).numpy()
            except LabError as error:
                raise LabError(f"{self.shown}: tensor {name}: {error}") from None

    def done(self, name: str) -> None:
        self._files.let_go()

    def _commonest(self) -> str:
        """The type that most weights of the matrices are in."""
        counts: dict[str, int] = {}
        for origin in self._origins.values():
            for entry in (self._files.entries[name] for name in origin.names):
                if len(entry.shape) > 1:
                    counts[entry.dtype] = counts.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
        found = TYPES[max(counts, key=counts.get)]
        return "F32" if found == "F64" else found


def _info(tensor: Tensor, type: str) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.shape, type, 0, FORMATS[type].bytes(tensor.elements))


def _text_fields(folder: Path, config: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """The text model's configuration as transformers reads it: old names brought up to date, what is left out filled in."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config().to_dict()
    except Exception as error:      # a config can be wrong in many ways, and transformers raises as many kinds of error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadConfig(f"{shown}/config.json: transformers cannot read it: {first}") from None


def _title(folder: Path) -> str:
    """What people would call it: the folder's name, dashes as spaces."""
    parts = [part.title() if part.islower() else part for part in re.split("[-_ ]+", folder.resolve().name)]
    return " ".join(filter(None, parts)) or "model"


def _size_label(spec: ModelSpec) -> str:
    """Parameters in a word, "8B"; of experts how many there are of what one and the rest make together, "8x7B"."""
    routed = sum(t.elements for t in spec.tensors if "_exps." in t.name)
    count = spec.experts if routed else 0
    number = spec.params - routed + routed // count if count else spec.params
    power, scale = next(((p, s) for p, s in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")) if number > p), (1e3, "K"))
    digits = max(2 - len(str(round(number / power)).lstrip("0")), 0)
    return f"{f'{count}x' if count else ''}{number / power:.{digits}f}{scale}"


def _licence(folder: Path) -> dict[str, str]:
    """What the model's card says at its head of the terms it comes under."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as card:
            head = card.read(65536).partition("---")[2].partition("\n---")[0]
    except OSError:
        return {}
    found = dict(re.findall(r"^(license|license_name|license_link): *[\"']?([^\"'\n]+?)[\"']? *$", head, re.MULTILINE))
    return {f"general.{key.replace('_', '.')}": found[key] for key in sorted(found)}


_SAMPLING = {"top_k": ("top_k", "int32"), "top_p": ("top_p", "float32"), "min_p": ("min_p", "float32"),
             "temperature": ("temp", "float32"), "repetition_penalty": ("penalty_repeat", "float32")}


def _sampling(folder: Path) -> dict[str, Any]:
    """How the model's makers would have it sampled, by generation_config.json."""
    path = folder / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    return {f"general.sampling.{ours}": (kind, given[theirs]) for theirs, (ours, kind) in _SAMPLING.items()
            if isinstance(given.get(theirs), int | float) and not isinstance(given[theirs], bool)}
