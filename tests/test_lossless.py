"""The lossless codec: every bit pattern comes back, near the entropy, whole or not at all; the entropies against theory."""

import json
import struct
from math import log2

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmlab import formats, gguf, lossless
from llmlab.errors import BadFile, LabError
from llmlab.lossless import coding, rans, storing

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def normal(count, sigma=0.02, seed=0, dtype=torch.bfloat16):
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * sigma).to(dtype)


def bits_of(tensor):
    return tensor.reshape(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


# ---- the coder ----------------------------------------------------------------------------------------------

def shannon(symbols):
    shares = np.bincount(symbols) / len(symbols)
    return -sum(p * log2(p) for p in shares if p)


@pytest.mark.parametrize("count", [1, 2, 5, 2047, 2048, 2049, 12345, 300_001])
@pytest.mark.parametrize("kind", ["one", "two", "few", "normal", "skewed", "even"])
def test_symbols_come_back(kind, count):
    rng = np.random.default_rng(count)
    symbols = {"one": np.full(count, 200), "two": rng.integers(7, 9, count), "few": rng.integers(0, 7, count),
               "normal": 120 - np.minimum(rng.geometric(0.4, count), 100), "skewed": (rng.random(count) < 1e-3) * 255,
               "even": rng.integers(0, 256, count)}[kind].astype(np.uint8)
    coded = rans.encode(symbols)
    assert np.array_equal(rans.decode(memoryview(coded), count), symbols)
    if count > 100_000 and kind != "even":      # a percent of a weight's bits, with its sign and mantissa
        assert shannon(symbols) <= 8 * len(coded) / count < shannon(symbols) + 0.01 * (8 + shannon(symbols))


@pytest.mark.parametrize("values", range(2, 30))
def test_every_number_of_values_has_shares_that_add_up(values):
    counts = np.sort(np.random.default_rng(values).integers(1, 10 ** 6, values))[::-1] // np.arange(1, values + 1) ** 3 + 1
    chosen, shares = rans._chosen(np.arange(values), counts)
    slots, starts = rans._slots(tuple(shares))
    assert shares.sum() == rans.SHARES and slots.sum() == 1 << rans.BITS and slots.min() >= 1
    assert len(chosen) == len(shares) <= rans.KEPT and np.array_equal(np.cumsum(slots) - slots, starts)


def test_passes_without_end_are_refused():
    head = rans._HEAD.pack(rans._CODED, 2, 1, 4, 0) + bytes([1, 2]) + np.array([4095, 1], "<u2").tobytes()
    state = np.array([rans.LOW], "<u4").tobytes()
    with pytest.raises(BadFile):
        rans.decode(memoryview((head + state) * 5000), 4)


# ---- tensors ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_pattern_comes_back(dtype):
    patterns = torch.arange(-1 << 15, 1 << 15, dtype=torch.int32)
    words = patterns.to(torch.int16)
    if dtype is torch.float32:      # every upper half, with nothing and with something in the lower
        words = torch.cat([patterns << 16, patterns << 16 | (patterns * 40503 & 0xFFFF)])
    tensor = words.view(dtype)
    assert tensor.isnan().any() and tensor.isinf().any() and (tensor == 0).sum() >= 2
    assert same(lossless.decode(lossless.encode(tensor)), tensor)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 100), (4096, 33)])
def test_shapes_come_back(dtype, shape):
    tensor = normal(shape or (1,), dtype=dtype).reshape(shape)
    coded = lossless.encode(tensor)
    assert coded.shape == shape and same(lossless.decode(coded), tensor) and same(lossless.decode(coded.data.tobytes()), tensor)


def test_what_does_not_lie_in_one_piece_is_coded_too():
    tensor = normal((64, 512)).T
    assert same(lossless.decode(lossless.encode(tensor)), tensor.contiguous())


@pytest.mark.parametrize("threads", [1, 3])
def test_segments_are_put_together(monkeypatch, threads):
    monkeypatch.setattr(coding, "SEGMENT", 10_000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensor = normal(45_678)
        assert same(lossless.decode(lossless.encode(tensor)), tensor)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "plain"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_the_code_is_within_a_percent_of_the_entropy(dtype, plain):
    tensor = normal(1 << 20, dtype=dtype)
    found, coded = lossless.entropy(tensor), lossless.encode(tensor)
    assert found.bits == found.exponent + plain
    assert found.bits <= coded.bits < 1.01 * found.bits
    assert coded.ratio == pytest.approx(coded.bits / (8 * tensor.element_size()))


# ---- damage -------------------------------------------------------------------------------------------------

def test_damage_and_cuts_are_found():
    data = lossless.encode(normal(20_000)).data
    for at in range(0, len(data), 997):
        broken = data.copy()
        broken[at] ^= 0x10
        with pytest.raises(BadFile, match="damaged|no weights"):
            lossless.decode(broken)
    for length in (0, 5, 30, 200, len(data) - 1):
        with pytest.raises(BadFile):
            lossless.decode(data[:length])
    with pytest.raises(BadFile):
        lossless.decode(np.concatenate([data, data[:1]]))


def test_damage_behind_a_right_checksum_is_found_or_harmless():
    """Bytes that somebody made: one clear error, or numbers of the right shape; never another exception."""
    data = lossless.encode(normal(20_000)).data
    head = bytes(data[len(coding._MAGIC):]).partition(b"\n")[0]
    body = bytes(data[len(coding._MAGIC) + len(head) + 1:])
    found = 0
    for at in [*range(120), *range(120, len(body), 401)]:
        broken = bytearray(body)
        broken[at] ^= 0x81
        told = json.loads(head) | {"crc32": coding.zlib.crc32(broken)}
        try:
            back = lossless.decode(coding._MAGIC + json.dumps(told).encode() + b"\n" + bytes(broken))
            assert back.shape == (20_000,)
        except BadFile:
            found += 1
    assert found > 60


@pytest.mark.parametrize("head", [b"{}", b"[]", b"null", b'{"type": "BF16", "shape": [-1], "crc32": 0}',
                                  b'{"type": "BF16", "shape": [1000000000000000], "crc32": 0}',
                                  b'{"type": "BF16", "shape": "ab", "crc32": 0}',
                                  b'{"type": "Q4_0", "shape": [1], "crc32": 0}'])
def test_a_head_that_nobody_wrote(head):
    with pytest.raises(BadFile):
        lossless.decode(coding._MAGIC + head + b"\n")


@pytest.mark.parametrize(("call", "says"), [
    (lambda: lossless.encode(torch.arange(5)), "torch.int64 has no exponent"),
    (lambda: lossless.encode([1.0]), "list has no exponent"),
    (lambda: lossless.decode(torch.zeros(4)), "are bytes, not Tensor"),
    (lambda: lossless.entropy(torch.zeros(0)), "with weights in it"),
    (lambda: lossless.entropy(torch.zeros(3, dtype=torch.int8)), "torch.int8"),
    (lambda: lossless.measure({"a": torch.ones(2)}, "Q8_0"), "give one of BF16, F16, F32"),
    (lambda: lossless.measure({"a": torch.arange(2)}), "no floats to measure"),
    (lambda: lossless.measure("no-such-model"), "no file and no model"),
    (lambda: lossless.of_gaussian(0), "above 0"),
])
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(LabError, match=says) as raised:
        call()
    assert "\n" not in str(raised.value)


# ---- entropies ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("type", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("sigma", [0.0123, 0.02, 1.0, 1.4])
def test_gaussian_weights_hold_what_theory_says(type, sigma):
    """The closed form against a sample's: a plug-in estimate of N symbols is low by about 25 / (2 N ln 2) bits."""
    count = 1 << 21
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[type]
    found = lossless.entropy(normal(count, sigma, dtype=dtype))
    assert found.exponent == pytest.approx(lossless.of_gaussian(sigma, type), abs=0.004)
    assert found.sign == pytest.approx(1, abs=1e-5)


def test_a_gaussians_exponent_depends_on_sigma_through_its_place_between_powers_of_two():
    assert lossless.of_gaussian(0.02) == pytest.approx(lossless.of_gaussian(0.04), abs=1e-12)
    found = [lossless.of_gaussian(2 ** (i / 20)) for i in range(20)]
    assert 2.53 < min(found) < max(found) < 2.56
    by_hand = [0.6826895 - 0.3829249, 0.9544997 - 0.6826895, 0.3829249 - 0.1974127, 0.1974127 - 0.0994764]  # tables of erf
    assert lossless.of_gaussian(1.0, "F32") > -sum(p * log2(p) for p in by_hand) + 0.5


def test_fields_by_hand():
    """-1.0, 1.0, 1.5, 2.0: signs 1 of 4, exponents 3 and 1, mantissas 3 and 1."""
    found = lossless.entropy(torch.tensor([-1.0, 1.0, 1.5, 2.0], dtype=torch.bfloat16))
    quarter = 0.25 * 2 + 0.75 * log2(4 / 3)
    assert (found.sign, found.exponent, found.mantissa) == pytest.approx((quarter, quarter, quarter))
    assert found.bits == pytest.approx(8 + quarter) and found.stored == 16
    assert found.all_bits == pytest.approx(3 * quarter)


def test_a_model_is_measured_by_tensor_and_whole(tmp_path):
    tensors = {"a": normal((100, 40)), "b": torch.ones(1000, dtype=torch.bfloat16), "ids": torch.arange(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    for model in (tensors, tmp_path / "model.safetensors", tmp_path):
        found = lossless.measure(model)
        assert [one.name for one in found.tensors] == ["a", "b"] and found.left_out == 1
        a, b = found.tensors
        assert b.exponent == 0 and a.exponent == lossless.entropy(tensors["a"]).exponent
        assert found.total.exponent == pytest.approx(a.exponent * 0.8)
        assert found.bytes == round((a.bits * 4000 + b.bits * 1000) / 8) and found.stored_bytes == 10_000
        assert "5,000 weights in BF16" in repr(found) and len(found.table()) == 3
    as_half = lossless.measure(tensors, "F16")
    assert as_half.total.source == "BF16" and as_half.tensors[0].type == "F16"


def test_a_ggufs_floats_are_measured_and_its_blocks_only_when_asked(tmp_path):
    rng, plain = np.random.default_rng(0), normal((8, 64))
    blocks = rng.integers(0, 60, (8, 36), dtype=np.uint8)
    gguf.write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, [
        ("plain", (64, 8), "BF16", bits_of(plain).numpy()), ("packed", (64, 8), "Q4_0", blocks)])
    found = lossless.measure(tmp_path / "m.gguf")
    assert [one.name for one in found.tensors] == ["plain"] and found.left_out == 1
    assert found.tensors[0].exponent == lossless.entropy(plain).exponent
    both = lossless.measure(tmp_path / "m.gguf", dequantized=True)
    packed = next(one for one in both.tensors if one.name == "packed")
    numbers = formats.dequantize(blocks, "Q4_0").bfloat16()
    assert packed.source == "Q4_0" and packed.exponent == lossless.entropy(numbers).exponent
    assert "of Q4_0" in repr(both.table())


# ---- files --------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    for shard in range(2):
        save_file({f"{shard}.w": normal((300, 200), seed=shard), f"{shard}.half": normal((200, 200), dtype=torch.float16),
                   f"{shard}.full": normal(30_000, dtype=torch.float32), f"{shard}.norm": normal(200), f"{shard}.none":
                   torch.zeros(0, 3), f"{shard}.mask": torch.ones(5, dtype=torch.bool), f"{shard}.one": torch.tensor(3)},
                  place / f"model-{shard}.safetensors", metadata={"format": "pt", "said": "ü"})
    (place / "config.json").write_text("{}")
    return place


def files_of(place):
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_a_folder_comes_back_to_the_byte(folder, tmp_path):
    saved = lossless.save(folder, tmp_path / "coded", progress=False)
    assert saved.coded == 6 and saved.tensors == 14 and saved.ratio < 0.85
    assert saved.bytes == sum(path.stat().st_size for path in (tmp_path / "coded").glob("*.safetensors"))
    lossless.restore(tmp_path / "coded", tmp_path / "back", progress=False)
    assert files_of(tmp_path / "back") == files_of(folder)
    read, original = dict(lossless.read(tmp_path / "coded")), {}
    for path in folder.glob("*.safetensors"):
        original |= load_file(path)
    assert read.keys() == original.keys()
    for name, tensor in original.items():
        assert tensor.dtype == read[name].dtype and tensor.numpy(force=True).tobytes() == read[name].numpy().tobytes() if (
            tensor.dtype is not torch.bfloat16) else same(read[name], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "coded", "model"]


def test_a_coded_file_is_plain_safetensors(folder, tmp_path):
    lossless.save(folder / "model-0.safetensors", tmp_path / "c.safetensors", progress=False)
    tensors = load_file(tmp_path / "c.safetensors")
    assert tensors["0.w"].dtype == torch.uint8 and same(lossless.decode(tensors["0.w"]), normal((300, 200), seed=0))
    assert tensors["0.norm"].dtype == torch.bfloat16


@pytest.mark.parametrize("at", [0.02, 0.3, 0.6, 0.9])
def test_a_damaged_file_gives_one_error_and_no_file(folder, tmp_path, at):
    coded = tmp_path / "c.safetensors"
    lossless.save(folder / "model-0.safetensors", coded, progress=False)
    data = bytearray(coded.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    coded.write_bytes(data)
    with pytest.raises(BadFile) as raised:
        lossless.restore(coded, tmp_path / "back.safetensors", progress=False)
    assert "\n" not in str(raised.value) and sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors", "model"]


def test_what_cannot_be_saved_or_restored(folder, tmp_path, monkeypatch):
    source, coded = folder / "model-0.safetensors", tmp_path / "c.safetensors"
    lossless.save(source, coded, progress=False)
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    for call, says in ((lambda: lossless.save(coded, tmp_path / "x.safetensors"), "coded already"),
                       (lambda: lossless.restore(source, tmp_path / "x.safetensors"), "is not coded"),
                       (lambda: list(lossless.read(source)), "is not coded"),
                       (lambda: lossless.save(tmp_path / "cut.safetensors", tmp_path / "x.safetensors"), "no whole"),
                       (lambda: lossless.save(tmp_path / "none.safetensors", tmp_path / "x.safetensors"), "no .safetensors"),
                       (lambda: lossless.save(tmp_path / "empty", tmp_path / "x"), "holds no .safetensors"),
                       (lambda: lossless.save(folder, tmp_path / "empty"), "there already"),
                       (lambda: lossless.save(source, tmp_path / "no" / "x.safetensors"), "is not a folder")):
        with pytest.raises(LabError, match=says):
            call()
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(LabError, match="1000 B free"):
        lossless.save(source, tmp_path / "x.safetensors", progress=False)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "x.safetensors").exists()


def test_a_failure_half_way_leaves_nothing_and_the_old_file(folder, tmp_path, monkeypatch):
    target, calls = tmp_path / "c.safetensors", []
    target.write_bytes(b"old")

    def failing(tensor):
        calls.append(tensor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return lossless.encode(tensor)

    monkeypatch.setattr(storing, "encode", failing)
    with pytest.raises(LabError, match="No space left"):
        lossless.save(folder / "model-0.safetensors", target, progress=False)
    assert target.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors", "model"]


def test_headers_that_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    for data in (b"", b"abc", struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}'):
        path.write_bytes(data)
        with pytest.raises(BadFile):
            lossless.save(path, tmp_path / "y.safetensors", progress=False)
