"""A block taken apart: every byte shown, and numbers that make the weights again."""

import numpy as np
import pytest

from llmlab.errors import LabError, UnknownName
from llmlab.formats import FORMATS, dequantize
from llmlab.formats.looking import take_apart

torch = pytest.importorskip("torch")
ABLE = [name for name, known in FORMATS.items() if known.unpack is not None]


@pytest.mark.parametrize("name", ABLE)
def test_every_byte_is_shown_and_the_parts_make_the_weights(name):
    block = np.random.default_rng(6).integers(0, 120, FORMATS[name].block_bytes, dtype=np.uint8)
    parts = take_apart(block, name)
    assert bytes.fromhex(" ".join(part.bytes for part in parts)) == bytes(block)
    assert parts == take_apart(bytes(block), name) == take_apart(torch.from_numpy(block)[None], name)
    made = {part.name: part.values[part.name] for part in parts if not part.bytes}
    runs = FORMATS[name].block // len(made["scales"])
    weights = np.float32(made["codes"]) * np.repeat(np.float32(made["scales"]), runs)
    if "offsets" in made:
        weights = weights + np.repeat(np.float32(made["offsets"]), runs)
    assert np.array_equal(weights, np.float32(made["weights"]))
    assert np.array_equal(weights, dequantize(block, name))


@pytest.mark.parametrize("name", ABLE)
def test_every_field_is_read(name):
    for part in take_apart(bytes(range(FORMATS[name].block_bytes)), name):
        assert part.values and all(part.values.values()), part


def test_what_is_packed_together_is_shown_apart():
    block = bytearray(74)
    block[0:2] = np.float16(2).tobytes()
    block[2:4] = (300 | 5 << 9).to_bytes(2, "little")       # the first 8 weights: point 300, minus at 0 and 2
    block[66] = 0x73                                        # 3 for the first 16 weights, 7 for the next
    scale, codes, scales, *made = take_apart(bytes(block), "IQ2_XS")
    assert scale.values == {"scale": (2.0,)} and scale.bytes == "00 40"
    assert codes.values["grid index"][:2] == (300, 0) and codes.values["signs"][:2] == (5, 0)
    assert scales.values["block scales"][:3] == (3, 7, 0)
    weights = made[-1].values["weights"]
    assert [w < 0 for w in weights[:8]] == [True, False, True] + [False] * 5
    assert {abs(w) for w in weights[:8]} <= {2 * 7 / 8 * level for level in (8, 25, 43)}


def test_one_and_a_quarter_bits_hide_their_scale_in_four_places():
    block = bytearray(56)
    for i in range(4):
        block[49 + 2 * i] = (int(np.float16(0.75).view(np.uint16)) >> 4 * i & 15) << 4
    tail = take_apart(bytes(block), "IQ1_M")[2]
    assert tail.values["scale"] == (0.75,) and tail.values["block scales"] == (0,) * 16


def test_what_is_not_one_block_is_refused():
    with pytest.raises(LabError, match="one block is 66 bytes, not 132"):
        take_apart(bytes(132), "IQ2_XXS")
    with pytest.raises(LabError, match="one block is 18 bytes, not 0"):
        take_apart(b"", "IQ4_NL")
    with pytest.raises(UnknownName, match="IQ9"):
        take_apart(bytes(18), "IQ9")
