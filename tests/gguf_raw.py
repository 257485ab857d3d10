"""GGUF files put together by hand, field by field, so that any of them can lie. Independent of llmlab's own writer."""

import struct

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q4_K = 0, 1, 2, 12


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` claims another one."""
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return u32(kind) + u64(count) + items


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int, dimensions: int | None = None) -> bytes:
    """A tensor's entry; `dimensions` claims another number of them."""
    count = len(shape) if dimensions is None else dimensions
    return text(name) + u32(count) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


LLAMA = pair("general.architecture", STRING, text("llama"))


def file(pairs: tuple[bytes, ...] = (LLAMA,), tensors: tuple[bytes, ...] = (), data: bytes = b"", *, version: int = 3,
         pair_count: int | None = None, tensor_count: int | None = None, alignment: int = 32) -> bytes:
    """A whole file; the counts may be claimed."""
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if tensor_count is None else tensor_count)
    head += u64(len(pairs) if pair_count is None else pair_count)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def small() -> bytes:
    """A valid file with every kind of value, a long vocabulary, and tensors of one to four dimensions."""
    scalars = [("u8", UINT8, "B", 200), ("i8", INT8, "b", -3), ("u16", UINT16, "H", 60000), ("i16", INT16, "h", -300),
               ("u32", UINT32, "I", 2**31), ("i32", INT32, "i", -(2**31)), ("f32", FLOAT32, "f", 0.5),
               ("b", BOOL, "B", 1),
               ("u64", UINT64, "Q", 2**63), ("i64", INT64, "q", -(2**40)), ("f64", FLOAT64, "d", 1e300)]
    pairs = [LLAMA, *(pair(name, kind, struct.pack("<" + code, value)) for name, kind, code, value in scalars),
             pair("short", ARRAY, array(INT32, 3, struct.pack("<3i", 1, -2, 3))),
             pair("words", ARRAY, array(STRING, 2, text("a") + text("ß"))),
             pair("tokens", ARRAY, array(STRING, 5000, b"".join(text(f"t{n}") for n in range(5000)))),
             pair("scores", ARRAY, array(FLOAT32, 5000, struct.pack("<5000f", *range(5000)))),
             pair("nested", ARRAY, array(ARRAY, 2, array(UINT8, 2, b"\1\2") + array(STRING, 1, text("x"))))]
    tensors = [tensor("one", (3,), F32, 0), tensor("two", (32, 2), Q4_0, 32), tensor("three", (256, 1, 2), Q4_K, 96),
               tensor("four", (1, 2, 3, 4), F16, 384)]
    return file(tuple(pairs), tuple(tensors), bytes(range(256)) + bytes(range(192)))
