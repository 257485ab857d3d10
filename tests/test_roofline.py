"""Where a token's time goes: bytes and operations by hand, the same by every way to run a model, and nothing left behind."""

import math
from types import SimpleNamespace

import pytest
import runtime_models
import torch

from llmlab import LabError, formats, roofline
from llmlab.gguf import read_gguf
from llmlab.kernels.int4 import Int4
from llmlab.loading import load
from llmlab.roofline import Ceilings, Op, Profile
from llmlab.runtime import compiled
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.generating import Memory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    def made(name: str):
        path = tmp_path_factory.getbasetemp() / f"roofline-{name}.gguf"
        if not path.exists():
            runtime_models.make(name, path)
        return path
    return made


@pytest.fixture
def uncompiled(monkeypatch):
    """Packages that are the functions themselves: what is compiled is another test's question."""
    monkeypatch.setattr(compiled, "package", lambda function, *_: lambda *tensors: function(*tensors))


def opened(path, way: str, **more):
    if way == "eager":
        return Memory(load(path, device="cpu", dtype="float32", **more)[0])
    return Decoder.open(path, dtype=torch.float32, compile=way == "compiled", **more)


def ops(reader, context=20, tokens=1) -> dict[str, Op]:
    return {op.name: op for op in roofline.profile(reader, context, tokens).ops}


def test_bytes_and_operations_are_those_of_the_file(tiny):
    file = read_gguf(tiny("llama"))
    found = ops(opened(file, "lean", strategy="compact"))
    inside = [t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2]
    for name, parts in {"qkv": ("attn_q.", "attn_k.", "attn_v."), "out": ("attn_output.",),
                        "gate, up": ("ffn_gate.", "ffn_up."), "down": ("ffn_down.",)}.items():
        here = [t for t in inside if any(part in t.name for part in parts)]
        assert (found[name].bytes, found[name].flops) == (sum(t.bytes for t in here), 2 * sum(t.elements for t in here)), name
    output, embedding = file.tensors["output.weight"], file.tensors["token_embd.weight"]
    assert (found["output"].bytes, found["output"].flops) == (output.bytes, 2 * output.elements)
    assert found["embedding"].bytes * embedding.shape[1] == embedding.bytes
    # 2 layers, 2 KV heads of 64, 4 heads; 21 cells in float32; scores and sums
    assert found["attention"].bytes == 2 * 2 * 2 * 64 * 21 * 4 and found["attention"].flops == 2 * 2 * 2 * 4 * 64 * 21
    assert all(op.seconds > 0 for op in found.values()) and found["small operations"].bytes == 0


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi3", "mixtral", "gpt-oss", "qwen2moe", "starcoder2"])
def test_every_way_reads_and_multiplies_the_same(tiny, name):
    lean, eager = ({op.name: (op.bytes, op.flops) for op in ops(opened(tiny(name), way, strategy="compact")).values()}
                   for way in ("lean", "eager"))
    inner = [tuple(map(sum, zip(*(held.pop(part, (0, 0)) for part in ("gate, up", "down", "experts")), strict=True)))
             for held in (lean, eager)]
    assert lean == eager and inner[0] == inner[1] and all(inner[0])


def test_a_window_bounds_what_attention_reads(tiny):
    short, long = (ops(opened(tiny("gemma2"), "lean", strategy="compact"), context)["attention"].bytes for context in (20, 40))
    each = 2 * 2 * 64 * 4       # keys and values, 2 KV heads
    assert short == each * (2 * 8 + 2 * 21) and long == each * (2 * 8 + 2 * 41)     # every second layer looks at 8 tokens


def test_packed_keys_and_values_are_read_in_their_own_bytes(tiny):
    plain, packed = (ops(opened(tiny("gemma2"), "lean", strategy="compact", kv=kv), 40)["attention"]
                     for kv in (None, ("q8_0", "q4_0")))
    assert packed.bytes * 4 * 2 * 32 == plain.bytes * (34 + 18) and packed.flops == plain.flops


def test_a_compiled_layer_is_one_operation(tiny, uncompiled):
    reader = opened(tiny("llama"), "compiled", strategy="auto")
    assert reader.compiled, reader.why
    before = reader.compiled._steps, reader.compiled._logits
    found = ops(reader)
    assert (reader.compiled._steps, reader.compiled._logits) == before
    layers, lean = reader.compiled.layers, ops(opened(tiny("llama"), "lean", strategy="compact"))
    held = sum(t.nbytes for layer in layers for value in layer.values() for t in getattr(value, "tensors", (value,))
               if isinstance(t, torch.Tensor))
    assert set(found) == {"embedding", "layers", "output", "small operations"} and found["layers"].calls == 2
    assert found["layers"].bytes == held + lean["attention"].bytes
    assert found["layers"].flops == sum(lean[name].flops for name in ("qkv", "attention", "out", "gate, up", "down"))
    assert found["output"].flops == lean["output"].flops


def test_kinds_of_compiled_layers_are_told_apart(tiny, uncompiled):
    found = ops(opened(tiny("gemma2"), "compiled", strategy="auto"))
    assert [found[name].calls for name in ("layers 1", "layers 2")] == [2, 2]


def test_nibbles_are_counted_as_often_as_they_are_gone_over():
    for name, planes, halves in (("Q4_0", 1, 1), ("Q8_0", 2, 1), ("Q6_K", 2, 2)):
        known = formats.FORMATS[name]
        kernel = Int4(torch.zeros(32, 256 // known.block * known.block_bytes, dtype=torch.uint8), name, 256, torch.bfloat16)
        scales = 2 * 2 * 32 * (256 // 32) * planes * halves     # of two bytes, and zeros as large
        assert roofline.read_by(SimpleNamespace(kernels=(kernel,))) == 32 * 256 // 2 * planes * halves + scales, name


@pytest.mark.parametrize("way", ["lean", "eager"])
def test_nothing_is_left_behind(tiny, way):
    reader = opened(tiny("llama"), way, strategy="compact")
    text = [3, 5, 7]
    before = reader.read(text)
    multiply = getattr(reader, "multiply", None)
    ops(reader)
    assert reader.tokens == [] and torch.equal(reader.read(text), before) and getattr(reader, "multiply", None) is multiply
    if way == "eager":
        assert not any(m._forward_hooks for m in reader.model.modules() if not m._modules)


def test_a_profile_takes_turns_and_can_be_stopped(tiny):
    readers = {way: opened(tiny("llama"), way, strategy="compact") for way in ("lean", "eager")}
    order = []
    for way, reader in readers.items():
        def read(tokens, way=way, usual=reader.read):
            order.append((way, len(tokens)))
            return usual(tokens)
        reader.read = read
    found = roofline.profiles(readers, 4, tokens=2)
    assert list(found) == ["lean", "eager"] and all(one.context == 4 for one in found.values())
    first, later = [(way, n) for way in readers for n in (4, 1, 1)], [(way, 1) for way in readers for _ in range(2)]
    assert order == first + 2 * later
    assert roofline.profiles(readers, 4, stopped=lambda: True) is None
    order.clear()
    roofline.profiles(readers, 4, tokens=50, seconds=0)
    assert order.count(("lean", 1)) == 2 * (1 + 3)        # three rounds at least, and one that does not count


@pytest.mark.parametrize("context", [1, 0, -3, 2.5, True, "64", 512, 10**9])
def test_a_context_that_cannot_be_is_refused_in_a_line(tiny, context):
    reader = opened(tiny("llama"), "lean", strategy="compact")
    with pytest.raises(LabError, match="^context is .{1,120}$"):
        roofline.profile(reader, context)


def test_the_roofline_is_the_larger_of_two_floors():
    limits = Ceilings(bandwidth=10e9, flops=40e9, how="")
    few, many = Op("a", 1, bytes=100, flops=200, seconds=1.0), Op("b", 1, bytes=100, flops=2000, seconds=1.0)
    assert math.isclose(limits.floor(few), 10e-9) and math.isclose(limits.floor(many), 50e-9)
    found = Profile((few, many, Op("small operations", 3, 0, 0, 1.0)), seconds=120e-9, context=8, why="")
    assert math.isclose(found.fraction(limits), 0.5) and found.bytes == 200 and math.isclose(found.rate, 1 / 120e-9)


def test_what_the_machine_allows_is_measured():
    limits = roofline.ceilings()
    assert limits.bandwidth > 1e8 and limits.flops > 1e8
    assert limits.how.endswith(("float32", "bfloat16")) and "MiB read by" in limits.how
