"""Block formats: bytes <-> numbers, one file a family, found by themselves."""

from importlib import import_module as _import_module
from pkgutil import iter_modules as _iter_modules

from .dequantizing import dequantize
from .quantizing import quantize
from .registry import BY_ID, FORMATS, Field, Format, Unpacked, register

for _module in _iter_modules(__path__):
    if not _module.ispkg:       # encoders wait until something is quantized: they need numpy
        _import_module(f"{__name__}.{_module.name}")

__all__ = ["BY_ID", "FORMATS", "Field", "Format", "Unpacked", "dequantize", "quantize", "register"]
