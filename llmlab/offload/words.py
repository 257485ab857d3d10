"""A model's matrices as compiled code takes them, written to a store once, a layer at a time, and seen in whatever buffer a
piece of it was read into.

What lies where follows from the GGUF alone: matrices are described as they would be laid out (tensors without numbers), and a
description and a buffer give the layer.
"""

import hashlib
import os
from collections.abc import Iterator

import torch

from ..errors import BadFile
from ..formats import FORMATS
from ..gguf import GGUFFile
from ..gguf.words import show_path
from ..kernels import words
from ..kernels.words import Words
from ..runtime.compiled import NotCompiled, compilable, described, each_laid_out, laid_out, laid_out_layer
from ..runtime.heap import give_back
from ..runtime.keys import Keys
from ..runtime.tensors import GGUFSource
from ..runtime.weights import Weights
from ..units import align
from .pieces import HEAD, PAGE, Piece
from .store import LINE, Part, Progress, Store, kept_store

_SAMPLE = 2048          # weights of each format that the name of a layout is made of


def described_model(file: GGUFFile, kv: tuple[str, str] | None = None, context: int | None = None) -> Weights:
    """A model's weights as compiled code takes them, within `words.ROOM` of the file's bytes: small tensors and the embedding
    are there, matrices are on torch's "meta" device. Raises NotCompiled where it cannot be compiled, and as `weights.read`."""
    return _described(file, kv, context)[1]


def kept(file: GGUFFile, folder: str | os.PathLike | None = None, progress: Progress | None = None) -> Store:
    """The store of a model's words that is there, else one that is written now. Raises as `described_model` and
    `store.write_store`."""
    total = sum(piece_bytes(file).values())
    return kept_store(file, folder, layout_name(file), progress, laid_out_pieces(file), total)


def layout_name(file: GGUFFile) -> str:
    """What the layout of this file's words is called here: how wide registers are, and a digest of how a few weights of each
    format lie, so that what was made for another processor or by other code is not taken for it."""
    found = hashlib.blake2b(digest_size=4)
    for name in sorted({tensor.type for tensor in file.tensors.values()}):
        known = words.layout(name, None, True)
        if known is not None:
            row = torch.arange(FORMATS[name].bytes(_SAMPLE)).mul(37).remainder(59).to(torch.uint8)[None]   # no NaN among floats
            found.update(repr((name, known)).encode())
            for part in words.lay_out(row, name, _SAMPLE, known).tensors:
                found.update(part.numpy().tobytes())
    return f"words{words.lanes()}-{found.hexdigest()}"


def piece_bytes(file: GGUFFile) -> dict[str, int]:
    """Bytes of each piece of such a store, whether it was written or not. Raises as `described_model`."""
    like, found = described_model(file), {}
    for name, part in [*((f"blk.{number}", layer) for number, layer in enumerate(like.layers)), (HEAD, like.head)]:
        end = 0
        for _, tensor in _matrices(part, part):
            end = align(end, LINE) + tensor.nbytes
        found[name] = align(end, PAGE)
    return found


def laid_out_pieces(file: GGUFFile) -> Iterator[tuple[str, list[Part]]]:
    """What `store.write_store` wants, laid out as it is asked for: the matrices of a layer are in memory at a time, or the
    output matrix. Raises as `described_model` does."""
    found, like = _described(file)
    for number, (layer, shape) in enumerate(zip(found.layers, found.shapes, strict=True)):
        yield f"blk.{number}", _parts(laid_out_layer(layer, shape, True)[0], like.layers[number])
        _tidy(file)
    yield HEAD, _parts(each_laid_out(found.head, True), like.head)
    _tidy(file)


def _parts(laid: dict, like: dict) -> list[Part]:
    return [Part(name, {"type": "F32", "shape": list(tensor.shape)}, tensor.contiguous().numpy())
            for name, tensor in _matrices(laid, like)]


def _matrices(laid: dict, like: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of what is a matrix in `like`, by name, "qkv.0" and on."""
    for name in sorted(like):
        if isinstance(like[name], Words):
            yield from ((f"{name}.{at}", tensor) for at, tensor in enumerate(laid[name].tensors))
        elif isinstance(like[name], torch.Tensor) and like[name].is_meta:
            yield name, laid[name]


def _tidy(file: GGUFFile) -> None:
    """What a piece took goes back before the next one is laid out, the file's pages too."""
    for part in file.sources:
        part.let_go()
    give_back()


def seen(layer: dict, piece: Piece, buffer: torch.Tensor, where: str) -> dict:
    """A layer that was described, over a buffer uint8 [piece.bytes] that its piece is read into, before or after it is.
    `where`: the store's path. Raises BadFile where the piece is not of this layer."""
    places = {tensor.name: tensor for tensor in piece.tensors}

    def view(name: str, like: torch.Tensor) -> torch.Tensor:
        tensor = places.pop(name, None)
        if tensor is None or tensor.bytes != like.nbytes or tensor.offset % LINE:
            raise BadFile(f"{show_path(where)}: {piece.name} is not of this model; delete it and make it again")
        return buffer[tensor.offset:tensor.offset + tensor.bytes].view(torch.float32).view(like.shape)

    def one(name: str, value):
        if isinstance(value, Words):
            return value._replace(tensors=tuple(view(f"{name}.{part}", like) for part, like in enumerate(value.tensors)))
        return view(name, value) if isinstance(value, torch.Tensor) and value.is_meta else value

    found = {name: one(name, value) for name, value in layer.items()}
    if places:
        raise BadFile(f"{show_path(where)}: {piece.name} is not of this model; delete it and make it again")
    return found


def _described(file: GGUFFile, kv: tuple[str, str] | None = None, context: int | None = None) -> tuple[Weights, Weights]:
    """A model's weights as they lie in its file, and as they will be laid out."""
    shown = show_path(file.paths[0])
    try:
        found = compilable(GGUFSource(file), Keys(file.metadata, file.architecture, shown), torch.device("cpu"), kv, context)
        return found, laid_out(found, True, described)
    except NotCompiled as error:
        raise NotCompiled(f"{shown} cannot be laid out for compiled code: {error}; take the layout 'gguf'") from None
