"""Function calls: what is right, and each way to be wrong, by who says it; in a template, an instruction, and plain text."""

import json

import pytest
import test_server_tools as server
import tiny_chat

import llmlab
from llmlab.errors import LabError
from llmlab.evaluation.calling import call_prompt, checked_tools, same, validator, verdict, way_of

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1},
                                               "unit": {"enum": ["C", "F"]}},
              "required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "description": name, "parameters": PARAMETERS}}
         for name in ("get_weather", "get_tides")]
KNOWN = checked_tools(TOOLS)


def item(number, expected, accept=None):
    return {"id": f"t-{number}", "kind": "call", "messages": [{"role": "user", "content": "Weather in Rome, two days?"}],
            "tools": TOOLS, "expected": expected, "accept": accept or {}}


RIGHT = {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}
ACCEPT = {"city": ["Rome, Italy"], "unit": ["C"]}


def told(name, arguments):
    return json.dumps({"name": name, "arguments": arguments})


SAID = [    # arguments or a name that differ, and what it is
    (told("get_weather", {"city": "Rome", "days": 2}), "right call"),
    (told("get_weather", {"days": 2.0, "city": " ROME "}), "right call"),
    (told("get_weather", {"city": "Rome, Italy", "days": 2, "unit": "C"}), "right call"),
    (told("get_weather", {"city": "Rome", "days": 2, "unit": "F"}), "wrong arguments"),
    (told("get_weather", {"city": "Rome", "days": 3}), "wrong arguments"),
    (told("get_weather", {"city": "Rome"}), "wrong arguments"),
    (told("get_tides", {"city": "Rome", "days": 2}), "the wrong function"),
    (told("get_wether", {"city": "Rome", "days": 2}), "a function that is not there"),
    (told("get_weather", {"city": "Rome", "days": "2"}), "arguments that break the schema"),
    (told("get_weather", {"city": "Rome", "days": True}), "arguments that break the schema"),
    (told("get_weather", {"city": "Rome", "days": 0}), "arguments that break the schema"),
    (told("get_weather", {"city": "Rome", "days": 2, "hours": 3}), "arguments that break the schema"),
    (told("get_weather", {"days": 2}), "arguments that break the schema"),
    ('{"name": "get_weather", "arguments": {"city": "Rome", "days"', "no call that parses"),
    ('{"name": "get_weather", "arguments": {"city": Rome}}', "no call that parses")]


@pytest.mark.parametrize(("call", "says"), SAID)
@pytest.mark.parametrize("template", [tiny_chat.TEMPLATE, server.QWEN], ids=["instruction", "template"])
def test_what_a_model_says_is_judged(tmp_path, call, says, template):
    words = tiny_chat.tokenizer(template)
    (tmp_path / "own.jsonl").write_text(json.dumps(item(0, RIGHT, ACCEPT)))
    model = tiny_chat.Scripted(words, f"<tool_call>\n{call}\n</tool_call><|im_end|>", context=4096)
    found = llmlab.evaluate(model, words, tmp_path / "own.jsonl", progress=False)
    one, = found.outcomes
    assert (one.verdict, one.right) == (says, says == "right call") and one.said
    assert found.verdicts == [{"task": "own", "verdict": says, "items": 1}] and found.scores["own"].right == one.right
    assert ("an instruction" in found.notes[0]) == (template == tiny_chat.TEMPLATE)


@pytest.mark.parametrize(("text", "expected", "says"), [
    ("It is sunny.", RIGHT, "no call"), ("It is sunny.", None, "rightly no call"), ("", None, "nothing said"),
    (f"<tool_call>\n{told('get_weather', {'city': 'Rome'})}\n</tool_call>", None, "a call where no tool fits"),
    ("<tool_call> what? </tool_call>", None, "no call that parses"),
    (told("get_weather", {}), None, "a call where no tool fits"),                       # as servers read it: marks may lack
    (f"```json\n{told(**RIGHT)}\n```", RIGHT, "right call"), (f"So: {told(**RIGHT)}", RIGHT, "no call that parses"),
    (f"Let me.\n<tool_call>\n{told(**RIGHT)}\n</tool_call>", RIGHT, "right call"),
    (f"<tool_call>\n{told(**RIGHT)}\n</tool_call><tool_call>\n{told('get_tides', {})}\n</tool_call>", RIGHT, "right call")])
def test_words_and_calls(tmp_path, text, expected, says):
    words = tiny_chat.tokenizer()
    (tmp_path / "own.jsonl").write_text(json.dumps(item(0, expected)))
    model = tiny_chat.Scripted(words, f"{text}<|im_end|>", context=4096)
    one, = llmlab.evaluate(model, words, tmp_path / "own.jsonl", progress=False).outcomes
    assert one.verdict == says and one.right == (says in ("right call", "rightly no call"))


def test_a_model_without_a_template_gets_it_in_plain_text():
    words = tiny_chat.tokenizer(template=None)
    text = words.decode(call_prompt(words, [{"role": "system", "content": "Be brief."}, *item(0, RIGHT)["messages"]], KNOWN))
    assert json.dumps(PARAMETERS) in text
    assert text.endswith("System: Be brief.\n\nUser: Weather in Rome, two days?\n\nAssistant:")
    assert way_of(words) == "text" and way_of(tiny_chat.tokenizer()) == "instruction"
    assert way_of(tiny_chat.tokenizer(server.QWEN)) == "template"


def test_a_schema_that_is_none_and_definitions_that_are_none():
    tool = checked_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": "x"}}}])
    with pytest.raises(LabError, match="'f' are no JSON schema"):
        validator(tool.tools[0])
    for given in (None, [], [{"type": "function"}], [*TOOLS, TOOLS[0]]):
        with pytest.raises(LabError):
            checked_tools(given)


@pytest.mark.parametrize(("schema", "text", "says"), [
    ({"$ref": "#/properties/x"}, '{"x": 1}', "arguments that break the schema"),
    ({"multipleOf": 0.1}, '{"x": Infinity}', "arguments that break the schema"),
    ({"multipleOf": 0.1}, '{"x": NaN}', "arguments that break the schema"),
    ({"multipleOf": 0.1}, '{"x": 1' + "0" * 400 + "}", "arguments that break the schema"),
    ({"$ref": "#/$defs/whole"}, '{"x": 1.0}', "right call"), ({"$ref": "#/$defs/whole"}, '{"x": "1"}',
                                                              "arguments that break the schema")])
def test_whatever_a_model_writes_is_judged(schema, text, says):
    tools = checked_tools([{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": schema}, "$defs": {"whole": {"type": "integer"}}}}}])
    assert verdict(("f", text), "", tools, "f", {"x": 1}, {}) == says


@pytest.mark.parametrize("ref", ["#/$defs/none", "http://127.0.0.1:9/schema.json", "file:///etc/hostname"])
def test_a_schema_that_leads_nowhere_is_refused_and_no_address_is_opened(tmp_path, ref):
    row = item(0, {"name": "f", "arguments": {"x": 1}})
    row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": {"$ref": ref}}}}}]
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    with pytest.raises(LabError, match="line 1: the parameters of 'f' refer to .*, which is not there"):
        llmlab.evaluation.read_items(tmp_path / "own.jsonl")


@pytest.mark.parametrize(("one", "other", "equal"), [
    ("Rome", " rome", True), ("Rome", "Roma", False), (5, 5.0, True), (1, True, False), (0, False, False), ("5", 5, False),
    ([1, "A"], [1, "a"], True), ([1, 2], [2, 1], False), ({"a": [1]}, {"a": [1.0]}, True), ({"a": 1}, {"a": 1, "b": 2}, False),
    (None, None, True), (None, 0, False)])
def test_values_that_are_the_same(one, other, equal):
    assert same(one, other) is equal and same(other, one) is equal


def test_a_truncated_call_is_none():
    assert verdict(("get_weather", '{"city": "Ro'), "", KNOWN, "get_weather", {"city": "Rome"}, {}) == "no call that parses"
