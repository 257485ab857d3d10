"""Maths on packed weights in plain torch: pack a matrix once, multiply by it, look rows up, unpack it."""

from .choosing import Choice, choose
from .multiplying import dense, linear, rows
from .packed import Packed
from .packing import pack

__all__ = ["Choice", "Packed", "choose", "dense", "linear", "pack", "rows"]
