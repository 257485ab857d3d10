"""Formats without blocks: one number, one element. Ids and sizes as in ggml's type table."""

from .registry import Field, register

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
          "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}      # as torch calls them


def _plain(name: str, id: int):
    size = int("".join(filter(str.isdigit, name))) // 8
    return register(name, id, 1, size, "plain", fields=(Field("number", 0, size, f"{STORED[name]}: the weight itself"),))


F32 = _plain("F32", 0)
F16 = _plain("F16", 1)
I8 = _plain("I8", 24)
I16 = _plain("I16", 25)
I32 = _plain("I32", 26)
I64 = _plain("I64", 27)
F64 = _plain("F64", 28)
BF16 = _plain("BF16", 30)
