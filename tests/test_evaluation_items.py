"""Items are read strictly: what cannot be used is refused in a line that names the file and where; answers are matched."""

import json
from decimal import Decimal

import pytest

from llmlab.errors import BadFile, UnknownName
from llmlab.evaluation import Call, Choice, Exact, Outcome, read_items, shipped
from llmlab.evaluation.items import may_share, task_items
from llmlab.evaluation.matching import folded, matches, number_of, whole

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"], "additionalProperties": False}}}
CHOICE = {"id": "a-1", "kind": "choice", "prompt": "Question: 2 + 2?\nAnswer:", "choices": [" 3", " 4"], "answer": 1}
EXACT = {"id": "a-2", "kind": "exact", "prompt": "2 + 2?", "answers": ["4", "four"], "match": "number"}
CALL = {"id": "a-3", "kind": "call", "messages": [{"role": "user", "content": "Weather in Rome?"}], "tools": [WEATHER],
        "expected": {"name": "get_weather", "arguments": {"city": "Rome"}}, "accept": {"city": ["Roma"], "days": [1]}}


def written(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_items_of_each_kind(tmp_path):
    choice, exact, call, none = read_items(written(tmp_path, CHOICE, "", EXACT | {"topic": "sums"}, CALL,
                                                   {**CALL, "id": "a-4", "expected": None, "accept": {}}))
    assert isinstance(choice, Choice) and choice.choices == (" 3", " 4") and choice.answer == 1 and choice.chance == 0.5
    assert isinstance(exact, Exact) and exact.tokens == 24 and exact.chance == 0
    assert isinstance(call, Call) and call.name == "get_weather" and call.accept == {"city": ("Roma",), "days": (1,)}
    assert none.name is None and len({one.digest for one in (choice, exact, call, none)}) == 4


def test_a_digest_is_of_all_that_an_item_says_and_of_nothing_else(tmp_path):
    one, = read_items(written(tmp_path, CHOICE))
    same, = read_items(written(tmp_path, dict(reversed(CHOICE.items())) | {"topic": "sums"}))
    other, = read_items(written(tmp_path, CHOICE | {"answer": 0}))
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(("row", "says"), [
    ("{", "no JSON"), ("[1]", "no JSON object"), ('{"id": "a", "id": "b"}', "twice"),
    (CHOICE | {"kind": "essay"}, "kind is 'essay'"), (CHOICE | {"kind": ["choice"]}, "kind is"),
    ({key: CHOICE[key] for key in CHOICE if key != "answer"}, "'answer' is missing"),
    (CHOICE | {"anwser": 1}, "'anwser' is none of"), (CHOICE | {"answer": 2}, "0 to 1"), (CHOICE | {"answer": True}, "0 to 1"),
    (CHOICE | {"choices": [" 4"]}, "choices"), (CHOICE | {"choices": [" 4", " 4"]}, "twice"),
    (CHOICE | {"choices": [" 4", 5]}, "text"), (CHOICE | {"choices": [" 4", " "]}, "text"),
    (CHOICE | {"prompt": ""}, "prompt"), (CHOICE | {"id": 7}, "id is 7"),
    (CHOICE | {"prompt": "\ud800?"}, "half a character"), (EXACT | {"match": "regex"}, "match is 'regex'"),
    (EXACT | {"answers": ["four"]}, "none of the answers"), (EXACT | {"answers": []}, "answers"),
    (EXACT | {"tokens": 0}, "tokens"),
    (CALL | {"messages": []}, "messages"), (CALL | {"messages": [{"role": "user"}]}, "no message"),
    (CALL | {"messages": [{"role": "assistant", "content": "x"}]}, "not the user's"), (CALL | {"tools": []}, "tools is empty"),
    (CALL | {"tools": [WEATHER, WEATHER]}, "twice"),
    (CALL | {"expected": {"name": "get_wether", "arguments": {}}}, "get_wether"),
    (CALL | {"expected": {"name": "get_weather", "arguments": {"town": "Rome"}}}, "own schema"),
    (CALL | {"expected": {"name": "get_weather"}}, "neither null nor"), (CALL | {"accept": {"days": [0]}}, "own schema"),
    (CALL | {"accept": {"city": "Roma"}}, "lists"), (CALL | {"expected": None}, "expected is null"),
    (CALL | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 3}}}]},
     "no JSON schema"), (CHOICE, "there twice")])
def test_what_cannot_be_used_is_refused_by_file_and_line(tmp_path, row, says):
    path = written(tmp_path, CHOICE, "", row)
    with pytest.raises(BadFile) as error:
        read_items(path)
    assert says in str(error.value) and "own.jsonl, line 3: " in str(error.value) and "\n" not in str(error.value)


def test_files_and_names_that_are_none(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for path in ("bytes.jsonl", "missing.jsonl"):
        with pytest.raises(BadFile, match=path):
            read_items(tmp_path / path)
    with pytest.raises(BadFile, match="no items"):
        read_items(written(tmp_path, "", ""))
    with pytest.raises(UnknownName, match="needles"):
        task_items("juggling")


def test_what_is_shipped_can_be_read():
    for task in shipped():
        assert len(task_items(task)) >= 24, f"{task}: a few dozen items"


@pytest.mark.parametrize(("line", "number"), [
    ("The answer is 42.", 42), ("3 + 4 = 7", 7), ("no digits", None), ("1,234 apples", 1234),
    ("1,234,567.5", Decimal("1234567.5")),
    ("12 345", 345), ("12\u00a0345", 12345), ("3,14", Decimal("3.14")), ("3.14", Decimal("3.14")), ("-5", -5),
    ("\u22125 degrees", -5), ("x=-2", -2),
    ("10-5", 5), ("H2O", None), ("42nd", 42), ("$7", 7), ("50%", 50), ("it is 4.", 4), ("1.2.3", Decimal("1.2"))])
def test_numbers(line, number):
    assert number_of(line) == number


def test_answers_are_matched_by_their_first_line():
    assert matches("\n\n  The sum is 4.\nOr 5?", ["4"], "number") and not matches("It is 5.\n4", ["4"], "number")
    assert matches("Let me see.\nIt is 4", ["4"], "number") and matches("Four!", ["4", "four"], "number")
    assert matches(" **Paris**.\nThe capital", ["paris"], "text") and not matches("It is Paris", ["Paris"], "text")
    assert matches("Ёлка", ["елка"], "text") and matches("x + 1", ["X  + 1"], "text")
    assert not matches("x - 1", ["x + 1"], "text")
    assert not matches("", ["4"], "number") and not matches("...", ["Paris"], "text")
    assert folded(" A,  b_C\n") == "a b c"


def test_an_answer_is_whole_when_its_line_has_ended():
    assert not whole("It is 4", "number") and whole("It is 4\n", "number") and not whole("Let me see:\nIt is 4", "number")
    assert not whole("\n\nParis", "text") and whole("\nParis\n", "text")


def test_what_may_be_among_earlier_outcomes_is_known_without_a_model(tmp_path):
    path = written(tmp_path, CHOICE, EXACT)
    choice, exact = read_items(path)
    of = [Outcome("own", exact.id, "exact", exact.digest, True)]
    assert may_share(path, None, of) and may_share(["coding", path], None, of) and not may_share(path, 1, of)
    assert not may_share("coding", None, of) and not may_share(path, None, [])
    assert not may_share(path, None, [Outcome("own", exact.id, "exact", "0", True)])       # another version of it
    named = [Outcome("needles", "number-0-0", "needle", "0", True), Outcome("lm_eval:arc_easy", "0", "lm_eval", "0", True)]
    assert may_share(None, None, named[:1]) and not may_share("needles", None, named[1:])
    assert may_share("lm_eval:arc", 5, named) and not may_share("lm_eval:arc", 5, named[:1])
