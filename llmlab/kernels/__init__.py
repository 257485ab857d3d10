"""Maths on packed numbers in plain torch: matrices packed once, multiplied by and looked up; attention on packed pages."""

from .attending import attention
from .choosing import Choice, choose
from .multiplying import dense, linear, rows
from .packed import Packed
from .packing import pack
from .pages import Pages

__all__ = ["Choice", "Packed", "Pages", "attention", "choose", "dense", "linear", "pack", "rows"]
