"""transformers models on a packed cache: the same logits as with their own, in every family, padded, cut, chosen among and gone
on with; the bytes that were predicted; and what cannot be is one line."""

import copy
import pickle
import re

import gguf
import pytest
import torch
from runtime_models import CASES, VOCAB, config_of, make, random_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import llmlab
from llmlab.errors import LabError, UnknownName
from llmlab.formats import dequantize
from llmlab.kernels import Pages
from llmlab.memory import CACHE_TYPES, cache_bytes
from llmlab.runtime import masks
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.packed_cache import PackedCache
from llmlab.shapes import from_config

TOKENS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
LEFT, RIGHT = torch.ones(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
LEFT[1, :7], RIGHT[1, 33:] = 0, 0
SMALL = {"hidden_size": 128, "intermediate_size": 128}

_BASE = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 4096, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}
_MLA = {"q_lora_rank": None, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64,
        "first_k_dense_replace": 1, "num_key_value_heads": 4, "num_hidden_layers": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_PAIRS = ["sliding_attention", "full_attention"]
OTHERS = {      # model types that do not run packed, or not from tests/runtime_models.py
    "mistral": {"sliding_window": 16, "num_hidden_layers": 2},
    "deepseek_v3": _MLA,
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "gemma3n_text": {"sliding_window": 16, "layer_types": _PAIRS * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
                     "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.0] * 6, "altup_num_inputs": 2},
    "gemma4_text": {"sliding_window": 16, "layer_types": _PAIRS * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
                    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 64},
    "llama4_text": {"attention_chunk_size": 16, "num_local_experts": 2, "interleave_moe_layer_step": 1,
                    "intermediate_size_mlp": 64},
    "qwen3_next": {**_EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                   "linear_value_head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}
FAMILIES = ("llama", "mixtral", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "starcoder2", "gpt-oss")


def tiny(name: str, **changes):
    """A random model in float32, of eager attention: of the families that run packed, or of OTHERS."""
    if name in CASES:
        model = random_model(CASES[name], **{**SMALL, **changes})
    else:
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**_BASE, **OTHERS[name], **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters():
            if p.ndim > 1:
                p.data = 1.3 * torch.randn_like(p) / p.shape[-1] ** 0.5
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def read(model, cache, mask=None, tokens=TOKENS, cuts=(25, 26)) -> torch.Tensor:
    """Logits of a text that comes in pieces; zeros where `mask` has padding."""
    found, cuts = [], [0, *cuts, tokens.shape[1]]
    for first, last in zip(cuts, cuts[1:], strict=False):
        given = {} if mask is None else {"attention_mask": mask[:, :last]}
        found.append(model(tokens[:, first:last], past_key_values=cache, use_cache=cache is not None, **given).logits)
    found = torch.cat(found, 1)
    return found if mask is None else found * mask[..., None]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def gemma():
    return tiny("gemma2")


# ---- the same logits -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_every_family_as_with_its_own_cache(name):
    """float32 pages are another order of additions and nothing else; eight bits are near."""
    model = tiny(name, **({"num_hidden_layers": 6} if name == "gemma3" else {}))
    wanted = [read(model, DynamicCache(config=model.config), mask) for mask in (None, LEFT)]
    for mask, logits in zip((None, LEFT), wanted, strict=True):
        assert off(read(model, PackedCache(model, "f32"), mask), logits) < 1e-5
    assert 1e-5 < off(read(model, PackedCache(model, "q8_0")), wanted[0]) < 0.3       # experts may change their minds


@pytest.mark.parametrize("kv", sorted(CACHE_TYPES))
def test_a_type_is_its_rounding_and_nothing_else(kv):
    """One layer, whose keys and values do not follow from attention: a cache of transformers' own that holds what the type
    stands for gives the same logits."""
    model = tiny("llama", num_hidden_layers=1)
    rounded = DynamicCache(config=model.config)
    update = rounded.layers[0].update if rounded.layers else None
    rounded.layers[0].update = lambda k, v, *more: update(as_rounded(k, kv), as_rounded(v, kv), *more)
    assert off(read(model, PackedCache(model, kv)), read(model, rounded)) < 1e-5


def as_rounded(x: torch.Tensor, kv: str) -> torch.Tensor:
    plain = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    if kv in plain:
        return x.to(plain[kv]).float()
    if kv == "iq4_nl":              # gguf-py does not make it
        cells, pages = torch.arange(x.shape[2]), Pages("iq4_nl", *x.shape[:2], x.shape[3], x.shape[2])
        pages.write(cells, x)
        return dequantize(pages.blocks(cells), "IQ4_NL", torch.float32)
    kind = gguf.GGMLQuantizationType[kv.upper()]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))


def test_keys_and_values_apart_and_turned(llama):
    wanted = read(llama, DynamicCache(config=llama.config))
    mixed, four = (off(read(llama, PackedCache(llama, kv)), wanted) for kv in (("q8_0", "q4_0"), "q4_0"))
    assert mixed < four
    assert off(read(llama, PackedCache(llama, "f32", rotate=True)), wanted) < 1e-5
    assert off(read(llama, PackedCache(llama, "q4_0", sinks=4, recent=64)), wanted) < 2e-3      # all of it is recent: float16


@pytest.mark.parametrize("settings", [{}, {"sinks": 3}, {"sinks": 3, "recent": 5}, {"rotate": True}])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_a_padded_text_is_read_as_it_would_be_alone(mask, settings):
    """Which tokens are first and recent is counted without padding."""
    model = tiny("llama", num_hidden_layers=1)
    real = mask[1].bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = PackedCache(model, "q4_0", **settings)
    with torch.no_grad():
        together = [model(TOKENS[:, :39], attention_mask=mask[:, :39], position_ids=positions[:, :39], past_key_values=cache),
                    model(TOKENS[:, 39:], attention_mask=mask, position_ids=positions[:, 39:], past_key_values=cache)]
        alone = model(TOKENS[1:, real], past_key_values=PackedCache(model, "q4_0", **settings)).logits
    found = torch.cat([out.logits for out in together], 1)[1:, real]
    # what is recent of a text with padding after it begins to be counted at the padding
    assert off(found, alone) < (0.3 if mask is RIGHT and "recent" in settings else 1e-5)


def test_no_mask_of_every_pair_is_made(gemma, monkeypatch):
    monkeypatch.setattr(masks, "sdpa_mask", None)
    read(gemma, PackedCache(gemma, "f32"), LEFT)
    chunked = tiny("llama4_text", num_hidden_layers=2)          # whose rule is another
    with pytest.raises(TypeError):
        read(chunked, PackedCache(chunked, "f32"), LEFT)


@torch.no_grad()
def test_a_mask_that_is_given_whole(llama):
    """Pairs of tokens, as a bool and as numbers added to the scores."""
    tokens, count = TOKENS[:, :20], 20
    pairs = torch.ones(count, count, dtype=torch.bool).tril()
    pairs[12:, 3:6] = False
    pairs = pairs[None, None].expand(2, 1, -1, -1)
    added = torch.where(pairs, 0.0, torch.finfo(torch.float32).min)
    llama.set_attn_implementation("eager")
    wanted = llama(tokens, attention_mask=added, use_cache=False).logits
    for mask in (pairs, added):
        cache = PackedCache(llama, "f32")
        first = llama(tokens[:, :15], attention_mask=mask[:, :, :15, :15], past_key_values=cache).logits
        rest = llama(tokens[:, 15:], attention_mask=mask[:, :, 15:], past_key_values=cache).logits
        assert off(torch.cat([first, rest], 1), wanted) < 1e-5
    with pytest.raises(LabError, match="adds numbers of its own to the scores; with a packed cache give a bool mask"):
        llama(tokens, attention_mask=added / 2 + 1, past_key_values=PackedCache(llama, "f32"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_without_a_packed_cache_this_attention_is_transformers_own(name):
    model = tiny(name)
    def reads(attention: str, mask) -> list[torch.Tensor]:
        model.set_attn_implementation(attention)
        return [read(model, None, mask, cuts=()), read(model, DynamicCache(config=model.config), mask, cuts=(25,))]

    for mask in (None, LEFT):
        assert max(off(*both) for both in zip(reads("llmlab", mask), reads("eager", mask), strict=True)) < 1e-5


# ---- long texts and bytes ------------------------------------------------------------------------------------

LONG = torch.randint(3, VOCAB, (1, 902), generator=torch.Generator().manual_seed(2))
WINDOW = 200
FEWER = {"gemma3n_text": {"num_hidden_layers": 4, "layer_types": _PAIRS * 2, "activation_sparsity_pattern": [0.0] * 4},
         "llama4_text": {"num_hidden_layers": 2}, "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}}


@pytest.mark.parametrize(("name", "window"), [("mistral", "sliding_window"), ("gemma3n_text", "sliding_window"),
                                              ("llama4_text", "attention_chunk_size")])
def test_a_piece_longer_than_a_ring(name, window):
    """More tokens at once than a window's cells hold, for the layers that share them too; then one by one."""
    model, cuts = tiny(name, **{window: WINDOW}, **FEWER.get(name, {})), (50, 900, 901)
    wanted, cache = read(model, DynamicCache(config=model.config), tokens=LONG, cuts=cuts), PackedCache(model, "f32")
    assert off(read(model, cache, tokens=LONG, cuts=cuts), wanted) < 1e-5
    rings = [layer.cache.cells for layer in cache.layers if getattr(layer, "window", 0)]
    assert rings and set(rings) == {768}


@pytest.mark.parametrize(("name", "kv"), [("gemma2", ("q8_0", "q4_0")), ("gemma4_text", "q5_1"), ("deepseek_v3", "q4_1"),
                                          ("llama", "fp8"), ("lfm2", "iq4_nl"), ("gpt-oss", "q5_0")])
@torch.no_grad()
def test_bytes_are_those_predicted(name, kv):
    """Layer by layer, after pieces of any length: rings no longer than they must be, one row a token of MLA, layers that share
    or have a state. llama.cpp has no fp8; transformers' count of whole pages stands in."""
    changes = {"sliding_window": WINDOW} if name in ("gemma2", "gemma4_text", "gpt-oss") else FEWER.get(name, {})
    model = tiny(name, **changes)
    spec, cache, last = from_config(model.config.to_dict(), name), PackedCache(model, kv), 0
    for count in (1, 199, 56, 1, 243, 400, 1):
        model(LONG[:, last:last + count], past_key_values=cache, logits_to_keep=1)
        last += count
        if kv == "fp8":
            predicted = cache_bytes(spec, -(-last // 256) * 256, kv, engine="transformers")
        else:
            predicted = cache_bytes(spec, last, kv)
        assert [getattr(layer, "bytes", 0) for layer in cache.layers] == list(predicted.by_layer), last
        assert cache.bytes == predicted.kv > 0


@torch.no_grad()
def test_bytes_of_several_texts_and_of_what_stays_in_full(llama):
    spec = from_config(llama.config.to_dict(), "llama")
    cache, near = PackedCache(llama, "q4_0"), PackedCache(llama, "q4_0", sinks=4, recent=28)
    for one in (cache, near):
        llama(TOKENS, past_key_values=one)
    assert cache.bytes == cache_bytes(spec, 512, "q4_0", sequences=2).kv
    config = llama.config
    assert near.bytes - cache.bytes == 2 * 2 * 2 * 32 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


# ---- generating ----------------------------------------------------------------------------------------------

def generate(model, cache=None, tokens=TOKENS[:, :20], mask=LEFT[:, :20], **more) -> torch.Tensor:
    return model.generate(tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=10, pad_token_id=0,
                          eos_token_id=None, **{"do_sample": False, **more})


@pytest.mark.parametrize("more", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 7}], ids=str)
def test_generating_says_the_same(gemma, more):
    gemma.set_attn_implementation("eager")
    wanted = generate(gemma, **more)
    assert torch.equal(generate(gemma, PackedCache(gemma, "f32"), **more), wanted)
    assert gemma.config._attn_implementation == "llmlab"


@pytest.mark.parametrize("way", ["assistant", "lookup", "samples"])
def test_generating_with_guesses_and_samples(gemma, way):
    more = {"assistant": {"assistant_model": tiny("gemma2", num_hidden_layers=1)}, "lookup": {"prompt_lookup_num_tokens": 3},
            "samples": {"do_sample": True, "num_return_sequences": 3}}[way]
    given = {"tokens": TOKENS[:1, :20], "mask": LEFT[:1, :20], **more}
    torch.manual_seed(0)
    wanted = generate(gemma, **given)
    torch.manual_seed(0)
    assert torch.equal(generate(gemma, PackedCache(gemma, "f32"), **given), wanted)


@torch.no_grad()
def test_going_on_after_cutting_choosing_and_copying(gemma):
    """Each against a cache of transformers' own that went the same way."""
    def after(cache, act) -> torch.Tensor:
        cache.activate_past_recording()
        gemma(TOKENS[:, :30], attention_mask=LEFT[:, :30], past_key_values=cache)
        count, length = act(cache)
        mask = torch.ones(count, length + 4, dtype=torch.long)
        mask[:, :7] = LEFT[1, :7] if count != 2 else LEFT[:, :7]
        return gemma(TOKENS[:1, :4].expand(count, -1), attention_mask=mask, past_key_values=cache).logits

    def act(name: str):
        def done(cache):
            if name == "crop":
                cache.crop(-12)
            elif name == "select":
                cache.batch_select_indices(torch.tensor([1]))
            elif name == "repeat":
                cache.batch_select_indices(torch.tensor([1]))
                cache.batch_repeat_interleave(3)
            elif name == "reorder":
                cache.reorder_cache(torch.tensor([0, 1]))
            elif name == "reset":
                cache.reset()
                gemma(TOKENS[:, :30], attention_mask=LEFT[:, :30], past_key_values=cache)
            return {"select": 1, "repeat": 3}.get(name, 2), cache.get_seq_length()
        return done

    for name in ("crop", "select", "repeat", "reorder", "reset"):
        found, wanted = after(PackedCache(gemma, "f32"), act(name)), after(DynamicCache(config=gemma.config), act(name))
        assert off(found, wanted) < 1e-5, name
    cache = PackedCache(gemma, "q8_0")
    gemma(TOKENS, past_key_values=cache)
    twin = copy.deepcopy(cache)
    found = [gemma(TOKENS[:, :3], past_key_values=one).logits for one in (cache, twin)]
    assert torch.equal(*found) and cache.get_seq_length() == twin.get_seq_length() == 43
    assert cache.layers[0].cache.keys.codes.data_ptr() != twin.layers[0].cache.keys.codes.data_ptr()


@torch.no_grad()
def test_a_window_goes_back_as_far_as_its_ring(gemma):
    model = tiny("mistral", sliding_window=WINDOW)
    cache = PackedCache(model, "f32")
    read(model, cache, tokens=LONG, cuts=())
    cache.crop(-500)
    wanted = read(model, DynamicCache(config=model.config), tokens=LONG[:, :405], cuts=(402,))[:, 402:]
    assert off(model(LONG[:, 402:405], past_key_values=cache).logits, wanted) < 1e-5
    assert cache.get_seq_length() == 405
    with pytest.raises(LabError, match="a sliding layer of 200 tokens goes back 512 at most, and 300 are to be forgotten"):
        cache.crop(-300)
    assert cache.get_seq_length() == 405


# ---- what cannot be ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("model", "settings", "says"), [
    ("llama", {"kv": "q3_0"}, "'q3_0' is no cache type; there are f32, f16"),
    ("llama", {"kv": ("q8_0", "f12")}, "'f12' is no cache type"),
    ("llama", {"sinks": -1}, "sinks is -1; give a number of tokens, 0 for none"),
    ("narrow", {}, "needs heads of a multiple of 32 numbers, and here they have 48; choose f16"),
    ("deepseek_v3", {"kv": ("q8_0", "q4_0")}, "an MLA layer keeps one latent row for K and V; give both the same cache type"),
    ("deepseek_v3", {"rotate": True}, "are not for layers that keep one latent row (MLA); leave them out"),
    ("gemma3n_text", {"recent": 8}, "share keys, which goes with recent=0 only"),
    ("falcon_h1", {}, "is 'hybrid', and a packed cache has none of that kind"),
    ("deepseek_v32", {}, "is 'indexed_attention', and a packed cache has none of that kind"),
])
def test_what_cannot_be_is_one_line(llama, model, settings, says):
    config = {"llama": lambda: llama.config, "narrow": lambda: config_of(CASES["llama"], head_dim=48)}.get(
        model, lambda: AutoConfig.for_model(model, **{**_BASE, **OTHERS.get(model, {})} if model in OTHERS else {}))()
    with pytest.raises(LabError, match=re.escape(says)):
        PackedCache(config, **settings)


@torch.no_grad()
def test_models_that_compute_with_keys_themselves_are_told(llama):
    small = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.raises(LabError, match="BloomForCausalLM computes attention in its own code"):
        PackedCache(AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **small)))
    differing = AutoModelForCausalLM.from_config(AutoConfig.for_model("diffllama", **small, intermediate_size=64))
    with pytest.raises(LabError, match="asks them for 'chunk': .* or the model computes with keys itself"):
        differing(TOKENS, past_key_values=PackedCache(differing))
    for attention in ("sdpa", "eager"):
        llama.set_attn_implementation(attention)
        with pytest.raises(LabError, match=r"attention is not set to 'llmlab' \(PackedCache\(model\) does it\)"):
            llama(TOKENS, past_key_values=PackedCache(llama.config))


@torch.no_grad()
def test_texts_that_are_not_those_of_the_cache(llama):
    cache = PackedCache(llama, "q8_0")
    llama(TOKENS[:, :10], attention_mask=LEFT[:, :10], past_key_values=cache)
    with pytest.raises(LabError, match="the cache holds 2 texts and 1 are to be gone on with; begin a new cache, or choose"):
        llama(TOKENS[:1, :1], past_key_values=cache)
    cache = PackedCache(llama, "q8_0")
    llama(TOKENS[:, :10], attention_mask=LEFT[:, :10], past_key_values=cache)
    with pytest.raises(LabError, match="the attention mask says otherwise than before which tokens in the cache are padding"):
        llama(TOKENS[:, 10:11], attention_mask=torch.ones(2, 11), past_key_values=cache)
    assert cache.get_seq_length() == 10 and llama(TOKENS[:, 10:11], past_key_values=cache).logits.isfinite().all()
    with pytest.raises(LabError, match="give minus the number of tokens to forget"):
        cache.crop(3)


def test_gradients_do_not_pass(llama):
    llama.train()
    with pytest.raises(LabError, match=r"gradients do not pass a packed cache; train without one \(use_cache=False\)"):
        llama(TOKENS, past_key_values=PackedCache(llama))
    llama.eval()
    assert llama(TOKENS, past_key_values=PackedCache(llama)).logits.shape == (2, 40, VOCAB)     # read without no_grad


# ---- llmlab.load ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "tiny.gguf"
    make("gemma2", path, **SMALL)
    return path


@torch.no_grad()
def test_a_loaded_model_keeps_packed_by_itself(file):
    plain, packed = (llmlab.load(file, device="cpu", dtype="float32", kv=kv)[0] for kv in (None, "f32"))
    assert plain.llmlab.kv is None and packed.llmlab.kv == ("f32", "f32")
    found, wanted = packed(TOKENS), plain(TOKENS)
    assert isinstance(found.past_key_values, PackedCache) and isinstance(wanted.past_key_values, DynamicCache)
    assert off(found.logits, wanted.logits) < 1e-5
    for more in ({}, {"num_beams": 2}):
        assert torch.equal(generate(packed, **more), generate(plain, **more))
    assert packed(TOKENS, use_cache=False).past_key_values is None
    assert isinstance(packed(TOKENS, None, None, DynamicCache(config=packed.config)).past_key_values, DynamicCache)
    out = generate(packed, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, PackedCache) and out.past_key_values.kv == ("f32", "f32")
    own = PackedCache(packed, ("q8_0", "q4_0"), rotate=True)
    assert packed(TOKENS, past_key_values=own).past_key_values is own and own.bytes > 0


@pytest.mark.parametrize("kv", ["q4_0", ("q8_0", "iq4_nl")])
@torch.no_grad()
def test_the_lean_decoder_says_the_same_on_the_same_pages(tmp_path, kv):
    """Two engines, one layer, whose keys and values do not follow from attention: rounded alike (Llama's are not: its file has
    the rows of a head in another order than transformers)."""
    make("qwen2", tmp_path / "one.gguf", "F32", num_hidden_layers=1, **SMALL)
    model = llmlab.load(tmp_path / "one.gguf", dtype="float32", device="cpu", strategy="compact", kv=kv)[0]
    decoder = Decoder.open(tmp_path / "one.gguf", torch.float32, "compact", kv=kv)
    found = torch.cat([decoder.logits(TOKENS[0, :30].tolist()), decoder.logits(TOKENS[0, 30:].tolist())])
    assert off(found, read(model, None, tokens=TOKENS[:1], cuts=())[0]) > 1e-3
    assert off(found, read(model, PackedCache(model, kv), tokens=TOKENS[:1])[0]) < 1e-5


@torch.no_grad()
def test_a_copy_keeps_packed_too(file, tmp_path):
    model = llmlab.load(file, device="cpu", dtype="float32", kv="q8_0")[0]
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    assert model.num_parameters() == twin.num_parameters() and model.get_memory_footprint() == model.llmlab.resident_bytes
    with pytest.raises(LabError, match="packed weights are not pickled"):
        pickle.dumps(model)
    folder = tmp_path / "folder"
    tiny("qwen2").save_pretrained(folder)
    model = llmlab.load(folder, dtype="float32", device="cpu", kv=("q8_0", "q4_0"))[0]
    again = pickle.loads(pickle.dumps(model))
    assert model.llmlab.kv == ("q8_0", "q4_0") and again(TOKENS).past_key_values.kv == ("q8_0", "q4_0")
    assert torch.equal(again(TOKENS).logits, copy.deepcopy(model)(TOKENS).logits)


def test_what_learns_keeps_numbers(file):
    from peft import LoraConfig, get_peft_model

    base = llmlab.load(file, device="cpu", dtype="float32", kv="q8_0")[0]
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"))
    out = tuned(input_ids=TOKENS, labels=TOKENS)
    assert isinstance(out.past_key_values, DynamicCache)
    out.loss.backward()
    assert all(p.grad is not None for name, p in tuned.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        assert isinstance(tuned.eval()(input_ids=TOKENS).past_key_values, PackedCache)


def test_a_type_that_cannot_be_is_said_before_anything_is_loaded(file, tmp_path):
    with pytest.raises(UnknownName, match="'q9' is no cache type"):
        llmlab.load(tmp_path / "none.gguf", kv="q9")
    make("llama", tmp_path / "narrow.gguf", "Q8_0", head_dim=48)
    with pytest.raises(LabError, match="a q8_0 cache needs heads of a multiple of 32 numbers, and here they have 48"):
        llmlab.load(tmp_path / "narrow.gguf", device="cpu", kv="q8_0")
