"""Guessed tokens: the text stays what it is without them, token for token, and so does what is remembered."""

import functools
import random

import pytest
import tiny_chat
import torch
from runtime_models import VOCAB, make

from llmlab import cli
from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.offload.opening import open_decoder
from llmlab.offload.placement import Placement
from llmlab.runtime import decoder as decoders
from llmlab.runtime.conversing import Conversation
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.generating import Memory, Options, memory_of, stream
from llmlab.runtime.speculating import MOST, Draft, Pace, PromptLookup, spare
from llmlab.vocabulary import words_of

ASK = [{"role": "user", "content": "How are you?"}]
FIRST = 0x100


class Letters:
    """A tokenizer of which each token is a character."""

    chat_template, stop_ids = None, ()

    def __init__(self, size: int = VOCAB):
        self.size = size

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) - FIRST for letter in text]}

    def decode(self, tokens, **_):
        return "".join(chr(FIRST + token) for token in tokens)

    def get_vocab(self):
        return {chr(FIRST + token): token for token in range(self.size)}

    def get_added_vocab(self):
        return {}


class Told:
    """Guesses what it was told the text will be, but for places where `wrong` says another."""

    free, pace = False, None

    def __init__(self, whole: list[int], wrong=lambda place: False, count: int = 6):
        self.whole, self.wrong, self.count = whole, wrong, count

    def check(self, memory, tokenizer):
        pass

    def propose(self, tokens, most, draw):
        places = range(len(tokens), min(len(tokens) + most, len(self.whole)))
        return [(self.whole[at] + 1) % VOCAB if self.wrong(at) else self.whole[at] for at in places]


LETTERS = Letters()
SOMETIMES = random.Random(5).choices([True, False], [1, 3], k=4096)       # whether a guess is wrong, by its place


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a case, made once."""
    @functools.cache
    def get(name: str, mix: str = "F32", **changes):
        path = tmp_path_factory.mktemp("guessed") / f"{name}.gguf"
        make(name, path, mix, **changes)
        return path

    return get


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("chat") / "tiny.gguf")


def opened(path, **settings) -> Decoder:
    return Decoder.open(path, **{"dtype": torch.float32, "strategy": "compact", **settings})


def prompt(count: int, seed: int = 1) -> str:
    return LETTERS.decode(random.Random(seed).choices(range(3, VOCAB), k=count))


def said(decoder: Decoder, text: str, options: Options, draft=None):
    """(the text, its stats, what is remembered then, the logits of one more token)."""
    decoder.forget()
    got = stream(decoder, LETTERS, text, options, memory=decoder, draft=draft)
    answer = "".join(got)
    tokens, dropped = list(decoder.tokens), list(decoder.dropped)
    if decoder.context is not None and len(tokens) == decoder.context:
        decoder.keep(dropped + tokens)
    return answer, got.stats, (tokens, dropped), decoder.read([7])


def same_with_guesses(decoder: Decoder, text: str, options: Options, ways: str = "sometimes lookup"):
    """{way: stats}: whatever is guessed, right, wrong or sometimes this and sometimes that, and by prompt lookup."""
    answer, stats, held, after = said(decoder, text, options)
    assert answer and stats.proposed is None and stats.tokens_a_pass in (1, None)
    beyond = random.Random(9).choices(range(3, VOCAB), k=9)
    whole = LETTERS(text + answer)["input_ids"] + beyond
    found = {}
    drafts = {"right": Told(whole), "wrong": Told(whole, lambda at: True), "sometimes": Told(whole, SOMETIMES.__getitem__),
              "lookup": PromptLookup(2, 1, 5, steady=True)}
    for name in ways.split():
        again, more, held_then, after_then = said(decoder, text, options, drafts[name])
        assert again == answer and held_then == held and more.ended == stats.ended, name
        assert torch.equal(after_then, after), f"{name}: what was taken back left something"
        assert (more.tokens, more.seed) == (stats.tokens, stats.seed)
        found[name] = more
    return found


# ---- the same text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 1.5, "top_k": 0, "seed": 3}, {"seed": 4, "repeat_penalty": 1.4},
    {"temperature": 0, "repeat_penalty": 1.4}, {"temperature": 1.0, "top_p": 0.7, "min_p": 0.0, "seed": 5}])
def test_the_text_is_the_same_however_it_is_drawn(tiny, options):
    decoder, options = opened(tiny("llama")), Options(max_tokens=40, **options)
    found = same_with_guesses(decoder, prompt(30), options, "right wrong sometimes lookup")
    assert found["wrong"].accepted == 0 and found["wrong"].tokens_a_pass == 1
    right = found["right"]
    assert right.tokens_a_pass > found["sometimes"].tokens_a_pass > 1.5
    assert right.passes == 6 and right.accepted == 33 and right.tokens_a_pass == 6.5      # 1 + 5 of 7 + 4, 39 after the first


@pytest.mark.parametrize(("name", "given"), [
    ("gemma3", {}), ("gpt-oss", {}), ("qwen3moe", {}), ("phi3-longrope", {}),
    ("llama", {"kv": "q8_0"}), ("llama", {"kv": ("q8_0", "q4_0"), "rotate": True}), ("gemma2", {"kv": "q8_0"}),
    ("gpt-oss", {"kv": "q4_0", "sinks": 4}), ("gemma2", {"kv": "f16", "sinks": 3})])
def test_the_text_is_the_same_for_every_family(tiny, name, given):
    """Windows, experts, packed caches; past the text from which on Phi-3's positions turn by other angles."""
    same_with_guesses(opened(tiny(name), **given), prompt(50), Options(temperature=0.7, seed=1, max_tokens=20))


def test_the_text_is_the_same_of_packed_weights(tiny):
    same_with_guesses(opened(tiny("gemma2", "few")), prompt(10), Options(temperature=0.7, seed=1, max_tokens=8))


def test_a_ring_that_has_gone_round(tiny):
    """Cells of a window's ring are written over and taken back."""
    decoder = opened(tiny("gemma2", max_position_embeddings=2048, num_hidden_layers=2), kv="q8_0")
    same_with_guesses(decoder, prompt(790), Options(temperature=0.7, seed=1, max_tokens=12), "sometimes")
    assert [cache.cells for cache in decoder.caches][:2] == [768, 1024] and decoder.caches[0].length > 768


def test_where_the_cache_grows_it_is_as_it_would_be(tiny):
    decoder = opened(tiny("llama"))
    same_with_guesses(decoder, prompt(246), Options(temperature=0, max_tokens=20), "right sometimes")
    decoder.forget()
    decoder.read([5] * 250)
    assert decoder.cells == 256 and spare(decoder) == 5
    decoder.read([5] * 5)
    assert spare(decoder) == 0
    decoder.read([5])
    assert spare(decoder) == MOST


@pytest.mark.parametrize(("given", "shift"), [
    ({}, None), ({}, 0), ({}, 5), ({"kv": "q8_0", "sinks": 6}, 6), ({"kv": "f32"}, 0)])
def test_a_full_context_and_going_on_past_it(tiny, given, shift):
    decoder = opened(tiny("gemma2", num_hidden_layers=2), context=32, **given)
    found = same_with_guesses(decoder, prompt(20), Options(temperature=0.8, seed=2, max_tokens=40, shift=shift))
    assert {one.ended for one in found.values()} == {"context full" if shift is None else "limit"}
    if shift == 5:                  # a prompt that is longer than the context, too
        same_with_guesses(decoder, prompt(50), Options(temperature=0.8, seed=2, max_tokens=20, shift=shift))


def test_stop_strings_and_the_end_of_a_turn(tiny, monkeypatch):
    decoder, text = opened(tiny("llama")), prompt(30)
    whole = said(decoder, text, Options(temperature=0, seed=1, max_tokens=40))[0]
    for stop in (whole[7], whole[9:12], whole[20:22]):
        found = same_with_guesses(decoder, text, Options(temperature=0, max_tokens=40, stop=stop), "right sometimes")
        assert {one.ended for one in found.values()} == {"stop string"}
    monkeypatch.setattr(LETTERS, "stop_ids", (ord(whole[10]) - FIRST,), raising=False)
    found = same_with_guesses(decoder, text, Options(temperature=0, max_tokens=40), "right sometimes")
    assert {one.ended for one in found.values()} == {"end of turn"}


def test_the_last_tokens_in_full_precision_are_not_put_at_risk(tiny):
    """What tokens that are taken back have pushed out into pages would not come back: that is said."""
    decoder = opened(tiny("llama"), kv="q4_0", recent=16)
    with pytest.raises(LabError, match=r"the last 16 tokens in full precision \(recent\) .* leave out draft, or recent"):
        same_with_guesses(decoder, prompt(30), Options(temperature=0, max_tokens=20))


def test_a_conversation_says_and_remembers_the_same(chat):
    plain, guessed = (Conversation(opened(chat), words_of(read_gguf(chat)), draft=draft) for draft in (None, "lookup"))
    assert guessed.draft.pace is not None
    for text in ("one", "two", "three"):
        answers = ["".join(talk.answer(text, Options(seed=3, temperature=0.3, max_tokens=30))) for talk in (plain, guessed)]
        assert answers[0] == answers[1] and plain.memory.tokens == guessed.memory.tokens
        assert plain.stats.reused_tokens == guessed.stats.reused_tokens
    assert guessed.stats.proposed is not None


def test_from_a_disk_within_a_budget_that_has_no_room_for_many(chat):
    """Layers that come and go give the same text, in fewer passes; of guesses as many are read as there is room for."""
    words, options = words_of(read_gguf(chat)), Options(temperature=0.6, seed=2, max_tokens=30)
    plain = stream(opened(chat), words, ASK, options)
    text = "".join(plain)
    whole = plain.memory.tokens + words(text[-1])["input_ids"]
    for room in (None, 3):
        with open_decoder(chat, Placement(context=200), dtype=torch.float32) as decoder:
            if room:
                decoder.budget.limits["device"] = decoder.budget.used["device"] + (room - 1) * 2 * 4 * 259
            got = stream(decoder, words, ASK, options, draft=Told(whole, count=8))
            assert "".join(got) == text and decoder.tokens == plain.memory.tokens
            assert got.stats.tokens_a_pass == pytest.approx(29 / (4 if room is None else 10), abs=0.2)


# ---- stopped, interrupted --------------------------------------------------------------------------------------------


def test_an_interrupt_in_the_middle_of_several_tokens_leaves_nothing_half_read(tiny, monkeypatch):
    decoder, text, options = opened(tiny("gemma2")), prompt(30), Options(temperature=0, max_tokens=30)
    answer = said(decoder, text, options)[0]
    whole, calm, calls = LETTERS(text + answer)["input_ids"], decoders.multiply_each, []

    def interrupted(x, matrix):
        calls.append(1)
        if len(calls) == 9:             # in the second layer
            raise KeyboardInterrupt
        return calm(x, matrix)
    decoder.forget()
    got = stream(decoder, LETTERS, text, options, memory=decoder, draft=Told(whole))
    next(got)
    with monkeypatch.context() as patched:
        patched.setattr(decoders, "multiply_each", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(got)
    assert len(calls) == 9 and decoder.tokens == [] and answer.startswith(got.text) and got.stats.ended == "stopped"
    assert "".join(stream(decoder, LETTERS, text, options, memory=decoder, draft=Told(whole))) == answer


def test_stopping_takes_back_what_was_not_said(tiny):
    decoder, text, options, came = opened(tiny("llama")), prompt(30), Options(temperature=0, max_tokens=30), []
    answer = said(decoder, text, options)[0]
    decoder.forget()
    got = stream(decoder, LETTERS, text, options, lambda: len(came) >= 4, decoder, Told(LETTERS(text + answer)["input_ids"]))
    for piece in got:
        came.append(piece)
    assert "".join(came) == answer[:4] and got.stats.ended == "stopped" and len(decoder.tokens) == 34
    # Closed, or only left lying about: the next one reads on from what is there.
    for end in (lambda got: got.close(), lambda got: None):
        got = stream(decoder, LETTERS, text, options, memory=decoder, draft=Told(LETTERS(text + answer)["input_ids"]))
        next(got)
        end(got)
        assert "".join(stream(decoder, LETTERS, text, options, memory=decoder, draft="lookup")) == answer


# ---- prompt lookup ---------------------------------------------------------------------------------------------------


def test_lookup_goes_on_as_the_text_did():
    look = PromptLookup(3, 2, 4)
    assert look.propose([1, 2, 3, 4, 5, 6, 2, 3], 9) == [4, 5, 6, 2]
    assert look.propose([1, 2, 3, 4, 5, 6, 2, 3], 2) == [4, 5]
    assert look.propose([1, 2, 3, 4, 2, 3, 5, 2, 3], 1) == [5], "the last time counts"
    assert look.propose([1, 2, 3, 4, 2, 3, 5, 1, 2, 3], 1) == [4], "but three tokens more than two"
    assert look.propose([1, 2, 3, 9, 3], 4) == [] and PromptLookup(3, 1).propose([1, 2, 3, 9, 3], 2) == [9, 3]
    assert look.propose([8, 1, 2, 1, 2], 4) == [1, 2, 1, 2], "and goes on repeating itself"
    assert look.propose([7], 4) == [] and look.propose([7, 7], 4) == []


def test_lookup_is_what_a_plain_search_finds():
    """Also where bytes agree that are no token's; grown a little at a time, and begun anew."""
    look, drawn = PromptLookup(4, 1, 3), random.Random(0)
    for _ in range(40):
        text = []
        for _ in range(30):
            text += drawn.choices([0, 1, 256, 257, 65536, 1 << 24], k=drawn.randint(1, 3))
            wanted = []
            for count in range(min(4, len(text) - 1), 0, -1):
                found = [at for at in range(count, len(text)) if text[at - count:at] == text[-count:]]
                if found:
                    longer = list(text)
                    for i in range(3):
                        longer.append(longer[found[-1] + i])
                    wanted = longer[-3:]
                    break
            assert look.propose(text, 3) == wanted


@pytest.mark.parametrize(("given", "says"), [
    ({"most": 0}, "^most is 0; give"), ({"least": 5}, "^least is 5; give a whole number from 1 to 4"),
    ({"count": 0}, "^count is 0; give how many"), ({"count": 129}, "from 1 to 128")])
def test_lookup_is_checked(given, says):
    with pytest.raises(LabError, match=says):
        PromptLookup(**given)


# ---- a draft ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "top_k": 0, "seed": 3},
                                     {"seed": 4, "repeat_penalty": 1.4, "temperature": 2.0}])
def test_the_same_model_as_draft_is_always_right(chat, options):
    """Drawn with the same numbers: sampled text, too."""
    words, options = words_of(read_gguf(chat)), Options(max_tokens=60, **options)
    model, draft = opened(chat), opened(chat)
    plain = "".join(stream(model, words, ASK, options))
    for given in (Draft(draft, words, 5, steady=True), Draft(draft, count=5, steady=True)):
        got = stream(model, words, ASK, options, draft=given)
        assert "".join(got) == plain
        left = got.stats.tokens - 1 - got.stats.passes
        assert got.stats.accepted == got.stats.proposed == left > 40 or got.stats.ended == "end of turn"


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_another_model_as_draft(chat, tmp_path, temperature):
    """One that says other things, and one with a smaller context, which reads the text from a later place on."""
    other = tiny_chat.write(tmp_path / "other.gguf", seed=1)
    words, options = words_of(read_gguf(chat)), Options(temperature=temperature, seed=1, max_tokens=30)
    model = opened(chat)
    plain = "".join(stream(model, words, ASK, options))
    small = Draft(opened(chat, context=24), words, 5, steady=True)
    for draft in (opened(other), (opened(other), words), small, small, Draft(opened(other), words, steady=True)):
        got = stream(model, words, ASK, options, draft=draft)
        assert "".join(got) == plain
        assert draft is not small or got.stats.accepted and len(small.decoder.tokens) <= 24
    assert got.stats.proposed and got.stats.accepted < got.stats.proposed


def test_a_long_prompt_is_read_by_a_draft_between_the_passes(chat):
    words, text = words_of(read_gguf(chat)), "word " * 80
    model, draft, reads = opened(chat), opened(chat), []
    read = draft.read
    draft.read = lambda tokens: reads.append(len(tokens)) or read(tokens)
    got = stream(model, words, text, Options(temperature=0, max_tokens=40), draft=Draft(draft, words, 4, steady=True))
    assert "".join(got) and reads[:2] == [256, 400 + 2 - 256] and max(reads[2:]) <= 2


def test_a_draft_of_another_vocabulary_is_refused(chat, tmp_path):
    words, model = words_of(read_gguf(chat)), opened(chat)
    tokens = list(read_gguf(chat).metadata["tokenizer.ggml.tokens"])
    tokens[40], tokens[41] = tokens[41], tokens[40]
    other = tiny_chat.write(tmp_path / "other.gguf", **{"tokenizer.ggml.tokens": ("array:string", tokens)})
    with pytest.raises(LabError, match=r"another vocabulary than the model \(259 and 259 tokens; .*same family") as caught:
        stream(model, words, ASK, draft=opened(other))
    assert "\n" not in str(caught.value)
    with pytest.raises(LabError, match="another vocabulary"):
        Conversation(model, words, draft=(opened(other), words_of(read_gguf(other))))
    bare = tiny_chat.write(tmp_path / "bare.gguf", **{"tokenizer.ggml.tokens": None, "tokenizer.ggml.merges": None})
    with pytest.raises(LabError, match="tokenizer.ggml.tokens is missing"):
        stream(model, words, ASK, draft=opened(bare))


def test_a_longer_vocabulary_that_begins_the_same_will_do(tiny):
    """Families pad their vocabularies differently; what only one of them knows is not guessed."""
    model, draft = opened(tiny("llama")), opened(tiny("llama"))
    options = Options(temperature=0, max_tokens=30)
    answer = said(model, prompt(30), options)[0]
    given = Draft(draft, Letters(200), 5, steady=True)
    again, stats, *_ = said(model, prompt(30), options, given)
    assert again == answer and given._size == 200
    small = LETTERS.decode(range(3, 33))
    answer, again = said(model, small, options), said(model, small, options, given)
    assert again[0] == answer[0]


@pytest.mark.parametrize(("draft", "says"), [
    ("look", "draft is 'look'; give 'lookup', or a small model's decoder"), (5, "a int cannot guess"),
    ("itself", "the draft is the model itself")])
def test_what_cannot_guess_is_said(chat, draft, says):
    model, words = opened(chat), words_of(read_gguf(chat))
    with pytest.raises(LabError, match=says):
        stream(model, words, ASK, draft=model if draft == "itself" else draft)


def test_transformers_modules_read_one_at_a_time():
    model = tiny_chat.model()
    for memory in (None, Memory(model)):
        with pytest.raises(LabError, match="is for a lean decoder, llmlab.decoder; leave draft out"):
            stream(model, tiny_chat.tokenizer(), ASK, memory=memory, draft="lookup")


def test_a_decoder_of_which_less_is_used(chat):
    words, options = words_of(read_gguf(chat)), Options(temperature=0)
    texts = [stream(model, words, "abc abc abc", options, memory=memory_of(model, 64), draft=draft)
             for model, draft in ((opened(chat), None), (opened(chat), PromptLookup(3, 1, 8, steady=True)))]
    assert "".join(texts[0]) == "".join(texts[1]) and texts[1].stats.ended == texts[0].stats.ended
    assert len(texts[1].memory.tokens) <= 64


# ---- how many --------------------------------------------------------------------------------------------------------


def test_as_many_are_guessed_as_pay():
    pace = Pace()
    assert pace.many(16) == 0, "nothing is known yet"
    pace.passed(0, 1.0, 0.0)
    assert 1 <= pace.many(16) <= 4
    for _ in range(9):
        for _ in range(8):
            pace.judged(True)
        pace.passed(8, 1.08, 0.0)           # a link: a token more costs a hundredth of a pass
    assert pace.share > 0.9 and pace.many(16) == 16 and pace.many(5) == 5
    for _ in range(30):
        pace.judged(False)
        pace.passed(1, 1.01, 0.0)
    assert pace.share < 0.2 and 1 <= pace.many(16) <= 2, "cheap ones are still worth it"
    for _ in range(9):
        pace.passed(2, 2.9, 0.0)            # weights in a cache: a token more costs nearly a pass
    assert pace.many(16) == 0
    for _ in range(9):
        pace.judged(True)
        pace.passed(2, 1.1, 1.8)            # cheap for the model, and the draft takes as long
    assert pace.many(16) == 0


def test_what_is_not_tried_is_tried_again():
    pace = Pace()
    pace.passed(0, 1.0, 0.0)
    for _ in range(12):
        pace.judged(False)
        pace.passed(1, 1.6, 0.0)
    assert pace.many(8) == 0
    waited = 0
    while not pace.many(8):
        pace.passed(0, 1.0, 0.0)
        waited += 1
    assert 30 < waited < 150


def test_free_guesses_are_judged_before_they_are_tried(tiny):
    """Where a guess would cost as much as a pass none is read; that all of them were right is known all the same."""
    decoder, text = opened(tiny("llama")), prompt(30)
    answer = said(decoder, text, Options(temperature=0, max_tokens=40))[0]
    told = Told(LETTERS(text + answer)["input_ids"])
    told.pace, told.free = Pace(), True
    told.pace.many = lambda most: 0
    again, stats, *_ = said(decoder, text, Options(temperature=0, max_tokens=40), told)
    assert again == answer and stats.proposed == 0 and told.pace.share > 0.7


def test_stats_in_words(tiny):
    decoder, text = opened(tiny("llama")), prompt(30)
    answer, plain, *_ = said(decoder, text, Options(temperature=0, max_tokens=9))
    assert "guess" not in str(plain) and plain.passes == 8
    stats = said(decoder, text, Options(temperature=0, max_tokens=9), Told(LETTERS(text + answer)["input_ids"], count=3))[1]
    assert (stats.passes, stats.proposed, stats.accepted, stats.tokens_a_pass) == (2, 6, 6, 4.0)
    assert "; 6 of 6 guesses right, 4.00 tokens a pass; limit [measured]" in str(stats) and "\n" not in str(stats)


# ---- in the terminal -------------------------------------------------------------------------------------------------


def test_in_the_terminal(chat, tmp_path, capsys):
    other = str(tiny_chat.write(tmp_path / "other.gguf", seed=1))

    def run(*argv):
        status = cli.main(["run", str(chat), "-p", "one two one two", "-s", "1", "-n", "30", "--dtype", "float32", *argv])
        return status, *capsys.readouterr()
    plain = run()
    for draft in ("lookup", other):
        status, out, err = run("--draft", draft)
        assert (status, out) == plain[:2] and "guesses right" in err
        assert "\ntokens are guessed by " + ("prompt lookup\n" if draft == "lookup" else "a draft (llama, ") in err
    status, _, err = run("--draft", "lookup", "--engine", "transformers")
    assert status == 2 and "--draft is for the lean decoder, which is not used (as asked); leave it out" in err
    status, _, err = run("--draft", str(tmp_path / "none.gguf"))
    assert status == 2 and "none.gguf" in err and err.splitlines()[-1].startswith("llmlab: ")
