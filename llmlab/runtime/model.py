"""What a packed model does otherwise than transformers' class of its name: it counts what is packed, and refuses in words."""

from collections.abc import Iterator
from functools import cache

from torch import nn

from ..errors import LabError
from ..kernels import Packed
from .modules import PackedEmbedding


class PackedModel:
    """Mixed into a transformers model whose matrices are packed; `llmlab` says what was loaded (`llmlab.load` sets it)."""

    def packed(self) -> Iterator[tuple[str, Packed]]:
        """(module's name, packed matrix or stack), each once, in the order of the modules."""
        seen = set()
        for name, module in self.named_modules():
            for part, value in vars(module).items():
                if isinstance(value, Packed) and id(value) not in seen:
                    seen.add(id(value))
                    yield (name if part == "packed" else f"{name}.{part}"), value

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        apart = {id(m.packed) for m in self.modules() if isinstance(m, PackedEmbedding)} if exclude_embeddings else ()
        return count + sum(p.rows * p.cols * len(p) for _, p in self.packed() if id(p) not in apart)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes held, the pages of the file that running touches among them."""
        return super().get_memory_footprint(return_buffers) + sum(p.bytes + p.mapped for _, p in self.packed())

    def save_pretrained(self, *args, **kwargs):
        raise LabError(f"a packed model is not saved again: its weights are those of {self._file}, copy that file; an adapter "
                       "on top of it is saved by the adapter's own save_pretrained")

    def push_to_hub(self, *args, **kwargs):
        self.save_pretrained()

    def resize_token_embeddings(self, *args, **kwargs):
        raise LabError(f"the embedding of {self._file} is packed and keeps its rows; add tokens before the model is converted")

    def __reduce_ex__(self, protocol):
        """copy.deepcopy makes the object by this; pickling it ends in words at the first EmptyWeight."""
        made, order = super().__reduce_ex__(protocol), type(self).__mro__
        return _empty, (order[order.index(PackedModel) + 1],), *made[2:]

    @property
    def _file(self) -> str:
        return self.name_or_path or "its file"


def as_packed(model: nn.Module) -> nn.Module:
    """The same object, now of transformers' class with PackedModel before it."""
    model.__class__ = _with_packed(type(model))
    return model


def _empty(kind: type) -> nn.Module:
    found = _with_packed(kind)
    return found.__new__(found)


@cache
def _with_packed(kind: type) -> type:
    return type(kind.__name__, (PackedModel, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
