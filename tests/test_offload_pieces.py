import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_files import KINDS, matches, write

from llmlab.gguf import read_gguf, write_gguf
from llmlab.gguf.layout import tensor_bytes
from llmlab.offload.pieces import GAP, HEAD, PAGE, pieces_of


def read(file, piece) -> bytes:
    """A piece by plain reads of its extents."""
    raw = bytearray(piece.bytes)
    for extent in piece.extents:
        with open(file.paths[extent.file], "rb") as source:
            source.seek(extent.offset)
            raw[extent.at:extent.at + extent.bytes] = source.read(extent.bytes)
    assert len(raw) == piece.bytes
    return bytes(raw)


def check(file) -> None:
    """What holds for the pieces of any file."""
    for name, piece in pieces_of(file).items():
        assert piece.name == name and matches(file, piece, read(file, piece))
        assert piece.bytes % PAGE == 0 and piece.payload == sum(t.bytes for t in piece.tensors) <= piece.bytes
        at = 0
        for extent in piece.extents:
            size = file.sources[extent.file].size
            assert extent.at == at and extent.offset % PAGE == 0 and 0 < extent.bytes <= size - extent.offset
            assert extent.bytes % PAGE == 0 or extent.offset + extent.bytes == size
            at += -(-extent.bytes // PAGE) * PAGE
        assert at == piece.bytes
        ends = sorted((tensor.offset, tensor.offset + tensor.bytes) for tensor in piece.tensors)
        assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_a_layer_is_in_one_piece_and_its_bytes_are_there(tmp_path, kind):
    file = write(tmp_path, kind)
    check(file)
    found = [(tensor.name, piece.expert) for name, piece in pieces_of(file).items() if name != HEAD for tensor in piece.tensors]
    want = []
    for name, tensor in file.tensors.items():
        if name.startswith("blk.") and name.endswith(".weight") and len(tensor.shape) > 1 and "gate_inp" not in name:
            want += [(name, expert) for expert in range(5)] if "_exps" in name else [(name, None)]
    assert sorted(found, key=str) == sorted(want, key=str)
    head = pieces_of(file)[HEAD].tensors
    assert [tensor.name for tensor in head] == ["token_embd.weight" if kind == "tied" else "output.weight"]


def test_pieces_come_in_the_order_of_a_pass(tmp_path):
    file = write(tmp_path, "experts", layers=11)
    names = list(pieces_of(file))
    assert names[:7] == ["blk.0", *(f"blk.0.expert.{i}" for i in range(5)), "blk.1"]
    assert names[-7:] == ["blk.10", *(f"blk.10.expert.{i}" for i in range(5)), "head"]
    pieces = pieces_of(file)
    assert (pieces["blk.10.expert.3"].layer, pieces["blk.10.expert.3"].expert) == (10, 3)
    assert (pieces["blk.10"].layer, pieces["blk.10"].expert, pieces["head"].layer) == (10, None, None)
    down = next(t for t in pieces["blk.0.expert.2"].tensors if "down" in t.name)
    assert down.shape == (256, 320) and down.type == "Q8_0" and down.bytes == 256 * 320 // 32 * 34


def test_what_lies_between_is_read_along_if_it_is_little(tmp_path):
    def between(rows: int):
        tensors = [("token_embd.weight", (256, 32), "F16", bytes(256 * 32 * 2)),
                   ("blk.0.attn_q.weight", (256, 256), "F16", np.ones(256 * 256, np.float16).tobytes()),
                   ("blk.1.attn_q.weight", (256, rows), "F16", bytes(256 * rows * 2)),
                   ("blk.0.attn_k.weight", (256, 64), "F16", np.full(256 * 64, 2, np.float16).tobytes())]
        write_gguf(tmp_path / f"{rows}.gguf", {"general.architecture": "llama"}, tensors)
        file = read_gguf(tmp_path / f"{rows}.gguf")
        check(file)
        return pieces_of(file)["blk.0"]

    few, many = GAP // 512 - 16, GAP // 512 + 16
    assert len(between(few).extents) == 1 and len(between(many).extents) == 2
    assert between(few).bytes > between(many).bytes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["attn_q", "ffn_up_exps", "attn_norm", "ffn_down"]),
                          st.integers(1, 90), st.sampled_from(["Q4_0", "Q6_K", "F32"])), min_size=1, max_size=12,
                unique_by=lambda each: each[:2]), st.sampled_from([32, 4096, 65536]))
def test_any_order_size_and_alignment(tmp_path_factory, drawn, alignment):
    tensors = [("token_embd.weight", (256, 3), "Q6_K")]
    for layer, part, rows, type in drawn:
        shape = {"attn_norm": (256,), "ffn_up_exps": (256, rows, 3)}.get(part, (256, rows))
        tensors.append((f"blk.{layer}.{part}.weight", shape, type))
    rng, path = np.random.default_rng(len(drawn)), tmp_path_factory.mktemp("any") / "any.gguf"
    entries = [(name, shape, type, rng.bytes(tensor_bytes(shape, type))) for name, shape, type in tensors]
    write_gguf(path, {"general.architecture": "llama"}, entries, alignment=alignment)
    file = read_gguf(path)
    check(file)
    assert HEAD in pieces_of(file)
