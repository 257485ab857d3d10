"""Packed models are transformers' models on the dequantized weights, for every architecture: to 1e-7 nats in float32."""

import functools

import pytest
import torch
from runtime_models import ARCHITECTURES, CASES, VOCAB, divergence, make

import llmlab
from llmlab.runtime import FAMILIES, PackedModel

LIMIT = 1e-7        # nats, at the worst position
TOKENS = torch.randint(3, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(path, reference) of a case, made once."""
    @functools.cache
    def get(name: str, mix: str = "mixed"):
        path = tmp_path_factory.mktemp("tiny") / f"{name}-{mix}.gguf"
        return path, make(name, path, mix)

    return get


def packed(path, **settings):
    return llmlab.load(path, device="cpu", **{"dtype": "float32", "strategy": "compact", **settings})[0]


def test_every_architecture_has_a_case():
    assert set(ARCHITECTURES) == {name for name in FAMILIES if " " not in name}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_cache_padding_and_generation_are_the_references(tiny, name):
    path, reference = tiny(name)
    model = packed(path)
    assert isinstance(model, type(reference)) and isinstance(model, PackedModel)
    assert divergence(reference(TOKENS).logits, model(TOKENS).logits) < LIMIT

    cache = theirs = None               # token by token, past the window of those that have one
    for start, stop in ((0, 40), (40, 41), (41, 42), (42, 43)):
        ours = model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True)
        wanted = reference(TOKENS[:, start:stop], past_key_values=theirs, use_cache=True)
        cache, theirs = ours.past_key_values, wanted.past_key_values
        assert divergence(wanted.logits, ours.logits) < LIMIT

    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0                     # a shorter text, padded on the left
    batch = TOKENS[:, :24] * mask
    found, wanted = (m(batch, attention_mask=mask).logits[mask.bool()] for m in (model, reference))
    assert divergence(wanted, found) < LIMIT
    greedy = [m.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (model, reference)]
    assert greedy[0].tolist() == greedy[1].tolist()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss"])
@torch.no_grad()
def test_a_window_of_nothing_is_none(tmp_path, name):
    """As llama.cpp has it for Gemma 3: every layer looks at everything."""
    path, layers = tmp_path / "whole.gguf", CASES[name].fields.get("num_hidden_layers", 2)
    reference = make(name, path, extra={"attention.sliding_window": 0}, sliding_window=512,
                     layer_types=["full_attention"] * layers)
    assert divergence(reference(TOKENS).logits, packed(path)(TOKENS).logits) < LIMIT


@pytest.mark.parametrize("strategy", ["compact", "fast"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2moe", "gemma2", "phi3", "gpt-oss"])
def test_gradients_are_the_references(tiny, name, strategy):
    """To the embeddings, through every matrix, expert and norm."""
    path, reference = tiny(name)
    grads = []
    for model in (reference, packed(path, strategy=strategy)):
        embedded = reference.get_input_embeddings()(TOKENS[:, :16]).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=TOKENS[:, :16]).loss.backward()
        grads.append(embedded.grad)
        model.zero_grad()
    assert (grads[1] - grads[0]).norm() < 1e-4 * grads[0].norm()


@pytest.mark.parametrize("mix", ["F32", "F16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-oss"])
@torch.no_grad()
def test_files_that_are_not_quantized(tiny, name, mix):
    path, reference = tiny(name, mix)
    assert divergence(reference(TOKENS).logits, packed(path)(TOKENS).logits) < LIMIT


@pytest.mark.parametrize("strategy", ["reference", "fast", "auto"])
@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gemma3"])
@torch.no_grad()
def test_every_strategy_is_exact(tiny, name, strategy):
    path, reference = tiny(name)
    model = packed(path, strategy=strategy)
    assert divergence(reference(TOKENS).logits, model(TOKENS).logits) < LIMIT
    assert strategy == "auto" or strategy in model.llmlab.strategy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3moe", "gemma2", "gemma3", "phi3", "starcoder2", "gpt-oss"])
@torch.no_grad()
def test_half_precision_errs_as_dense_half_precision_does(tiny, name, dtype):
    path, reference = tiny(name)
    model, exact = packed(path, dtype=dtype), reference(TOKENS).logits
    assert model.dtype == dtype and model(TOKENS).logits.dtype == dtype
    dense = type(reference)(reference.config)
    dense.load_state_dict(reference.state_dict())
    dense = dense.to(dtype).eval()
    ours, theirs = ((m(TOKENS).logits.float() - exact).norm(dim=-1).median() for m in (model, dense))
    assert ours < 1.25 * theirs         # the median: rounding sends a token here and there to another expert


@torch.no_grad()
def test_fused_tensors_are_taken_in_their_parts(tiny, tmp_path):
    """llama.cpp's converter can write Q, K and V as one tensor, and the experts' gate and up as one."""
    from llmlab.gguf import read_gguf, write_gguf

    path, reference = tiny("qwen3moe")
    file = read_gguf(path)
    tensors = []
    wholes = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
    apart = {part for parts in wholes.values() for part in parts}
    for name, info in file.tensors.items():
        block, _, bare = name.removesuffix(".weight").rpartition(".")
        if bare not in apart:
            tensors.append((name, info.shape, info.type, file.data(name).tobytes()))
    for block in ("blk.0", "blk.1"):
        tensors += [_joined(file, block, parts, whole) for whole, parts in wholes.items()]
    fused = tmp_path / "fused.gguf"
    write_gguf(fused, file.typed_metadata(), tensors)
    assert divergence(reference(TOKENS).logits, packed(fused)(TOKENS).logits) < LIMIT


def _joined(file, block, parts, whole):
    """One tensor of the rows of several, one after another; of different types, so in float32."""
    import numpy as np

    from llmlab.formats import dequantize

    pieces = []
    for part in parts:
        info = file.tensors[f"{block}.{part}.weight"]
        rows = file.data(info.name).reshape(*info.shape[:0:-1], -1)
        pieces.append(dequantize(rows, info.type).numpy())
    joined = np.concatenate(pieces, axis=-2)
    return f"{block}.{whole}.weight", joined.shape[::-1], "F32", np.ascontiguousarray(joined).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["compact", "fast"])
@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gemma3", "gpt-oss"])
@torch.no_grad()
def test_on_a_card(tiny, name, strategy):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    path, reference = tiny(name)
    model = packed(path, device="cuda", strategy=strategy)
    assert {p.device.type for _, p in model.packed()} == {"cuda"} and not any(p.mapped for _, p in model.packed())
    assert divergence(reference(TOKENS).logits, model(TOKENS.cuda()).logits.cpu()) < LIMIT
    greedy = model.generate(TOKENS.cuda(), max_new_tokens=4, do_sample=False).tolist()
    assert greedy == reference.generate(TOKENS, max_new_tokens=4, do_sample=False).tolist()
