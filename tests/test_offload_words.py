"""Compiled code over weights that are handed out a layer at a time gives what it gives over weights of its own, to the bit."""

from collections.abc import Iterator

import pytest
import torch
from runtime_models import VOCAB, make

from llmlab.errors import BadFile
from llmlab.gguf import read_gguf
from llmlab.kernels import words
from llmlab.offload import words as laid
from llmlab.offload.opening import open_decoder
from llmlab.offload.pieces import Piece
from llmlab.offload.placement import Placement
from llmlab.offload.reading import Readers, buffer
from llmlab.runtime.compiled import Compiled, NotCompiled
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.weights import Weights

READ = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The path of a model of three layers of two kinds, and a cache folder of this file's own to compile them into, once."""
    folder = tmp_path_factory.mktemp("words")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_CACHE", str(folder))
        make("llama", folder / "small.gguf", "small", num_hidden_layers=3)
        yield folder / "small.gguf"


def pieces(path) -> dict[str, tuple[Piece, torch.Tensor]]:
    """Each piece of a model's store, and its bytes."""
    store = laid.kept(read_gguf(path))
    with Readers(store.files, 1) as readers:
        found = {name: (piece, buffer(piece.bytes)) for name, piece in store.pieces.items()}
        for ticket in [readers.fetch(piece, into) for piece, into in found.values()]:
            ticket.wait()
    return found


class Turns(Weights):
    """Weights whose layers take turns in two buffers, each spoilt as soon as the next is asked for."""

    @classmethod
    def of(cls, path, resident: tuple[int, ...], kv: str | None) -> "Turns":
        like, found = laid.described_model(read_gguf(path), kv and (kv, kv)), pieces(path)
        slots = [buffer(max(piece.bytes for piece, _ in found.values())) for _ in range(2)]
        steps = [(held, None if number in resident else slots[number % 2])
                 for number, (_, held) in enumerate(found[f"blk.{number}"] for number in range(len(like.layers)))]
        layers = [laid.seen(layer, found[f"blk.{number}"][0], held if slot is None else slot, "store")
                  for number, (layer, (held, slot)) in enumerate(zip(like.layers, steps, strict=True))]
        made = cls(**{**vars(like), "layers": tuple(layers), "head": laid.seen(like.head, *found["head"], "store")})
        vars(made).update(steps=steps, passes=0)
        return made

    def handed(self, head: bool = True) -> Iterator[dict]:
        vars(self)["passes"] += 1
        for layer, (held, slot) in zip(self.layers, self.steps, strict=True):
            if slot is not None:
                slot[:len(held)] = held
            yield layer
            if slot is not None:
                slot.fill_(255)     # NaN, whoever looks


def streamed(path, resident: tuple[int, ...] = (), kv: str | None = None) -> Decoder:
    """A decoder whose layers take turns, but for those that are resident."""
    weights = Turns.of(path, resident, kv)
    decoder = Decoder(weights, torch.float32, None, read_gguf(path), kv)
    decoder.compiled = Compiled(weights, torch.float32, small=True, kv=kv and (kv, kv))
    decoder.multiply = decoder.compiled.multiply
    assert weights.passes == 1
    return decoder


@pytest.mark.parametrize("kv", [None, "q8_0"])
def test_layers_that_take_turns_give_the_same_bits(small, kv):
    whole = Decoder.open(small, torch.float32, "compact", compile=True, kv=kv)
    assert whole.compiled, whole.why
    wanted = [whole.logits(READ[:20]), *(whole.logits([token]) for token in READ[20:30]), whole.read_each(READ[30:])]
    assert whole.keep([*READ[:30], 0]) == 30
    assert torch.equal(wanted[-1], torch.cat([whole.logits([token]) for token in READ[30:]]))
    for resident in ((), (1,), (0, 1, 2)):
        decoder = streamed(small, resident, kv)
        found = [decoder.logits(READ[:20]), *(decoder.logits([token]) for token in READ[20:30]), decoder.read_each(READ[30:])]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert decoder.weights.passes == 1 + 1 + 10 + 1
        assert decoder.compiled.bytes == whole.compiled.bytes and decoder.compiled.why == whole.compiled.why


def test_a_store_is_made_once_and_anew_for_other_code(small, monkeypatch):
    file, said = read_gguf(small), []
    store = laid.kept(file, progress=lambda share, what: said.append(what))
    assert store.layout.startswith(f"words{words.lanes()}-")
    assert {name: piece.bytes for name, piece in store.pieces.items()} == laid.piece_bytes(file)
    store.verify()
    said.clear()
    laid.kept(file, progress=lambda share, what: said.append(what))
    assert not said
    made = words._words
    monkeypatch.setattr(words, "_words", lambda *given: -made(*given))
    assert laid.kept(file, progress=lambda share, what: said.append(what)).layout != store.layout
    assert said and not store.path.exists()


def test_what_cannot_be_laid_out_says_so_before_anything_is_written(small, tmp_path):
    make("llama", tmp_path / "F16.gguf", "F16")
    make("mixtral", tmp_path / "experts.gguf", "Q8_0")
    for name, why in (("F16", "no way is known to lay F16 as words"), ("experts", "which experts a token takes")):
        said = f"{name}.gguf cannot be laid out for compiled code: {why}.*take the layout 'gguf'"
        with pytest.raises(NotCompiled, match=said):
            laid.kept(read_gguf(tmp_path / f"{name}.gguf"), tmp_path / "stores")
    with pytest.raises(NotCompiled, match="256 cells at most .* a context of more than 256 tokens, or no kv; take the layout"):
        laid.described_model(read_gguf(small), ("q8_0", "q8_0"), 256)
    assert not (tmp_path / "stores").exists()


def test_a_piece_of_another_model_is_not_seen(small):
    like, found = laid.described_model(read_gguf(small)), pieces(small)
    piece, held = found["blk.0"]
    with pytest.raises(BadFile, match="blk.0 is not of this model"):
        laid.seen(like.head, piece, held, "store")
    with pytest.raises(BadFile, match="blk.0 is not of this model"):
        laid.seen({name: value for name, value in like.layers[0].items() if name != "down"}, piece, held, "store")


@pytest.mark.parametrize("where", [{}, {"blk.1": "device"}, {"blk.0": "ram", "blk.2": "device"}, "device"])
def test_wherever_pieces_live_logits_are_those_of_the_compiled_decoder(small, where):
    whole = Decoder.open(small, torch.float32, "compact", compile=True)
    where = dict.fromkeys(laid.piece_bytes(read_gguf(small)), "device") if where == "device" else where
    placement = Placement(where, slots=2, context=64, layout="words")
    with open_decoder(small, placement, dtype=torch.float32) as decoder:
        assert decoder.compiled and decoder.strategy == "compiled"
        wanted = [whole.logits(READ[:20]), *(whole.logits([token]) for token in READ[20:24]), whole.read_each(READ[24:30])]
        found = [decoder.logits(READ[:20]), *(decoder.logits([token]) for token in READ[20:24]), decoder.read_each(READ[24:30])]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
