"""Every format that says how its blocks come apart: bit for bit gguf-py's numbers, whatever the bytes. One file is enough."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from llmlab import formats
from llmlab.errors import LabError, UnknownName
from llmlab.formats import FORMATS, bnb, dequantizing, mixes
from llmlab.formats.plain import STORED

torch = pytest.importorskip("torch")
quants = pytest.importorskip("gguf.quants")
from gguf.constants import GGMLQuantizationType  # noqa: E402

TOP = Path(__file__).resolve().parent.parent
ABLE = sorted(name for name, known in FORMATS.items() if known.unpack is not None)
BLOCKY = sorted(name for name, known in FORMATS.items() if known.block > 1)
THEIRS = sorted({*ABLE, "F32", "F16", "BF16"} & set(GGMLQuantizationType.__members__) - {"Q1_0", "Q2_0"})


def random_bytes(name: str, rows: int = 24, weights: int = 2048, seed: int = 0) -> np.ndarray:
    """Any bytes at all, as blocks: not-a-numbers, infinities, subnormal scales and codes no quantizer would choose."""
    known = FORMATS[name]
    data = np.random.default_rng(seed).integers(0, 256, (rows, weights // known.block * known.block_bytes), dtype=np.uint8)
    data[0] = 0
    data[1] = 255
    return data


def theirs(data: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(data, GGMLQuantizationType[name])


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


@pytest.mark.parametrize("name", THEIRS)
def test_random_bytes_are_gguf_pys_to_the_last_bit(name):
    for seed in range(3):
        data = random_bytes(name, seed=seed)
        assert same_bits(formats.dequantize(data, name), theirs(data, name))


@pytest.mark.parametrize("name", THEIRS)
def test_quantized_weights_are_gguf_pys_to_the_last_bit(name):
    weights = np.random.default_rng(1).normal(0, 0.02, (40, 1024)).astype(np.float32)
    try:
        data = quants.quantize(weights, GGMLQuantizationType[name]).view(np.uint8)
    except NotImplementedError:     # gguf-py reads these and cannot make them: small scales at random instead
        data = random_bytes(name, 40, 1024)
    out = formats.dequantize(data, name)
    assert same_bits(out, theirs(data, name))
    if name not in ("F32", "F16", "BF16") and out.isfinite().all():
        assert out.unique().numel() > 2


@pytest.mark.parametrize("name", ABLE)
def test_chunks_threads_and_places_change_nothing(name, monkeypatch):
    """Whole, a row at a time, in small chunks, at an odd place in memory, three axes, into a buffer of one's own."""
    data = torch.from_numpy(random_bytes(name))
    whole = formats.dequantize(data, name)
    assert whole.shape == (24, 2048) and whole.dtype == torch.float32
    assert same_bits(torch.cat([formats.dequantize(row[None], name) for row in data]), whole)
    odd = torch.zeros(data.numel() + 1, dtype=torch.uint8)[1:].view(data.shape).copy_(data)
    assert same_bits(formats.dequantize(odd, name), whole)
    assert same_bits(formats.dequantize(data.view(4, 6, -1), name).view(24, -1), whole)
    assert same_bits(formats.dequantize(data[::2], name), whole[::2])
    into = torch.full_like(whole, 7)
    assert formats.dequantize(data, name, out=into) is into and same_bits(into, whole)
    monkeypatch.setattr(dequantizing, "CHUNK", 3 * FORMATS[name].block)
    assert same_bits(formats.dequantize(data, name), whole)


@pytest.mark.parametrize("name", ABLE)
def test_many_rows_are_the_same_as_few(name):
    data = np.resize(random_bytes(name), (1200, random_bytes(name).shape[1]))
    whole = formats.dequantize(data, name)
    assert same_bits(whole[:24], formats.dequantize(data[:24], name)) and same_bits(whole[-24:], whole[:24])


def test_threads_follow_the_caller_into_inference_mode(monkeypatch):
    """What is made in inference mode may not be written outside of it, and a pool's threads have a mode of their own."""
    monkeypatch.setattr(dequantizing, "SHARE", 1 << 12)
    data = torch.from_numpy(random_bytes("Q4_K"))
    whole = formats.dequantize(data, "Q4_K")
    with torch.inference_mode():
        assert same_bits(formats.dequantize(data, "Q4_K"), whole)
        assert same_bits(formats.dequantize(data.clone(), "Q4_K", torch.float32, torch.empty(whole.shape)), whole)


@pytest.mark.parametrize("name", ABLE)
def test_unpacked_parts_make_the_weights(name):
    """What kernels build on: whole-number codes, a scale and an offset for runs of neighbours, one product and one sum."""
    known = FORMATS[name]
    blocks = torch.from_numpy(random_bytes(name)).reshape(-1, known.block_bytes)
    codes, scale, offset = known.unpack(blocks)
    assert codes.shape == (len(blocks), known.block) and codes.dtype in (torch.int8, torch.float32)
    assert scale.dtype == torch.float32 and scale.shape[0] == len(blocks) and known.block % scale.shape[1] == 0
    weights = codes.float().view(len(blocks), scale.shape[1], -1) * scale[..., None]
    if offset is not None:
        assert offset.dtype == torch.float32 and offset.shape == scale.shape
        weights = offset[..., None] + weights
    assert same_bits(weights.view(24, -1), formats.dequantize(blocks.view(24, -1), name))


@pytest.mark.parametrize("name", ABLE)
def test_other_dtypes_are_float32_rounded(name):
    data = random_bytes(name)
    whole = formats.dequantize(data, name)
    for dtype in (torch.float16, torch.bfloat16):
        out = formats.dequantize(data, name, dtype=dtype)
        assert out.dtype == dtype and np.array_equal(out.view(torch.int16), whole.to(dtype).view(torch.int16))


@pytest.mark.parametrize("name", BLOCKY)
def test_fields_cover_a_block_once_and_in_order(name):
    known = FORMATS[name]
    if known.unpack is None and not known.fields:
        assert name in ("NF4", "FP4")   # no layout on disk: codes and maxima are tensors of their own
        return
    at = 0
    for part in known.fields:
        assert part.start == at < part.stop and part.name and len(part.what) > 8
        at = part.stop
    assert at == known.block_bytes


@pytest.mark.parametrize("name", ABLE)
def test_every_field_but_padding_matters(name):
    """A field that says it holds codes or scales does: another byte there makes another weight."""
    known = FORMATS[name]
    data = np.random.default_rng(5).integers(1, 100, (1, known.block_bytes), dtype=np.uint8)
    before = formats.dequantize(data, name)
    for part in known.fields:
        other = data.copy()
        other[:, part.start:part.stop] ^= 0x15
        assert not same_bits(formats.dequantize(other, name), before), part


def test_plain_numbers():
    for name, dtype in STORED.items():
        numbers = torch.arange(-6, 6).view(3, 4).to(getattr(torch, dtype))
        out = formats.dequantize(numbers.view(torch.uint8), name)
        assert out.dtype == torch.float32 and torch.equal(out, numbers.float())


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_a_mapped_file_is_read_in_place_without_a_warning(name, tmp_path):
    data = random_bytes(name)
    data.tofile(tmp_path / "blocks")
    mapped = np.memmap(tmp_path / "blocks", mode="r", shape=data.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = formats.dequantize(mapped, name)
    assert same_bits(out, formats.dequantize(data, name))
    tensor = dequantizing.as_bytes(mapped, FORMATS[name])
    assert tensor.data_ptr() == mapped.ctypes.data


@pytest.mark.parametrize(("data", "name", "error", "says"), [
    (np.zeros((2, 144), np.uint8), "Q9_Z", UnknownName, "'Q9_Z' is no block format"),
    (np.zeros((2, 144), np.uint8), None, UnknownName, "'None' is no block format"),
    (np.zeros((2, 292), np.uint8), "Q8_K", LabError, "Q8_K cannot be dequantized"),
    (np.zeros((2, 143), np.uint8), "Q4_K", LabError,
     "Q4_K: a row of 143 bytes is cut short; a block is 144 bytes for 256 weights"),
    (np.zeros((2, 7), np.uint8), "F32", LabError, "F32: a row of 7 bytes"),
    (np.zeros((2, 144), np.float32), "Q4_K", LabError, "Q4_K: blocks are bytes (uint8), not float32"),
    (torch.zeros(2, 144, dtype=torch.int8), "Q4_K", LabError, "Q4_K: blocks are bytes (uint8), not int8"),
    (b"abc", "Q4_K", LabError, "Q4_K: blocks are bytes (uint8), not bytes"),
    (torch.zeros((), dtype=torch.uint8), "Q4_0", LabError, "Q4_0: a row of 0 bytes"),
])
def test_bad_blocks_are_named(data, name, error, says):
    with pytest.raises(error) as caught:
        formats.dequantize(data, name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_buffer_that_does_not_fit_is_named():
    for out in (torch.empty(2, 255), torch.empty(2, 256, dtype=torch.float16), torch.empty(256, 2).t()):
        with pytest.raises(LabError, match=r"Q4_K: out is .* a contiguous torch.float32 \[2, 256\] is needed"):
            formats.dequantize(np.zeros((2, 144), np.uint8), "Q4_K", out=out)


def test_nothing_and_one_row():
    assert formats.dequantize(np.zeros((0, 144), np.uint8), "Q4_K").shape == (0, 256)
    assert formats.dequantize(np.zeros((3, 0), np.uint8), "Q4_K").shape == (3, 0)
    assert formats.dequantize(np.zeros(36, np.uint8), "Q4_0").shape == (64,)


CAPABILITIES = """
import sys, hashlib, torch
sys.path.insert(0, {tests!r})
from test_formats import ABLE, formats, random_bytes
print(torch.backends.cpu.get_cpu_capability())
for name in (*ABLE, "F16"):
    out = formats.dequantize(random_bytes(name, seed=9), name)
    print(name, hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    """torch has a kernel of its own for each; none may join the product and the sum into one rounding."""
    expected = [f"{name} {_digest(theirs(random_bytes(name, seed=9), name))}" for name in (*ABLE, "F16") if name in THEIRS]
    sets = ("DEFAULT", "AVX2", "AVX512")     # of x86; one that the processor lacks would end the program
    mine = torch.backends.cpu.get_cpu_capability()
    seen = set()
    for capability in sets[:sets.index(mine) + 1] if mine in sets else ("DEFAULT",):
        done = subprocess.run([sys.executable, "-c", CAPABILITIES.format(tests=str(TOP / "tests"))], capture_output=True,
                              text=True, cwd=TOP, env=os.environ | {"ATEN_CPU_CAPABILITY": capability.lower()})
        assert done.returncode == 0, done.stderr
        first, *lines = done.stdout.splitlines()
        seen.add(first)
        assert set(expected) <= set(lines), capability
    assert {"DEFAULT", mine} <= seen


def _digest(array: np.ndarray) -> str:
    import hashlib
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# -- bitsandbytes --

KINDS = [(kind, size, nested) for kind in ("nf4", "fp4") for size in (32, 64, 128, 256, 4096) for nested in (False, True)]


@pytest.mark.parametrize(("kind", "blocksize", "nested"), KINDS)
def test_four_bits_are_bitsandbytes_own(kind, blocksize, nested):
    """To the bit, but for the sign of zero: FP4 has a -0.0, and what bitsandbytes runs on AVX-512 loses it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype, bits in ((torch.float32, torch.int32), (torch.float16, torch.int16), (torch.bfloat16, torch.int16)):
        for shape in ((96, 1024), (130, 70), (1024,), (5, 2)):     # the second and the last end in half a run
            weights = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
            packed, state = functional.quantize_4bit(weights, blocksize=blocksize, quant_type=kind, compress_statistics=nested)
            inner = bnb.Nested(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize) if nested else None
            out = bnb.dequantize_4bit(packed, state.absmax, kind, shape, blocksize, inner, dtype)
            theirs = functional.dequantize_4bit(packed, state).view(shape)
            assert torch.equal((out + 0.0).view(bits), (theirs + 0.0).view(bits)), (dtype, shape)       # -0.0 + 0.0 is 0.0


def test_four_bits_of_an_odd_width():
    """Equal as numbers: bitsandbytes' way for odd widths has no -0.0 in FP4, its way for even ones has."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(torch.linspace(-1, 1, 195).view(3, 65), quant_type=kind)
        out = bnb.dequantize_4bit(packed, state.absmax, kind, (3, 65))
        assert torch.equal(out, functional.dequantize_4bit(packed, state))


def test_more_than_one_chunk(monkeypatch):
    packed, maxima = torch.randint(0, 256, (640,), dtype=torch.uint8), torch.rand(20)
    whole = bnb.dequantize_4bit(packed, maxima, "nf4", (10, 128))
    monkeypatch.setattr(bnb, "CHUNK", 128)
    assert torch.equal(bnb.dequantize_4bit(packed, maxima, "nf4", (10, 128)), whole)
    assert torch.equal(bnb.dequantize_4bit(packed[:33], maxima[:13], "nf4", (65,), 5),
                       bnb.dequantize_4bit(packed[:33], maxima[:13].repeat_interleave(5)[:65], "nf4", (65,), 1))


def test_eight_bits_are_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, maxima, _ = functional.int8_vectorwise_quant(torch.randn(65, 130).half())
    out = bnb.dequantize_int8(codes, maxima)
    assert torch.equal(out.view(torch.int32), functional.int8_vectorwise_dequant(codes, maxima).view(torch.int32))
    assert bnb.dequantize_int8(codes, maxima, torch.float16).dtype == torch.float16


def packed_bytes(count: int):
    return torch.zeros(count, dtype=torch.uint8)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: bnb.dequantize_4bit(packed_bytes(32), torch.ones(1), "af4", (64,)), "'af4' is no four-bit kind"),
    (lambda: bnb.dequantize_4bit(packed_bytes(31), torch.ones(1), "nf4", (64,)), "needs 32 bytes and 1 maxima, not 31"),
    (lambda: bnb.dequantize_4bit(packed_bytes(64), torch.ones(1), "nf4", (2, 64)), "and 2 maxima, not 64 and 1"),
    (lambda: bnb.dequantize_4bit(packed_bytes(32), torch.ones(1), "nf4", (64,), 0), "a run of 0 weights"),
    (lambda: bnb.dequantize_4bit(packed_bytes(32), packed_bytes(1), "nf4", (64,),
                                 nested=bnb.Nested(torch.ones(2), torch.zeros(256), 0.0)), "need 1 maxima and a table of 256"),
    (lambda: bnb.dequantize_int8(torch.zeros(2, 3), torch.ones(2)), "not torch.float32 [2, 3]"),
    (lambda: bnb.dequantize_int8(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3)), "and 3 maxima"),
])
def test_bad_bitsandbytes_tensors_are_named(call, says):
    with pytest.raises(LabError, match=".") as caught:
        call()
    assert says in str(caught.value)


# -- a new format is one file --

TOY = '''
"""Three levels in a byte: scale and code of four weights."""
from .bits import halves
from .registry import Field, Unpacked, register

def unpack(blocks):
    import torch
    codes = (blocks[:, 2:] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3
    return Unpacked(codes.view(torch.int8) - 1, halves(blocks[:, :2]))

TOY = register("TOY", None, 4, 3, "toy", unpack, (Field("scale", 0, 2, "float16: multiplies the codes"),
                                                  Field("codes", 2, 3, "2 bits a weight, less 1")))
'''
ASK = """
import numpy, llmlab
from llmlab import formats
spec = llmlab.model("tinyllama-1.1b")
print(llmlab.size(spec, "toy").tensor_bytes, llmlab.size(spec, "f16").tensor_bytes)
print(formats.dequantize(numpy.array([[0, 60, 0b11100100]], numpy.uint8), "TOY").tolist())
"""


def test_a_new_format_is_one_file(tmp_path):
    """The package with one more file in it: sizes, numbers and this file's own tests know the format."""
    for folder in ("llmlab", "data"):
        shutil.copytree(TOP / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    (tmp_path / "llmlab" / "formats" / "toy.py").write_text(TOY)
    (tmp_path / "tests").mkdir()
    shutil.copy(__file__, tmp_path / "tests" / "test_formats.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert asked.returncode == 0, asked.stderr
    sizes, numbers = asked.stdout.splitlines()
    toy, half = map(int, sizes.split())
    assert 0.35 < toy / half < 0.45     # 6 bits against 16, and an output matrix that is kept better
    assert numbers == "[[-1.0, 0.0, 1.0, 2.0]]"

    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "TOY",
                           "tests/test_formats.py"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("name", ABLE)
def test_every_format_has_a_size(name):
    assert mixes.find_mix(name.lower()).default in FORMATS
