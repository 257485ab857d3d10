"""The lean decoder on a packed cache beside llama.cpp with the same cache types and flash attention: bytes, and logits.

llama.cpp turns keys and values of quantized caches by a Hadamard matrix of its own accord, unless LLAMA_ATTN_ROT_DISABLE is
set; here that is `rotate`. Its flash attention rounds the query to q8_0 where keys are quantized, and adds values up in
float16 where they are float16; here neither is rounded. So what lies between the two is held against what the type itself
costs.
"""

from functools import lru_cache

import numpy as np
import pytest
import torch
from llama_engine import TYPES, context_log, llama_cpp, loaded
from llama_engine import log as said
from runtime_models import VOCAB, make

import llmlab
from llmlab.runtime.decoder import Decoder
from llmlab.units import MIB

pytestmark = pytest.mark.peers

PRINTED = 0.0051 * MIB      # sizes are printed in MiB with two decimals
TOKENS = torch.randint(3, VOCAB, (100,), generator=torch.Generator().manual_seed(1)).tolist()


def context_of(model, kv: tuple[str, str], context: int):
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = context, 2048, 512, 2, 2
    params.type_k, params.type_v = (TYPES[name] for name in kv)
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    made = llama_cpp.llama_init_from_model(model, params)
    assert made, said()
    return made


def their_logits(model, kv: tuple[str, str], tokens: list[int]) -> torch.Tensor:
    """llama.cpp's logits [tokens, vocabulary]: half of the tokens read at once, then one at a time."""
    context, found = context_of(model, kv, 512), []
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    half = len(tokens) // 2
    try:
        for start, stop in [(0, half), *((at, at + 1) for at in range(half, len(tokens)))]:
            batch = llama_cpp.llama_batch_init(stop - start, 0, 1)
            batch.n_tokens = stop - start
            for i, at in enumerate(range(start, stop)):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[at], at, 1, 1
                batch.seq_id[i][0] = 0
            assert llama_cpp.llama_decode(context, batch) == 0, said()
            rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (stop - start, vocabulary))
            found.append(torch.from_numpy(rows.copy()))
            llama_cpp.llama_batch_free(batch)
    finally:
        llama_cpp.llama_free(context)
    return torch.cat(found)


def our_logits(path, kv: tuple[str, str], tokens: list[int], **settings) -> torch.Tensor:
    decoder, half = Decoder.open(path, dtype=torch.float32, strategy="compact", kv=kv, **settings), len(tokens) // 2
    return torch.cat([decoder.logits(tokens[:half]), *(decoder.read([token])[None] for token in tokens[half:])])


def mean_divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Kullback-Leibler, the mean over positions, in nats."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model's file in float32, so that nothing but the cache is rounded; made once."""
    @lru_cache
    def get(name: str):
        path = tmp_path_factory.mktemp("cache") / f"{name}.gguf"
        make(name, path, "F32")
        return path, our_logits(path, ("f32", "f32"), TOKENS)

    return get


# (types, the largest share of what the type costs that may lie between): keys in q8_0 cost as little as queries in q8_0.
SHARES = [(("f16", "f16"), 2), (("q8_0", "q8_0"), 0.9), (("q8_0", "q4_0"), 0.25), (("q5_1", "q5_0"), 0.25),
          (("iq4_nl", "q4_1"), 0.25)]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_are_llama_cpps(tiny, name):
    path, exact = tiny(name)
    with loaded(path) as model:
        assert mean_divergence(exact, their_logits(model, ("f32", "f32"), TOKENS)) < 1e-5
        for kv, share in SHARES:
            theirs, ours = their_logits(model, kv, TOKENS), our_logits(path, kv, TOKENS, rotate=kv[1][0] != "f")
            assert mean_divergence(theirs, ours) < share * mean_divergence(exact, theirs), kv


def test_without_rotation_too(tiny, monkeypatch):
    path, exact = tiny("llama")
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with loaded(path) as model:
        theirs = their_logits(model, ("q8_0", "q4_0"), TOKENS)
    assert mean_divergence(theirs, our_logits(path, ("q8_0", "q4_0"), TOKENS)) < 0.1 * mean_divergence(exact, theirs)


def test_a_real_models_logits(smollm2):
    """Weights are quantized here, and llama.cpp rounds what it multiplies by them: that lies between the two with any cache,
    and by the thirtieth layer 4-bit codes have gone their own ways. What a type costs is alike all the same."""
    words = llmlab.decoder(smollm2)[1]
    text = ("The lean decoder reads the very same file, token by token, and what it says on a packed cache must be close to "
            "what llama.cpp says of it on its own: ")
    ids = words(3 * text)["input_ids"][:90]
    exact = our_logits(smollm2, ("f32", "f32"), ids)
    with loaded(smollm2) as model:
        always = their_logits(model, ("f32", "f32"), ids)
        theirs = {name: their_logits(model, (name, name), ids) for name in ("q8_0", "q4_0")}
    ours = {name: our_logits(smollm2, (name, name), ids, rotate=True) for name in theirs}
    base = mean_divergence(always, exact)
    assert base < 0.01 and mean_divergence(theirs["q8_0"], ours["q8_0"]) < 2 * base
    cost = mean_divergence(always, theirs["q4_0"]), mean_divergence(exact, ours["q4_0"])
    assert 0.5 < cost[1] / cost[0] < 2 and mean_divergence(theirs["q4_0"], ours["q4_0"]) < sum(cost)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_bytes_are_those_llama_cpp_prints(tiny, name):
    path, _ = tiny(name)
    with loaded(path) as model:
        for kv in (("q8_0", "q8_0"), ("q8_0", "q4_0"), ("f16", "q5_1")):
            for context in (256, 300, 512):
                told = context_log(model, n_ctx=context, n_ubatch=512, type_k=TYPES[kv[0]], type_v=TYPES[kv[1]], n_threads=1,
                                   flash_attn_type=1, swa_full=False)
                ours = Decoder.open(path, dtype=torch.float32, strategy="compact", kv=kv, context=context)
                assert ours.cache_bytes == pytest.approx(sum(line.total for line in told.caches) * MIB, abs=2 * PRINTED)
                for line in told.caches:
                    assert line.cells in {cache.cells for cache in ours.caches}


def test_a_real_models_bytes(smollm2):
    with loaded(smollm2, no_alloc=True, load_mode=0) as model:
        for kv in (("q8_0", "q8_0"), ("q4_0", "q4_0"), ("f16", "f16"), ("q5_0", "iq4_nl")):
            for context in (1, 1000, 4097, 8192):
                told = context_log(model, n_ctx=context, type_k=TYPES[kv[0]], type_v=TYPES[kv[1]], n_threads=1,
                                   flash_attn_type=1)
                ours = Decoder.open(smollm2, strategy="compact", kv=kv, context=max(2, context))
                assert ours.cache_bytes == pytest.approx(sum(line.total for line in told.caches) * MIB, abs=PRINTED)
