"""Answers of a form: whatever the logits, what comes out fits; forms by strangers are refused in one line, in bounded time."""

import json
import random
import re

import jsonschema
import pytest
import tiny_chat
import torch
import vocabularies

from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.runtime import constraining
from llmlab.runtime.constraining import LONGEST, FormError, Later, constraint, faults, grammar_of
from llmlab.runtime.sampling import Chooser, Options
from llmlab.vocabulary import tokenizer_of, words_of

PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "ü", None, 3]}, "maxItems": 3},
        "size": {"anyOf": [{"type": "number"}, {"type": "null"}]}, "next": {"$ref": "#/$defs/place"}},
    "$defs": {"place": {"type": "object", "required": ["street"], "additionalProperties": False, "properties": {
        "street": {"type": "string", "pattern": "^[A-Z][a-z]{1,9} [0-9]{1,4}$"}, "day": {"type": "string", "format": "date"},
        "next": {"$ref": "#/$defs/place"}}}}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Vocabularies of each kind: bytes and merges, SentencePiece, and transformers' own class of bytes alone."""
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {name: words_of(read_gguf(vocabularies.put(folder, metadata, f"{name}.gguf")))
            for name, metadata in (("bpe", vocabularies.bpe()), ("spm", vocabularies.spm()))}
    return made | {"transformers": tiny_chat.tokenizer()}


def written(words, form, seed=0, most=600, likely='"}],0 ', rows=0, **options):
    """The text that random logits make of a form, which tend to end what is begun; None where it did not end by then."""
    count = max(words.get_vocab().values()) + 1 if hasattr(words, "get_vocab") else len(words)
    random_numbers = torch.Generator().manual_seed(seed)
    liked = [words(one, add_special_tokens=False)["input_ids"][-1] for one in likely]
    choose = Chooser(Options(**{"temperature": 1.0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": seed} | options),
                     mask=form.fork())
    ends = {*getattr(words, "stop_ids", (words.eos_token_id,))}
    new = []
    while len(new) < most and not choose.ended:
        scores = torch.randn(count + rows, generator=random_numbers) * 3
        scores[liked] += 6.0
        scores[count:] += 100.0         # rows of the model that are no tokens
        token = choose(scores, [], new)
        if token in ends:
            return words.decode(new)
        new.append(token)
    return words.decode(new) if choose.ended else None


@pytest.mark.parametrize("name", ["bpe", "spm", "transformers"])
def test_whatever_the_logits_the_text_fits_its_schema(small, name):
    form, done = constraint(small[name], PERSON), 0
    for seed in range(8):
        text = written(small[name], form, seed, rows=5)
        if text is not None:
            jsonschema.validate(json.loads(text), PERSON)
            done += 1
    assert done >= 4


def test_a_real_vocabulary():
    import llmlab
    words = words_of(read_gguf(llmlab.fetch("smollm2-135m", progress=False)))
    form = constraint(words, json.dumps(PERSON))
    texts = [written(words, form, seed) for seed in range(4)]
    for text in filter(None, texts):
        jsonschema.validate(json.loads(text), PERSON)
    assert sum(map(bool, texts)) >= 2
    assert form.allowed().shape == (49152,) and not form.allowed()[list(words.stop_ids)].any()


def test_json_alone_is_any_object(small):
    for name, words in small.items():
        found = [text for seed in range(6) if (text := written(words, constraint(words, "json"), seed)) is not None]
        assert found and all(isinstance(json.loads(text), dict) for text in found), name


def test_one_form_of_a_vocabulary_is_as_another(tmp_path):
    """Our words, and transformers' class around them, allow the same tokens."""
    file = read_gguf(vocabularies.put(tmp_path, vocabularies.bpe()))
    ours, theirs = constraint(words_of(file), PERSON), constraint(tokenizer_of(file), PERSON)
    draw = random.Random(0)
    for _ in range(60):
        allowed = ours.allowed()
        assert torch.equal(allowed, theirs.allowed())
        token = draw.choice(allowed.nonzero()[:, 0].tolist())
        ours.take(token)
        theirs.take(token)
        if ours.ended:
            break


@pytest.mark.parametrize(("form", "kind", "pattern"), [
    (r"(yes|no), [0-9]{2,4}!", "regex", r"(yes|no), [0-9]{2,4}!"),
    ('root ::= "a" ("b" | "c")+ "d"', "gbnf", "a[bc]+d"),
    ('start: "x" | "(" start ")"', "lark", r"\(*x\)*")])
def test_other_forms(small, form, kind, pattern):
    for words in small.values():
        found = [text for seed in range(4) if (text := written(words, constraint(words, form, kind), seed, likely="!d)x"))]
        assert found and all(re.fullmatch(pattern, text) for text in found)


def test_an_end_comes_where_the_form_is_whole_and_not_before(small):
    words = small["bpe"]
    form = constraint(words, "a{2,3}", "regex")
    end, = words.stop_ids
    a, = words("a", add_special_tokens=False)["input_ids"]
    for whole in (False, False, True):
        assert form.whole == whole == bool(form.allowed()[end]) and not form.ended
        form.take(a)
    assert form.ended and form.allowed().nonzero()[:, 0].tolist() == [end]
    form.take(end)
    assert form.ended
    other = constraint(words, "a{2,3}", "regex", ends=[a])
    assert not other.allowed()[end]


def test_a_vocabulary_without_an_end_still_gets_to_one():
    words = tiny_chat.tokenizer()
    words.eos_token = None
    assert json.loads(written_without_end(words)) in (True, False)


def written_without_end(words):
    form, text = constraint(words, {"type": "boolean"}), []
    while not form.ended:
        text.append(int(form.allowed().nonzero()[0]))
        form.take(text[-1])
    return words.decode(text)


def test_special_tokens_are_no_text(small):
    for words in small.values():
        form = constraint(words, "(.|\n)*", "regex")
        special = set(words.get_added_vocab().values()) - set(getattr(words, "stop_ids", (words.eos_token_id,)))
        special = {one for one in special if not hasattr(words, "is_special") or words.is_special(one)}
        assert special and not form.allowed()[list(special)].any()


def test_a_fork_goes_its_own_way(small):
    words = small["bpe"]
    form = constraint(words, "ab|ac", "regex")
    a, b, c = (words(one, add_special_tokens=False)["input_ids"][0] for one in "abc")
    form.take(a)
    other = form.fork()
    other.take(c)
    assert other.ended and not form.ended and form.allowed()[b]
    form.take(b)
    assert form.ended
    with pytest.raises(LabError, match="token"):
        constraint(words, "ab|ac", "regex").take(b)


def test_spaces_do_not_go_on_for_ever(small):
    words = small["transformers"]
    form = constraint(words, {"type": "array", "items": {"type": "integer"}})
    for one in "[1,\n  ":
        form.take(words(one, add_special_tokens=False)["input_ids"][0])
    line, = words("\n", add_special_tokens=False)["input_ids"]
    assert not form.allowed()[line]


# ---- a form that begins later ------------------------------------------------------------------------------


def test_a_text_is_free_until_an_opening(small):
    words = small["bpe"]
    later = Later(words, constraint(words, ' ?x=[0-9]+;', "regex"), re.compile(b"<go>"))
    said = words("anything, <g or <go", add_special_tokens=False)["input_ids"]
    for token in said:
        assert later.allowed() is None
        later.take(token)
    before = later.fork()
    for text in (">", "x", "=", "7"):
        for token in words(text, add_special_tokens=False)["input_ids"]:
            later.take(token)
    allowed = {words.decode([token]) for token in later.allowed().nonzero()[:, 0].tolist()}
    assert ";" in allowed and all(set(one) <= set("0123456789;") for one in allowed) and not later.ended
    later.take(words(";", add_special_tokens=False)["input_ids"][0])
    assert later.ended and before.allowed() is None and not before.ended


def test_an_opening_may_be_special_or_lie_inside_a_token(tmp_path):
    words = words_of(read_gguf(vocabularies.put(tmp_path, vocabularies.bpe())))
    special = words.get_added_vocab()["<|begin|>"]
    later = Later(words, constraint(words, "[0-9]+", "regex"), re.compile(re.escape(b"<|begin|>")))
    later.take(special)
    assert later.allowed() is not None
    # "the" is one token: what follows the opening in it is given to the form, and where that does not take it nothing is held.
    the, = words("the", add_special_tokens=False)["input_ids"]
    taken = Later(words, constraint(words, "he[0-9]+", "regex"), re.compile(b"t"))
    taken.take(the)
    assert taken.allowed() is not None
    refused = Later(words, constraint(words, "[0-9]+", "regex"), re.compile(b"t"))
    refused.take(the)
    assert refused.allowed() is None
    anchored = Later(words, constraint(words, '"[a-z]+"', "regex"), re.compile(rb"\A\s*the"), b'"')
    anchored.take(the)
    assert anchored.allowed() is not None
    for token in words("x the", add_special_tokens=False)["input_ids"]:
        refused.take(token)
    late = Later(words, constraint(words, '"[a-z]+"', "regex"), re.compile(rb"\A\s*the"), b'"')
    for token in words("x the the", add_special_tokens=False)["input_ids"]:
        late.take(token)
    assert late.allowed() is None


# ---- forms by strangers ------------------------------------------------------------------------------------


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(("form", "kind", "said"), [
    ({"type": "objekt"}, "json_schema", "objekt"), ('{"type": "object"', "json_schema", "line 1"),
    ([], "json_schema", "give an object"), (False, "json_schema", "schema is false"), (None, "json_schema", "give an object"),
    ("[]", "json_schema", "give an object"), ({"$ref": "http://127.0.0.1:9/x"}, "json_schema", "not present"),
    ({"$ref": "file:///etc/passwd"}, "json_schema", "not present"),
    ({"$ref": "#/$defs/x"}, "json_schema", "does not exist"), ({"not": {}}, "json_schema", "not"),
    ({"type": "string", "pattern": "(?=a)b"}, "json_schema", "look-around"), ({"enum": []}, "json_schema", "empty"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "json_schema", "greater"),
    ({"type": "integer", "multipleOf": 10**9 + 7}, "json_schema", "cannot be followed"),
    (nested(200), "json_schema", "recursion"), (nested(900), "json_schema", "deep"), ({"a": {1, 2}}, "json_schema", "set"),
    ("(", "regex", "regex parse error"), (r"(?<!a)b", "regex", "look-around"), ({}, "regex", "give text"),
    ("^(a{1000}){1000}$", "regex", "too many expressions"), ("x" * (LONGEST + 1), "regex", "characters"),
    ("start: nowhere", "lark", "unknown name"), ("start: (", "lark", "cannot be followed"), ("root ::= x", "gbnf", "'x' not"),
    ("x", "yaml", "json_schema, regex, lark, gbnf")])
def test_a_form_that_cannot_be_is_refused_in_one_line(small, form, kind, said, plain_depth):
    with pytest.raises(LabError, match=re.escape(said)) as refused:
        constraint(small["bpe"], form, kind)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_form_that_would_take_for_ever_is_ended(small):
    """Patterns that must all fit: what they come to doubles with each, and no limit of llguidance's own counts it."""
    hostile = {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwxyz"]}
    with pytest.raises(LabError, match="too much time or memory"):
        constraint(small["bpe"], hostile)


def test_what_is_wrong_with_each_of_several(small, plain_depth):
    """In one trial: what comes after one that ends it is as one that asks for too much itself."""
    odd = {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}}
    said = faults([({"type": "integer"}, False), (odd, False), (odd, True), ({"type": "objekt"}, True), (nested(900), False),
                   ({"type": "string", "pattern": "("}, False), ({}, False)])
    assert [bool(one) for one in said] == [False, True, False, True, True, True, False]
    assert "uniqueItems" in said[1] and "objekt" in said[3] and "deep" in said[4] and all("\n" not in one for one in said)
    hostile = {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "zyxwvutsrqponmlkjihgfedcba"]}
    said = faults([({"type": "null"}, False), (hostile, False), ({"type": "boolean"}, False)])
    assert said[0] == "" and "too much time or memory" in said[1] and said[1] == said[2]
    assert faults([]) == [] and faults([({"type": "objekt"}, False)]) == [said_alone({"type": "objekt"})]


def said_alone(schema):
    with pytest.raises(FormError) as refused:
        grammar_of(schema)
    return str(refused.value)


def test_a_form_that_cannot_be_followed_any_further_says_so(small):
    """What a trial finds nothing wrong with may still come to too much."""
    words = small["transformers"]
    form = constraint(words, {"type": "string", "pattern": "^(a{1,50}b?){1,200}c$"})
    with pytest.raises(FormError, match="the JSON schema cannot be followed: .*too many") as error:
        for one in '"' + "a" * 200:
            form.allowed()
            form.take(words(one, add_special_tokens=False)["input_ids"][0])
    assert "\n" not in str(error.value)
    with pytest.raises(FormError, match="the JSON schema"):
        constraint(words, {"type": "integer"}).take(words("a", add_special_tokens=False)["input_ids"][0])


def test_what_cannot_be_followed_can_be_passed_over(small):
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}
    with pytest.raises(LabError, match="uniqueItems"):
        constraint(small["bpe"], schema)
    assert isinstance(json.loads(written(small["bpe"], constraint(small["bpe"], schema, lenient=True))), list)


def test_a_trial_that_a_busy_moment_ended_is_tried_again(small, monkeypatch):
    form, run = {"type": "object", "properties": {"busy": {"type": "integer"}}}, constraining.subprocess.run

    def late(*given, **more):
        raise constraining.subprocess.TimeoutExpired("trial", 1)

    monkeypatch.setattr(constraining.subprocess, "run", late)
    with pytest.raises(LabError, match="too much time or memory"):
        constraint(small["bpe"], form)
    monkeypatch.setattr(constraining.subprocess, "run", run)
    assert constraint(small["bpe"], form)
