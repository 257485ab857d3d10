"""The lean decoder's logits are transformers' in float32, for every architecture, however the tokens are read."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_chat
import torch
from runtime_models import CASES, VOCAB, divergence, make

import llmlab
from llmlab.errors import BadFile, LabError
from llmlab.gguf import read_gguf, write_gguf
from llmlab.memory import cache_bytes
from llmlab.runtime import FAMILIES, generating, layers, rope
from llmlab.runtime import decoder as decoders
from llmlab.runtime.decoder import Decoder
from llmlab.shapes import model_spec

TOP = Path(__file__).resolve().parent.parent
LIMIT = 1e-7        # nats, at the worst position
TOKENS = torch.randint(3, VOCAB, (1, 70), generator=torch.Generator().manual_seed(1))
READ = TOKENS[0].tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path, reference) of a case, made once."""
    @functools.cache
    def get(name: str, mix: str = "mixed"):
        path = tmp_path_factory.mktemp("decoder") / f"{name}-{mix}.gguf"
        return path, make(name, path, mix)

    return get


@torch.no_grad()
def logits(reference, count: int = len(READ)) -> torch.Tensor:
    """transformers', after each of the first `count` tokens."""
    return reference(TOKENS[:, :count]).logits[0].float()


def opened(path, **settings) -> Decoder:
    return Decoder.open(path, **{"dtype": torch.float32, "strategy": "compact", **settings})


# ---- exactness -----------------------------------------------------------------------------------------------

def test_every_family_has_a_case():
    assert {case.architecture for case in CASES.values()} == {name for name in FAMILIES if " " not in name}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_transformers(tiny, name):
    """All at once, in pieces, token by token, past every window and past Phi-3's first context; and after dropping some."""
    path, reference = tiny(name)
    decoder, wanted = opened(path), logits(reference)
    assert divergence(wanted, decoder.logits(READ)) < LIMIT and decoder.tokens == READ

    assert decoder.keep([*READ[:50], 5]) == (50 if name != "phi3-longrope" else 0)      # there, other angles: all anew
    decoder.forget()
    before = logits(reference, 60)
    cuts = (0, 1, 2, 20, 41, 42, 43, 60)
    found = torch.cat([decoder.logits(READ[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)])
    assert divergence(before, found) < LIMIT and decoder.tokens == READ[:60]
    for token in READ[60:]:
        last = decoder.read([token])
    assert divergence(wanted[-1], last) < LIMIT

    other = [*READ[:30], 7, 8, 9]
    assert decoder.keep(other) == (30 if name != "phi3-longrope" else 0)
    with torch.no_grad():
        anew = reference(torch.tensor([other])).logits[0, -1].float()
    assert divergence(anew, decoder.read(other[len(decoder.tokens):])) < LIMIT


@pytest.mark.parametrize("strategy", ["reference", "fast", "auto"])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2moe", "qwen3", "gemma3", "phi3"])
def test_every_strategy_is_exact(tiny, name, strategy):
    """With formats that agree, so that "fast" fuses what it can."""
    path, reference = tiny(name, "Q8_0")
    decoder, wanted = opened(path, strategy=strategy), logits(reference)
    assert divergence(wanted, decoder.logits(READ)) < LIMIT
    decoder.keep([*READ[:40], READ[40]])
    assert divergence(wanted[40], decoder.read(READ[40:41])) < LIMIT
    shape = decoder.weights.shapes[0]
    if strategy == "fast":
        assert shape.inputs == ("qkv",) and (shape.shared or shape.ff) in (("gate_up",), ("gate_shared_up_shared",))
    assert strategy == "auto" or strategy in decoder.strategy


def test_what_agrees_in_part_is_fused_in_part(tiny, tmp_path):
    """Q4_K_M files have Q and K in one format and V in another."""
    path, _ = tiny("qwen2")
    file = read_gguf(path)
    tensors = [(n, t.shape, t.type, file.data(n).tobytes()) for n, t in file.tensors.items() if "attn_k." not in n]
    eight, _ = tiny("qwen2", "Q8_0")
    other = read_gguf(eight)
    for name in ("attn_q", "attn_k"):
        for block in (0, 1):
            for end in ("weight", "bias"):
                part = f"blk.{block}.{name}.{end}"
                tensors = [t for t in tensors if t[0] != part]
                tensors.append((part, other.tensors[part].shape, other.tensors[part].type, other.data(part).tobytes()))
    write_gguf(tmp_path / "parts.gguf", file.typed_metadata(), tensors)
    fused, apart = (opened(tmp_path / "parts.gguf", strategy=strategy) for strategy in ("fast", "compact"))
    assert fused.weights.shapes[0].inputs == ("qk", "v") and apart.weights.shapes[0].inputs == ("q", "k", "v")
    model, _ = llmlab.load(tmp_path / "parts.gguf", device="cpu", dtype="float32", strategy="reference")
    for decoder in (fused, apart):
        assert divergence(logits(model), decoder.logits(READ)) < LIMIT


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss"])
def test_a_window_of_nothing_is_none(tmp_path, name):
    path, count = tmp_path / "whole.gguf", CASES[name].fields.get("num_hidden_layers", 2)
    reference = make(name, path, extra={"attention.sliding_window": 0}, sliding_window=512,
                     layer_types=["full_attention"] * count)
    assert divergence(logits(reference), opened(path).logits(READ)) < LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3moe", "gemma2", "gemma3", "phi3", "starcoder2", "gpt-oss"])
@torch.no_grad()
def test_half_precision_errs_no_more_than_dense_half_precision(tiny, name, dtype):
    path, reference = tiny(name)
    exact = logits(reference)
    decoder = opened(path, dtype=dtype)
    dense = type(reference)(reference.config)
    dense.load_state_dict(reference.state_dict())
    theirs = dense.to(dtype).eval()(TOKENS).logits[0].float()
    found = decoder.logits(READ)
    assert found.dtype == torch.float32
    ours, theirs = ((one - exact).norm(dim=-1).median() for one in (found, theirs))
    assert ours < 1.1 * theirs          # the median: rounding sends a token here and there to another expert


@torch.no_grad()
def test_fused_tensors_of_the_file_stay_fused(tiny, tmp_path):
    """llama.cpp's converter can write Q, K and V as one tensor, and the experts' gate and up as one."""
    from test_runtime import _joined

    path, reference = tiny("qwen3moe")
    file = read_gguf(path)
    wholes = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
    apart = {part for parts in wholes.values() for part in parts}
    tensors = [(n, t.shape, t.type, file.data(n).tobytes()) for n, t in file.tensors.items()
               if n.removesuffix(".weight").rpartition(".")[2] not in apart]
    for block in ("blk.0", "blk.1"):
        tensors += [_joined(file, block, parts, whole) for whole, parts in wholes.items()]
    write_gguf(tmp_path / "fused.gguf", file.typed_metadata(), tensors)
    decoder = opened(tmp_path / "fused.gguf")
    assert decoder.weights.shapes[0].inputs == ("qkv",) and decoder.weights.shapes[0].ff == ("gate_up",)
    assert divergence(logits(reference), decoder.logits(READ)) < LIMIT


# ---- the parts ------------------------------------------------------------------------------------------------

def test_a_norm_is_the_root_mean_square():
    x, weight = 5 * torch.randn(7, 96, generator=torch.Generator().manual_seed(0)), torch.rand(96)
    for eps in (1e-6, 0.3):
        found = layers.norm(x, {"n": weight * 96 ** 0.5, "n.eps": torch.tensor((96 * eps) ** 0.5)}, "n")
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight
        assert (found - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "longrope"])
def test_angles_are_transformers(rope_type):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "beta_fast": 16.0,
                  "original_max_position_embeddings": 64, "short_factor": [1.0 + i / 40 for i in range(24)],
                  "long_factor": [1.0 + i / 4 for i in range(24)], **({} if rope_type == "longrope" else {"factor": 4.0})}
    config = SimpleNamespace(rope_parameters=parameters, head_dim=64, max_position_embeddings=256, hidden_size=256,
                             num_attention_heads=4, standardize_rope_params=lambda: None)
    theirs = ROPE_INIT_FUNCTIONS.get(rope_type, Phi3RotaryEmbedding.compute_default_rope_parameters)
    for long in (False, True):
        wanted, scale = theirs(config, None, seq_len=65 if long else 10)
        found, own = rope.frequencies(parameters, 64, 256, long)
        assert torch.allclose(found, wanted, rtol=1e-6, atol=0) and own == pytest.approx(scale)


@pytest.mark.parametrize("pairs", [True, False])
def test_a_turn_is_by_the_positions_angle(pairs):
    shape = layers.LayerShape(heads=2, kv_heads=1, head_dim=8, turned=6, pairs=pairs, scale=1.0, dtype=torch.float32)
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    found = x.clone()
    layers.turn(found, shape, *rope.table(frequencies, 1.0, 5, 8, pairs))
    place = [(2 * i, 2 * i + 1) if pairs else (i, i + 3) for i in range(3)]
    for token, position in enumerate((5, 6, 7)):
        for i, (a, b) in enumerate(place):
            turned = torch.view_as_complex(x[token][:, [a, b]].contiguous()) * torch.polar(torch.tensor(1.0),
                                                                                        position * frequencies[i])
            assert torch.allclose(torch.view_as_complex(found[token][:, [a, b]].contiguous()), turned, atol=1e-6)
    assert torch.equal(found[..., 6:], x[..., 6:])


@pytest.mark.parametrize(("softcap", "sinks"), [(0.0, False), (5.0, False), (0.0, True)])
def test_attention_of_one_and_of_many_is_the_formula(softcap, sinks):
    """In pieces of tokens, in a window, with cells that a mask leaves out; against every pair in float64."""
    shape = layers.LayerShape(heads=6, kv_heads=2, head_dim=8, turned=8, pairs=True, scale=1.0, dtype=torch.float32,
                              softcap=softcap, window=40)
    random, tokens, cells = torch.Generator().manual_seed(0), 2 * layers.ROWS + 9, 2 * layers.ROWS + 29
    q = torch.randn(tokens, 2, 3, 8, generator=random)
    keys, values = torch.randn(2, 2, cells, 8, generator=random)
    sink = torch.randn(6, generator=random) if sinks else None
    at = torch.arange(cells - tokens, cells)[:, None] - torch.arange(cells)
    mask = (at >= 0) & (at < 40)
    found = layers.many(q, keys, values, shape, mask, sink)
    scores = torch.einsum("tkgd,kcd->tkgc", q.double(), keys.double())
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.exp() * mask[:, None, None]
    total = weights.sum(-1, keepdim=True) + (sink.double().exp().view(2, 3, 1) if sinks else 0.0)
    exact = torch.einsum("tkgc,kcd->tkgd", weights / total, values.double())
    assert (found - exact).abs().max() < 1e-5
    for token in (0, 70, tokens - 1):
        alone = layers.one(q[token], keys, values, shape, mask[token:token + 1], sink)
        assert (alone - exact[token]).abs().max() < 1e-5


# ---- the memory ------------------------------------------------------------------------------------------------

def test_transformers_is_never_imported(tiny):
    path, _ = tiny("qwen3moe")
    code = f"""
import sys, torch
from llmlab.runtime.decoder import Decoder
from llmlab.shapes import model_spec
decoder = Decoder.open({str(path)!r}, dtype=torch.float32)
assert decoder.read([3, 4, 5]).shape == ({VOCAB},) and decoder.read([6]).isfinite().all()
assert "transformers" not in sys.modules and "ipywidgets" not in sys.modules, sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(TOP)})
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_is_the_memory_that_text_is_made_with(tmp_path):
    words, path = tiny_chat.tokenizer(), tiny_chat.write(tmp_path / "chat.gguf")
    decoder, asked = opened(path), [{"role": "user", "content": "How are you?"}]
    for options in (generating.Options(temperature=0, max_tokens=20),
                    generating.Options(temperature=1.5, top_k=0, repeat_penalty=1.2, seed=3, max_tokens=20)):
        theirs = "".join(generating.stream(tiny_chat.model(), words, asked, options))
        got = generating.stream(decoder, words, asked, options, memory=decoder)
        assert "".join(got) == theirs and got.stats.tokens == 20
    more = generating.stream(decoder, words, [*asked, {"role": "assistant", "content": theirs},
                                              {"role": "user", "content": "And now?"}], options, memory=decoder)
    assert "".join(more) and more.stats.reused_tokens > got.stats.prompt_tokens


def test_the_cache_grows_and_keeps_what_it_holds(tiny, monkeypatch):
    path, reference = tiny("gemma3")
    monkeypatch.setattr(decoders, "_ROOM", 4)
    monkeypatch.setattr(decoders, "_PIECE", 7)
    decoder = opened(path)
    found = torch.cat([decoder.logits(READ[:33]), decoder.logits(READ[33:34]), decoder.logits(READ[34:])])
    assert divergence(logits(reference), found) < LIMIT and decoder.cells == 132
    decoder.forget()
    assert decoder.tokens == [] and decoder.cells == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_an_interruption_between_two_layers_leaves_nothing_half_read(tiny, monkeypatch, error):
    path, reference = tiny("llama")
    decoder = opened(path)
    decoder.read(READ[:20])
    done, real = [], decoders.block

    def block(*args):
        done.append(1)
        if len(done) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(decoders, "block", block)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else LabError) as raised:
        decoder.read(READ[20:30])
    assert "memory does not suffice to go on after 20 tokens" in str(raised.value) or not str(raised.value)
    monkeypatch.undo()
    assert decoder.tokens == [] and decoder.keep(READ) == 0
    assert divergence(logits(reference), decoder.logits(READ)) < LIMIT


# ---- a packed cache ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CASES)
def test_packed_pages_of_float32_are_the_numbers(tiny, name):
    """In pieces, token by token, past every window, after dropping some: what transformers finds."""
    path, reference = tiny(name)
    decoder, wanted = opened(path, kv="f32"), logits(reference)
    assert divergence(wanted, decoder.logits(READ)) < LIMIT
    decoder.forget()
    before = logits(reference, 60)
    assert divergence(before, torch.cat([decoder.logits(READ[:41]), decoder.logits(READ[41:60])])) < LIMIT
    for token in READ[60:66]:
        last = decoder.read([token])
    if name != "phi3-longrope":                         # goes by other angles from here on
        assert divergence(wanted[65], last) < LIMIT and decoder.keep([*READ[:50], 5]) == 50
        assert divergence(wanted[50:], decoder.logits(READ[50:])) < LIMIT


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_narrower_types_err_more(tiny, name):
    path, reference = tiny(name)
    wanted, errors = logits(reference), []
    for kv in ("f32", "f16", "q8_0", ("q8_0", "q4_0"), "q4_0"):
        errors.append(divergence(wanted, opened(path, kv=kv).logits(READ)))
    assert errors[0] < LIMIT < errors[1] < 1e-4 < errors[2] < 1e-2 < min(errors[3:])
    less = divergence(wanted, opened(path, kv="q4_0", sinks=4, recent=64, rotate=True).logits(READ))
    assert 0 < less < errors[4] / 10                    # all but a few tokens are within 64


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "gemma2", "gemma3", "gpt-oss"])
def test_the_cache_holds_what_memory_says(tiny, name):
    """At every context of a sweep, reserved at once or grown to it: full layers, sliding ones, and both."""
    path, _ = tiny(name)
    spec, shapes = model_spec(path), opened(path).weights.shapes
    for kv in ("q8_0", ("f16", "q4_0"), ("q5_1", "iq4_nl"), "bf16"):
        for context in (2, 255, 256, 257, 300, 511, 512):
            said = cache_bytes(spec, context, kv).kv
            decoder = opened(path, kv=kv, context=context)
            assert decoder.cache_bytes == said
    numbers = sum(2 * shape.kv_heads * shape.head_dim for shape in shapes)
    assert opened(path, kv="q8_0", context=300, sinks=4, recent=28).cache_bytes == (
        cache_bytes(spec, 300, "q8_0").kv + 2 * 32 * numbers)
    grown, seen = opened(path, kv="q8_0"), []
    for _ in range(4):
        grown.read((READ * 2)[:128])
        seen.append(grown.cache_bytes)
    assert seen[0] < seen[-1] == cache_bytes(spec, 512, "q8_0").kv and seen == sorted(seen)


@pytest.fixture(scope="module")
def long_gemma3(tmp_path_factory):
    """A window of 8 in a ring of 768 cells, and a context that goes round it more than twice."""
    path = tmp_path_factory.mktemp("long") / "gemma3.gguf"
    make("gemma3", path, "F16", max_position_embeddings=2048)
    return path


def test_rings_go_round(long_gemma3):
    plain, packed = opened(long_gemma3), opened(long_gemma3, kv="f32")
    text = torch.randint(3, VOCAB, (1700,), generator=torch.Generator().manual_seed(2)).tolist()
    for start in range(0, 1700, 425):
        wanted, found = (one.logits(text[start:start + 425])[-30:] for one in (plain, packed))
        assert divergence(wanted, found) < LIMIT
    assert packed.cache_bytes == cache_bytes(model_spec(long_gemma3), 2048, "f32").kv
    assert max(cache.cells for cache in packed.caches if cache.window) == 768
    assert packed.keep([*text[:1500], 5]) == 1500
    assert divergence(plain.read([9]) if plain.keep([*text[:1500], 9]) else None, packed.read([9])) < LIMIT
    assert packed.keep([*text[:600], 5]) == 0 and packed.tokens == []        # the ring has lost what 600 looks back on


def test_an_interruption_forgets_packed_pages_too(tiny, monkeypatch):
    path, reference = tiny("gemma3")
    decoder, done, real = opened(path, kv="f32", sinks=2, recent=8), [], decoders.block
    exact = decoder.logits(READ)
    decoder.forget()
    decoder.read(READ[:20])

    def block(*args):
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(decoders, "block", block)
    with pytest.raises(KeyboardInterrupt):
        decoder.read(READ[20:30])
    monkeypatch.undo()
    assert decoder.tokens == [] and all(cache.length == 0 for cache in decoder.caches)
    assert torch.equal(decoder.logits(READ), exact)


def test_what_a_packed_cache_cannot_be(tiny, tmp_path):
    path, _ = tiny("llama")
    for wrong, says in (({"kv": "q3"}, "'q3' is no cache type"), ({"kv": ("q8_0",)}, "give one type like 'q8_0'"),
                        ({"kv": "q8_0", "recent": -1}, "recent is -1"), ({"kv": "q8_0", "sinks": 1.5}, "sinks is 1.5"),
                        ({"sinks": 4}, "give kv, such as kv='q8_0'"), ({"rotate": True}, "give kv, such as")):
        with pytest.raises(LabError, match=says):
            opened(path, **wrong)
    make("llama", tmp_path / "narrow.gguf", "F16", head_dim=48)
    with pytest.raises(LabError, match="a q4_0 cache needs heads of a multiple of 32 numbers, and here they have 48"):
        opened(tmp_path / "narrow.gguf", kv=("f16", "q4_0"))
    assert opened(tmp_path / "narrow.gguf", kv="f16", rotate=True).logits(READ).isfinite().all()


# ---- saved and recalled --------------------------------------------------------------------------------------------

WAYS = {"numbers": {}, "q8_0": {"kv": "q8_0"}, "all": {"kv": ("q5_1", "iq4_nl"), "sinks": 3, "recent": 12, "rotate": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "gemma3"])
def test_a_memory_recalled_goes_on_with_the_very_same_logits(tiny, tmp_path, name, way):
    path, _ = tiny(name)
    decoder = opened(path, context=300, **WAYS[way])
    decoder.read(READ[:66])
    decoder.save(tmp_path / "memory")
    wanted = decoder.logits(READ[66:]), decoder.read([7])
    for context in (300, 512):
        other = opened(path, context=context, **WAYS[way])
        other.read(READ[5:20])
        assert other.recall(tmp_path / "memory") == 66 and other.tokens == READ[:66]
        assert torch.equal(other.logits(READ[66:]), wanted[0]) and torch.equal(other.read([7]), wanted[1])
    assert other.keep([*READ[:66], 3]) == (66 if name != "phi3-longrope" else 66)
    assert [file.name for file in tmp_path.iterdir()] == ["memory"]
    from safetensors import safe_open
    assert safe_open(tmp_path / "memory", "pt").get_tensor("tokens").tolist() == READ[:66]


def test_a_ring_recalled(long_gemma3, tmp_path):
    text = torch.randint(3, VOCAB, (1000,), generator=torch.Generator().manual_seed(2)).tolist()
    decoder = opened(long_gemma3, kv="q8_0", context=1200)
    decoder.read(text)
    decoder.shift()
    decoder.save(tmp_path / "memory")
    other = opened(long_gemma3, kv="q8_0")
    assert other.recall(tmp_path / "memory") == 500 and (other.dropped, other.kept) == (text[:500], 0)
    assert torch.equal(other.logits(text[:20]), decoder.logits(text[:20]))
    assert other.keep([*text, *text[:10], 5]) == 1010


def test_a_memory_that_does_not_fit_is_one_line(tiny, tmp_path):
    path, memory = tiny("llama")[0], tmp_path / "memory"
    decoder = opened(path, kv="q8_0", sinks=2)
    with pytest.raises(LabError, match="nothing was read yet"):
        decoder.save(memory)
    decoder.read(READ)
    decoder.save(memory)
    make("llama", tmp_path / "other.gguf", seed=1)
    cases = ((opened(tmp_path / "other.gguf", kv="q8_0", sinks=2), "was read by another model than .*other.gguf"),
             (opened(path, kv="q4_0", sinks=2), "has kv=q8_0,q8_0 and this decoder kv=q4_0,q4_0"),
             (opened(path), r"has kv=q8_0,q8_0 and this decoder kv=none \(float32\)"),
             (opened(path, kv="q8_0", sinks=2, rotate=True), "has rotate=False and this decoder rotate=True"),
             (opened(path, kv="q8_0", sinks=2, recent=5), "has recent=0 and this decoder recent=5"),
             (opened(path, kv="q8_0"), "has sinks=2 and this decoder sinks=0"),
             (opened(path, kv="q8_0", sinks=2, context=40), "holds 70 tokens and the context 40"))
    for other, says in cases:
        other.read([5, 6])
        with pytest.raises(LabError, match=says) as error:
            other.recall(memory)
        assert "\n" not in str(error.value) and other.tokens == [5, 6]
    whole = memory.read_bytes()
    damaged = tmp_path / "damaged"
    for at in (9, 300, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        with pytest.raises(BadFile, match="damaged"):
            decoder.recall(damaged)
    for length in (0, 5, 8, 200, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(BadFile, match="damaged"):
            decoder.recall(damaged)
    for wrong, says in ((path, "is no memory that a decoder saved"), (tmp_path / "none", "cannot be read"),
                        (tmp_path, "cannot be read"), (3, "is not a path")):
        with pytest.raises(LabError, match=says):
            decoder.recall(wrong)
    assert decoder.tokens == READ and decoder.recall(memory) == len(READ)


def test_saving_is_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    decoder, memory = opened(tiny("llama")[0], kv="q8_0"), tmp_path / "memory"
    decoder.read(READ)
    decoder.save(memory)
    before, write, written = memory.read_bytes(), os.write, []

    def interrupted(handle, data):
        written.append(len(data))
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(handle, data)

    decoder.read([5])
    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.save(memory)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["memory"] and memory.read_bytes() == before
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(LabError, match="needs .* and its disk has 1,000 B free|needs .* free"):
        decoder.save(memory)
    monkeypatch.undo()
    with pytest.raises(LabError, match="is not a folder"):
        decoder.save(tmp_path / "nowhere" / "memory")
    assert decoder.tokens == [*READ, 5] and memory.read_bytes() == before


# ---- past the context ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "llama-yarn", "phi3-partial"])
def test_shifted_cells_are_those_of_the_shorter_text(tmp_path, name, keep):
    """In one layer a token's keys and values know nothing of the others: what is left after a shift is then what the shorter
    text gives, at other positions, which only differences of matter. Packed or not, and as often as one likes."""
    make(name, tmp_path / "one.gguf", num_hidden_layers=1, **({"layer_types": ["full_attention"]} if name == "gemma2" else {}))
    for given in ({}, {"kv": "f32", "sinks": 8}, {"kv": "q8_0", "sinks": 8, "recent": 3, "rotate": True}):
        decoder, anew = (opened(tmp_path / "one.gguf", context=100, **given) for _ in range(2))
        text = READ[:60]
        decoder.read(text)
        for _ in range(3):
            count = (len(text) - keep) // 2
            assert decoder.shift(keep) == count
            text = text[:keep] + text[keep + count:] + READ[30:50]
            found = decoder.logits(READ[30:50])
            assert decoder.tokens == text
        wanted = anew.logits(text)[-20:]
        # Keys that are turned anew are rounded to float16 anew, and quantized ones were quantized turned otherwise
        limit = LIMIT * 10 if "kv" not in given else 1e-5 if given["kv"] == "f32" else 2e-2
        assert divergence(wanted, found) < limit, given


def test_packed_cells_shift_as_numbers_do(long_gemma3):
    """Of several layers the tokens that are left have seen those that are gone: not what the shorter text gives, but the same
    whether cells are moved together or left where they are; sliding layers and full ones, many times round."""
    text = torch.randint(3, VOCAB, (900,), generator=torch.Generator().manual_seed(2)).tolist()
    plain, packed = opened(long_gemma3, context=300), opened(long_gemma3, context=300, kv="f32", sinks=4)
    for keep in (0, 4):
        for one in (plain, packed):
            one.forget()
        for start in range(0, 900, 100):
            for one in (plain, packed):
                if len(one.tokens) + 100 > 300:
                    one.shift(keep)
            found = [one.logits(text[start:start + 100]) for one in (plain, packed)]
            assert divergence(*found) < (10 * LIMIT if keep == 0 else 1e-5) and plain.tokens == packed.tokens
        history = text[:900]
        assert plain.dropped == packed.dropped and len(packed.dropped) > 300
        assert [one.keep([*history, 7]) for one in (plain, packed)] == [900, 900]
        assert packed.keep([*history[:850], 7]) == 850 and plain.keep([*history[:850], 7]) == 850
        assert divergence(plain.read([7]), packed.read([7])) < 1e-5
        assert [one.keep(history[:400]) for one in (plain, packed)] == [0, 0]


def test_what_cannot_be_shifted(tiny):
    path, _ = tiny("llama")
    decoder = opened(path, kv="q8_0", sinks=4, context=80)
    with pytest.raises(LabError, match="0 tokens were read and the first 0 are to stay; there is nothing to drop"):
        decoder.shift()
    decoder.read(READ)
    with pytest.raises(LabError, match="open the decoder with sinks=5"):
        decoder.shift(5)
    with pytest.raises(LabError, match="keep is -1"):
        decoder.shift(-1)
    with pytest.raises(LabError, match="the first 79 tokens are to stay and the context holds 80"):
        decoder.shift(79)
    assert decoder.tokens == READ and decoder.shift(4) == 33 and len(decoder.tokens) == 37
    with pytest.raises(LabError, match="it was 4 before"):
        decoder.shift(0)


def test_text_goes_on_past_the_context(tmp_path):
    words, path = tiny_chat.tokenizer(), tiny_chat.write(tmp_path / "chat.gguf")
    for given, shift in (({}, 0), ({}, 5), ({"kv": "f16", "sinks": 6}, 6), ({"kv": "f32"}, 0)):
        decoder = opened(path, context=64, **given)
        options = generating.Options(seed=1, max_tokens=300)
        ended = generating.stream(decoder, words, "Once upon a time", options, memory=decoder)
        assert "".join(ended) and ended.stats.ended == "context full"
        options = generating.Options(temperature=0, max_tokens=150, shift=shift)
        got = generating.stream(decoder, words, "Once upon a time", options, memory=decoder)
        first = "".join(got)
        assert got.stats.ended == "limit" and got.stats.tokens == 150 and len(decoder.tokens) <= 64
        assert len(decoder.dropped) + len(decoder.tokens) == 16 + 149
        more = generating.stream(decoder, words, "Once upon a time", options, memory=decoder)
        assert "".join(more) == first                   # read anew, and the same
        less = generating.memory_of(decoder, 48)
        assert "".join(generating.stream(decoder, words, "x" * 200, options, memory=less)) and len(decoder.tokens) <= 48
    with pytest.raises(LabError, match="is for a lean decoder"):
        generating.stream(tiny_chat.model(), words, "Once", generating.Options(shift=0))
    with pytest.raises(LabError, match="open the decoder with sinks=3"):
        generating.stream(decoder, words, "Once", generating.Options(shift=3), memory=decoder)
    with pytest.raises(LabError, match="shift is -1"):
        generating.Options(shift=-1)


# ---- what cannot be ------------------------------------------------------------------------------------------------

def test_what_is_asked_of_it_is_checked(tiny, tmp_path):
    path, _ = tiny("llama")
    decoder = opened(path, context=32)
    assert (decoder.context, decoder.trained, decoder.architecture, decoder.path) == (32, 512, "llama", str(path))
    for wrong in (1, 513, 2.5, True):
        with pytest.raises(LabError, match="context is"):
            opened(path, context=wrong)
    with pytest.raises(LabError, match="there is no row 9999"):
        decoder.read([3, 9999])
    assert decoder.tokens == []
    with pytest.raises(LabError, match="nothing to read"):
        decoder.read([])
    write_gguf(tmp_path / "mamba.gguf", {"general.architecture": "mamba"}, [("token_embd.weight", (32, 4), "F32", bytes(512))])
    with pytest.raises(LabError, match="is a 'mamba' model, which llmlab does not run packed"):
        Decoder.open(tmp_path / "mamba.gguf")
    with pytest.raises(LabError, match=r"strategy|is no strategy"):
        opened(path, strategy="quick")


@pytest.mark.parametrize(("drop", "add", "says"), [
    (["blk.1.ffn_up.weight"], [], "lacks tensor 'blk.1.ffn_up.weight', which this model needs"),
    (["token_embd.weight"], [], "lacks tensor 'token_embd.weight'"),
    ([], [("blk.0.attn_q_norm.weight", (64,), "F32", bytes(256))], "holds tensor 'blk.0.attn_q_norm.weight', for which"),
    (["output_norm.weight"], [("output_norm.weight", (128,), "F32", bytes(512))], "tensor 'output_norm.weight' is 128, and"),
])
def test_a_bad_file_is_one_clear_line(tiny, tmp_path, drop, add, says):
    file = read_gguf(tiny("llama")[0])
    path = tmp_path / "bad.gguf"
    write_gguf(path, file.typed_metadata(), [(n, t.shape, t.type, file.data(n).tobytes()) for n, t in file.tensors.items()
                                             if n not in drop] + add)
    with pytest.raises(BadFile) as error:
        Decoder.open(path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_written_over_meanwhile(tiny, tmp_path):
    path = tmp_path / "live.gguf"
    path.write_bytes(tiny("llama")[0].read_bytes())
    decoder = opened(path)
    os.truncate(path, 4096)             # touching a page beyond would end the process
    with pytest.raises(BadFile, match="live.gguf has changed since it was opened"):
        decoder.read(READ)


def test_compact_holds_the_file_and_little_else(tiny):
    path, _ = tiny("llama")
    decoder = opened(path)
    assert all(packed.bytes == 0 and packed.mapped for packed in decoder.weights.packed())
    assert 0 < decoder.resident_bytes < path.stat().st_size and "compact" in decoder.why
    fast = opened(path, strategy="fast")
    held = sum(packed.bytes + packed.mapped for packed in fast.weights.packed())
    assert held < fast.resident_bytes < held + 20000
