"""Rows of many texts together are what the lean decoder reads alone, for every architecture; and no row depends on another."""

import functools
import random

import pytest
import torch
from runtime_models import CASES, VOCAB, divergence, make

from llmlab.errors import LabError
from llmlab.runtime import few, matrices
from llmlab.runtime.batching import Batcher, longest
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.matrices import Matrices
from llmlab.runtime.paged import PagedCache, Part

LIMIT = 1e-7        # nats
SIZE = 16
TEXTS = [torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(count)).tolist()
         for count in (60, 7, 33, 1, 48, 20)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    @functools.cache
    def get(name: str, mix: str = "mixed"):
        path = tmp_path_factory.mktemp("batching") / f"{name}-{mix}.gguf"
        make(name, path, mix)
        return path

    return get


def opened(path, **settings) -> Decoder:
    return Decoder.open(path, **{"dtype": torch.float32, "strategy": "compact", **settings})


class Reading:
    """Texts read by a batcher, each in blocks of its own, which lie in no order."""

    def __init__(self, decoder: Decoder, kv: str = "f32", numbers: bool | None = None, blocks: int = 64, compile: bool = False):
        self.cache = PagedCache(decoder.weights.shapes, blocks, SIZE, kv)
        self.batcher = Batcher(decoder, self.cache, Matrices(decoder, numbers, compile=compile))
        self.free = list(range(blocks))
        random.Random(0).shuffle(self.free)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def part(self, text: int, count: int) -> tuple[list[int], Part]:
        """The next tokens of TEXTS[text]."""
        first = self.lengths.get(text, 0)
        table = self.tables.setdefault(text, [])
        while len(table) * SIZE < first + count:
            table.append(self.free.pop())
        self.lengths[text] = first + count
        return TEXTS[text][first:first + count], Part(list(table), first, count)

    def read(self, *wanted: tuple[int, int], padded: int = 0) -> torch.Tensor:
        tokens, parts = zip(*(self.part(text, count) for text, count in wanted), strict=True)
        return self.batcher.read(tokens, parts, [True] * len(parts), padded)


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if name != "phi3-longrope"])
def test_every_architecture_reads_as_alone(tiny, name, numbers):
    """Prompts in chunks and single tokens of several texts in the same steps."""
    decoder = opened(tiny(name))
    reading = Reading(decoder, numbers=numbers)
    steps = [[(0, 30), (1, 6)], [(1, 1), (0, 29), (2, 11)], [(0, 1), (2, 22), (3, 1), (4, 47)], [(4, 1), (5, 20)]]
    found = [reading.read(*step) for step in steps]
    for step, logits in zip(steps, found, strict=True):
        assert logits.dtype == torch.float32 and logits.shape == (len(step), VOCAB)
    for text, (step, row) in {0: (2, 0), 1: (1, 0), 2: (2, 1), 3: (2, 2), 4: (3, 0), 5: (3, 1)}.items():
        decoder.forget()
        alone = decoder.logits(TEXTS[text])[-1]
        assert divergence(alone[None], found[step][row][None]) < LIMIT, text


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "gpt-oss"])
def test_a_row_is_the_same_to_the_bit_whatever_is_beside_it(tiny, name):
    """Alone, among few, among many, first or last; padded or not."""
    decoder, ways = opened(tiny(name, "Q8_0")), []
    for others in ([], [1], [2, 4], [1, 2, 4, 5]):
        for first in (True, False):
            reading = Reading(decoder)
            reading.read((0, 40))
            for text in others:
                reading.read((text, 5))
            beside = [(text, 1) for text in others]
            logits = reading.read(*([(0, 1), *beside] if first else [*beside, (0, 1)]), padded=3 * first)
            ways.append(logits[0 if first else -1])
    assert all(torch.equal(ways[0], other) for other in ways)


def test_only_wanted_logits_are_made(tiny):
    reading = Reading(opened(tiny("llama")))
    pairs = [reading.part(text, 7) for text in (0, 1, 2)]
    tokens, parts = zip(*pairs, strict=True)
    some = reading.batcher.read(tokens, parts, [False, True, False])
    assert some.shape == (1, VOCAB)
    assert torch.equal(some, reading.batcher.read(tokens, parts, [True] * 3)[1:2])      # written again: the same cells
    assert reading.batcher.read(tokens, parts, [False] * 3).shape == (0, VOCAB)


def test_longer_angles_bound_a_text(tiny):
    decoder = opened(tiny("phi3-longrope"))
    assert longest(decoder) == 64 < decoder.context
    reading = Reading(decoder)
    found = reading.read((0, 60))
    assert divergence(decoder.logits(TEXTS[0])[-1:], found) < LIMIT
    with pytest.raises(LabError, match="65 tokens, 64 can be read"):
        reading.batcher.read([[1]], [Part(reading.tables[0] + [reading.free[0]], 64, 1)], [True])


def test_the_decoders_own_text_is_left_alone(tiny):
    decoder = opened(tiny("llama"))
    before = decoder.read(TEXTS[0][:20])
    Reading(decoder).read((1, 7), (2, 9))
    assert decoder.tokens == TEXTS[0][:20]
    after = decoder.read(TEXTS[0][20:21])
    decoder.forget()
    decoder.read(TEXTS[0][:20])
    assert torch.equal(after, decoder.read(TEXTS[0][20:21])) and not torch.equal(before, after)


def test_a_damaged_token_is_told(tiny):
    for numbers in (True, False):
        reading = Reading(opened(tiny("llama-tied")), numbers=numbers)
        with pytest.raises((LabError, IndexError)):
            reading.batcher.read([[VOCAB]], [Part([0], 0, 1)], [True])


# ---- matrices ------------------------------------------------------------------------------------------------

def test_numbers_where_there_is_room(tiny, monkeypatch):
    decoder = opened(tiny("llama"))
    room = Matrices(decoder)
    assert room.bytes and "float32 numbers" in room.why and room.shapes[0].inputs == ("q_k_v",)
    monkeypatch.setattr(matrices, "_free", lambda device: 1 << 30)
    packed = Matrices(decoder)
    assert not packed.bytes and "are not free" in packed.why and packed.multiply is decoder.multiply


def test_numbers_of_a_compiled_decoder_are_its_own(tiny):
    """Words laid out for one token alone give the same numbers back."""
    words, plain = opened(tiny("llama", "Q8_0"), compile=True), opened(tiny("llama", "Q8_0"))
    if not words.compiled:
        pytest.fail(words.why)
    one, other = Reading(words, numbers=True), Reading(plain, numbers=True)
    assert divergence(one.read((0, 40), (1, 7)), other.read((0, 40), (1, 7))) < LIMIT


def test_rows_are_filled_up_to_what_is_multiplied_alike(tiny):
    made = Matrices(opened(tiny("llama")))
    for count in (1, 5, 31, 33, 64):
        assert made.even(count) >= count and (made.even(count) in made.alike or made.even(count) == 64)
    made.alike = [4, 8]
    assert [made.even(count) for count in (1, 4, 5, 9, 64, 65)] == [4, 4, 8, 64, 64, 128]
    made.alike = [4, 8, *matrices._MORE]
    assert [made.even(count) for count in (9, 65, 100)] == [64, 65, 100]


@pytest.mark.parametrize("words", [False, True])
def test_few_rows_by_codes_are_the_same_to_the_bit(tiny, monkeypatch, words):
    """Alone, among few and among more than are multiplied by codes, whatever the decoder's own weights are held as."""
    monkeypatch.setattr(few, "COUNTS", (1, 4))
    monkeypatch.setattr(few, "_quick", lambda *kind: 1 << 1 | 1 << 4)
    decoder, found = opened(tiny("llama", "Q8_0"), compile=words), []
    assert bool(decoder.compiled) == words, decoder.why
    for compile in (False, True):
        for beside in ([], [1], [1, 2], [1, 2, 4], [1, 2, 4, 5]):
            reading = Reading(decoder, numbers=True, compile=compile)
            reading.read((0, 40))
            for text in beside:
                reading.read((text, 5))
            found.append(reading.read((0, 1), *((text, 1) for text in beside))[0])
    made = reading.batcher.matrices
    assert all(torch.equal(found[0], one) for one in found)
    assert "by the codes of" in made.why and made.even(5) == made._filled(5)
    if made.few:
        assert [made.even(count) for count in (1, 3, 4)] == [1, 3, 4] and made.bytes > Matrices(decoder, True).bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_rows_are_alike_wherever_they_stand(dtype):
    """A row of bfloat16 alone differs from the same among others in few of its results, where it does (oneDNN on AVX-512)."""
    random = torch.Generator().manual_seed(7)
    x, matrix = (torch.randn(many, 1536, generator=random).to(dtype) for many in (300, 576))
    many, found = torch.mm(x, matrix.T), matrices._numbers_alike.__wrapped__(576, 1536, dtype)
    numbers = [n for n in range(1, 33) if found >> n & 1]
    assert numbers
    for n in numbers:
        for at in (0, 5, 31, 100, 201, 267):
            assert torch.equal(torch.mm(x[at:at + n].clone(), matrix.T), many[at:at + n]), (n, at)
