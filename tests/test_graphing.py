"""One token's layers as a step of static tensors: what the decoder computes anyhow; capture, replay, what stands in the way."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from runtime_models import VOCAB, make

from llmlab.runtime import decoder as decoders
from llmlab.runtime import graphing
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.layers import norm

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import bench_gpu as bench

TEXT = [1, 17, 5, 200, 31, 8, 99, 4, 120, 64, 7, 300]


# -- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "phi3", "gpt-oss", "starcoder2"])
def test_a_step_gives_what_the_decoder_gives(tmp_path, name):
    """Norms of heads, windows, soft caps, sinks, biases; past the end of windows and of the first cache."""
    make(name, tmp_path / "model.gguf")
    plain, stepped = (Decoder.open(tmp_path / "model.gguf", strategy="compact") for _ in range(2))
    assert not plain.graphed
    stepped.graphed = True
    for one in (plain, stepped):
        one.read(TEXT)
    for token in (3, 9, 27, 81):
        a, b = plain.read([token]), stepped.read([token])
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-4) and a.shape == (VOCAB,)
    assert stepped.step.why == "not captured: CUDA graphs need an NVIDIA or AMD card, this is cpu" and plain.step is None
    assert stepped.tokens == plain.tokens == [*TEXT, 3, 9, 27, 81]


def test_layers_of_a_kind_are_compiled_once_and_whole(tmp_path, monkeypatch):
    """torch.compile sees no break in a layer, whose kernels are Python objects, and one kind of layer is compiled once."""
    from torch._dynamo.testing import CompileCounter
    bench.write_model(tmp_path / "model.gguf", bench.LLAMA_3_8B | {
        "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 384}, "Q4_K_M")
    seen, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend=seen, **options))
    plain, stepped = (Decoder.open(tmp_path / "model.gguf", torch.bfloat16, "fast") for _ in range(2))
    stepped.graphed = stepped.fused = True
    for token in TEXT[:3]:
        assert torch.allclose(plain.read([token]), stepped.read([token]), atol=1e-2, rtol=1e-2)
    assert seen.frame_count == 2 and stepped.step.why.startswith("fused by torch.compile; not captured")
    torch._dynamo.reset()


def test_what_cannot_be_compiled_runs_as_it_is(tmp_path, monkeypatch):
    def refuses(function, **options):
        raise RuntimeError("\n Cannot find a working triton installation.\nmore")

    make("llama", tmp_path / "model.gguf")
    monkeypatch.setattr(torch, "compile", refuses)
    plain, stepped = (Decoder.open(tmp_path / "model.gguf", strategy="compact") for _ in range(2))
    stepped.graphed = stepped.fused = True
    assert torch.allclose(plain.read([5]), stepped.read([5]), atol=2e-4, rtol=1e-4)
    assert stepped.step.why.startswith("not fused: Cannot find a working triton installation.; not captured")


def test_it_is_made_anew_where_the_cache_grows_or_is_forgotten(tmp_path, monkeypatch):
    make("llama", tmp_path / "model.gguf")
    monkeypatch.setattr(decoders, "_ROOM", 16)
    plain, stepped = (Decoder.open(tmp_path / "model.gguf", strategy="compact") for _ in range(2))
    stepped.graphed = True
    steps = []
    for token in TEXT + TEXT:
        assert torch.allclose(plain.read([token]), stepped.read([token]), atol=2e-4, rtol=1e-4)
        if not steps or stepped.step is not steps[-1]:
            steps.append(stepped.step)
    assert len(steps) == 2 and stepped.cells == 32
    for one in (plain, stepped):
        assert one.keep([*TEXT, 5]) == len(TEXT)
    assert torch.allclose(plain.read([5]), stepped.read([5]), atol=2e-4, rtol=1e-4) and stepped.step is steps[-1]
    stepped.forget()
    assert stepped.step is None and torch.allclose(stepped.read(TEXT), Decoder.open(
        tmp_path / "model.gguf", strategy="compact").read(TEXT), atol=2e-4, rtol=1e-4)


def test_cells_that_hold_no_number_change_nothing(tmp_path):
    make("llama", tmp_path / "model.gguf")
    plain, stepped = (Decoder.open(tmp_path / "model.gguf", strategy="compact") for _ in range(2))
    stepped.graphed = True
    for one in (plain, stepped):
        one.read(TEXT)
        with torch.inference_mode():
            for cache in one.caches:
                cache[:, :, len(TEXT):] = float("nan")
    assert torch.allclose(plain.read([3]), stepped.read([3]), atol=2e-4, rtol=1e-4)


def test_on_another_device_every_tensor_is_there(tmp_path):
    """torch's meta device has shapes, types and devices and no numbers."""
    make("gemma2", tmp_path / "model.gguf")
    stepped = Decoder.open(tmp_path / "model.gguf", dtype=torch.bfloat16, strategy="fast", device="meta")
    stepped.graphed = True
    stepped.read(TEXT)
    logits = stepped.read([3])
    assert logits.device.type == "meta" and logits.shape == (VOCAB,) and stepped.step.why.endswith("this is meta")


@pytest.mark.parametrize("rows", [(), (6,)])
def test_a_cards_norm_is_the_processors(rows):
    x, weight, n, eps = torch.randn(3, *rows, 64) / 50, torch.rand(*rows, 64) + 0.5, 64, 1e-5
    ours = {"norm": weight * n ** 0.5, "norm.eps": torch.tensor((n * eps) ** 0.5)}
    assert torch.allclose(norm(x, ours, "norm"), norm(x, {"norm": weight, "norm.eps": eps}, "norm"), rtol=1e-5)


# -- capture --------------------------------------------------------------------------------------------------------


class Card:
    """What torch.cuda is asked for, done in order on the CPU: a graph replays the function as it was captured."""

    def __init__(self, monkeypatch, fault=None):
        self.said, self.fault, card = [], fault, self

        class Stream:
            def wait_stream(self, other):
                card.said.append("waits")

        class Graph:
            def replay(self):
                card.said.append("replay")

        @contextlib.contextmanager
        def graph(made, stream, capture_error_mode):
            card.said.append("capture")
            yield
            if card.fault:
                raise card.fault

        for name in ("current_stream", "Stream"):
            monkeypatch.setattr(torch.cuda, name, lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: card.said.append("sync"))


class OnACard(torch.Tensor):
    """A tensor that says it is on a card."""

    device = torch.device("cuda", 0)


def test_captured_once_and_replayed(monkeypatch):
    card, calls = Card(monkeypatch), []
    held, at = torch.zeros(3).as_subclass(OnACard), torch.zeros(1, dtype=torch.int64)
    replay = graphing.Replay(lambda x, at: calls.append(1) or x + at, held, at)
    assert replay.why == "captured as a CUDA graph" and len(calls) == graphing.WARM + 1
    assert card.said == ["waits", "waits", "capture"]
    first = replay(torch.ones(3), 5)
    assert first is replay(torch.full((3,), 2.0), 6) and len(calls) == graphing.WARM + 1
    assert card.said[3:] == ["replay", "replay"] and held.tolist() == [2, 2, 2] and at.tolist() == [6]


def test_what_cannot_be_captured_is_called(monkeypatch):
    card = Card(monkeypatch, RuntimeError("CUDA error: not permitted when stream is capturing\nmore"))
    held = torch.zeros(3).as_subclass(OnACard)
    replay = graphing.Replay(lambda x: x * 2, held)
    assert replay.why == "not captured: CUDA error: not permitted when stream is capturing" and card.said[-1] == "sync"
    assert replay(torch.ones(3)).tolist() == [2, 2, 2] and "replay" not in card.said


def test_as_many_values_as_inputs():
    replay = graphing.Replay(lambda x: x, torch.zeros(2))
    with pytest.raises(ValueError):
        replay(torch.ones(2), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["fast", "compact"])
def test_on_a_card(tmp_path, strategy):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    for name in ("llama", "gemma2", "gpt-oss"):
        make(name, tmp_path / f"{name}.gguf")
        here = Decoder.open(tmp_path / f"{name}.gguf", strategy="reference")
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            there = Decoder.open(tmp_path / f"{name}.gguf", dtype=dtype, strategy=strategy, device="cuda")
            here.forget(), here.read(TEXT), there.read(TEXT)
            for token in (3, 9, 27):
                p, q = (one.read([token]).double().cpu().log_softmax(-1) for one in (here, there))
                assert float((p.exp() * (p - q)).sum()) < limit, (name, dtype)
            print(name, dtype, there.step.why)
            there = Decoder.open(tmp_path / f"{name}.gguf", dtype=dtype, strategy=strategy, device="cuda", compile=True)
            here.forget()
            p, q = (one.read([token]).double().cpu().log_softmax(-1) for one in (here, there))
            assert there.fused and float((p.exp() * (p - q)).sum()) < limit
            print(name, dtype, there.step.why)
            if strategy == "fast" and name != "gpt-oss":        # its experts are chosen on the processor
                assert there.step.why.endswith("; captured as a CUDA graph")
