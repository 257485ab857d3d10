"""Tokenizers from GGUF vocabularies: golden tokens of llama.cpp, decoding, chat templates in bounds, hostile vocabularies."""

import copy
import hashlib
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import gguf_raw as raw
import pytest
from vocabularies import BYTE, CONTROL, NORMAL, SPLITS, TEXTS, bpe, cases, put, spm

from llmlab.errors import BadFile, LabError
from llmlab.gguf import read_gguf
from llmlab.sources import fetch
from llmlab.vocabulary import stop_tokens, templates, tokenizer_of, words_of
from llmlab.vocabulary.splits import NAMES, split_of

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vocabulary.json").read_text())
HELLO = [{"role": "user", "content": "Hi"}]


def made(folder, metadata):
    return tokenizer_of(read_gguf(put(folder, metadata)))


@pytest.fixture(scope="module")
def smol():
    return tokenizer_of(read_gguf(fetch("smollm2-135m", progress=False)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return made(tmp_path_factory.mktemp("bpe"), bpe("llama3"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return made(tmp_path_factory.mktemp("spm"), spm())


def problem(folder, metadata, *words):
    """The one line that opening it raises; it names the file and all `words`."""
    path = put(folder, metadata)
    with pytest.raises(LabError) as caught:
        tokenizer_of(read_gguf(path))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 2500 and path.name in said, said
    for word in words:
        assert word in said, said
    return said


# -- token for token as llama.cpp ----------------------------------------------------------------------------------------------

def check(tokenizer, case):
    for place, (text, plain) in enumerate(zip(TEXTS, case["plain"], strict=True)):
        assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == plain, text
        assert tokenizer(text)["input_ids"] == case["special"].get(str(place), plain), text
    assert list(tokenizer.stop_ids) == case["ends"]
    pieces = "\0".join(tokenizer.piece(number).hex() for number in range(len(tokenizer)))
    assert hashlib.sha256(pieces.encode()).hexdigest() == case["pieces"]


@pytest.mark.parametrize("name", list(cases()))
def test_tokens_are_llama_cpps(name, tmp_path):
    check(made(tmp_path, cases()[name]), GOLDEN[name])


def test_tokens_of_a_real_file_are_llama_cpps(smol):
    check(smol, GOLDEN["SmolLM2"])
    assert (smol.bos_token, smol.eos_token, smol.model_max_length, smol.notes) == ("<|im_start|>", "<|im_end|>", 8192, ())


def test_every_case_has_golden_data_and_every_rule_a_case():
    assert set(GOLDEN) == {"made with", "SmolLM2", *cases()}
    assert {NAMES[name] for name in SPLITS} == set(NAMES.values()) - {"gemma4"}  # which has no byte-level letters
    assert all(split_of(name).rules for name in NAMES)


def test_rules_cut_differently():
    """Rules that differ cut the texts differently: a rule that went to another name would be seen."""
    cuts = {rule: json.dumps(GOLDEN[f"bpe {rule}"]["plain"]) for rule in set(NAMES.values()) - {"gemma4"}}
    assert len(set(cuts.values())) >= len(cuts) - 3, "of texts this short, few rules may look alike"


def test_stop_tokens(tmp_path):
    path = put(tmp_path, bpe("gpt-2"))
    assert stop_tokens(read_gguf(path)) == tokenizer_of(read_gguf(path)).stop_ids == tuple(GOLDEN["bpe gpt-2"]["ends"])
    changed = bpe("gpt-2")
    changed["tokenizer.ggml.eot_token_id"] = ("uint32", 300)
    changed["tokenizer.ggml.eom_token_id"] = ("uint32", 301)
    assert {300, 301} < set(made(tmp_path, changed).stop_ids)


# -- without transformers ------------------------------------------------------------------------------------------------------

def same(words, tokenizer):
    """What `words_of` gives answers as transformers' tokenizer does: tokens, text, names, conversations."""
    for text in TEXTS:
        for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
            ids = words(text, **options)["input_ids"]
            assert ids == words(text, **options).input_ids == tokenizer(text, **options)["input_ids"], text
            for some in (ids, ids[::-1], ids[:1]):
                for skip in (False, True):
                    assert words.decode(some, skip) == tokenizer.decode(some, skip_special_tokens=skip), text
    assert words(list(TEXTS)) == {"input_ids": tokenizer(list(TEXTS))["input_ids"]}
    everything = range(len(tokenizer))
    assert [words.piece(number) for number in everything] == [tokenizer.piece(number) for number in everything]
    assert [words.is_special(number) for number in everything] == [tokenizer.is_special(number) for number in everything]
    assert len(words) == len(tokenizer) and words.piece(10**6) == b"" and words.decode(5) == tokenizer.decode(5)
    for name in ("get_added_vocab", "stop_ids", "notes", "file", "special_tokens_map", "bos_token", "bos_token_id",
                 "eos_token", "eos_token_id", "model_max_length"):
        one, other = getattr(words, name), getattr(tokenizer, name)
        assert (one() if callable(one) else one) == (other() if callable(other) else other), name
    talk = [{"role": "system", "content": TEXTS[0]}, *HELLO, {"role": "assistant", "content": "é: "}]
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        theirs = tokenizer.apply_chat_template(talk, tokenize=False, **options)
        assert words.apply_chat_template(talk, tokenize=False, **options) == theirs
        assert words.apply_chat_template([talk, HELLO], **options)["input_ids"] == [
            tokenizer.apply_chat_template(one, **options)["input_ids"] for one in (talk, HELLO)]
    assert words.apply_chat_template(talk) == {"input_ids": tokenizer.apply_chat_template(talk)["input_ids"]}


@pytest.mark.parametrize("name", list(cases()))
def test_words_are_what_transformers_has(name, tmp_path):
    file = read_gguf(put(tmp_path, cases()[name]))
    same(words_of(file), tokenizer_of(file))


def test_words_of_a_real_file_are_what_transformers_has(smol):
    same(words_of(read_gguf(fetch("smollm2-135m", progress=False))), smol)


def test_words_need_no_transformers(tmp_path):
    code = ("import sys; from llmlab.gguf import read_gguf; from llmlab.vocabulary import words_of; "
            "words = words_of(read_gguf(sys.argv[1])); words.decode(words('the dog').input_ids); "
            "print(words.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False), "
            "{'transformers', 'torch', 'jinja2'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code, put(tmp_path, bpe())], capture_output=True, text=True, check=True)
    assert done.stdout == "<|begin|>user\nHi<|end|>\n set()\n"


def test_words_refuse_what_transformers_refuses(tmp_path):
    words = words_of(read_gguf(put(tmp_path, bpe(**{"tokenizer.chat_template": None}))))
    assert words.chat_template is None
    with pytest.raises(LabError, match="vocabulary.gguf has no chat template; give plain text"):
        words.apply_chat_template(HELLO)
    with pytest.raises(LabError, match="empty"):
        words.apply_chat_template([], chat_template="x")
    named = bpe(**{"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "{{ tools | tojson }}{{ extra }}"})
    words = words_of(read_gguf(put(tmp_path, named)))
    assert words.apply_chat_template(HELLO, tokenize=False) == "plain"
    assert words.apply_chat_template(HELLO, tools=[{"name": "é"}], tokenize=False, extra=3) == '[{"name": "é"}]3'


def test_a_function_is_a_tool(tmp_path):
    def add(a: int, b: int):
        """Adds two numbers.

        Args:
            a: the one
            b: the other
        """

    file = read_gguf(put(tmp_path, bpe(**{"tokenizer.chat_template": "{{ tools[0].function.name }}"})))
    for words in (words_of(file), tokenizer_of(file)):
        assert words.apply_chat_template(HELLO, tools=[add], tokenize=False) == "add"


def test_the_process_of_templates_can_be_there_before_it_is_needed():
    templates.warm()
    started = templates._worker.process.pid
    templates.warm()
    assert templates.render("{{ x }}", {"x": 1}) == "1" and templates._worker.process.pid == started


# -- decoding ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", ["small", "pieces", "smol"])
def test_what_was_encoded_is_decoded(which, request):
    tokenizer = request.getfixturevalue(which)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        whole = b"".join(map(tokenizer.piece, plain))
        back = tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"], skip_special_tokens=True)
        if which == "pieces":  # it keeps no difference between a space and ▁, and puts a space before each part of a text
            if "<tool>" in text:
                continue
            text, whole = text.replace("▁", " "), whole.removeprefix(b" ")
        assert back == text == whole.decode(), ids


def test_special_tokens_are_left_out_when_asked(small, pieces):
    ids = small("the dog<|end|>\n<tool>")["input_ids"]
    assert small.decode(ids) == "<|begin|>the dog<|end|>\n<tool>"
    assert small.decode(ids, skip_special_tokens=True) == "the dog\n<tool>"  # a tool call is part of the answer
    ids = pieces("the dog<|end|> x")["input_ids"]
    assert ids[0] == pieces.bos_token_id
    assert pieces.decode(ids, skip_special_tokens=True) == "the dog  x"  # the space that each part gets, and its own
    assert pieces.decode(ids[1:]) == "the dog<|end|>  x"


def test_parts_of_a_character_wait_for_the_rest(small, pieces):
    for tokenizer in (small, pieces):
        ids = tokenizer("𐎀", add_special_tokens=False)["input_ids"]
        assert len(ids) >= 3
        assert tokenizer.decode(ids[:-1]).endswith("\ufffd") and tokenizer.decode(ids) == "𐎀"
        assert b"".join(map(tokenizer.piece, ids)).strip() == "𐎀".encode()


def test_nothing_is_cleaned_up_and_unknown_ids_are_nothing(small):
    text = "Hello , world ! it 's  ."
    assert small.decode(small(text)["input_ids"], skip_special_tokens=True) == text
    assert small.piece(10**6) == b"" and small.decode([10**6, small.convert_tokens_to_ids("a")]) == "a"


def test_batches_pairs_and_numpy(small):
    import numpy as np

    both = small(["the dog", "x"])["input_ids"]
    assert both == [small("the dog")["input_ids"], small("x")["input_ids"]]
    assert small.batch_decode(both, skip_special_tokens=True) == ["the dog", "x"]
    assert small.decode(np.array(both[0]), skip_special_tokens=True) == "the dog"
    assert small("a", "x")["input_ids"] == small("a")["input_ids"] + small("x")["input_ids"]


def test_no_padding_token_is_made_up(small):
    assert small.pad_token is None and small.bos_token == "<|begin|>" and small.eos_token == "<|end|>"


def test_an_ordinary_token_may_end_texts(tmp_path):
    """Falcon's files and others name ordinary tokens; they must not be cut out of texts for that."""
    changed = bpe("gpt-2", **{"tokenizer.ggml.eos_token_id": ("uint32", 97)})  # "a"
    tokenizer = made(tmp_path, changed)
    assert tokenizer.eos_token == "a" and 97 in tokenizer.stop_ids
    assert tokenizer.decode(tokenizer("a day")["input_ids"], skip_special_tokens=True) == "a day"
    assert tokenizer("and")["input_ids"] == made(tmp_path, bpe("gpt-2"))("and")["input_ids"]


def test_it_is_a_transformers_tokenizer(small, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    assert isinstance(small, PreTrainedTokenizerFast)
    for other in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert [other(text)["input_ids"] for text in TEXTS] == [small(text)["input_ids"] for text in TEXTS]
        assert other.decode(other("ü<|end|>")["input_ids"]) == small.decode(small("ü<|end|>")["input_ids"])
    small.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert [saved(text)["input_ids"] for text in TEXTS] == [small(text)["input_ids"] for text in TEXTS]


# -- chat templates ------------------------------------------------------------------------------------------------------------

def chat(folder, template, messages=HELLO, **options):
    return made(folder, bpe(**{"tokenizer.chat_template": template})).apply_chat_template(messages, tokenize=False, **options)


def test_template_of_the_file(small):
    text = small.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|>user\nHi<|end|>\n<|begin|>assistant\n"
    ids = small.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert ids == small(text, add_special_tokens=False)["input_ids"] and ids.count(small.bos_token_id) == 2
    tensors = small.apply_chat_template(HELLO, return_tensors="pt", return_dict=True)
    assert tensors["input_ids"].shape == (1, len(small.apply_chat_template(HELLO, return_dict=False)))
    assert small.apply_chat_template([HELLO, HELLO], tokenize=False) == [small.apply_chat_template(HELLO, tokenize=False)] * 2


def test_template_of_a_real_file_is_what_transformers_makes(smol):
    from transformers import PreTrainedTokenizerFast

    system = {"role": "system", "content": "Be brief <|im_end|> \n"}
    for messages in (HELLO, [system, *HELLO, {"role": "assistant", "content": "é"}]):
        for options in ({}, {"add_generation_prompt": True}):
            theirs = PreTrainedTokenizerFast.apply_chat_template(smol, messages, tokenize=False, **options)
            assert smol.apply_chat_template(messages, tokenize=False, **options) == theirs


def test_last_message_is_continued(small, tmp_path):
    messages = [*HELLO, {"role": "assistant", "content": "Sure: "}]
    assert small.apply_chat_template(messages, tokenize=False, continue_final_message=True).endswith("assistant\nSure: ")
    with pytest.raises(LabError, match="does not show the last message"):
        chat(tmp_path, "{{ messages[0]['content'] }}", messages, continue_final_message=True)
    with pytest.raises(LabError, match="either"):
        small.apply_chat_template(messages, continue_final_message=True, add_generation_prompt=True)


def test_named_templates(tmp_path):
    metadata = bpe(**{"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "{{ tools | tojson }}",
                      "tokenizer.chat_template.rag": "{{ documents[0].text }}"})
    tokenizer = made(tmp_path, metadata)
    assert set(tokenizer.chat_template) == {"default", "tool_use", "rag"}
    assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "plain"
    tool = {"name": "<é>"}
    assert tokenizer.apply_chat_template(HELLO, tools=[tool], tokenize=False) == '[{"name": "<é>"}]'
    assert tokenizer.apply_chat_template(HELLO, documents=[{"text": "x"}], chat_template="rag", tokenize=False) == "x"
    assert tokenizer.apply_chat_template(HELLO, chat_template="{{ extra }}", extra=3, tokenize=False) == "3"
    del metadata["tokenizer.chat_template"]
    with pytest.raises(LabError, match="no chat template but .*tool_use"):
        made(tmp_path, metadata).apply_chat_template(HELLO)


def test_no_template(tmp_path):
    tokenizer = made(tmp_path, bpe(**{"tokenizer.chat_template": None}))
    assert tokenizer.chat_template is None
    with pytest.raises(LabError, match="vocabulary.gguf has no chat template; give plain text"):
        tokenizer.apply_chat_template(HELLO)
    with pytest.raises(LabError, match="empty"):
        tokenizer.apply_chat_template([], chat_template="x")


def test_what_templates_use(tmp_path):
    assert chat(tmp_path, "{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}{{ bos_token + m.content }}"
                          "{% endfor %}{% generation %}a{% endgeneration %}", HELLO * 3) == "<|begin|>Hia"
    counted = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    assert chat(tmp_path, counted, HELLO * 3) == "3"
    assert len(chat(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert chat(tmp_path, "{{ messages[0].content is none }}{{ messages[0].x is defined }}",
                [{"role": "user", "content": object(), "x": None}]) == "FalseFalse"


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% set ns = namespace(__class__=1) %}{{ ns.__class__ }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a'|center(10**10) }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for m in messages %}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ 1 / 0 }}",
    "{{ undefined_thing.x }}",
    "(" * 100 + "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
])
def test_template_that_misbehaves_is_one_clear_line(template, tmp_path, monkeypatch):
    if "[ns.l, ns.l]" in template:
        monkeypatch.setattr(templates, "SECONDS", 1)  # whether time or memory runs out first depends on the machine
    with pytest.raises(LabError) as caught:
        chat(tmp_path, template)
    said = str(caught.value)
    assert "vocabulary.gguf: its chat template" in said and "\n" not in said and len(said) < 800, said
    if "alternate" in template:
        assert "roles must alternate" in said
    monkeypatch.undo()
    assert chat(tmp_path, "{{ messages[0].content }}") == "Hi"  # the next one works


@pytest.mark.parametrize("template", [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
])
def test_template_that_does_not_end(template, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    with pytest.raises(LabError, match="did not end within"):
        chat(tmp_path, template)
    assert templates._worker is None
    monkeypatch.undo()
    assert chat(tmp_path, "fine") == "fine"


def test_template_that_writes_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "LONGEST", 1000)
    with pytest.raises(LabError, match="made 2000 characters"):
        chat(tmp_path, "{{ 'ab' * 1000 }}")


def test_template_process_watched_where_the_system_sets_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "MEMORY", 1)
    with pytest.raises(LabError, match="memory"):
        chat(tmp_path, "{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}")


def test_interrupt_leaves_no_answer_behind(tmp_path, monkeypatch):
    """Ctrl-C while a template is filled in: the next conversation gets its own text."""
    def interrupt(pid):
        raise KeyboardInterrupt

    monkeypatch.setattr(templates, "_resident", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat(tmp_path, "{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}late")
    monkeypatch.undo()
    assert chat(tmp_path, "mine") == "mine"


def test_template_process_ends_with_its_python(tmp_path):
    import psutil

    code = ("import sys; from llmlab.vocabulary import templates; templates.render('x', {}); "
            "print(templates._worker.process.pid)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for _ in range(100):
        if not psutil.pid_exists(int(done.stdout)):
            break
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))


# -- vocabularies that cannot be used ------------------------------------------------------------------------------------------

def changed(key, value, of=bpe):
    return of(**{f"tokenizer.ggml.{key}": value})


def tokens_of(metadata):
    return list(metadata["tokenizer.ggml.tokens"][1])


def repeated():
    words = tokens_of(bpe())
    words[300] = words[301]
    return changed("tokens", ("array:string", words))


@pytest.mark.parametrize(("metadata", "words"), [
    (lambda: changed("model", None), ["tokenizer.ggml.model", "holds no vocabulary"]),
    (lambda: changed("model", ("uint32", 1)), ["tokenizer.ggml.model", "not a str"]),
    (lambda: changed("model", "rwkv"), ["'rwkv'", "gpt2, gemma4, llama"]),
    (lambda: changed("pre", "qwen-2"), ["tokenizer.ggml.pre", "'qwen-2'", "nearest it knows is qwen2", "llama-bpe"]),
    (lambda: changed("pre", True), ["tokenizer.ggml.pre"]),
    (lambda: changed("tokens", None), ["tokenizer.ggml.tokens is missing"]),
    (lambda: changed("tokens", ("array:uint32", [1, 2])), ["tokenizer.ggml.tokens", "string"]),
    (repeated, ["tokenizer.ggml.tokens", "twice, as 300 and 301"]),
    (lambda: changed("merges", None), ["tokenizer.ggml.merges is missing"]),
    (lambda: changed("merges", ("array:string", ["ab"])), ["tokenizer.ggml.merges", "'ab'"]),
    (lambda: changed("merges", ("array:string", ["a "])), ["tokenizer.ggml.merges", "'a '"]),
    (lambda: changed("merges", ("array:string", ["q zzz"])), ["tokenizer.ggml.merges", "'zzz' is not in"]),
    (lambda: changed("merges", ("array:uint32", [1])), ["tokenizer.ggml.merges", "string"]),
    (lambda: changed("token_type", ("array:int32", [1, 1])), ["tokenizer.ggml.token_type has 2 items for 1161 tokens"]),
    (lambda: changed("token_type", ("array:string", ["a"])), ["tokenizer.ggml.token_type"]),
    (lambda: changed("bos_token_id", ("uint32", 10**6)), ["tokenizer.ggml.bos_token_id is '1000000'", "0 to 1160"]),
    (lambda: changed("eos_token_id", ("int32", -1)), ["tokenizer.ggml.eos_token_id"]),
    (lambda: changed("eot_token_id", "x"), ["tokenizer.ggml.eot_token_id"]),
    (lambda: changed("add_bos_token", ("uint32", 1)), ["tokenizer.ggml.add_bos_token", "not a bool"]),
    (lambda: changed("scores", None, spm), ["tokenizer.ggml.scores is missing"]),
    (lambda: changed("scores", ("array:float32", [0.0]), spm), ["tokenizer.ggml.scores has 1 items"]),
    (lambda: changed("scores", ("array:float32", [float("nan")] * len(tokens_of(spm()))), spm), ["ggml.scores has nan"]),
    (lambda: changed("tokens", ("array:string", [*tokens_of(spm())[:-1], "a" * 60_000]), spm),
     ["tokenizer.ggml.tokens", "60000 letters"]),
    (lambda: bpe(**{"tokenizer.chat_template": ("uint32", 1)}), ["tokenizer.chat_template is not a string"]),
], ids=str)
def test_vocabulary_that_cannot_be_used(metadata, words, tmp_path):
    problem(tmp_path, metadata(), *words)


def test_tokens_that_are_no_text_name_file_and_key(tmp_path):
    items = b"".join(raw.text(b"\xff%d" % number) for number in range(5000))
    path = tmp_path / "bytes.gguf"
    path.write_bytes(raw.file((raw.LLAMA, raw.pair("tokenizer.ggml.model", raw.STRING, raw.text("gpt2")),
                               raw.pair("tokenizer.ggml.tokens", raw.ARRAY, raw.array(raw.STRING, 5000, items)))))
    with pytest.raises(BadFile, match=r"bytes.gguf: tokenizer.ggml.tokens has item 0, .* is not UTF-8"):
        tokenizer_of(read_gguf(path))


def test_long_vocabulary_is_read_as_a_short_one(tmp_path):
    """Beyond 4096 items an array is left in the file and read in one pass."""
    extra = [f"<extra {number}>" for number in range(6000)]
    metadata = bpe("gpt-2")
    count = len(tokens_of(metadata))
    metadata["tokenizer.ggml.tokens"] = ("array:string", tokens_of(metadata) + extra)
    metadata["tokenizer.ggml.token_type"] = ("array:int32", metadata["tokenizer.ggml.token_type"][1] + [CONTROL] * 6000)
    tokenizer = made(tmp_path, metadata)
    assert len(tokenizer) == count + 6000
    assert tokenizer("<extra 5999>the")["input_ids"][0] == count + 5999
    assert tokenizer(TEXTS[3])["input_ids"] == GOLDEN["bpe gpt-2"]["plain"][3]


def test_empty_tokens_and_odd_bytes_are_harmless(tmp_path):
    metadata = bpe("gpt-2")
    words, kinds = tokens_of(metadata), list(metadata["tokenizer.ggml.token_type"][1])
    metadata["tokenizer.ggml.tokens"] = ("array:string", [*words, "", "<0xZZ>"])
    metadata["tokenizer.ggml.token_type"] = ("array:int32", [*kinds, NORMAL, BYTE])
    tokenizer = made(tmp_path, metadata)
    assert tokenizer.convert_ids_to_tokens(len(words)) == f"[EMPTY_{len(words)}]"
    assert tokenizer.piece(len(words) + 1) == b"<0xZZ>"


def test_missing_pre_is_said(tmp_path):
    assert "no tokenizer.ggml.pre" in made(tmp_path, bpe(None)).notes[0]
