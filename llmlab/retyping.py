"""A model whose matrices are in one format: which of its tensors that means, and how large it is then."""

from .architectures import Tensor
from .errors import LabError
from .formats import Format
from .memory import GGUF_ALIGNMENT, Size, tensor_bytes
from .shapes import ModelSpec
from .units import align


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a GGUF tensor is a matrix (or a stack of experts) of a block: what takes most of a file, and what is quantized
    first. Not the embedding, the output matrix, routers, norms or biases; `shape` in either order."""
    return (name.startswith("blk.") and name.endswith(".weight") and len(shape) >= 2 and "_norm." not in name
            and not any(part in name for part in (".ffn_gate_inp", ".ssm_conv1d.", ".shortconv.")))


def retyped(spec: ModelSpec, format: Format) -> Size:
    """How large a GGUF is with its block matrices in `format` and everything else as it is stored: exact.

    Raises LabError where a width does not divide into blocks, naming the tensor, and for a model that is not from a GGUF.
    """
    if spec.stored is None:
        raise LabError(f"{spec.title} is no GGUF file: what its other tensors are stored in is not known")
    changed = {t.name: t.shape[0] for t in spec.tensors if is_block_matrix(t.name, t.shape)}
    check_widths(changed.items(), format)
    types = [format.name if t.name in changed else t.type for t in spec.tensors]
    return _size(spec.tensors, types, format.name)


def as_stored(spec: ModelSpec) -> Size:
    """The same of the file as it is."""
    return _size(spec.tensors, [t.type for t in spec.tensors], str(spec.stored))


def check_widths(widths, format: Format) -> None:
    """Raises LabError for the first (name, width) that is no whole number of blocks."""
    for name, width in widths:
        if width % format.block:
            raise LabError(f"{name} is {width} weights wide, which does not divide into blocks of {format.block}: "
                           f"{format.name} cannot hold it")


def _size(tensors: tuple[Tensor, ...], types: list[str], what: str) -> Size:
    sizes = [tensor_bytes(type, t.shape) for type, t in zip(types, tensors, strict=True)]
    elements = sum(t.elements for t in tensors)
    return Size(what, sum(align(size, GGUF_ALIGNMENT) for size in sizes), sum(sizes) * 8 / elements, False, elements)
