"""What a cache type costs, against transformers with keys and values rounded by gguf-py, and where errors must be none."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiny_chat
import torch
from runtime_models import VOCAB, make
from transformers import DynamicCache

from llmlab import quality
from llmlab.errors import LabError, UnknownName
from llmlab.quality import CacheDivergence, CacheSettings, cache_divergence, cache_divergences
from llmlab.runtime.decoder import Decoder

CONTEXT = 300       # more than a piece, more than a page
IDS = np.random.default_rng(3).integers(3, VOCAB, 2 * CONTEXT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path, transformers' model of the same weights); keys lie as in transformers, not in llama's pairs."""
    path = tmp_path_factory.mktemp("caches") / "tiny.gguf"
    return path, make("qwen2", path, "F32")


class Rounded(DynamicCache):
    """Keys and values rounded by gguf-py as they come."""

    def __init__(self, k: str, v: str):
        super().__init__()
        self.types = k, v

    def update(self, keys, values, layer, *args, **kwargs):
        def rounded(x, name):
            if name == "f32":
                return x
            kind = gguf.GGMLQuantizationType[name.upper()]
            return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)).view(x.shape)

        return super().update(*(rounded(x, name) for x, name in zip((keys, values), self.types, strict=True)), layer, *args,
                              **kwargs)


def straight(model, k: str, v: str, start: int) -> np.ndarray:
    """KL divergence of each position of a chunk, by no code of llmlab's."""
    ids = torch.from_numpy(IDS[start:start + CONTEXT])[None]
    with torch.no_grad():
        p, q = (model(ids, past_key_values=cache).logits[0, :-1].double().log_softmax(-1)
                for cache in (DynamicCache(), Rounded(k, v)))
    return (p.exp() * (p - q)).sum(-1).numpy()


@pytest.mark.parametrize("kv", [("q8_0", "q8_0"), ("q4_0", "f32"), ("f32", "q5_1")])
def test_as_transformers_with_rounded_keys_and_values(tiny, kv):
    path, model = tiny
    found = cache_divergence(path, kv, IDS, CONTEXT, progress=False)
    wanted = np.concatenate([straight(model, *kv, start) for start in (0, CONTEXT)])
    assert found.chunks == 2 and found.tokens == 2 * (CONTEXT - 1) == len(wanted)
    assert found.mean_kld.value == pytest.approx(wanted.mean(), rel=0.02)
    assert np.corrcoef(found.kld, wanted)[0, 1] > 0.98 and found.ratio.value != 1


def test_a_cache_is_none_away_from_itself_and_more_bits_are_nearer(tiny):
    kinds = ["f32", "f16", "q8_0", "q5_0", "q4_0", CacheSettings("q4_0", "q4_0", recent=CONTEXT)]
    found = cache_divergences(tiny[0], kinds, IDS, CONTEXT, chunks=1, progress=False)
    same, *rest, near = [one.mean_kld.value for one in found]
    assert same < 1e-13 and found[0].top1.value == 1 and found[0].ratio.value == pytest.approx(1, abs=1e-12)
    assert 1e-12 < rest[0] and all(8 * low < high for low, high in zip(rest[:2], rest[1:3], strict=True)) and rest[2] < rest[3]
    assert near == pytest.approx(rest[0], rel=0.5)      # what is recent lies in float16, whatever the types
    assert str(found[-1].cache) == "q4_0, 300 recent" and "q4_0, 300 recent" in repr(found[-1])


def test_a_decoder_is_measured_and_keeps_its_text(tiny):
    decoder = Decoder.open(tiny[0], torch.float32, "compact")
    decoder.read([5, 6, 7])
    one = cache_divergence(decoder, "q8_0", IDS, CONTEXT, chunks=1, rotate=True, sinks=4, progress=False)
    assert decoder.tokens == [5, 6, 7] and decoder.kv is None
    settings = CacheSettings("q8_0", "q8_0", rotate=True, sinks=4)
    other = cache_divergences(tiny[0], ["f16", settings], IDS, CONTEXT, chunks=1, progress=False)[1]
    assert one.cache == other.cache == settings
    np.testing.assert_allclose(one.kld, other.kld, rtol=1e-6, atol=1e-12)


def test_depth_is_the_place_in_a_chunk():
    kld = np.concatenate([np.arange(9.0), np.arange(9.0)])
    found = CacheDivergence("m", "f32", 10, 2, kld, kld, kld, kld, kld < 5, CacheSettings.of("q8_0"))
    rows = list(found.by_depth((0, 4, 8, 20)))
    assert [(row["from"], row["to"], row["tokens"]) for row in rows] == [(0, 4, 8), (4, 8, 8), (8, 10, 2)]
    assert [row["mean_kld"] for row in rows] == [1.5, 5.5, 8.0] and [row["top1"] for row in rows] == [1.0, 0.25, 0.0]
    assert sum(row["mean_kld"] * row["tokens"] for row in rows) / 18 == found.mean_kld.value
    assert [row["to"] for row in found.by_depth()] == [10] and list(found.by_depth((50, 60))) == []


def test_settings_say_what_they_are():
    assert CacheSettings.of(("Q8_0", "q4_0")) == CacheSettings("q8_0", "q4_0") != CacheSettings.of("q8_0")
    assert CacheSettings.of("q8_0").bits == 8.5 and CacheSettings("q8_0", "q4_0").bits == 6.5
    assert [CacheSettings.of(kind).bits for kind in ("f32", "f16", "fp8", "q5_1", "iq4_nl")] == [32, 16, 8, 6, 4.5]
    assert str(CacheSettings("f16", "q4_0", True, 128, 4)) == "f16/q4_0, rotated, 128 recent, 4 sinks"


def test_what_cannot_be_measured_is_said_in_a_line(tiny, tmp_path):
    path = tiny[0]
    for raised, call in (
            (UnknownName, lambda: cache_divergence(path, "q9", IDS, CONTEXT)),
            (LabError, lambda: CacheSettings("q8_0", "q8_0", recent=-1)),
            (LabError, lambda: cache_divergences(path, [], IDS, CONTEXT)),
            (LabError, lambda: cache_divergence(path, "q8_0", IDS, 2 * CONTEXT, progress=False)),
            (LabError, lambda: cache_divergence(path, "q8_0", [VOCAB] * 8, 4, progress=False)),
            (LabError, lambda: cache_divergence(path, "q8_0", "text", 4, progress=False)),
            (LabError, lambda: cache_divergence(tiny_chat.write(tmp_path / "narrow.gguf"), "q8_0", [1] * 8, 4)),
            (LabError, lambda: quality.cache_divergence(_without_file(path), "q8_0", progress=False))):
        with pytest.raises(raised) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_compiled_decoder_is_refused(tiny):
    decoder = Decoder.open(tiny[0], torch.float32, "compact")
    decoder.compiled = SimpleNamespace()
    with pytest.raises(LabError, match="compiled"):
        cache_divergence(decoder, "q8_0", IDS, CONTEXT)


def test_without_tokens_it_reads_the_text_that_llmlab_ships(tmp_path):
    path = tiny_chat.write(tmp_path / "tiny.gguf")
    found = cache_divergence(path, "fp8", context=64, chunks=1, progress=False)
    assert found.tokens == 63 and found.mean_kld.value > 1e-9


def _without_file(path) -> Decoder:
    decoder = Decoder.open(path, torch.float32, "compact")
    decoder.path = ""
    return decoder
