"""The lean decoder on a real model's file: transformers' logits, and its text, over the same blocks."""

import pytest
import torch
from runtime_models import divergence

import llmlab
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.generating import Options, stream

pytestmark = pytest.mark.peers

LIMIT = 1e-7        # nats, at the worst position
TEXT = "The lean decoder reads the very same file, token by token, and it must say just what transformers says of it: "


@pytest.fixture(scope="module")
def loaded(smollm2):
    return llmlab.load(smollm2, device="cpu", dtype="float32", strategy="reference")


@pytest.mark.parametrize("strategy", ["compact", "fast"])
def test_the_logits_are_transformers(smollm2, loaded, strategy):
    model, tokenizer = loaded
    ids = tokenizer(4 * TEXT)["input_ids"]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    decoder = Decoder.open(smollm2, dtype=torch.float32, strategy=strategy)
    assert divergence(wanted, decoder.logits(ids)) < LIMIT
    decoder.forget()
    assert divergence(wanted[:9], decoder.logits(ids[:9])) < LIMIT
    assert divergence(wanted[9:16], torch.stack([decoder.read([token]) for token in ids[9:16]])) < LIMIT
    assert decoder.keep(ids[:13]) == 12 and divergence(wanted[12:], decoder.logits(ids[12:])) < LIMIT


def test_the_text_is_transformers(smollm2, loaded):
    model, tokenizer = loaded
    options, asked = Options(temperature=0, max_tokens=10), [{"role": "user", "content": "Why is the sky blue?"}]
    decoder = Decoder.open(smollm2, dtype=torch.float32, strategy="compact")
    ours = "".join(stream(decoder, tokenizer, asked, options, memory=decoder))
    assert ours == "".join(stream(model, tokenizer, asked, options))
