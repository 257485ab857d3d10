"""llmlab.load against llama.cpp on the same files: names, permutations, rope, windows, experts of each architecture are right.

In float32 both do the same arithmetic. On quantized weights llama.cpp rounds the activations, too: to 8 bits in blocks of 32 or
256 (ggml's vec_dot_type), which is all that lies between the two: rounding ours in the same way brings them together.
"""

import numpy as np
import pytest
import torch
from llama_engine import llama_cpp, loaded, log
from runtime_models import CASES, VOCAB, divergence, make

import llmlab
from llmlab.formats import FORMATS
from llmlab.kernels import linear
from llmlab.runtime import modules

pytestmark = pytest.mark.peers

TOKENS = torch.randint(3, VOCAB, (1, 100), generator=torch.Generator().manual_seed(1))
Q8_K = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


def llama_logits(path, tokens: list[int]) -> torch.Tensor:
    """llama.cpp's logits at every position [tokens, vocabulary]; its cache in float32, no flash attention."""
    with loaded(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = 0
        context = llama_cpp.llama_init_from_model(model, params)
        assert context, log()
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            assert llama_cpp.llama_decode(context, batch) == 0, log()
            vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens) * vocab,))
            return torch.from_numpy(found.reshape(len(tokens), vocab).copy())
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def as_llama_cpp_multiplies(x, packed, bias=None, expert=None) -> torch.Tensor:
    """kernels.linear on activations rounded as ggml rounds them before it multiplies by weights of this format."""
    one = packed if expert is None else packed[expert]
    if one.format in ("F32", "F16", "BF16"):
        return linear(x.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[one.format]).float(), one, bias)
    blocks = x.unflatten(-1, (-1, 256 if one.format in Q8_K else 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.nan_to_num(blocks / step).round()
    near = codes * (step if one.format in Q8_K else step.half().float())
    y = linear(near.flatten(-2), one, bias)
    if one.format in ("Q4_1", "Q5_1"):      # what a block's minimum is multiplied by is a sum, rounded to half precision
        layout = FORMATS[one.format]
        minimum = layout.unpack(one.blocks.reshape(-1, layout.block_bytes)).offset.view(one.rows, -1)
        y = y + ((codes * step).sum(-1).half().float() - near.sum(-1)) @ minimum.T
    return y


def packed(path, **settings):
    return llmlab.load(path, device="cpu", dtype="float32", strategy="compact", **settings)[0]


def both(name, path) -> tuple[torch.nn.Module, torch.Tensor]:
    """Our model with what llama.cpp does otherwise in all formats alike, and llama.cpp's logits.

    It rounds the bounds of gpt-oss's YaRN, which OpenAI's code and transformers do not, and looks gelu up in a table of
    half-precision numbers.
    """
    model = packed(path)
    if name == "gpt-oss":
        model.config.rope_parameters["truncate"] = True
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    for layer in model.model.layers:
        for part, act in (("act_fn", getattr(layer.mlp, "act_fn", None)), ("act", getattr(layer.mlp, "act", None))):
            if act is not None and "gelu" in type(act).__name__.lower():
                setattr(layer.mlp, part, Table())
    return model, llama_logits(path, TOKENS[0].tolist())


class Table(torch.nn.Module):
    """gelu as ggml has it: half precision in and out between -10 and 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, found, x.clamp(min=0))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_float32_logits_are_llama_cpps(tmp_path, name):
    make(name, tmp_path / "tiny.gguf", "F32")
    model, theirs = both(name, tmp_path / "tiny.gguf")
    ours = model(TOKENS).logits[0]
    assert divergence(theirs, ours) < 1e-6
    # The same best token, but where two are as good as each other: there the last bits decide, and they are the processor's.
    best = theirs.max(-1).values - theirs.gather(-1, ours.argmax(-1)[:, None])[:, 0]
    assert best.max() < 1e-3 and (best > 0).sum() <= 1


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_between_us_on_quantized_weights_are_its_8_bit_activations(tmp_path, name, monkeypatch, capsys):
    make(name, tmp_path / "tiny.gguf")
    model, theirs = both(name, tmp_path / "tiny.gguf")
    ours = model(TOKENS).logits[0]
    monkeypatch.setattr(modules, "linear", as_llama_cpp_multiplies)
    rounded = model(TOKENS).logits[0]
    apart, together = (((theirs - x).norm(dim=-1) / theirs.norm(dim=-1)).median() for x in (ours, rounded))
    agree = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    with capsys.disabled():
        print(f"\n{name}: top-1 {agree:.0%}, worst KLD {divergence(theirs, ours):.1e}, half of the positions off by "
              f"{apart:.2%}; with its rounding worst KLD {divergence(theirs, rounded):.1e}, off by {together:.2%}")
    assert agree > 0.8 and together < 0.75 * apart          # what is left are codes that round the other way
