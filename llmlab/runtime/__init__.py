"""Running models packed: a transformers model built around the blocks of a GGUF."""

from .building import build
from .families import FAMILIES, Family
from .keys import Keys
from .model import PackedModel
from .tensors import GGUFSource, Source

__all__ = ["FAMILIES", "Family", "GGUFSource", "Keys", "PackedModel", "Source", "build"]
