"""The claims of 2024: verdicts follow from numbers as they are now; the sentences, the README and the saved results agree."""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import llmlab
from llmlab.errors import LabError
from llmlab.verdicts import VERDICTS, Claims, Judged, Part, stated
from llmlab.verdicts.numbers import KINDS, figures

TOP = Path(__file__).resolve().parent.parent
IDS = [claim.id for claim in stated()]
# Quantities that sentences may hold as they are: what was asked, not what came of it.
GIVEN = {"1 GiB", "8 GiB", "12 GiB", "24 GiB", "64 GiB", "2.05 GB", "10 tokens/s", "90 %", "16 bits"}
QUANTITY = r"\d[\d.,]* (?:[GM]i?B\b|tokens/s|%|times\b|bits\b|s a token|USD)"


@cache
def judged() -> Claims:
    return llmlab.claims()


def of(id: str) -> Judged:
    return judged()[IDS.index(id)]


@pytest.mark.parametrize("id", IDS)
def test_a_claim_s_numbers_say_what_was_reviewed(id):
    found = of(id)
    assert found.verdict == found.claim.verdict
    for part, holds in found.parts:
        assert holds == part.holds, f"{part.says}: {part.number} is {part.number and found.figures[part.number]}, {part.bound}"


def test_there_are_thirteen_and_each_names_its_notebook():
    assert len(IDS) == len(set(IDS)) == 13
    books = {path.stem for path in (TOP / "notebooks").glob("0*.ipynb")} | {"07_smaller_not_bigger", "08_hybrid"}
    assert {claim.notebook for claim in stated()} < books


@pytest.mark.parametrize("id", IDS)
def test_a_sentence_takes_its_numbers_from_what_was_computed_and_says_their_kind(id):
    found = of(id)
    assert set(re.findall(QUANTITY, re.sub(r"\{[^}]*\}", "", found.claim.answer))) <= GIVEN
    assert not re.search(r"[{}]", found.answer)
    kinds = {found.figures[name].kind for name in re.findall(r"\{([\w.-]+)\}", found.claim.answer)}
    assert kinds <= set(KINDS) and all(kind in found.answer for kind in kinds), kinds
    assert all(part.bound for part, _ in found.parts if part.number)


@pytest.mark.parametrize("id", IDS)
def test_no_number_is_there_for_nothing(id):
    claim, used = of(id).claim, set(of(id).named)
    used |= {asked[side] for asked in claim.numbers.values() if asked["way"] == "ratio" for side in ("of", "over")}
    assert [name for name in claim.numbers if not any(one == name or one.startswith(f"{name}.") for one in used)] == []


def found_in(file: Path, at: str, median: bool) -> float:
    """The number at a place of a saved result, or in what a notebook printed."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    if file.suffix == ".ipynb":
        printed = "\n".join("".join(out.get("text", ())) for cell in saved["cells"] for out in cell.get("outputs", ()))
        pattern = re.escape(at).replace(r"\.\.\.", ".*?").replace(r"\{\}", r"(\d+(?:\.\d+)?)")
        return float(re.search(pattern, printed)[1])
    here = [saved]
    for key, wanted in re.findall(r"([^.\[\]]+)(?:\[([^\]]*)\])?(?:\.|$)", at):
        here = [one[key] for one in here]
        while here and isinstance(here[0], list):
            here = [one for several in here for one in several]
        if wanted:
            pairs = [pair.split("=") for pair in wanted.split(",")]
            here = [one for one in here if all(one[name] == value for name, value in pairs)]
    assert here and (median or len(here) == 1), f"{file.name}: {len(here)} at {at}"
    return statistics.median(here)


def saved() -> dict[str, dict]:
    return {f"{claim.id} {name}": asked for claim in stated() for name, asked in claim.numbers.items()
            if asked["way"] == "saved"}


@pytest.mark.parametrize("name", saved())
def test_a_kept_number_is_that_of_the_saved_result(name):
    asked = saved()[name]
    assert asked["value"] == pytest.approx(found_in(TOP / asked["file"], asked["at"], asked.get("median", False)), rel=1e-3)


def test_the_readme_has_the_table_as_it_is_now():
    assert judged().markdown() in (TOP / "README.md").read_text(encoding="utf-8"), (
        "put what `llmlab claims --markdown` prints under README's \"The claims of 2024, checked\"")


def judge(*held, beyond=()) -> str:
    """The verdict of a claim whose parts hold so."""
    parts = [(holds, False) for holds in held] + [(holds, True) for holds in beyond]
    made = tuple(Part(f"part {at}", None if holds is None else "one", holds, at_most=2 if holds else 0, beyond=after)
                 for at, (holds, after) in enumerate(parts))
    numbers = {"one": {"way": "saved", "value": 1, "file": "a.json", "at": "b"}}
    return Judged(replace(stated()[0], parts=made, numbers=numbers), figures(numbers)).verdict


def test_a_verdict_follows_from_the_parts():
    assert judge(True, True) == judge(True, beyond=(True,)) == "true"
    assert judge(True, beyond=(True, False)) == judge(True, beyond=(None,)) == "true, with a condition"
    assert judge(True, False) == judge(True, None) == judge(True, False, beyond=(True,)) == "half true"
    assert judge(False) == judge(False, False, beyond=(True,)) == "false"
    assert judge(None) == judge(False, None) == "not shown here"
    assert {judge(True), judge(True, beyond=(False,)), judge(True, False), judge(False), judge(None)} == set(VERDICTS)


def again(id: str, name: str, **changes) -> Judged:
    """A claim judged with one of its numbers asked otherwise."""
    claim = of(id).claim
    changed = replace(claim, numbers={**claim.numbers, name: {**claim.numbers[name], **changes}})
    return Judged(changed, figures(changed.numbers))


@pytest.mark.parametrize(("id", "name", "changes", "verdict"), [
    ("home-card", "3060", {"model": "qwen2.5-32b"}, "half true"),
    ("home-card", "4060ti-price", {"gpu": "rtx-4090-24gb"}, "half true"),
    ("golden-mean", "q4_k_m", {"quant": "Q3_K_M"}, "half true"),
    ("golden-mean", "8b", {"quant": "Q5_K_M"}, "half true"),
    ("iq4-xs", "q4_k_m", {"quant": "Q3_K_M"}, "half true"),
    ("paged-attention", "static", {"value": 1.9}, "false"),
    ("13b-in-8gb", "13b-fit", {"gpu": "rtx-3060-12gb"}, "true, with a condition"),
    ("smaller", "qwen", {"reach": 0.5}, "half true"),
])
def test_another_number_gives_another_verdict_and_sentence(id, name, changes, verdict):
    found = again(id, name, **changes)
    assert found.verdict == verdict and found.answer != of(id).answer


@pytest.mark.parametrize(("numbers", "words"), [
    ({"a": {"way": "guess"}}, "number 'a': KeyError 'guess'"),
    ({"a": {"way": "size", "model": "llama-3-8b"}}, "number 'a': TypeError"),
    ({"a": {"way": "size", "model": "no-such-model", "quant": "Q4_K_M"}}, "no-such-model"),
    ({"a": {"way": "ratio", "of": "b", "over": "b"}}, "number 'a': KeyError 'b'"),
    ({"a": {"way": "speed", "id": "Z99"}}, "Z99"),
    ({"a": {"way": "smollm2", "quant": "Q9_K"}}, "number 'a': StopIteration"),
    ({"a": {"way": "score", "model": "qwen2.5-7b", "benchmark": "BFCL", "source": "BFCL paper"}}, "2 scores of qwen2.5-7b"),
    ({"a": {"way": "shares", "model": "qwen2.5-7b", "beside": "nobody", "source": "Qwen run", "reach": 1}}, "no setting"),
])
def test_what_cannot_be_computed_is_said(numbers, words):
    with pytest.raises(LabError, match=re.escape(words)):
        figures(numbers)


def test_a_sentence_with_a_number_nobody_computed_is_refused():
    found = Judged(replace(stated()[0], answer="It takes {nothing}."), {})
    with pytest.raises(LabError, match="memory has no number 'nothing'"):
        _ = found.answer


def test_shown_as_text_as_a_table_and_with_links():
    found = judged()
    assert repr(found).count("\n    (0") == 13 and all(len(line) <= 200 for line in repr(found).splitlines())
    assert [row["verdict"] for row in found.table] == [claim.verdict for claim in stated()]
    html = found._repr_html_()
    assert html.count("<tr") == 14 and '<a href="01_fit.ipynb">01_fit</a>' in html and "vLLM&#x27;s" in html
    assert isinstance(found[:2], Claims) and len(found[:2]) == 2


def test_from_a_shell_as_json_without_torch():
    code = "import sys; from llmlab.cli import main; main(['claims', '--json']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["verdict"] for row in rows] == [claim.verdict for claim in stated()]
    first = rows[0]
    assert first["numbers"]["13b.verdict"]["value"] == "fits" and first["parts"][0]["bound"] == "is fits"
    assert all(one["kind"] in KINDS and one["source"] for row in rows for one in row["numbers"].values())
