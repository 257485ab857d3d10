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
from llmlab.runtime import FAMILIES, generating, layers, rope
from llmlab.runtime import decoder as decoders
from llmlab.runtime.decoder import Decoder

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
