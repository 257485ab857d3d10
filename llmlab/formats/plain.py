"""Formats without blocks: one number, one element. Ids and sizes as in ggml's type table."""

from .registry import register

F32 = register("F32", 0, 1, 4, "plain")
F16 = register("F16", 1, 1, 2, "plain")
I8 = register("I8", 24, 1, 1, "plain")
I16 = register("I16", 25, 1, 2, "plain")
I32 = register("I32", 26, 1, 4, "plain")
I64 = register("I64", 27, 1, 8, "plain")
F64 = register("F64", 28, 1, 8, "plain")
BF16 = register("BF16", 30, 1, 2, "plain")
