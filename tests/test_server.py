"""OpenAI's own client gets from llmlab serve what it gets from OpenAI: whole, streamed, several at once, with chances."""

import json
import math
import threading

import httpx
import openai
import pytest
from server_clients import HELLO, alone, client, http, idle, serving, tiny

import llmlab
from llmlab.runtime.engine import Engine


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """With room for tools, described in tokens of one letter."""
    return tiny(tmp_path_factory, **{"llama.context_length": 2048})


@pytest.fixture(scope="module")
def server(path):
    with serving(path) as server:
        yield server


@pytest.fixture(scope="module")
def ask(server):
    with client(server) as ask:
        yield ask


def chat(ask, count: int = 12, messages=HELLO, temperature: float = 0, **settings):
    return ask.chat.completions.create(model="tiny", messages=messages, max_tokens=count, temperature=temperature, **settings)


def write(ask, prompt="hello", count: int = 12, temperature: float = 0, **settings):
    return ask.completions.create(model="tiny", prompt=prompt, max_tokens=count, temperature=temperature, **settings)


# ---- chats --------------------------------------------------------------------------------------------------------

def test_a_chat_says_what_the_decoder_says_alone(path, ask):
    found = chat(ask)
    assert found.object == "chat.completion" and found.id.startswith("chatcmpl-") and found.model == "tiny"
    choice, = found.choices
    assert (choice.index, choice.finish_reason, choice.message.role, choice.logprobs) == (0, "length", "assistant", None)
    assert choice.message.content == alone(path, HELLO, 12)
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    tokens = len(prompt.replace("<|im_start|>", "1").replace("<|im_end|>", "1"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (tokens, 12, tokens + 12)


def test_what_was_read_before_is_not_read_again_and_counted_as_cached(ask):
    long = [{"role": "user", "content": "once " * 20}]
    first, second = chat(ask, messages=long), chat(ask, messages=long)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens // 16 == (second.usage.prompt_tokens - 1) // 16


def test_a_stream_is_the_same_in_pieces(ask):
    whole, chunks = chat(ask), list(chat(ask, stream=True, stream_options={"include_usage": True}))
    *said, usage = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * (len(said) - 1) + ["length"]
    assert usage.choices == [] and usage.usage.completion_tokens == 12 and all(chunk.usage is None for chunk in said)


def test_the_bytes_of_a_stream(server):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "temperature": 0, "stream": True}
    with http(server) as plain, plain.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for one in events[:-2]:
        assert "usage" not in json.loads(one.removeprefix("data: "))


def test_roles_and_parts_reach_the_template(path, ask):
    parts = [{"role": "developer", "content": "be brief"},
             {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
             {"role": "assistant", "content": "yes"}, {"role": "user", "content": "go"}]
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one\ntwo"},
             {"role": "assistant", "content": "yes"}, {"role": "user", "content": "go"}]
    assert chat(ask, messages=parts).choices[0].message.content == alone(path, plain, 12)


def test_an_image_is_refused_by_its_place(ask):
    picture = [{"role": "user", "content": [{"type": "text", "text": "what is it?"},
                                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
    with pytest.raises(openai.BadRequestError, match="text only.*image_url") as error:
        chat(ask, messages=picture)
    assert error.value.param == "messages[0].content[1].type"


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(ask):
    text = chat(ask, 24).choices[0].message.content
    stop = text[6:9]
    found = chat(ask, 24, stop=[stop])
    assert found.choices[0].finish_reason == "stop" and found.choices[0].message.content == text[:text.find(stop)]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(ask, 24, stop=stop, stream=True))
    assert streamed == found.choices[0].message.content


def test_without_max_tokens_an_answer_ends_where_the_context_does(path):
    with serving(path, context=64) as small, client(small) as ask:
        found = ask.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
        assert found.choices[0].finish_reason == "length" and found.usage.total_tokens == 64


# ---- several answers, and chance ----------------------------------------------------------------------------------

def test_several_choices_with_a_seed_differ_and_come_again(ask):
    first, second = (chat(ask, n=3, seed=7, temperature=1.0) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    assert chat(ask, seed=7, temperature=1.0).choices[0].message.content == texts[0]
    assert chat(ask, seed=8, temperature=1.0).choices[0].message.content == texts[1]
    assert first.usage.completion_tokens == 36


def test_several_choices_streamed(ask):
    whole = chat(ask, n=3, seed=7, temperature=1.0)
    texts = ["", "", ""]
    for chunk in chat(ask, n=3, seed=7, temperature=1.0, stream=True):
        choice, = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_negative_seeds_and_a_top_p_of_none_are_taken(ask):
    assert chat(ask, seed=-1, top_p=0, temperature=1.0).choices[0].message.content == chat(ask).choices[0].message.content


def test_a_banned_token_does_not_come_and_a_wanted_one_does(server, ask):
    text = chat(ask).choices[0].message.content
    token, = server.engine.words("z", add_special_tokens=False)["input_ids"]
    assert chat(ask, logit_bias={str(token): 100}).choices[0].message.content == "z" * 12
    first, *_ = server.engine.words(text[0], add_special_tokens=False)["input_ids"]
    assert not chat(ask, logit_bias={str(first): -100}).choices[0].message.content.startswith(text[0])


def test_a_frequency_penalty_changes_what_repeats(ask):
    token = {"90": 8.0}
    assert len(set(chat(ask, 30, logit_bias=token, frequency_penalty=2).choices[0].message.content)) > len(
        set(chat(ask, 30, logit_bias=token).choices[0].message.content))


# ---- chances ------------------------------------------------------------------------------------------------------

def test_logprobs_of_a_chat(server, ask):
    found = chat(ask, logprobs=True, top_logprobs=3).choices[0]
    told = found.logprobs.content
    assert len(told) == 12
    assert b"".join(bytes(one.bytes) for one in told).decode(errors="replace").startswith(found.message.content[:8])
    for one in told:
        assert len(one.top_logprobs) == 3 and one.logprob == one.top_logprobs[0].logprob <= 0
        assert 0.2 < sum(math.exp(other.logprob) for other in one.top_logprobs) <= 1 + 1e-5 or one.logprob > math.log(1 / 259)
    assert chat(ask, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_streamed_are_those_of_the_whole(ask):
    whole = chat(ask, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = list(chat(ask, logprobs=True, top_logprobs=2, stream=True))
    told = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.model_dump() for one in told] == [one.model_dump() for one in whole]


def test_logprobs_of_a_completion(ask):
    found = write(ask, logprobs=2, count=5).choices[0]
    chances = found.logprobs
    assert len(chances.tokens) == len(chances.token_logprobs) == len(chances.text_offset) == len(chances.top_logprobs) == 5
    assert chances.text_offset[0] == 0 and chances.text_offset == sorted(chances.text_offset)
    assert all(token in top and len(top) == 2 for token, top in zip(chances.tokens, chances.top_logprobs, strict=True))
    unlikely = write(ask, logprobs=2, count=5, logit_bias={"90": 100}).choices[0].logprobs      # chosen, and not among the best
    for token, logprob, top in zip(unlikely.tokens, unlikely.token_logprobs, unlikely.top_logprobs, strict=True):
        assert top[token] == logprob and len(top) == 2 + (logprob < sorted(top.values())[-2])
    alone = write(ask, logprobs=0, count=3).choices[0].logprobs
    assert [list(top) for top in alone.top_logprobs] == [[token] for token in alone.tokens]


# ---- completions --------------------------------------------------------------------------------------------------

def test_a_completion_says_what_the_decoder_says_alone(path, ask):
    found = write(ask)
    assert found.object == "text_completion" and found.id.startswith("cmpl-")
    assert found.choices[0].text == alone(path, "hello", 12) and found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == 5
    default = ask.completions.create(model="tiny", prompt="hello", temperature=0)
    assert default.usage.completion_tokens == 16


def test_four_ways_to_give_prompts(server, ask):
    tokens = [server.engine.words(text, add_special_tokens=False)["input_ids"] for text in ("hello", "other")]
    one, other = write(ask).choices[0].text, write(ask, "other").choices[0].text
    for prompt in (["hello", "other"], tokens):
        found = write(ask, prompt)
        assert [(choice.index, choice.text) for choice in found.choices] == [(0, one), (1, other)]
        assert found.usage.prompt_tokens == 10 and found.usage.completion_tokens == 24
    assert write(ask, tokens[0]).choices[0].text == one


def test_several_prompts_and_several_choices(ask):
    found = write(ask, ["hello", "other"], n=2, seed=3, temperature=1.0, count=6)
    alone_ = write(ask, "other", n=2, seed=3, temperature=1.0, count=6)
    assert [choice.text for choice in found.choices[2:]] == [choice.text for choice in alone_.choices]


def test_an_echo(ask):
    found = write(ask, echo=True).choices[0].text
    assert found == "hello" + write(ask).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in write(ask, echo=True, stream=True)) == found


def test_an_echo_alone(ask):
    """max_tokens=0: the prompt as it is, and its tokens counted."""
    found = write(ask, ["hello", "other"], count=0, echo=True, n=2)
    assert [(one.text, one.finish_reason) for one in found.choices] == [("hello", "length")] * 2 + [("other", "length")] * 2
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (10, 0)
    chunks = list(write(ask, count=0, echo=True, stream=True))
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [("hello", "length")]
    with pytest.raises(openai.BadRequestError, match="without echo") as error:
        write(ask, count=0)
    assert error.value.param == "max_tokens"


def test_a_completion_streams(ask):
    chunks = list(write(ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.text for chunk in chunks for one in chunk.choices) == write(ask).choices[0].text
    assert chunks[-1].usage.total_tokens == 17 and chunks[-2].choices[0].finish_reason == "length"


# ---- forms --------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "warm": {"type": "boolean"}},
          "required": ["city", "warm"], "additionalProperties": False}


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_kept(ask, stream):
    format = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA}}
    found = chat(ask, 300, response_format=format, stream=stream)
    if stream:
        chunks = list(found)
        text, reason = "".join(one.choices[0].delta.content or "" for one in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = found.choices[0].message.content, found.choices[0].finish_reason
    value = json.loads(text)
    assert reason == "stop" and value["city"] in ("Rome", "Oslo") and isinstance(value["warm"], bool) and len(value) == 2


def test_several_choices_keep_to_a_schema_each(ask):
    format = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    found = chat(ask, 300, response_format=format, n=4, seed=1, temperature=1.5)
    assert all(json.loads(choice.message.content).keys() == {"city", "warm"} for choice in found.choices)


def test_a_json_object_begins_as_one(ask):
    assert chat(ask, 20, response_format={"type": "json_object"}).choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize("schema", [{"type": "no such type"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}])
def test_a_schema_that_cannot_be_kept_is_refused(ask, schema):
    with pytest.raises(openai.BadRequestError) as error:
        chat(ask, response_format={"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}})
    assert error.value.param == "response_format"


@pytest.mark.parametrize("param", ["response_format", "tools"])
def test_a_schema_that_cannot_be_followed_any_further_is_the_requests_fault(server, ask, param):
    """A pattern that a trial finds nothing wrong with, and that comes to too much after seventy letters."""
    letter, = server.engine.words("a", add_special_tokens=False)["input_ids"]
    schema = {"type": "string", "pattern": "^(a{1,50}b?){1,200}c$"}
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}}
    if param == "tools":
        tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
        form = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    settings = form | {"logit_bias": {str(letter): 100}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed") as error:
        chat(ask, 300, **settings)
    assert (error.value.param, error.value.code) == (param, "form_error")
    with pytest.raises(openai.APIError, match="cannot be followed") as error:
        list(chat(ask, 300, stream=True, **settings))
    assert (error.value.param, error.value.code) == (param, "form_error")
    assert ask.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2) and idle(server)


# ---- tools --------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": name, "description": "of a city", "parameters": SCHEMA}}
         for name in ("weather", "news")]


def test_a_call_that_must_come_comes_in_its_schema(ask):
    named = {"type": "function", "function": {"name": "news"}}
    choice = chat(ask, 400, tools=TOOLS, tool_choice=named, parallel_tool_calls=False).choices[0]
    call, = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.type, call.function.name) == (
        "tool_calls", None, "function", "news")
    assert json.loads(call.function.arguments).keys() == {"city", "warm"} and call.id.startswith("call_")
    result = {"role": "tool", "tool_call_id": call.id, "content": "none"}
    messages = [*HELLO, choice.message.model_dump(exclude_none=True), result]
    assert chat(ask, 4, messages=messages, tools=TOOLS).usage.completion_tokens == 4


def test_a_call_streams(ask):
    choice = {"type": "function", "function": {"name": "weather"}}
    whole = chat(ask, 400, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices[0].message.tool_calls[0]
    chunks = list(chat(ask, 400, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert chunks[-1].choices[0].finish_reason == "tool_calls" and {call.index for call in calls} == {0}
    assert [call.function.name for call in calls if call.function.name] == ["weather"] and calls[0].id
    assert "".join(call.function.arguments or "" for call in calls) == whole.function.arguments


def test_tools_that_need_not_be_called_leave_text_as_it_is(ask):
    none = chat(ask, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.content == chat(ask).choices[0].message.content
    free = chat(ask, tools=TOOLS).choices[0]
    assert free.finish_reason == "length" and free.message.content and not free.message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
def test_with_tools_and_a_schema_an_answer_is_a_call_or_follows_the_schema(server, ask, stream):
    """The likeliest letter decides which: { begins JSON, < a call's mark."""
    schema = {"type": "object", "properties": {"done": {"type": "boolean"}}, "required": ["done"]}
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema | {"additionalProperties": False}}}
    found = []
    for letter in "{<":
        token, = server.engine.words(letter, add_special_tokens=False)["input_ids"]
        answer = chat(ask, 300, tools=TOOLS, parallel_tool_calls=False, response_format=format, stream=stream,
                      logit_bias={str(token): 50})
        if not stream:
            message = answer.choices[0].message
            calls = [(one.function.name, one.function.arguments) for one in message.tool_calls or []]
            found.append((message.content, calls, answer.choices[0].finish_reason))
            continue
        chunks = [chunk.choices[0] for chunk in answer]
        pieces = [one.function for chunk in chunks for one in chunk.delta.tool_calls or []]
        calls = [(pieces[0].name, "".join(one.arguments for one in pieces))] if pieces else []
        found.append(("".join(chunk.delta.content or "" for chunk in chunks) or None, calls, chunks[-1].finish_reason))
    (text, none, stop), (nothing, ((name, arguments),), called) = found
    assert (none, stop, nothing, called) == ([], "stop", None, "tool_calls")
    assert isinstance(json.loads(text)["done"], bool) and name in ("weather", "news")
    assert json.loads(arguments).keys() == {"city", "warm"}


def test_a_call_that_must_come_leaves_no_place_for_a_schema(ask):
    with pytest.raises(openai.BadRequestError, match="tool_choice asks for a call; leave response_format or tools out"):
        chat(ask, tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})


@pytest.mark.parametrize("wrong", [{"tools": [{"type": "function"}]}, {"tools": TOOLS, "tool_choice": "often"},
                                   {"tool_choice": "required"}, {"tools": TOOLS * 2}])
def test_tools_that_are_none_are_refused(ask, wrong):
    with pytest.raises(openai.BadRequestError):
        chat(ask, **wrong)


# ---- models, errors -----------------------------------------------------------------------------------------------

def test_models(ask):
    found, = ask.models.list().data
    assert (found.id, found.object, found.owned_by) == ("tiny", "model", "llmlab")
    assert ask.models.retrieve("tiny").id == "tiny"
    for call in (lambda: ask.models.retrieve("gpt-4"), lambda: ask.chat.completions.create(model="gpt-4", messages=HELLO)):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.code == "model_not_found"


def test_a_prompt_longer_than_the_context(ask):
    for call in (lambda: chat(ask, messages=[{"role": "user", "content": "a" * 2100}]), lambda: write(ask, "a" * 2100)):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 2048") as error:
            call()
        assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(("wrong", "param"), [
    ({"n": 0}, "n"), ({"n": 129}, "n"), ({"temperature": 2.1}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_p": -1}, "top_p"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"seed": 2**63}, "seed"), ({"stop": ""}, "stop"), ({"stop": [1]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"259": 1}}, "logit_bias"), ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"stream": "yes"}, "stream"), ({"messages": []}, "messages"), ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [{"role": "user", "content": 5}]},
                                                                "messages[0].content"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"), ({"model": 5}, "model"), ({"model": None}, "model"),
    ({"audio": {"voice": "a"}}, "audio"), ({"modalities": ["text", "audio"]}, "modalities"),
    ({"functions": [{"name": "f"}]}, "functions"), ({"web_search_options": {}}, "web_search_options"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"no_such": 1}, "no_such"),
])
def test_what_is_wrong_is_named(server, wrong, param):
    with http(server) as plain:
        answer = plain.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 2} | wrong)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error", error
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]


@pytest.mark.parametrize(("wrong", "param"), [
    ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [1, 259]}, "prompt"),
    ({"prompt": [-1]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": None}, "prompt"), ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"), ({"echo": True, "logprobs": 1}, "echo"), ({"logprobs": True}, "logprobs"),
    ({"prompt": ["a"] * 128, "n": 128}, "n"),
])
def test_what_is_wrong_with_a_completion_is_named(server, wrong, param):
    with http(server) as plain:
        answer = plain.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2} | wrong)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_what_changes_nothing_is_ignored(ask):
    found = chat(ask, user="me", metadata={"a": "b"}, store=True, service_tier="auto", modalities=["text"],
                 prediction={"type": "content", "content": ""}, response_format={"type": "text"},
                 extra_body={"best_of": 1, "suffix": None})
    assert found.choices[0].message.content == chat(ask).choices[0].message.content


def test_addresses_and_methods_that_are_none(server):
    with http(server) as plain:
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/", 404),
                                     ("POST", "/v1/models", 405), ("DELETE", "/health", 405)):
            answer = plain.request(method, path)
            assert answer.status_code == status and answer.json()["error"]["message"], (method, path)


def test_responses_say_what_to_ask_instead(ask):
    for call in (lambda: ask.responses.create(model="tiny", input="hello"), lambda: ask.responses.retrieve("resp_1")):
        with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions") as error:
            call()
        assert error.value.code == "unknown_url"


# ---- many at once -------------------------------------------------------------------------------------------------

def test_many_at_once_say_what_each_says_alone(path, server, ask):
    prompts = [f"{letter} and so on" for letter in "abcdefghijkl"]
    expected = {prompt: alone(path, prompt, 20) for prompt in prompts}
    found = {}

    def one(prompt: str) -> None:
        found[prompt] = write(ask, prompt, 20).choices[0].text

    threads = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected and idle(server)


# ---- in Python ----------------------------------------------------------------------------------------------------

def test_an_engine_that_is_there_is_served_and_left_open(path):
    decoder, words = llmlab.decoder(path, dtype="float32")
    with Engine(decoder, words, memory="4 MiB") as engine:
        with llmlab.serve(engine, port=0, background=True, name="mine", progress=lambda said: None) as server:
            assert httpx.get(f"{server.base_url}/models", trust_env=False).json()["data"][0]["id"] == "mine"
            assert "mine" in repr(server) and "ok" in repr(server)
        assert engine.submit([1, 2, 3]).result(10).prompt_tokens == 3


@pytest.mark.parametrize("exact", [False, True])
def test_an_answer_that_comes_again_is_taken_as_written_or_read_anew(path, exact):
    with llmlab.serve(path, port=0, memory="2 MiB", background=True, exact=exact, progress=lambda text: None) as server:
        assert server.service.engine.answers is not exact
