"""Tools: prompts in the way each family's chat template writes them, calls read out of answers however cut, and forced ones."""

import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
import tiny_chat
import torch
import vocabularies

from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.runtime import constraining
from llmlab.runtime.sampling import Chooser, Options, Words
from llmlab.server.calls import Reader, _Scan
from llmlab.server.dialects import ALL, FUNCTIONARY, HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, QWEN_CODER
from llmlab.server.refusals import Refusal
from llmlab.server.tools import Answer, conversation_tokens, known_dialect, tools_of
from llmlab.vocabulary import words_of

WEATHER = {"type": "object", "required": ["city"], "additionalProperties": False, "properties": {
    "city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}}
ADD = {"type": "object", "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
       "required": ["numbers"], "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER}},
         {"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}}]


def call(identity, name, arguments):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call("call_1", "get_weather", {"city": "Rome"})]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 C"}]

# What the published templates do with tools, and no more: the same text but for the words in which tools are explained.
LISTED = "{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
QWEN = ("{%- if tools %}<|im_start|>system\n{{ messages[0].content }}\n\n<tools>" + LISTED + "\n</tools><|im_end|>\n"
        "{%- set messages = messages[1:] %}{{ '\n' }}{% endif %}"
        "{%- for m in messages %}"
        "{%- if m.role == 'tool' %}"
        "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
        "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
        "{%- else %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        "{%- for t in m.tool_calls %}{{ '\n<tool_call>\n{\"name\": \"' + t.function.name + '\", \"arguments\": ' }}"
        "{{- t.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}<|im_end|>\n{% endif %}"
        "{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA_3 = ("{%- set head = '<|start_header_id|>' %}{% for m in messages %}"
           "{%- if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
           "{%- set f = m.tool_calls[0].function %}{{ head + 'assistant<|end_header_id|>\n\n' }}"
           "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}<|eot_id|>' }}"
           "{%- elif m.role == 'tool' %}{{ head + 'ipython<|end_header_id|>\n\n' }}{{ m.content | tojson }}<|eot_id|>"
           "{%- else %}{{ head + m.role + '<|end_header_id|>\n\n' }}"
           "{%- if tools and m.role == 'user' %}" + LISTED + "{{ '\n\n' }}{% endif %}{{ m.content }}<|eot_id|>{% endif %}"
           "{%- endfor %}{% if add_generation_prompt %}{{ head + 'assistant<|end_header_id|>\n\n' }}{% endif %}")
NINE = "{%- if t.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
MISTRAL_V3 = ("{{ bos_token }}{% for m in messages %}"
              "{%- if m.tool_calls %}[TOOL_CALLS][{% for t in m.tool_calls %}" + NINE +
              "{{ (t.function | tojson)[:-1] }}, \"id\": \"{{ t.id }}\"}{{ ', ' if not loop.last else ']' }}{% endfor %}</s>"
              "{%- elif m.role == 'tool' %}[TOOL_RESULTS]{\"content\": {{ m.content }}, "
              "\"call_id\": \"{{ m.tool_call_id }}\"}[/TOOL_RESULTS]"
              "{%- elif m.role == 'user' %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
              "[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}")
MISTRAL_V11 = (MISTRAL_V3.replace("[TOOL_CALLS][{%", "{%").replace("{{ (t.function | tojson)[:-1] }}, \"id\": \"{{ t.id }}\"}"
                                                                  "{{ ', ' if not loop.last else ']' }}",
                                                                  "[TOOL_CALLS]{{ t.function.name }}[CALL_ID]{{ t.id }}"
                                                                  "[ARGS]{{ t.function.arguments | tojson }}")
               .replace("{\"content\": {{ m.content }}, \"call_id\": \"{{ m.tool_call_id }}\"}",
                        "{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}"))
FUNCTIONARY_3 = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for t in m.tool_calls %}"
                 "<function={{ t.function.name }}>{{ t.function.arguments | tojson }}</function>"
                 "{% endfor %}<|eot|>{% endfor %}{{ tools | tojson }}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CODER = ("{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for t in m.tool_calls %}"
         "<tool_call>\n<function={{ t.function.name }}>\n{% for k, v in t.function.arguments | items %}"
         "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
         "{% endfor %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
NO_SYSTEM = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<model>{% endif %}")
TEMPLATES = {"qwen": (QWEN, HERMES), "llama": (LLAMA_3, LLAMA), "mistral": (MISTRAL_V3, MISTRAL),
             "mistral-args": (MISTRAL_V11, MISTRAL_ARGS), "functionary": (FUNCTIONARY_3, FUNCTIONARY),
             "coder": (CODER, QWEN_CODER), "chatml": (tiny_chat.TEMPLATE, None), "no system": (NO_SYSTEM, None)}

# What the published templates of Qwen2.5, Llama 3.1, Mistral Nemo and Mistral Small 3.2 make of TALK from the question on.
GOLDEN = {
    "qwen": "Weather in Rome?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
            '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\n18 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "llama": "Weather in Rome?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
             '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>'
             '<|start_header_id|>ipython<|end_header_id|>\n\n"18 C"<|eot_id|>'
             "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": 'Weather in Rome?[/INST]'
               '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "1549bbd55"}]</s>'
               '[TOOL_RESULTS]{"content": 18 C, "call_id": "1549bbd55"}[/TOOL_RESULTS]',
    "mistral-args": 'Weather in Rome?[/INST][TOOL_CALLS]get_weather[CALL_ID]1549bbd55[ARGS]{"city": "Rome"}</s>'
                    "[TOOL_RESULTS]1549bbd55[TOOL_CONTENT]18 C[/TOOL_RESULTS]",
}
CHATML_CALLED = ("<|im_start|>user\nWeather in Rome?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
                 '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
                 "<|im_start|>user\n<tool_response>\n18 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A small vocabulary by the name of its template; some of Mistral's marks are special tokens, one of Qwen's a plain one."""
    folder, made = tmp_path_factory.mktemp("words"), {}
    for name, (template, _) in TEMPLATES.items():
        marks = {"mistral-args": ("[TOOL_CALLS]", "[ARGS]"), "qwen": ("<tool_call>",)}.get(name, ())
        plain = vocabularies.bpe()
        tokens, kinds = plain["tokenizer.ggml.tokens"][1], plain["tokenizer.ggml.token_type"][1]
        kind = vocabularies.USER if name == "qwen" else vocabularies.CONTROL
        metadata = vocabularies.bpe(**{"tokenizer.ggml.tokens": ("array:string", [*tokens, *marks]),
                                       "tokenizer.ggml.token_type": ("array:int32", [*kinds, *[kind] * len(marks)]),
                                       "tokenizer.chat_template": template})
        made[name] = words_of(read_gguf(vocabularies.put(folder, metadata, f"{name}.gguf")))
    return made


# ---- prompts -----------------------------------------------------------------------------------------------


def test_a_templates_dialect_is_found_out(words):
    assert {name: known_dialect(words[name]) for name in words} == {name: dialect for name, (_, dialect) in TEMPLATES.items()}
    bare = tiny_chat.tokenizer(None)
    assert known_dialect(bare) is None and known_dialect(tiny_chat.tokenizer(QWEN)) is HERMES
    assert known_dialect(tiny_chat.tokenizer("{{ nonsense.of.it }}")) is None


@pytest.mark.parametrize("name", list(GOLDEN))
def test_calls_and_results_are_written_as_published_templates_do(words, name):
    text = words[name].decode(conversation_tokens(words[name], TALK, tools_of(TOOLS)))
    assert text.endswith(GOLDEN[name])
    assert json.dumps(TOOLS[0], ensure_ascii=False) in text and json.dumps(ADD) in text
    without = words[name].decode(conversation_tokens(words[name], TALK))
    assert without.endswith(GOLDEN[name]) and json.dumps(ADD) not in without


def test_results_of_one_turn_are_together(words):
    both = [call("a", "get_weather", {"city": "Rome"}), call("b", "add", {"numbers": [1]})]
    talk = [TALK[1], {"role": "assistant", "content": "Let me see.", "tool_calls": both},
            {"role": "tool", "tool_call_id": "a", "content": "18 C"}, {"role": "tool", "tool_call_id": "b", "content": "1"}]
    expected = ("Let me see.\n"
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
                '<tool_call>\n{"name": "add", "arguments": {"numbers": [1]}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
                "<tool_response>\n18 C\n</tool_response>\n<tool_response>\n1\n</tool_response><|im_end|>\n")
    for name in ("qwen", "chatml"):
        assert expected in words[name].decode(conversation_tokens(words[name], talk, None))
    with pytest.raises(LabError, match="one call at once"):
        conversation_tokens(words["llama"], talk)


def test_a_template_without_tools_gets_them_in_the_system_text(words):
    text = words["chatml"].decode(conversation_tokens(words["chatml"], TALK, tools_of(TOOLS)))
    assert text.startswith("<|im_start|>system\nBe short.\n\n# Tools") and text.endswith(CHATML_CALLED)
    assert all(json.dumps(schema) in text for schema in SCHEMAS.values()) and "<tool_call>\n{" in text
    assert words["chatml"].decode(conversation_tokens(words["chatml"], TALK[1:2], tools_of(TOOLS))).startswith(
        "<|im_start|>system\n# Tools")
    text = words["no system"].decode(conversation_tokens(words["no system"], TALK, tools_of(TOOLS)))
    assert text.startswith("<user>Be short.\n\n# Tools") and "\n\nWeather in Rome?\n<assistant><tool_call>" in text
    assert "System" not in text


def test_a_conversation_without_tools_is_as_ever(words):
    plain = [{"role": "user", "content": "Hi"}]
    for name in ("qwen", "chatml"):
        assert words[name].decode(conversation_tokens(words[name], plain)) == (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_arguments_that_are_no_json_are_shown_as_they_are(words):
    talk = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"numbers": [1'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "?"}]
    for name in ("qwen", "chatml", "mistral"):
        assert "numbers" in words[name].decode(conversation_tokens(words[name], talk, tools_of(TOOLS)))


@pytest.mark.parametrize("talk", [TALK[3:], [*TALK[:3], TALK[3] | {"tool_call_id": "other"}],
                                  [*TALK[:3], {"role": "user", "content": "x"}, TALK[3]],
                                  [*TALK[:3], {"role": "tool", "content": "18 C"}]])
def test_a_result_of_no_call_is_refused(words, talk):
    with pytest.raises(Refusal, match="tool_call_id") as refused:
        conversation_tokens(words["qwen"], talk, tools_of(TOOLS))
    assert refused.value.param.startswith("messages[") and refused.value.status == 400


# ---- calls out of answers ----------------------------------------------------------------------------------


ROME, SUM = {"city": 'Rome "{[]}" ü\\', "days": 2}, {"numbers": [1, -2]}
R, S = json.dumps(ROME, ensure_ascii=False), json.dumps(SUM)
BOTH = [("get_weather", ROME), ("add", SUM)]
ANSWERS = [      # dialect, answer, content, calls
    (HERMES, f'Let me.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {R}}}\n</tool_call>\n'
             f'<tool_call>\n{{"name": "add", "arguments": {S}}}\n</tool_call>', "Let me.", BOTH),
    (HERMES, f'<tool_call>{{"name":"get_weather","arguments":{R}}}</tool_call><tool_call>{{"arguments": {S}, "name": "add"}}'
             "</tool_call>\n", None, BOTH),
    (HERMES, f'<tool_call>\n{{"name": "get_weather", "arguments": {R}}}\n<tool_call>\n{{"name": "add", "arguments": {S}}}',
     None, BOTH),
    (HERMES, f'<tool_call>{{"name": "add", "arguments": {json.dumps(S)}}}</tool_call> Done.', "Done.", [("add", SUM)]),
    (HERMES, f'<tool_call>{{"type": "function", "function": {{"name": "add", "arguments": {S}}}}}</tool_call>', None,
     [("add", SUM)]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', None, [("add", {})]),
    (HERMES, '<tool_call>{"name": "steal", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "steal", "arguments": {}}</tool_call>', []),
    (HERMES, "a <tool_call> is <b>", "a <tool_call> is <b>", []), (HERMES, "1 < 2 <tool_ca", "1 < 2 <tool_ca", []),
    (HERMES, "<tool_call>{'name': 1}</tool_call>", "<tool_call>{'name': 1}</tool_call>", []),
    (HERMES, "  plain \n text \n", "  plain \n text \n", []), (HERMES, "", "", []),
    (HERMES, '<tool_call>\n{"name": "add", "argum', '<tool_call>\n{"name": "add", "argum', []),
    (HERMES, f'```json\n{{\n  "name": "get_weather",\n  "arguments": {R}\n}}\n```', None, BOTH[:1]),    # Qwen2.5 Coder
    (HERMES, f'```\n{{"name": "get_weather", "arguments": {R}}}\n```\n```json\n{{"name": "add", "arguments": {S}}}\n```\nDone.',
     "Done.", BOTH),
    (HERMES, f'\n{{"name": "get_weather", "arguments": {R}}}\n{{"name": "add", "arguments": {S}}}', None, BOTH),
    (HERMES, f'{{"name": "add", "arguments": {S}}} <tool_call>{{"name": "add", "arguments": {S}}}</tool_call>', None,
     BOTH[1:] * 2),
    (HERMES, '```json\n{"name": "steal", "arguments": {}}\n```', '```json\n{"name": "steal", "arguments": {}}\n```', []),
    (HERMES, '```json\n{"named": 1}\n```', '```json\n{"named": 1}\n```', []), (HERMES, "```js", "```js", []),
    (HERMES, '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []), (HERMES, '{"na', '{"na', []),
    (HERMES, f'So: ```json\n{{"name": "add", "arguments": {S}}}\n```',
     f'So: ```json\n{{"name": "add", "arguments": {S}}}\n```', []),
    (LLAMA, f'{{"name": "get_weather", "parameters": {R}}}', None, BOTH[:1]),
    (LLAMA, f'<|python_tag|>{{"name": "get_weather", "parameters": {R}}}; {{"name": "add", "arguments": {S}}}', None, BOTH),
    (LLAMA, f'\n{{"type": "function", "name": "add", "parameters": {S}}}', None, BOTH[1:]),
    (LLAMA, f'Here: {{"name": "add", "parameters": {S}}}', f'Here: {{"name": "add", "parameters": {S}}}', []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []), (LLAMA, "{", "{", []), (LLAMA, "<|python", "<|python", []),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {R}}}, {{"name": "add", "arguments": {S}}}]', None, BOTH),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {R}, "id": "abc123xyz"}},{{"name":"add","arguments":{S}}}]',
     None, BOTH),
    (MISTRAL, f'Yes. [TOOL_CALLS][{{"arguments": {S}, "name": "add"}}]', "Yes.", BOTH[1:]),
    (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (MISTRAL_ARGS, f"[TOOL_CALLS]get_weather[ARGS]{R}[TOOL_CALLS]add[CALL_ID]x1y2z3a4b[ARGS]{S}", None, BOTH),
    (MISTRAL_ARGS, f"Hm.[TOOL_CALLS]add[ARGS]{S}", "Hm.", BOTH[1:]),
    (FUNCTIONARY, f"<function=get_weather>{R}</function><function=add>{S}</function>", None, BOTH),
    (FUNCTIONARY, f"<function=other>{R}</function>", f"<function=other>{R}</function>", []),
    (QWEN_CODER, f"Well\n<tool_call>\n<function=get_weather>\n<parameter=city>\n{ROME['city']}\n</parameter>\n"
                 "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
                 "<tool_call>\n<function=add>\n<parameter=numbers>\n[1, -2]\n</parameter>\n</function>\n</tool_call>",
     "Well", BOTH),
    (QWEN_CODER, f'<tool_call>\n{{"name": "add", "arguments": {S}}}\n</tool_call>', None, BOTH[1:]),
]


def gathered(deltas):
    """A message put together from deltas, as OpenAI's clients do."""
    content, calls = "", []
    for delta in deltas:
        assert set(delta) in ({"content"}, {"tool_calls"})
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls) and re.fullmatch("call_[0-9a-f]{24}", piece["id"])
                name = piece["function"]["name"]
                calls.append({"id": piece["id"], "type": piece["type"], "function": {"name": name, "arguments": ""}})
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return content, calls


@pytest.mark.parametrize(("dialect", "answer", "content", "calls"), ANSWERS)
def test_calls_are_read_however_the_answer_is_cut(dialect, answer, content, calls):
    for size in [1, 2, 3, 5, 7, 11, 30, len(answer) + 1]:
        reader = Reader(dialect, SCHEMAS, SCHEMAS)
        deltas = []
        for at in range(0, len(answer), size):
            deltas += reader.add(answer[at:at + size])
        deltas += reader.end()
        said, made = gathered(deltas)
        assert said == reader.content == (content or "") and made == reader.calls, size
        assert [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in made] == calls
        message = reader.message
        assert message["content"] == content and message.get("tool_calls", []) == made
    assert len({one["id"] for one in made}) == len(made)


def test_names_come_first_and_arguments_as_they_come():
    reader = Reader(HERMES, SCHEMAS)
    assert reader.add('Sure. <tool_call>\n{"name": "add", "argu') == [{"content": "Sure."}]
    first, second = reader.add('ments": {')
    assert first["tool_calls"][0]["function"] == {"name": "add", "arguments": ""}
    assert second == {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}
    assert reader.add('"numbers": [1') == [{"tool_calls": [{"index": 0, "function": {"arguments": '"numbers": [1'}}]}]
    assert reader.add(', 2]}}\n</tool') == [{"tool_calls": [{"index": 0, "function": {"arguments": ", 2]}"}}]}]
    assert reader.add("_call>") == reader.end() == []
    assert json.loads(reader.calls[0]["function"]["arguments"]) == {"numbers": [1, 2]}


def test_an_answer_that_was_cut_short_has_what_came():
    reader = Reader(HERMES, SCHEMAS)
    reader.add('<tool_call>\n{"name": "add", "arguments": {"numbers": [1,')
    reader.end()
    assert reader.calls[0]["function"]["arguments"] == '{"numbers": [1,' and reader.content == ""


@pytest.mark.parametrize("dialect", ALL, ids=lambda one: one.name)
def test_whatever_comes_is_read_alike_in_any_pieces(dialect):
    """Scraps of calls thrown together: no error, the same calls and content however cut, and no letter made up."""
    scraps = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<function=add>", "</function>", "<|python_tag|>", "[",
              "]", '{"name": "add", "arguments": ', '{"numbers": [1]}', '{"name": "add", "parameters": {', "}", "{", '"', ",",
              "\\", " ", "\n", "add", '{"arguments": {}, "name": "get_weather"}', "<parameter=numbers>", "</parameter>",
              "text", ";"]
    draw = random.Random(0)
    for _ in range(150):
        text = "".join(draw.choices(scraps, k=draw.randrange(1, 14)))
        found = set()
        for size in (1, 4, len(text)):
            reader = Reader(dialect, SCHEMAS, SCHEMAS)
            deltas = [delta for at in range(0, len(text), size) for delta in reader.add(text[at:at + size])] + reader.end()
            said, made = gathered(deltas)
            assert said == reader.content and made == reader.calls
            letters = iter(text)
            assert all(letter in letters for letter in said), "content is what was written, in its order"
            found.add((said.strip(), json.dumps([one["function"] for one in made])))
        assert len(found) == 1, text


def test_special_tokens_that_have_no_text_are_seen(words):
    """Mistral's marks are special: decoding leaves them out, and their tokens tell."""
    mistral = words["mistral-args"]
    reader, ids = tools_of(TOOLS).reader(mistral), mistral.get_added_vocab()
    for token in [ids["[TOOL_CALLS]"], *mistral("add", add_special_tokens=False)["input_ids"], ids["[ARGS]"],
                  *mistral(S, add_special_tokens=False)["input_ids"]]:
        reader.add(mistral.decode([token], skip_special_tokens=True), token)
    reader.end()
    assert [one["function"] for one in reader.calls] == [{"name": "add", "arguments": S}]


@pytest.mark.parametrize(("dialect", "begin"), [
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "'), (HERMES, '<tool_call>{"arguments": {"a": "'),
    (LLAMA, '{"a": "'),
    (LLAMA, '{"name": "add", "parameters": {"a": "'), (MISTRAL, '[TOOL_CALLS][{"arguments": {"a": "')])
def test_every_letter_is_looked_at_once(dialect, begin, monkeypatch):
    """Not each time that more comes: an answer may be long."""
    looked, end = 0, _Scan.end

    def counting(self, text):
        nonlocal looked
        looked += len(text)
        return end(self, text)
    monkeypatch.setattr(_Scan, "end", counting)
    reader = Reader(dialect, SCHEMAS)
    for piece in [begin, *["xyz"] * 500]:
        reader.add(piece)
    assert 1500 <= looked <= 1500 + len(begin)


# ---- calls that must be ------------------------------------------------------------------------------------


def answered(words, tools, seed=0, most=250, begin="", answer=None):
    """What random logits say under the tools' mask, read: (reader, whether it ended)."""
    choose = Chooser(Options(temperature=1.0, top_k=0, top_p=1, min_p=0, seed=seed), mask=tools.mask(words, answer))
    reader, numbers = tools.reader(words), torch.Generator().manual_seed(seed)
    likely = [words(one, add_special_tokens=False)["input_ids"][-1] for one in '"}],1']
    pieces, forced = Words(words, [0]), words(begin, add_special_tokens=False)["input_ids"]
    new = []
    while len(new) < most and not choose.ended:
        scores = torch.randn(len(words), generator=numbers) * 2
        scores[likely] += 7
        if len(new) < len(forced):
            scores[forced[len(new)]] += 1000
        token = choose(scores, [], new)
        if token in words.stop_ids:
            reader.add(pieces.rest())
            reader.end()
            return reader, True
        new.append(token)
        reader.add(pieces.add(token), token)
    reader.add(pieces.rest())
    reader.end()
    return reader, choose.ended


def check(reader, names, most):
    assert 1 <= len(reader.calls) <= most and reader.content == ""
    for one in reader.calls:
        assert one["function"]["name"] in names
        jsonschema.validate(json.loads(one["function"]["arguments"]), SCHEMAS[one["function"]["name"]])


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_forced_call_fits_its_schema_whatever_the_logits(words, name):
    named = {"type": "function", "function": {"name": "add"}}
    for choice, names in (("required", set(SCHEMAS)), (named, {"add"})):
        tools, done = tools_of(TOOLS, choice, several=False), 0
        for seed in range(2):
            reader, ended = answered(words[name], tools, seed)
            if ended:
                check(reader, names, 1)
                done += 1
        assert done


def test_several_calls_where_they_may_be(words):
    counts = set()
    for name in ("qwen", "mistral", "mistral-args", "functionary"):
        for seed in range(2):
            reader, ended = answered(words[name], tools_of(TOOLS, "required"), seed)
            if ended:
                check(reader, set(SCHEMAS), 99)
                counts.add(len(reader.calls))
    assert len(counts) > 1


@pytest.mark.parametrize(("name", "begin"), [
    ("qwen", "Well. <tool_call>"), ("llama", '{"name": "'), ("mistral", "[TOOL_CALLS]"), ("mistral-args", "[TOOL_CALLS]"),
    ("functionary", "<function="), ("chatml", "Now: <tool_call>\n")])
def test_a_call_that_the_model_begins_is_held_to_its_schema(words, name, begin):
    tools, done = tools_of(TOOLS, several=False), 0
    for seed in range(4):
        reader, ended = answered(words[name], tools, seed, begin=begin)
        if ended:
            assert reader.content == begin.split("<")[0].split("[")[0].split("{")[0].strip()
            reader.content = ""
            check(reader, set(SCHEMAS), 1)
            done += 1
    assert done


@pytest.mark.parametrize("name", [name for name, (_, dialect) in TEMPLATES.items() if dialect is not LLAMA])
def test_an_answer_is_a_call_or_of_the_form_that_was_asked_for(words, name):
    """From its first token on; which of the two the logits decide, here by what they begin with."""
    begin = {"mistral": "[TOOL_CALLS]", "mistral-args": "[TOOL_CALLS]", "functionary": "<function="}.get(name, "<tool_call>")
    for text, calls in ((begin, True), ("{", False)):
        done = 0
        for seed in range(3):
            reader, ended = answered(words[name], tools_of(TOOLS, several=False), seed, begin=text, answer=Answer(ADD))
            if ended and calls:
                check(reader, set(SCHEMAS), 1)
            elif ended:
                assert not reader.calls
                jsonschema.validate(json.loads(reader.content), ADD)
            done += ended
        assert done, text


def test_an_answer_that_looks_like_a_call_cannot_be_asked_for_beside_calls(words):
    with pytest.raises(Refusal, match="this model's calls are JSON too") as refused:
        tools_of(TOOLS).mask(words["llama"], Answer(ADD))
    assert refused.value.status == 400 and "response_format" in str(refused.value) and "tools" in str(refused.value)
    with pytest.raises(Refusal, match="tool_choice asks for a call"):
        tools_of(TOOLS, "required").mask(words["qwen"], Answer(ADD))


def test_text_is_free_where_calls_may_be(words):
    mask = tools_of(TOOLS).mask(words["qwen"])
    for token in words["qwen"]("the quick {brown} [fox]", add_special_tokens=False)["input_ids"]:
        assert mask.allowed() is None and not mask.ended
        mask.take(token)
    assert tools_of(TOOLS).mask(words["coder"]) is None       # its values are no JSON: read, not held


# ---- what is asked -----------------------------------------------------------------------------------------


def test_what_is_offered():
    assert tools_of(None) is tools_of([]) is tools_of(None, "auto") is tools_of(None, "none") is tools_of(TOOLS, "none") is None
    auto = tools_of(TOOLS, "auto", False)
    assert not auto.forced and not auto.several and [one.name for one in auto.offered] == ["get_weather", "add"]
    assert [one.strict for one in auto.tools] == [False, True] and auto.tools[0].described == TOOLS[0]
    named = tools_of(TOOLS, {"type": "function", "function": {"name": "add"}})
    assert named.forced and [one.name for one in named.offered] == ["add"] and replace(named, choice="auto") == tools_of(TOOLS)
    assert tools_of([{"type": "function", "function": {"name": "now"}}]).tools[0].parameters == {
        "type": "object", "properties": {}, "additionalProperties": False}


def function(**fields):
    return [{"type": "function", "function": {"name": "f"} | fields}]


def deep(count):
    found = {"type": "object"}
    for _ in range(count):
        found = {"type": "object", "properties": {"a": found}}
    return found


@pytest.mark.parametrize(("tools", "choice", "param"), [
    ("x", None, "tools"), ([1], None, "tools[0]"), ([{"type": "web_search"}], None, "tools[0]"), (TOOLS * 2, None, "tools"),
    (TOOLS * 65, None, "tools"), (function(name=""), None, "tools[0].function.name"),
    (function(name="a b"), None, "tools[0].function.name"), (function(name="x" * 65), None, "tools[0].function.name"),
    (function(name=None), None, "tools[0].function.name"), (function(description=3), None, "tools[0].function.description"),
    (function(strict="yes"), None, "tools[0].function.strict"), (function(parameters=[]), None, "tools[0].function.parameters"),
    (function(parameters={"type": "string"}), None, "tools[0].function.parameters"),
    (function(parameters=deep(900)), None, "tools"),
    (function(description="x" * 300_000), None, "tools"), (None, "required", "tool_choice"), (TOOLS, "maybe", "tool_choice"),
    (TOOLS, {"type": "function"}, "tool_choice"), (TOOLS, {"type": "function", "function": {"name": "other"}}, "tool_choice"),
    (TOOLS, {"type": "allowed_tools", "function": {"name": "add"}}, "tool_choice"), (TOOLS, 3, "tool_choice"),
    (TOOLS, [], "tool_choice")])
def test_what_is_wrong_is_refused_by_name(tools, choice, param, plain_depth):
    with pytest.raises(Refusal) as refused:
        tools_of(tools, choice)
    assert refused.value.param == param and refused.value.status == 400


def test_a_strict_schema_must_be_one_that_can_be_followed(words):
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}}},
           "required": ["a"]}
    hopeless = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}
    for schema in (odd, hopeless):
        with pytest.raises(Refusal) as refused:
            tools_of(function(parameters=schema, strict=True), "required").mask(words["qwen"])
        assert refused.value.param == "tools[0].function.parameters"
        reader, ended = answered(words["qwen"], tools_of(function(parameters=schema), "required", False), seed=1)
        assert not ended or isinstance(json.loads(reader.calls[0]["function"]["arguments"]), dict)


@pytest.fixture
def trials(monkeypatch):
    """The processes that were started."""
    run, found = constraining.subprocess.run, []

    def counted(*given, **more):
        found.append(given)
        return run(*given, **more)

    monkeypatch.setattr(constraining.subprocess, "run", counted)
    return found


def many(count, name, **fields):
    """So many tools whose schemas no other test has tried."""
    return [{"type": "function", "function": {"name": f"f{at}", "parameters": {
        "type": "object", "properties": {f"{name}{at}": {"type": "integer"}}}} | fields} for at in range(count)]


def test_many_tools_are_tried_in_one_process(words, trials):
    assert tools_of(many(100, "one")).mask(words["qwen"]) and len(trials) == 1
    assert tools_of(many(100, "two")).mask(words["qwen"], Answer(ADD)) and len(trials) == 2


def test_of_many_tools_that_cannot_all_be_followed_each_is_tried_once_more_in_one(words, trials):
    hopeless = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=y)"}}}
    tools = many(60, "three")
    tools[7]["function"]["parameters"] = tools[50]["function"]["parameters"] = hopeless
    mask = tools_of(tools, "required", False)
    reader, _ = answered(words["qwen"], mask, most=400)
    assert len(trials) == 3 and not reader.content         # all, each, and all with any object in two places
    tools[50]["function"]["strict"] = True
    with pytest.raises(Refusal, match="look-around") as refused:
        tools_of(tools).mask(words["qwen"])
    assert refused.value.param == "tools[50].function.parameters"
    named = {"type": "function", "function": {"name": "f50"}}
    with pytest.raises(Refusal) as refused:
        tools_of(tools, named).mask(words["qwen"])
    assert refused.value.param == "tools[50].function.parameters"
    with pytest.raises(Refusal, match="look-around") as refused:
        tools_of(many(3, "four")).mask(words["qwen"], Answer(hopeless))
    assert refused.value.param == "response_format"


def test_tools_that_are_too_much_are_refused_after_few_processes(words, trials):
    """More than their description may be together, or more than a trial has time for."""
    doubling = {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwxyz!"]}
    tools = [one | {"function": one["function"] | {"strict": True, "parameters": {
        "type": "object", "properties": {"a": doubling}}}} for one in many(30, "five")]
    with pytest.raises(Refusal, match="too much time or memory") as refused:
        tools_of(tools, "required").mask(words["qwen"])
    assert refused.value.status == 400 and refused.value.param == "tools[0].function.parameters" and len(trials) <= 3
    long = [{"type": "function", "function": {"name": f"f{at}", "description": "x" * 2000}} for at in range(100)]
    with pytest.raises(Refusal, match=r"tools are 2\d\d,\d{3} characters of JSON; up to 200,000 are read"):
        tools_of(long)


def test_every_dialect_is_tested():
    assert {dialect for dialect, *_ in ANSWERS} == set(ALL) == {dialect for _, dialect in TEMPLATES.values()} - {None}
