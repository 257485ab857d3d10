"""A packed cache on a real model beside transformers' own caches: what it says, and what rounding costs."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

import llmlab
from llmlab.runtime.packed_cache import PackedCache

TEXT = """The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in Paris. Its
base is square, measuring 125 metres on each side. During its construction, it surpassed the Washington Monument to become the
tallest man-made structure in the world, a title it held for 41 years until the Chrysler Building in New York City was finished
in 1930. It was the first structure in the world to surpass both the 200-metre and 300-metre mark in height."""


@pytest.fixture(scope="module")
def model():
    return llmlab.load(llmlab.fetch("smollm2-135m"), device="cpu", dtype="float32", strategy="compact")


@torch.no_grad()
def divergences(model, tokenizer, cache, wanted=None) -> torch.Tensor:
    """Logits of the second half of a text that is read in two pieces, or their divergence from those, in nats a token."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    half = ids.shape[1] // 2
    model(ids[:, :half], past_key_values=cache, logits_to_keep=1)
    found = model(ids[:, half:], past_key_values=cache).logits[0].log_softmax(-1)
    return found if wanted is None else (wanted.exp() * (wanted - found)).sum(-1).mean()


def test_what_a_cache_type_costs_beside_transformers_own(model):
    """KLD of the same text: the more bits the less, and eight bits with a scale for 32 numbers or one number each are no worse
    than transformers' eight bits with a scale for a tensor."""
    model, tokenizer = model
    model.set_attn_implementation("sdpa")
    wanted = divergences(model, tokenizer, DynamicCache(config=model.config))
    theirs = float(divergences(model, tokenizer, QuantizedCache("fp8", model.config), wanted))
    ours = {kv: float(divergences(model, tokenizer, PackedCache(model, kv), wanted)) for kv in ("f32", "q8_0", "fp8", "q4_0")}
    print(f"KLD a token: transformers' fp8 {theirs:.5f}; " + ", ".join(f"{kv} {found:.5f}" for kv, found in ours.items()))
    assert abs(ours["f32"]) < 1e-6 < ours["q8_0"] < ours["fp8"] < ours["q4_0"]
    assert ours["q8_0"] < theirs and ours["fp8"] < 2 * theirs


def test_the_same_answer_as_with_its_own_cache(model):
    model, tokenizer = model
    asked = tokenizer("The capital of France is", return_tensors="pt").input_ids
    given = {"max_new_tokens": 12, "do_sample": False}
    model.set_attn_implementation("sdpa")
    wanted = model.generate(asked, **given)
    assert torch.equal(model.generate(asked, past_key_values=PackedCache(model, "q8_0"), **given), wanted)
