"""The items of data/tasks: well formed, and right: code is run, sums are done again, calls are held against their schemas."""

import contextlib
import csv
import hashlib
import io
import json
import re
from collections import Counter
from datetime import date, timedelta
from fractions import Fraction
from itertools import permutations

import jsonschema
import pytest

from llmlab.places import folder

TASKS = ("coding", "tools", "reasoning", "english", "russian")
FIELDS = {"choice": {"id", "kind", "topic", "prompt", "choices", "answer"},
          "exact": {"id", "kind", "topic", "prompt", "answers", "match", "tokens"},
          "call": {"id", "kind", "topic", "messages", "tools", "expected", "accept"}}

# Items whose choices are written into code: the right one alone makes it print this.
COMPLETED = {
    "coding-015": ('import sqlite3\ndb = sqlite3.connect(":memory:")\ndb.execute("create table users (name)")\n'
                   'db.executemany("insert into users values (?)", [("a",), ("b",), ("c",)])\n'
                   'print(db.execute("____").fetchall())', "[(3,)]"),
    "coding-016": ('import sqlite3\ndb = sqlite3.connect(":memory:")\ndb.execute("create table t (a)")\n'
                   'db.executemany("insert into t values (?)", [(1,)] * 6 + [(2,)])\n'
                   'print(db.execute("select a from t group by a ____ count(*) > 5").fetchall())', "[(1,)]"),
    "coding-020": ('import re\nprint([bool(re.fullmatch(r"____", s)) for s in ("1234", "123", "12345", "12a4", "44", "")])',
                   "[True, False, False, False, False, False]"),
    "coding-022": ("def factorial(n):\n    if n == 0:\n        return 1\n    ____\n\nprint(factorial(5))", "120"),
    "coding-023": ('words = "a b a".split()\ncounts = {}\nfor word in words:\n    ____\nprint(counts)', "{'a': 2, 'b': 1}"),
}
# Items whose code raises an exception, which is the answer.
RAISED = {"coding-024": 'ages = {"Ann": 31}\nprint(ages["Bob"])', "coding-036": 'int("abc")'}
# Items that can be done again: the value is the answer, or the number in it.
CHECKED = {
    "reasoning-001": "3 + 4",
    "reasoning-002": "12 * 5",
    "reasoning-003": "60 * 2.5",
    "reasoning-004": "40 * (1 - 0.25)",
    "reasoning-005": "(4 + 8 + 12 + 16) / 4",
    "reasoning-006": "2 / 12 * 30",
    "reasoning-007": "2 * 6 / 3",
    "reasoning-008": "(11 - 5) / 2",
    "reasoning-009": "2 * (8 + 5)",
    "reasoning-010": "2.5 * 1000",
    "reasoning-011": "'%d:%02d' % divmod(9 * 60 + 45 + 90, 60)",
    "reasoning-012": "(date(2026, 11, 25) + timedelta(10)).strftime('%A')",
    "reasoning-013": "date(2025, 4, 1).strftime('%A')",
    "reasoning-014": "2 ** 5",
    "reasoning-015": "13 + 5",
    "reasoning-016": "Fraction(3, 6)",
    "reasoning-017": "Fraction(3, 3 + 2)",
    "reasoning-018": "Fraction(2, 4)",
    "reasoning-019": "only(p[3] for p in permutations('TBCD') if p.index('D') < p.index('T') < p.index('B') < p.index('C'))",
    "reasoning-020": "only(p[2] for p in permutations('ywgrb') if p[:2] == ('y', 'w') and p[4] == 'g' "
                     "and p.index('r') + 1 == p.index('b'))",
    "reasoning-025": "15 + 27",
    "reasoning-026": "9 * 8",
    "reasoning-027": "12 / 3 * 2",
    "reasoning-028": "6 * 250 / 100",
    "reasoning-029": "12 / 2 + 10",
    "reasoning-030": "200 * 35 / 100",
    "reasoning-031": "(100 - 80) / 80 * 100",
    "reasoning-032": "only(n + 2 for n in range(48) if n + n + 1 + n + 2 == 48)",
    "reasoning-033": "len(list(permutations('ABCD', 2)))",
    "reasoning-034": "(24 + 6) * 60 + 15 - (22 * 60 + 40)",
    "reasoning-035": "(date(2026, 11, 27) - timedelta(3)).strftime('%A')",
    "reasoning-036": "only(p[1] for p in permutations('MNOP') if p.index('M') < p.index('N') < p.index('O') < p.index('P'))",
    "russian-021": "'%d:%02d' % divmod(9 * 60 - 10, 60)",
    "russian-034": "3 + 1 + 1",
    "russian-035": "200 - 3 * 45",
}
SHORT = {"C": "Carl", "r": "The red one", "N": "Noah"}      # of the orderings above


def items_of(task: str) -> list[dict]:
    return [json.loads(line) for line in (folder("data") / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


ITEMS = {item["id"]: item for task in TASKS for item in items_of(task)}


def of_kind(kind: str) -> list[dict]:
    return [item for item in ITEMS.values() if item["kind"] == kind]


def printed(code: str) -> str:
    """What the code prints; the name of the exception that it raises."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, {})
    except Exception as error:
        return type(error).__name__
    return out.getvalue().rstrip("\n")


def right_of(item: dict) -> str:
    return item["choices"][item["answer"]].strip() if item["kind"] == "choice" else item["answers"][0]


def wrong_of(item: dict) -> list[str]:
    return [text.strip() for at, text in enumerate(item.get("choices", [])) if at != item["answer"]]


def only(values):
    [value] = set(values)
    return value


def says(text: str, value) -> bool:
    """Whether an answer is this value, or has this number in it."""
    if isinstance(value, str):
        return text.removeprefix("в ") == SHORT.get(value, value)
    return Fraction(re.search(r"\d+(?:/\d+)?", text)[0]) == Fraction(value).limit_denominator(1000)


def test_every_task_has_its_items():
    for task in TASKS:
        items = items_of(task)
        assert [item["id"] for item in items] == [f"{task}-{number:03d}" for number in range(1, 37)]
        kinds = Counter(item["kind"] for item in items)
        assert kinds == ({"call": 36} if task == "tools" else {"choice": 24, "exact": 12})
    prompts = [item.get("prompt") or json.dumps([item["messages"], item["tools"]]) for item in ITEMS.values()]
    assert len(set(prompts)) == len(ITEMS) == 180


@pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)
def test_an_item_is_well_formed(item):
    assert set(item) == FIELDS[item["kind"]]
    if item["kind"] == "choice":
        question, answer = ("Вопрос: ", "\nОтвет:") if item["id"].startswith("russian") else ("Question: ", "\nAnswer:")
        assert item["prompt"].startswith(question) and item["prompt"].endswith(answer)
        assert len(item["choices"]) == len(set(item["choices"])) == 4 and item["answer"] in range(4)
        assert all(re.fullmatch(r" \S(.*\S)?", text) for text in item["choices"])
        lengths = [len(text) for text in item["choices"]]
        assert max(lengths) <= 1.7 * min(lengths) + 4, lengths
    elif item["kind"] == "exact":
        assert item["prompt"] == item["prompt"].strip() and item["tokens"] == 24 and item["answers"]
        assert item["match"] in ("number", "text") and len(item["answers"]) == len(set(item["answers"]))
        assert item["match"] == "text" or all(float(text) == int(text) for text in item["answers"])
        told = item["prompt"].casefold()     # who only repeats the question does not answer it
        assert item["id"] in ("english-029", "english-034", "english-035", "reasoning-036", "russian-033") or \
            not any(re.search(rf"\b{re.escape(text.casefold())}\b", told) for text in item["answers"])
    else:
        assert [message["role"] for message in item["messages"]] == ["user"] and 1 <= len(item["tools"]) <= 4


def test_right_answers_are_spread_and_not_told_by_length():
    for task in TASKS:
        choices = [item for item in items_of(task) if item["kind"] == "choice"]
        if choices:
            assert set(Counter(item["answer"] for item in choices).values()) == {6}
            longest = sum(len(right_of(item)) > max(map(len, wrong_of(item))) for item in choices)
            shortest = sum(len(right_of(item)) < min(map(len, wrong_of(item))) for item in choices)
            assert longest <= 9 and shortest <= 9, (task, longest, shortest)


def test_code_that_is_shown_prints_the_right_answer():
    ran = 0
    for item in items_of("coding"):
        code = re.search(r"this Python code print\?.*?\n\n(.*?)(?:\n\nAnswer:)?$", item["prompt"], re.DOTALL)
        if code:
            ran += 1
            assert printed(code[1]) == right_of(item), item["id"]
    assert ran == 20


@pytest.mark.parametrize("name", COMPLETED)
def test_only_the_right_choice_completes_the_code(name):
    code, shown = COMPLETED[name]
    assert printed(code.replace("____", right_of(ITEMS[name]))) == shown
    assert [text for text in wrong_of(ITEMS[name]) if printed(code.replace("____", text)) == shown] == []


@pytest.mark.parametrize("name", RAISED)
def test_code_raises_what_the_answer_says(name):
    assert RAISED[name] in ITEMS[name]["prompt"] and printed(RAISED[name]) == right_of(ITEMS[name])


def test_the_function_with_the_bug_has_it():
    code = ITEMS["coding-021"]["prompt"].split("\n\n")[1]
    fixed = code.replace("        return result", "    return result")
    assert printed(code + "\nprint(total([4, 5, 6]))") == "4" and printed(fixed + "\nprint(total([4, 5, 6]))") == "15"


@pytest.mark.parametrize("name", CHECKED)
def test_sums_are_right(name):
    value = eval(CHECKED[name], {"date": date, "timedelta": timedelta, "Fraction": Fraction, "permutations": permutations,
                                 "only": only})
    assert says(right_of(ITEMS[name]), value)
    assert [text for text in wrong_of(ITEMS[name]) if says(text, value)] == []


def test_no_tool_fits_six_calls():
    assert sum(item["expected"] is None for item in of_kind("call")) == 6
    assert all(not item["accept"] for item in of_kind("call") if item["expected"] is None)


@pytest.mark.parametrize("item", of_kind("call"), ids=[item["id"] for item in of_kind("call")])
def test_the_expected_call_fits_its_tool_and_wrong_ones_do_not(item):
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item["tools"]}
    assert len(schemas) == len(item["tools"])
    for tool in item["tools"]:
        assert tool["type"] == "function" and set(tool["function"]) == {"name", "description", "parameters"}
        jsonschema.Draft202012Validator.check_schema(tool["function"]["parameters"])
    if item["expected"] is None:
        return
    schema, arguments = schemas[item["expected"]["name"]], item["expected"]["arguments"]
    check = jsonschema.Draft202012Validator(schema)
    check.validate(arguments)
    for name, values in item["accept"].items():
        for value in values:
            assert value != arguments.get(name)
            check.validate(arguments | {name: value})
    for name in schema["required"]:
        assert not check.is_valid({key: value for key, value in arguments.items() if key != name})
    for name in arguments:
        assert not check.is_valid(arguments | {name: None})
    assert not check.is_valid(arguments | {"nonsense": 1})
    if "date" in arguments:
        date.fromisoformat(arguments["date"])


def test_what_was_measured_of_them_adds_up():
    """data/evaluations.csv: counts, shares and intervals follow from each other, and its rows are of the items as they are."""
    pytest.importorskip("torch")
    from llmlab.evaluation import read_items
    from llmlab.intervals import wilson

    with open(folder("data") / "evaluations.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["model"], row["quant"], row["task"], row["items"]) for row in rows}) == len(rows) > 5
    for row in rows:
        items = read_items(folder("data") / "tasks" / f"{row['task']}.jsonl")
        stamp, _, every = row["items"].partition("-every")
        assert stamp == hashlib.sha256("".join(item.digest for item in items).encode()).hexdigest()[:8], row["task"]
        asked = items[::int(every or 1)]
        right, n = int(row["right"]), int(row["n"])
        assert n == len(asked) and 0 <= right <= n and float(row["share"]) == round(right / n, 4)
        assert (float(row["low"]), float(row["high"])) == tuple(round(edge, 4) for edge in wilson(right, n))
        assert float(row["chance"]) == round(sum(item.chance for item in asked) / n, 4)
        assert not row["logprob"] or float(row["logprob"]) < 0
