"""A model's file quantized: what each tensor becomes and how large that is, then the file, a piece of a tensor at a time."""

from .planning import Plan, Row, planned
from .writing import quantize_gguf

__all__ = ["Plan", "Row", "planned", "quantize_gguf"]
