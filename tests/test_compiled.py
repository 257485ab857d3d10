"""Layers compiled for this processor give what they give uncompiled; what cannot be compiled says so and runs all the same."""

import copy
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from runtime_models import CASES, VOCAB, divergence, make

import llmlab
from llmlab import kernels
from llmlab.errors import LabError
from llmlab.kernels import words
from llmlab.runtime import compiling
from llmlab.runtime.compiling import NotPackaged, package
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.delegating import DecoderCache
from llmlab.runtime.unlocked import unlocked

LIMIT = 1e-7        # nats, at the worst position
READ = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
MODELS = {"llama": "few", "gemma2": "Q8_0", "starcoder2": "Q8_0"}     # three layouts; windows, soft caps, four norms; biases


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder of this file's own, so that everything is compiled here once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny(cache, tmp_path_factory):
    """The path of a tiny model."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str):
        if name not in made:
            made[name] = folder / f"{name}.gguf"
            make(name, made[name], MODELS.get(name, "Q8_0"))
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_uncompiled(tiny, name):
    plain = Decoder.open(tiny(name), dtype=torch.float32, strategy="compact")
    decoder = Decoder.open(tiny(name), dtype=torch.float32, compile=True)
    assert decoder.compiled and decoder.strategy == "compiled" and decoder.why.startswith("compiled for")
    wanted = plain.logits(READ)
    one_by_one = torch.cat([decoder.logits([token]) for token in READ[:20]])
    rest = decoder.logits(READ[20:50])
    after = torch.stack([decoder.read([token]) for token in READ[50:]])
    assert divergence(wanted, torch.cat([one_by_one, rest, after])) < LIMIT
    assert decoder.keep([*READ[:50], 0]) == 50 and torch.equal(decoder.read_each(READ[50:]), after)

    assert decoder.keep([*READ[:30], 7, 8]) == 30
    plain.keep([*READ[:30], 7, 8])
    assert divergence(plain.logits([7, 8]), torch.stack([decoder.read([7]), decoder.read([8])])) < LIMIT


def test_compact_stays_near_the_files_bytes(cache, tmp_path):
    path = tmp_path / "small.gguf"
    make("llama", path, "small")
    plain = Decoder.open(path, dtype=torch.float32, strategy="compact")
    decoder = Decoder.open(path, dtype=torch.float32, strategy="compact", compile=True)
    assert decoder.compiled and "the file's own scales" in decoder.why
    alone = torch.cat([decoder.logits([token]) for token in READ[:10]])
    assert divergence(plain.logits(READ[:40]), torch.cat([alone, decoder.logits(READ[10:40])])) < LIMIT
    for held in (value for part in decoder.compiled.layers for value in part.values() if isinstance(value, words.Words)):
        cols = held.cols
        assert held.bytes * 8 == pytest.approx(held.rows * cols * held.layout.bits_per_weight(cols))


@pytest.mark.parametrize("name, kv, rotate", [("llama", "q8_0", True), ("starcoder2", ("q4_0", "q8_0"), False)])
def test_a_packed_cache_is_read_and_written(tiny, name, kv, rotate):
    """Each token meets the same cells: what float noise makes of a code here and there is not carried on."""
    plain = Decoder.open(tiny(name), dtype=torch.float32, strategy="compact", kv=kv, rotate=rotate)
    decoder = Decoder.open(tiny(name), dtype=torch.float32, compile=True, kv=kv, rotate=rotate)
    assert decoder.compiled and decoder.why.startswith("compiled for")
    text = READ * 5
    plain.read(text[:250]), decoder.read(text[:250])
    other = blocks = 0
    for at, token in enumerate(text[250:265], 250):
        for one, two in zip(decoder.caches, plain.caches, strict=True):
            for mine, theirs in zip(one.tensors, two.tensors, strict=True):
                mine[:, :theirs.shape[1]] = theirs
        assert divergence(plain.read([token])[None], decoder.read([token])[None]) < (LIMIT if kv == "q8_0" else 1e-5)
        for one, two in zip(decoder.caches, plain.caches, strict=True):
            cell = one.cell(torch.tensor([at]))
            assert one.length == two.length and one.positions[0, cell] == at
            for mine, theirs in ((one.keys, two.keys), (one.values, two.values)):
                same = (mine.blocks(cell) == theirs.blocks(cell)).flatten()
                other, blocks = other + int((~same).sum()), blocks + len(same)
    assert other < blocks / 500
    # What is forgotten is not looked at, and the first token of all has nothing to look at.
    assert decoder.keep([*text[:255], 7]) == 255
    plain.keep([*text[:255], 7])
    assert divergence(plain.read([7])[None], decoder.read([7])[None]) < 1e-4
    decoder.forget()
    plain.forget()
    alone = torch.stack([decoder.read([token]) for token in text[:5]])
    assert divergence(plain.logits(text[:2]), alone[:2]) < 1e-4
    decoder.forget()
    assert torch.equal(decoder.read_each(text[:5]), alone)


def test_a_packed_cache_that_cannot_be_compiled_is_read_all_the_same(tiny):
    why = Decoder.open(tiny("llama"), compile=True, kv="q8_0", recent=32).why
    assert why.startswith("not compiled: tokens in full precision lie beside a packed cache")
    assert "of 256 cells at most" in Decoder.open(tiny("llama"), compile=True, kv="q8_0", context=200).why


def test_a_second_time_nothing_is_compiled(tiny, monkeypatch):
    Decoder.open(tiny("llama"), compile=True, dtype=torch.float32)
    monkeypatch.setattr(compiling, "_compile", None)
    said = []
    assert Decoder.open(tiny("llama"), compile=True, dtype=torch.float32, progress=said.append).compiled and not said


def test_load_hands_one_text_to_the_decoder(tiny):
    model, _ = llmlab.load(tiny("llama"), dtype="float32", compile=True)
    plain, _ = llmlab.load(tiny("llama"), dtype="float32", strategy="compact")
    assert model.llmlab.strategy == "compiled" and model.llmlab.resident_bytes == model.decoder.resident_bytes
    ids = torch.tensor([READ[:40]])
    with torch.no_grad():
        wanted = plain(ids).logits
        found = model(ids)
        assert isinstance(found.past_key_values, DecoderCache) and divergence(wanted, found.logits) < LIMIT
        assert model(ids, logits_to_keep=1).logits.shape == (1, 1, VOCAB)
        # Two texts by turns: what one overwrote in the decoder is read again.
        other = model(ids.flip(1)[:, :9], use_cache=True)
        onward = model(torch.tensor([[5]]), past_key_values=found.past_key_values).logits
        assert divergence(plain(torch.tensor([[*READ[:40], 5]])).logits[:, -1], onward[:, -1]) < LIMIT
        again = model(torch.tensor([[6]]), past_key_values=other.past_key_values).logits
        assert divergence(plain(torch.cat([ids.flip(1)[:, :9], torch.tensor([[6]])], 1)).logits[:, -1], again[:, -1]) < LIMIT

    greedy = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    assert model.generate(ids, **greedy).tolist() == plain.generate(ids, **greedy).tolist()
    torch.manual_seed(3)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    assert sampled.tolist() == plain.generate(ids, max_new_tokens=8, do_sample=True).tolist()


def test_load_keeps_to_transformers_for_everything_else(tiny):
    model, _ = llmlab.load(tiny("llama"), dtype="float32", compile=True)
    plain, _ = llmlab.load(tiny("llama"), dtype="float32", strategy="compact")
    two = torch.tensor([READ[:8], READ[8:16]])
    with torch.no_grad():
        assert torch.equal(model(two).logits, plain(two).logits)
        told = model(two[:1], output_hidden_states=True)
        assert len(told.hidden_states) == 3 and not isinstance(told.past_key_values, DecoderCache)
        mask = torch.tensor([[0, *[1] * 7]])
        assert torch.equal(model(two[:1], attention_mask=mask).logits, plain(two[:1], attention_mask=mask).logits)
        mine = model(two[:1]).past_key_values
        with pytest.raises(LabError, match="one text's tokens alone"):
            model(two[:1], past_key_values=mine, output_attentions=True)
        seen = []
        hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        model(two[:1])
        assert seen
        hook.remove()
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert model.generate(two[:1], **beams).tolist() == plain.generate(two[:1], **beams).tolist()
    copied = copy.deepcopy(model)
    assert not hasattr(copied, "decoder") and divergence(plain(two).logits, copied(two).logits) < LIMIT


def test_generating_in_other_ways_goes_by_transformers(tiny):
    model, _ = llmlab.load(tiny("llama"), dtype="float32", compile=True)
    plain, _ = llmlab.load(tiny("llama"), dtype="float32", strategy="compact")
    ids = torch.tensor([READ[:8]])
    told = {"output_hidden_states": True, "return_dict_in_generate": True}
    for settings in ({"num_return_sequences": 2, "do_sample": True}, told, {"use_cache": False},
                     {"attention_mask": torch.tensor([[0, 0, *[1] * 6]])}):
        found = []
        for one in (model, plain):
            torch.manual_seed(1)
            said = one.generate(ids, max_new_tokens=5, **{"do_sample": False, **settings})
            found.append((said if isinstance(said, torch.Tensor) else said.sequences).tolist())
        assert found[0] == found[1], settings
    with torch.no_grad():
        places = torch.arange(8)[None] * 3
        assert torch.equal(model(ids, position_ids=places).logits, plain(ids, position_ids=places).logits)
        assert isinstance(model(ids, return_dict=False), tuple)
        logits = model(ids).logits
        logits[0, -1, 0] = -1                       # numbers like any other
        prefix = model(ids, use_cache=True).past_key_values
        ends = [model(torch.tensor([[token]]), past_key_values=copy.deepcopy(prefix)).logits[0, -1] for token in (5, 6)]
        for token, end in zip((5, 6), ends, strict=True):
            assert divergence(plain(torch.tensor([[*READ[:8], token]])).logits[0, -1], end) < LIMIT


def test_what_is_changed_inside_is_not_passed_by(tiny):
    ids = torch.tensor([READ[:8]])
    for change in (lambda m: setattr(m, "lm_head", torch.nn.Linear(256, 7)), lambda m: m.model.norm.weight.mul_(2),
                   lambda m: setattr(m.model.layers[1], "forward", lambda x, *_, **__: x)):
        model, _ = llmlab.load(tiny("llama"), dtype="float32", compile=True)
        with torch.no_grad():
            before = model(ids).logits
            change(model)
            after = model(ids).logits
        assert before.shape != after.shape or not torch.allclose(before, after, atol=1e-3)


def test_threads_take_turns(tiny):
    model, _ = llmlab.load(tiny("llama"), dtype="float32", compile=True)
    prompts = [torch.tensor([READ[at:at + 9]]) for at in (0, 10, 20)]
    greedy = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False}
    alone = [model.generate(prompt, **greedy).tolist() for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: model.generate(prompt, **greedy).tolist(), prompts))
    assert alone == together


def test_an_adapter_is_not_passed_by(tiny):
    peft = pytest.importorskip("peft")
    model, _ = llmlab.load(tiny("llama"), dtype="float32", compile=True)
    ids = torch.tensor([READ[:12]])
    with torch.no_grad():
        before = model(ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        assert not torch.allclose(wrapped(ids).logits, before, atol=1e-4)
    from llmlab.runtime.generating import Memory, memory_of
    assert isinstance(memory_of(wrapped), Memory)


def test_experts_and_other_ways_run_uncompiled_and_say_so(tiny):
    decoder = Decoder.open(tiny("mixtral"), dtype=torch.float32, compile=True)
    assert decoder.compiled is None and decoder.why.startswith("not compiled: which experts a token takes")
    assert decoder.read(READ[:5]).shape == (VOCAB,)
    assert "to compare with" in Decoder.open(tiny("llama"), strategy="reference", compile=True).why
    why = Decoder.open(tiny("llama"), strategy="compact", compile=True).why
    assert why.startswith("not compiled: no way is known to lay BF16 as words within 1.15 of the file")


@pytest.fixture
def no_compiler(tmp_path):
    """As on a machine without g++ and clang++."""
    from torch._inductor import config
    with config.patch({"cpp.cxx": (None, str(tmp_path / "no-such-compiler"))}):
        yield


def test_without_a_compiler_it_runs_and_says_so(tiny, tmp_path, monkeypatch, no_compiler):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    model, _ = llmlab.load(tiny("llama"), dtype="float32", compile=True)
    assert "not compiled: no C++ compiler" in model.llmlab.why
    assert model(torch.tensor([READ[:4]])).logits.shape == (1, 4, VOCAB)


def test_a_folder_is_not_compiled(tmp_path):
    with pytest.raises(LabError, match="compile=True is for GGUF files"):
        llmlab.load(tmp_path, compile=True)


# ---- packages ------------------------------------------------------------------------------------------------

def double(x):
    return (x * 2,)


def test_a_package_is_kept_made_again_where_damaged_and_named_after_its_source(cache):
    said, x = [], torch.ones(3, 4)
    first = package(double, [x], "double", [double], {0: {0: "rows"}}, said.append)
    assert torch.equal(first(torch.ones(7, 4))[0], torch.full((7, 4), 2.0))
    assert package(double, [x], "double", [double], {0: {0: "rows"}}, said.append).path == first.path and len(said) == 1
    assert os.listdir(first.path.parent).count(first.path.name) == 1
    bytes = bytearray(first.path.read_bytes())
    bytes[len(bytes) // 2] ^= 255
    first.path.write_bytes(bytes)
    again = package(double, [x], "double", [double], {0: {0: "rows"}}, said.append)
    assert len(said) == 2 and torch.equal(again(x)[0], x * 2)
    assert compiling._place("double", [x], [double], {}) != compiling._place("double", [x], [package], {})


def test_other_threads_run_on_while_an_unlocked_package_does(cache):
    """With Python's lock held none of them comes to its turn before the end."""
    made = package(double, [torch.ones(3, 4)], "double", [double], {0: {0: "rows"}})
    free, x = unlocked(made.path), torch.ones(10_000_000, 4)
    assert torch.equal(made(x)[0], free(x)[0]) and free is unlocked(made.path)
    with pytest.raises(LabError, match="a package of 1 tensors was given 0"):
        free()

    def longest(run) -> float:
        """The longest time in which another thread had no turn, as a share of the run's."""
        turns, over = [], threading.Event()

        def count():
            while not over.wait(0.001):
                turns.append(time.perf_counter())

        other = threading.Thread(target=count)
        other.start()
        start = time.perf_counter()
        run(x)
        end = time.perf_counter()
        over.set()
        other.join()
        seen = [start, *(turn for turn in turns if start < turn < end), end]
        return max(after - before for before, after in pairwise(seen)) / (end - start)

    assert min(longest(free) for _ in range(20)) < 0.5 < max(longest(made) for _ in range(5))


def test_a_cache_that_is_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotPackaged, match="cannot be kept in .*file.compiled .*LLMLAB_CACHE"):
        package(double, [torch.ones(3, 4)], "double", [double])


def test_what_a_killed_process_left_is_swept(tmp_path):
    old, new = tmp_path / "making-old", tmp_path / "making-new"
    old.mkdir(), new.mkdir()
    os.utime(old, (1, 1))
    compiling._sweep(tmp_path)
    assert new.exists() and not old.exists()


def test_what_cannot_be_compiled_or_comes_out_wrong_is_not_kept(cache, monkeypatch):
    def asks(x):
        return (x if x.sum() > 3 else -x,)

    with pytest.raises(NotPackaged, match="the asks cannot be compiled here"):
        package(asks, [torch.ones(3)], "asks", [asks])
    calls = []

    def moody(x):
        calls.append(1)
        return (x * len(calls),)        # traced first, asked again later

    with pytest.raises(NotPackaged, match="other numbers"):
        package(moody, [torch.ones(5)], "moody", [moody])
    assert not compiling._place("moody", [torch.ones(5)], [moody], {}).exists()


def test_what_is_no_integer_code_is_multiplied_as_numbers():
    from llmlab.runtime.compiled import described, lay_out
    packed = kernels.pack(torch.randn(8, 64).view(torch.uint8), "F32", "compact")
    assert words.layout("F32") is None and isinstance(lay_out(packed), torch.Tensor)
    assert described(packed).is_meta and described(packed).shape == lay_out(packed).shape
    assert set(CASES) >= set(MODELS)
