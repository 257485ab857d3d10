"""Generating: sampling, streaming, stop strings, the memory between turns; against transformers' own generate."""

import logging
import os

import pytest
import tiny_chat
import torch

from llmlab.errors import LabError
from llmlab.runtime.generating import Memory, Options, stream

ASK = [{"role": "user", "content": "How are you?"}]
GREEDY = Options(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_chat.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_chat.model()


def said(*answers, ask=ASK, **options):
    """What a model that is told to say `answers` streams, as pieces and stats."""
    words = tiny_chat.tokenizer()
    got = stream(tiny_chat.Scripted(words, *answers), words, ask, Options(**{"temperature": 0} | options))
    return list(got), got.stats


# ---- what comes -----------------------------------------------------------------------------------------


def test_greedy_is_what_transformers_generates(model, tokenizer):
    got = stream(model, tokenizer, ASK, GREEDY)
    text = "".join(got)
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1]:]
    assert text == got.text == tokenizer.decode(whole, skip_special_tokens=True)
    assert got.stats.prompt_tokens == prompt["input_ids"].shape[1] and got.stats.reused_tokens == 0


def test_a_text_is_continued_as_it_is(model, tokenizer):
    got = stream(model, tokenizer, "Once upon", GREEDY)
    assert got.stats is None and "".join(got) and got.stats.prompt_tokens == len("Once upon")


@pytest.mark.parametrize("options", [
    {"top_k": 1}, {"min_p": 1.0, "top_k": 0}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-30}])
def test_a_cut_to_one_is_greedy(model, tokenizer, options):
    greedy = "".join(stream(model, tokenizer, ASK, GREEDY))
    assert "".join(stream(model, tokenizer, ASK, Options(max_tokens=40, **options))) == greedy


def test_a_seed_gives_the_same_text_and_another_seed_another(model, tokenizer):
    def text(seed):
        return "".join(stream(model, tokenizer, ASK, Options(temperature=1.5, top_k=0, seed=seed, max_tokens=30)))
    assert text(1) == text(1) != text(2)
    one, other = (stream(model, tokenizer, ASK, Options(temperature=1.5, max_tokens=30)) for _ in range(2))
    assert "".join(one) != "".join(other) and one.stats.seed != other.stats.seed
    assert "".join(stream(model, tokenizer, ASK, Options(temperature=1.5, seed=one.stats.seed, max_tokens=30))) == one.text


def test_draws_follow_the_chances():
    """A hundred draws from three tokens of known chances, cut by top k, top p and min p in turn."""
    from llmlab.runtime.sampling import Chooser
    logits = torch.tensor([0.6, 0.3, 0.1, 0.0]).log()

    def drawn(**options):
        choose = Chooser(Options(**{"temperature": 1.0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 7} | options))
        tokens = [choose(logits, [], []) for _ in range(2000)]
        return [tokens.count(at) / 2000 for at in range(4)]
    assert drawn() == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.04)
    assert drawn(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    assert drawn(top_p=0.85) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    assert drawn(min_p=0.4) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    squares = [0.36, 0.09, 0.01, 0]
    assert drawn(temperature=0.5) == pytest.approx([one / 0.46 for one in squares], abs=0.04)
    # Cuts come before the temperature, as in llama.cpp: a hot temperature brings nothing back that was cut.
    assert drawn(temperature=50, min_p=0.4) == pytest.approx([0.5, 0.5, 0, 0], abs=0.04)


def test_a_repeat_penalty_looks_at_the_last_64():
    from llmlab.runtime.sampling import Chooser
    logits = torch.tensor([2.0, 1.9, -1.0])
    choose = Chooser(Options(temperature=0, repeat_penalty=1.5))
    assert choose(logits, [], []) == 0 and choose(logits, [0], []) == 1 and choose(logits, [], [0]) == 1
    assert choose(logits, [0], [2] * 63) == 1 and choose(logits, [0], [2] * 64) == 0


@pytest.mark.parametrize("options", [
    {"repeat_penalty": 1.3}, {"repeat_penalty": 0.7, "temperature": 0}, {"top_p": 0.7, "min_p": 0, "top_k": 0},
    {"top_p": 1, "min_p": 0.2, "top_k": 0}, {"top_p": 0.9, "min_p": 0.1, "top_k": 30, "repeat_penalty": 1.1}, {"top_p": 1e-6}])
def test_cuts_are_those_of_transformers(options):
    """Same draws from the same logits: what is cut, and what is left, is what transformers' warpers leave."""
    from transformers.generation import logits_process as theirs

    from llmlab.runtime.sampling import Chooser
    options = Options(**{"seed": 3, "temperature": 1.0, "top_k": 0} | options)
    choose, draws = Chooser(options), torch.Generator().manual_seed(3)
    random = torch.Generator().manual_seed(0)
    prompt, new = list(range(0, 40, 3)), [5, 5, 7]
    for _ in range(200):
        logits = torch.randn(100, generator=random) * 2
        scores = theirs.RepetitionPenaltyLogitsProcessor(options.repeat_penalty)(torch.tensor([prompt + new]), logits[None])
        if options.temperature == 0:
            assert choose(logits, prompt, new) == scores.argmax()
            continue
        if options.top_k:
            scores = theirs.TopKLogitsWarper(options.top_k)(None, scores)
        scores = theirs.TopPLogitsWarper(options.top_p)(None, scores)
        scores = theirs.MinPLogitsWarper(options.min_p)(None, scores)
        order = scores[0].argsort(descending=True)
        order = order[:options.top_k or None]
        assert choose(logits, prompt, new) == order[torch.multinomial(scores[0, order].softmax(-1), 1, generator=draws)]


def test_no_character_is_ever_half():
    text = "Zürich 🏔️ 日本 👩‍👩‍👧"
    pieces, stats = said(text + "<|im_end|>")
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text) and stats.tokens == len(text.encode()) and stats.ended == "end of turn"


def test_bytes_that_are_no_text_do_not_hold_the_rest_up_for_ever(tokenizer):
    model = tiny_chat.Scripted(tokenizer, "x")
    model.answers = [[tokenizer.convert_tokens_to_ids("ł")] * 40 + tokenizer("ok<|im_end|>")["input_ids"]]     # byte 0x80...
    pieces = list(stream(model, tokenizer, ASK, Options(temperature=0)))
    assert len(pieces) > 2 and "".join(pieces).endswith("ok")


def test_a_space_at_a_tokens_beginning_is_kept():
    """As SentencePiece has it: decoding one token alone loses the space."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from llmlab.runtime.sampling import Words
    inner = Tokenizer(models.BPE(vocab={"▁Once": 0, "▁a": 1, "▁time": 2, "<0xC3>": 3, "<0xBC>": 4, "<unk>": 5}, merges=[],
                                 byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    words = Words(PreTrainedTokenizerFast(tokenizer_object=inner), [0])
    assert [words.add(token) for token in (1, 2, 3, 4, 3, 4, 1)] == [" a", " time", "", "ü", "", "ü", " a"]
    begun = Words(PreTrainedTokenizerFast(tokenizer_object=inner), [3, 4])       # a prompt that ends in a byte run
    assert [begun.add(token) for token in (3, 4)] == ["", "ü"]


def test_pieces_add_up_with_a_real_vocabulary():
    """Wherever the prompt ends, the pieces are what the whole text has after it."""
    import llmlab
    from llmlab.gguf import read_gguf
    from llmlab.runtime.sampling import Words
    from llmlab.vocabulary import tokenizer_of
    words = tokenizer_of(read_gguf(llmlab.fetch("smollm2-135m", progress=False)))
    ids = words("Once  upon a time, in Zürich 🏔️\n\n\t日本語 👩‍👩‍👧 ﷽ नमस्ते “quoted” end", add_special_tokens=False)["input_ids"]
    ends = [at for at in range(len(ids)) if "\ufffd" not in words.decode(ids[:at])]
    assert len(ends) < len(ids), "some characters take several tokens"
    for end in ends:
        streamed = Words(words, ids[:end])
        pieces = [*map(streamed.add, ids[end:]), streamed.rest()]
        assert "".join(pieces) == words.decode(ids)[len(words.decode(ids[:end])):]
        assert not any("\ufffd" in piece for piece in pieces)


# ---- how it ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "stop", "left"), [
    ("one STOP two", ("STOP",), "one "), ("one two", ("one",), ""), ("aaab!", ("aab",), "a"),
    ("ab end", ("zz", "en", "b"), "a"), ("grün 🏔️ Tal", ("🏔️",), "grün "), ("say <|tool|> now", ("<|tool|>",), "say ")])
def test_a_stop_string_ends_it_wherever_tokens_end(answer, stop, left):
    pieces, stats = said(answer + "<|im_end|>", stop=stop)
    assert "".join(pieces) == left and stats.ended == "stop string"


def test_what_only_begins_a_stop_string_is_given_in_the_end():
    pieces, stats = said("wait for it ST<|im_end|>", stop="STOP")
    assert "".join(pieces) == "wait for it ST" and stats.ended == "end of turn"


def test_limit_and_full_context():
    pieces, stats = said("for ever ", max_tokens=12)
    assert "".join(pieces) == "for ever for" and (stats.tokens, stats.ended) == (12, "limit")
    _, stats = said("for ever ")
    assert stats.ended == "context full" and stats.prompt_tokens + stats.tokens == tiny_chat.CONTEXT


def test_stopping_keeps_what_came(tokenizer):
    model, came = tiny_chat.Scripted(tokenizer, "for ever "), []
    got = stream(model, tokenizer, ASK, Options(temperature=0), stopped=lambda: len(came) >= 5)
    for piece in got:
        came.append(piece)
    assert "".join(came) == got.text == "for e" and got.stats.ended == "stopped"
    got = stream(model, tokenizer, ASK, Options(temperature=0))
    next(got)
    got.close()
    assert got.stats.ended == "stopped" and got.stats.tokens == 1
    nothing = stream(model, tokenizer, ASK, Options(), stopped=lambda: True)
    assert list(nothing) == [] and nothing.stats.first_seconds is None and "stopped" in str(nothing.stats)


def test_stats_in_words():
    _, stats = said("Fine.<|im_end|>")
    assert stats.tokens == 5 and stats.first_seconds > 0 and stats.rate > 0 and stats.prompt_rate > 0
    words = str(stats)
    assert "prompt tokens" in words and "5 new tokens" in words and "end of turn [measured]" in words and "\n" not in words


# ---- the memory -----------------------------------------------------------------------------------------


def test_a_second_turn_reads_only_what_is_new(tokenizer):
    model = tiny_chat.Scripted(tokenizer, "Fine.<|im_end|>", "Yes.<|im_end|>")
    memory, talk = Memory(model), list(ASK)
    for text in ("Really?", None):
        model.read.clear()
        got = stream(model, tokenizer, talk, Options(temperature=0), memory=memory)
        answer = "".join(got)
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    before = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine."
    assert answer == "Yes." and got.stats.reused_tokens == len(tokenizer(before)["input_ids"])
    assert model.read[0] == got.stats.prompt_tokens - got.stats.reused_tokens < 50


def test_a_conversation_with_memory_says_what_one_without_says(model, tokenizer):
    memory, talk = Memory(model), []
    for text in ("one", "two", "three"):
        talk.append({"role": "user", "content": text})
        kept = "".join(stream(model, tokenizer, talk, GREEDY, memory=memory))
        assert kept == "".join(stream(model, tokenizer, talk, GREEDY))
        talk.append({"role": "assistant", "content": kept})
    other = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "changed"}, talk[2]]
    got = stream(model, tokenizer, other, GREEDY, memory=memory)
    assert "".join(got) == "".join(stream(model, tokenizer, other, GREEDY))
    assert 0 < got.stats.reused_tokens < got.stats.prompt_tokens
    again = stream(model, tokenizer, other, GREEDY, memory=memory)
    assert "".join(again) == got.text and again.stats.reused_tokens == again.stats.prompt_tokens - 1


def test_a_sliding_window_that_moved_on_is_read_again(tokenizer):
    """Its cache has lost what came before: going back in it would silently answer from half a conversation."""
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=16, bos_token_id=None, eos_token_id=256)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    memory = Memory(model)
    for text, reused in (("abcdefgh", 0), ("abcdefgh-and-more-than-the-window", 8), ("abcdefgh-and-XYZ", 0)):
        memory_before = len(memory.tokens)
        got = stream(model, tokenizer, text, Options(temperature=0, max_tokens=1), memory=memory)
        assert "".join(got) == "".join(stream(model, tokenizer, text, Options(temperature=0, max_tokens=1)))
        assert got.stats.reused_tokens == reused, memory_before


def test_a_long_prompt_is_read_in_parts_and_can_be_stopped_between(model, tokenizer):
    text, asked = "word " * 80, []
    few, memory = Options(temperature=0, max_tokens=5), Memory(model)
    whole = "".join(stream(model, tokenizer, text, few))
    got = stream(model, tokenizer, text, few, stopped=lambda: len(asked) == 1 or asked.append(1), memory=memory)
    assert list(got) == [] and got.stats.ended == "stopped" and 0 < len(memory.tokens) < 400
    rest = stream(model, tokenizer, text, few, memory=memory)
    assert "".join(rest) == whole and 0 < rest.stats.reused_tokens < 400


def test_an_interrupted_layer_leaves_nothing_half_read(model, tokenizer):
    memory = Memory(model)
    list(stream(model, tokenizer, ASK, GREEDY, memory=memory))

    def interrupt(*_):
        raise KeyboardInterrupt
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(stream(model, tokenizer, ASK, GREEDY, memory=memory))
    hook.remove()
    assert memory.tokens == []
    assert "".join(stream(model, tokenizer, ASK, GREEDY, memory=memory)) == "".join(stream(model, tokenizer, ASK, GREEDY))


def test_a_growing_cache_holds_what_transformers_own_holds(model):
    from transformers import DynamicCache

    from llmlab.runtime.growing import growing_cache
    one, other = growing_cache(model.config), DynamicCache(config=model.config)
    places = set()
    for step, many in enumerate((5, 300, *[1] * 40, 2)):
        for layer in range(2):
            keys, values = torch.randn(2, 1, 2, many, 8)
            for cache in (one, other):
                cache.update(keys, values, layer)
        if step == 20:
            one.crop(-7)
            other.crop(-7)
        for mine, theirs in zip(one.layers, other.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        places.add(one.layers[1].keys.data_ptr())
    assert one.get_seq_length() == other.get_seq_length() == 5 + 300 + 40 + 2 - 7 and len(places) == 2
    one.reset()
    assert one.get_seq_length() == 0 and one.update(keys, values, 0)[0].equal(keys)


# ---- what cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -1), ("temperature", float("nan")), ("temperature", "hot"), ("top_k", -1), ("top_k", 1.5), ("top_p", 0),
    ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2), ("repeat_penalty", 0), ("seed", -1), ("seed", True), ("max_tokens", 0),
    ("stop", ("",)), ("stop", 5)])
def test_options_are_checked(name, value):
    with pytest.raises(LabError, match=f"^{name} is .*; give ") as caught:
        Options(**{name: value})
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_the_context(model, tokenizer, monkeypatch, caplog):
    tokenizer.model_max_length = tiny_chat.CONTEXT       # transformers has a warning of its own for this
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(LabError, match=r"the prompt is 600 tokens and the context holds 512; shorten it or begin a new"):
        stream(model, tokenizer, "x" * 600)
    with pytest.raises(LabError, match=r"the prompt is 60 tokens and the context holds 50; .* was trained with 512"):
        stream(model, tokenizer, "x" * 60, memory=Memory(model, context=50))
    with pytest.raises(LabError, match="nothing to read"):
        stream(model, tokenizer, "")
    for context in (0, 513, "x", True):
        with pytest.raises(LabError, match="^context is "):
            Memory(model, context=context)
    assert caplog.records == []


def test_messages_need_a_template(model):
    with pytest.raises(LabError, match="no chat template"):
        stream(model, tiny_chat.tokenizer(None), ASK)


def test_without_a_vocabulary_nothing_is_said(model):
    from llmlab.runtime.conversing import Conversation
    for start in (stream, Conversation):
        with pytest.raises(LabError, match="has no vocabulary"):
            start(model, None, "")


@pytest.mark.parametrize("prompt", [None, 5, {"role": "user", "content": "x"}])
def test_what_is_no_prompt_is_said(model, tokenizer, prompt):
    with pytest.raises(LabError, match="there is no prompt in .*; give a text or a list of messages"):
        stream(model, tokenizer, prompt)


def test_bytes_of_a_shell_that_are_no_utf8_are_read(tokenizer):
    from llmlab.runtime.generating import prompt_tokens
    said = os.fsdecode(b"caf\xe9")
    assert prompt_tokens(tokenizer, said) == prompt_tokens(tokenizer, "caf?")
    assert "caf?" in tokenizer.decode(prompt_tokens(tokenizer, [{"role": "user", "content": said}]))


def test_a_template_that_refuses_says_why(model):
    words = tiny_chat.tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(LabError, match="refuses this conversation: System role not supported"):
        stream(model, words, ASK)
    words = tiny_chat.tokenizer("{{ messages[0].content + 1 }}")
    with pytest.raises(LabError, match=r"fails on this conversation \(TypeError: .*give a text instead of messages"):
        stream(model, words, ASK)


def test_too_little_memory_is_said_and_nothing_half_read(model, tokenizer):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
    memory, hook = Memory(model), model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(LabError, match="memory does not suffice"):
        list(stream(model, tokenizer, ASK, memory=memory))
    hook.remove()
    assert memory.tokens == []


def test_a_tokenizer_of_a_gguf_knows_its_ends(model):
    from llmlab.runtime.generating import end_tokens
    words = tiny_chat.tokenizer()
    assert end_tokens(model, words) == {256}
    words.stop_ids = (256, 258)
    assert end_tokens(model, words) == {256, 258}


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_said(model, tokenizer, temperature):
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(LabError, match="not numbers"):
        list(stream(model, tokenizer, ASK, Options(temperature=temperature)))
    hook.remove()
