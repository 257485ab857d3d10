"""Scores are what reading everything anew gives, on a tiny model and on a real one; a damaged evaluation is caught; two
evaluations are paired item by item."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_chat
import torch

import llmlab
from llmlab.errors import BadFile, LabError
from llmlab.evaluation import Evaluation, Outcome
from llmlab.evaluation.asking import Asked
from llmlab.evaluation.student import student
from llmlab.loading import load
from llmlab.quality.statistics import Estimate, mean
from llmlab.runtime.generating import memory_of

CITIES = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Russia": "Moscow", "Japan": "Tokyo",
          "Egypt": "Cairo", "England": "London"}
ANSWERS = [" London", " Oslo town", " a", " Lima, in Peru"]


def choice(number, prompt, choices, answer):
    return {"id": f"c-{number}", "kind": "choice", "prompt": prompt, "choices": choices, "answer": answer}


def capitals():
    """Questions that SmolLM2 can answer, each beside three other cities."""
    names = list(CITIES.values())
    for at, (country, city) in enumerate(CITIES.items()):
        choices = [f" {names[(at + step) % len(names)]}" for step in (0, 1, 3, 5)]
        choices = choices[at % 4:] + choices[:at % 4]
        yield choice(at, f"Question: What is the capital of {country}?\nAnswer:", choices, choices.index(f" {city}"))


def written(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", **{"llama.context_length": 2048})


@pytest.fixture(scope="module")
def smollm2():
    return llmlab.fetch("smollm2-135m", progress=False)


def anew(model, tokens, count):
    """Log-likelihood of the last `count` of `tokens`, by one pass over all of them without a cache; and the likeliest there."""
    with torch.inference_mode():
        rows = model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
    places = range(len(tokens) - count - 1, len(tokens) - 1)
    return sum(float(rows[at, tokens[at + 1]]) for at in places), [int(rows[at].argmax()) for at in places] == tokens[-count:]


@pytest.mark.parametrize("way", ["decoder", "packed cache", "model"])
def test_likelihoods_are_those_of_reading_all_anew(tiny, way):
    words = tiny_chat.tokenizer()
    kv = "f32" if way == "packed cache" else None
    model = tiny_chat.model() if way == "model" else llmlab.decoder(tiny, dtype="float32", kv=kv)[0]
    asked, prompt = Asked(model, words), words("Where does she live? In")["input_ids"]
    for order in (ANSWERS, ANSWERS[::-1]):
        targets = [words(text)["input_ids"] for text in order]
        with asked.held():
            for target, found in zip(targets, asked.likelihoods(prompt, targets), strict=True):
                value, greedy = anew(tiny_chat.model(), prompt + target, len(target))
                assert found.value == pytest.approx(value, abs=2e-3) and found.greedy == greedy
                assert found.tokens == len(target)
        assert asked.memory.tokens == []


def test_a_prompt_is_read_once_and_a_choice_without_its_last_token(tiny):
    decoder, words = llmlab.decoder(tiny, dtype="float32")
    asked, prompt = Asked(decoder, words), words("Where does she live? In")["input_ids"]
    targets = [words(text)["input_ids"] for text in ANSWERS]
    asked.likelihoods(prompt, targets)
    assert asked.read == len(prompt) + sum(len(target) - 1 for target in targets)
    before = asked.read
    asked.likelihoods(prompt + words(" the")["input_ids"], [words("re")["input_ids"]])
    assert asked.read == before + 3 + 1         # the space of " Lima" stands there already


def test_a_memory_gives_the_logits_after_each_token(tiny):
    words = tiny_chat.tokenizer()
    tokens = words("after each of them")["input_ids"]
    model = tiny_chat.model()
    with torch.inference_mode():
        right = model(torch.tensor([tokens])).logits[0]
    memory = memory_of(model)
    assert torch.allclose(memory.logits(tokens[:7]), right[:7], atol=1e-4)
    assert torch.allclose(memory.logits(tokens[7:]), right[7:], atol=1e-4) and memory.tokens == tokens
    assert memory.keep(tokens[:9]) == 8 and torch.allclose(memory.read(tokens[8:9]), right[8], atol=1e-4)


def test_spaces_at_the_prompts_end_belong_to_the_choice(tiny):
    asked = Asked(*llmlab.decoder(tiny, dtype="float32"))
    first, rest = asked.pair("Answer: ", "yes")
    assert (asked.words.decode(first), asked.words.decode(rest)) == ("Answer:", " yes") == (
        *map(asked.words.decode, asked.pair("Answer:", " yes")),)


def test_choices_by_sum_and_by_length(tiny, tmp_path):
    """The likeliest a character is the headline, the likeliest is beside it; both from one pass over everything."""
    texts = [" Os", " Oslo", " Oslo to", " Oslo town"]
    rows = [choice(at, f"Number {at}:", texts, at % 4) for at in range(8)]
    found = llmlab.evaluate(*llmlab.decoder(tiny, dtype="float32"), written(tmp_path / "own.jsonl", *rows), progress=False)
    words, model = tiny_chat.tokenizer(), tiny_chat.model()
    for row, one in zip(rows, found.outcomes, strict=True):
        sums = [anew(model, words(row["prompt"] + text)["input_ids"], len(words(text)["input_ids"]))[0] for text in texts]
        assert one.logprobs == pytest.approx(sums, abs=5e-3) and one.logprob == one.logprobs[row["answer"]]
        assert one.plain == (max(sums) == sums[row["answer"]])
        by_length = [value / len(text) for value, text in zip(sums, texts, strict=True)]
        assert one.said == texts[by_length.index(max(by_length))] and one.right == (one.said == texts[row["answer"]])
    assert any(one.said != texts[one.logprobs.index(max(one.logprobs))] for one in found.outcomes)
    assert {one.plain for one in found.outcomes} == {True, False}
    assert found.scores["own"].chance == 0.25 and found.tokens["own"] < 8 * 80


def test_a_real_model_knows_capitals_and_damage_is_seen(smollm2, tmp_path):
    decoder, words = llmlab.decoder(smollm2, dtype="float32")
    rows = list(capitals())
    good = llmlab.evaluate(decoder, words, written(tmp_path / "own.jsonl", *rows), progress=False)
    assert good.scores["own"].right >= 7 and good.whole
    wrong = [row | {"answer": (row["answer"] + 1) % 4} for row in rows]         # the key permuted
    bad = llmlab.evaluate(decoder, words, written(tmp_path / "own.jsonl", *wrong), progress=False)
    assert bad.scores["own"].right <= 1 and bad.scores["own"].logprob < good.scores["own"].logprob - 1
    with pytest.raises(LabError, match="no item alike"):    # other items by the same names are not the same items
        good.beside(bad)
    assert "(88 %" in good.answer or "(100 %" in good.answer
    assert "measured" in good.answer and "guessing gives 25 %" in good.answer and "of 8" in good.answer


def test_the_modules_of_transformers_score_as_the_lean_decoder(smollm2, tmp_path):
    path = written(tmp_path / "own.jsonl", *list(capitals())[:3], {
        "id": "e-1", "kind": "exact", "prompt": "What is 2 + 2? Answer with a number.", "answers": ["4"], "match": "number"})
    lean = llmlab.evaluate(*llmlab.decoder(smollm2, dtype="float32"), path, progress=False)
    modules = llmlab.evaluate(*load(smollm2, dtype="float32", device="cpu"), path, progress=False)
    assert [one.right for one in lean.outcomes] == [one.right for one in modules.outcomes]
    for one, other in zip(lean.outcomes[:3], modules.outcomes, strict=False):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    assert lean.outcomes[3].right and lean.outcomes[3].said == modules.outcomes[3].said
    assert "lean decoder" in lean.how and "modules" in modules.how and lean.model == modules.model == smollm2.name


def test_an_exact_answer_goes_through_the_template_and_ends_with_its_line(tmp_path):
    words = tiny_chat.tokenizer()
    model = tiny_chat.Scripted(words, "Let me see.\nIt is 7\nOr 8, or 9, or 10", "<|im_end|>", "Rome, and")
    rows = [{"id": f"e-{at}", "kind": "exact", "prompt": f"{at}?", "answers": [answer], "match": match, "tokens": most}
            for at, (answer, match, most) in enumerate([("7", "number", 99), ("7", "number", 9), ("Rome", "text", 4)])]
    found = llmlab.evaluate(model, words, written(tmp_path / "own.jsonl", *rows), progress=False)
    assert [one.said for one in found.outcomes] == ["Let me see.\nIt is 7\n", "", "Rome"]
    assert [one.right for one in found.outcomes] == [True, False, True]
    assert model.read[0] == len(words.apply_chat_template([{"role": "user", "content": "0?"}], add_generation_prompt=True,
                                                          tokenize=True)["input_ids"])


def test_needles_are_found_by_who_says_them(smollm2):
    found = llmlab.evaluate(*llmlab.decoder(smollm2, dtype="float32", context=512), "needles", limit=5, progress=False)
    assert found.scores["needles"].n == 5 and found.scores["needles"].right >= 3
    assert found.outcomes[0].id == "number-0-0" and all(one.logprob < 0 for one in found.outcomes)
    said = llmlab.quality.find_needles(smollm2, "f32", 512 - 160, trials=1)
    for one, search in zip(found.outcomes, said.searches, strict=True):
        assert one.right == search.found and one.logprob == pytest.approx(search.log_likelihood, abs=5e-3)


def test_limit_and_stopping(tiny, tmp_path):
    decoder, words = llmlab.decoder(tiny, dtype="float32")
    path = written(tmp_path / "own.jsonl", *(choice(at, f"{at}:", ANSWERS, 0) for at in range(5)))
    assert llmlab.evaluate(decoder, words, [path], limit=2, progress=False).scores["own"].n == 2
    asks = iter([False, False, False, True])
    found = llmlab.evaluate(decoder, words, [path, "needles"], progress=False, stopped=lambda: next(asks))
    assert len(found.outcomes) == 3 and not found.whole and "stopped" in found.answer
    none = llmlab.evaluate(decoder, words, [path], progress=False, stopped=lambda: True)
    assert none.outcomes == () and "before the first item" in repr(none)


def test_what_cannot_be_asked_is_said_in_a_line(tiny, tmp_path):
    decoder, words = llmlab.decoder(tiny, dtype="float32", context=300)
    short = written(tmp_path / "own.jsonl", choice(0, "a" * 290, [" b", " and so on and so on"], 0))
    broken = tiny_chat.model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    small = written(tmp_path / "small.jsonl", choice(1, "a", [" b", " c"], 0))
    for call, says in ((lambda: llmlab.evaluate(decoder, words, short, progress=False), "item c-0.*context"),
                       (lambda: llmlab.evaluate(broken, words, small, progress=False), "item c-1.*not numbers"),
                       (lambda: llmlab.evaluate(decoder, None, small), "no vocabulary"),
                       (lambda: llmlab.evaluate(decoder, words, []), "tasks"),
                       (lambda: llmlab.evaluate(decoder, words, 3), "tasks"),
                       (lambda: llmlab.evaluate(decoder, words, [small, small]), "twice"),
                       (lambda: llmlab.evaluate(decoder, words, ["", " "]), r"tasks is \['', ' '\]; give names"),
                       (lambda: llmlab.evaluate(decoder, words, ""), "tasks is ''; give names"),
                       (lambda: llmlab.evaluate(decoder, words, small, limit=0), "limit is 0; give .* from 1 up"),
                       (lambda: llmlab.evaluate(decoder, words, "jugling"), "no task 'jugling'")):
        with pytest.raises(LabError, match=says) as error:
            call()
        assert "\n" not in str(error.value)


def test_what_is_no_model_or_no_tokenizer_is_said_with_what_to_give(tiny):
    both = decoder, words = llmlab.decoder(tiny, dtype="float32")
    for given, says in ((("smollm2-135m", words, "coding"), "a str is no model"), ((None, words, "coding"), "None is no model"),
                        ((both, "coding"), "a tuple is no model"), ((decoder, "coding"), "a str is no tokenizer"),
                        ((words, decoder, "coding"), "is no model"), ((decoder, decoder), "is no tokenizer")):
        with pytest.raises(LabError, match=f"{says}.*llmlab.load.*with a star") as error:
            llmlab.evaluate(*given, progress=False)
        assert "\n" not in str(error.value)


# ---- what the outcomes say -------------------------------------------------------------------------------------------


def evaluation(rights, logprobs=None, name="a.gguf", task="own"):
    logprobs = logprobs or [None] * len(rights)
    return Evaluation(name, "by hand", tuple(Outcome(task, str(at), "choice", "0", bool(right), 0.25, logprob=value, plain=True)
                                             for at, (right, value) in enumerate(zip(rights, logprobs, strict=True))))


def test_it_is_saved_and_loaded_whole(tmp_path):
    one = replace(evaluation([1, 0, 1], [-1.5, -2.25, -0.1]), seconds={"own": 1.5}, tokens={"own": 30}, notes=("so",),
                  versions={"torch": "2"}, date="2026-01-02")
    one.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == one and list(tmp_path.iterdir()) == [tmp_path / "e.json"]
    told = json.loads((tmp_path / "e.json").read_text())
    assert told["scores"]["own"]["right"] == 2 and told["scores"]["own"]["share"] == pytest.approx(2 / 3)
    frame = one.to_frame()
    assert list(frame["right"]) == [True, False, True] and len(one.table) == 1
    for damage in ("", "{}", "[]", json.dumps(told | {"llmlab_evaluation": 2}), json.dumps(told | {"more": 1}),
                   json.dumps(told | {"outcomes": [told["outcomes"][0] | {"right": 1}]}),
                   json.dumps(told | {"outcomes": [told["outcomes"][0] | {"logprob": "low"}]}),
                   json.dumps(told | {"outcomes": [told["outcomes"][0] | {"logprob": 10**400}]}),
                   *(json.dumps(told | {name: value}) for name, value in (
                       ("model", 5), ("seconds", None), ("tokens", {"own": "30"}), ("notes", "so"), ("whole", 1))),
                   json.dumps({key: told[key] for key in told if key != "how"})):
        (tmp_path / "e.json").write_text(damage)
        with pytest.raises(BadFile, match="no evaluation"):
            Evaluation.load(tmp_path / "e.json")


def test_whatever_a_model_said_is_saved_whatever_the_computer_s_language(tmp_path):
    one = replace(evaluation([1]), model="модель")
    one = replace(one, outcomes=(replace(one.outcomes[0], said="снег \ud800("),))
    code = ("import sys; from llmlab.evaluation import Evaluation as E; one = E.load(sys.argv[1]); one.save(sys.argv[1]); "
            "assert E.load(sys.argv[1]) == one")
    one.save(tmp_path / "e.json")
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code, tmp_path / "e.json"], capture_output=True, text=True,
                          env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
    found = Evaluation.load(tmp_path / "e.json")
    assert found.model == "модель" and found.outcomes[0].said == "снег ?("


def test_scores_say_when_they_cannot_be_told_from_guessing():
    assert "cannot be told from guessing" in evaluation([1] * 9 + [0] * 15).answer
    sure = evaluation([1] * 16 + [0] * 8)
    assert "guessing gives" in sure.answer and "cannot be told" not in sure.answer
    assert (sure.scores["own"].low, sure.scores["own"].high) == pytest.approx((0.4671, 0.8203), abs=1e-4)
    worse = evaluation([1] + [0] * 35)
    assert "In own it is worse than guessing, beyond chance." in worse.answer and "cannot be told" not in worse.answer
    both = replace(worse, outcomes=worse.outcomes + evaluation([1, 0], task="few").outcomes)
    assert "In few it cannot be told from guessing. In own it is worse than guessing" in both.answer


def test_two_on_the_same_items():
    # 12 items: 2 gained (0, 1), 8 lost (2 to 9), the last two as before
    one = evaluation([1, 1] + [0] * 8 + [1, 0], [-1.0] * 12, "small.gguf")
    other = evaluation([0, 0] + [1] * 8 + [1, 0], [-0.5] * 6 + [-1.0] * 6, "large.gguf")
    found = one.beside(other)
    assert (found.n, found.lost, found.gained, found.difference) == (12, 8, 2, -0.5)
    assert found.p == pytest.approx(2 * (1 + 10 + 45) / 1024) and not found.shown
    assert found.interval[0] < -0.5 < found.interval[1] and found.least == 8 / 12
    assert found.logprob == mean(torch.tensor([-0.5] * 6 + [0.0] * 6).double().numpy())
    assert "50.0 points below large.gguf on the same 12 items" in found.answer and "8 lost, 2 gained" in found.answer
    assert "no more than chance" in found.answer and "nothing below 66.7 points can be shown" in found.answer
    assert "fell by 0.250" in found.answer
    back = other.beside(one)
    assert (back.lost, back.gained, back.p, back.difference) == (2, 8, found.p, 0.5) and "rose by 0.250" in back.answer
    row, = found.by_task
    assert row["share"] == 4 / 12 - 1 / 12 and row["other"] == 9 / 12 and row["lost"] == 8


def test_one_item_has_no_error():
    found = evaluation([1], [-1.0]).beside(evaluation([1], [-1.5]))
    assert "rose by 0.500 nats on average, within chance" in found.answer and "nan" not in repr(found)


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (6, 2.5706), (11, 2.2281),
                                                 (31, 2.0423), (121, 1.9799), (1001, 1.9623)])
def test_student_s_quantiles_as_printed_in_tables(count, quantile):
    for value in (quantile, -quantile):
        assert student(Estimate(value, 1.0), count) == pytest.approx(0.05, abs=2e-5)


def test_student_s_ends():
    assert student(Estimate(0.0, 1.0), 5) == 1 and student(Estimate(1.0, 0.0), 5) == 0 and student(Estimate(1e9, 1.0), 6) == 0
    assert student(Estimate(3.0, float("nan")), 1) == 1


def test_a_few_log_likelihoods_must_move_far_to_say_anything():
    for moves, says in (([1.0, 1.6], "within chance"), ([1.0, 1.05], "more than chance"),   # 4.3 and 41 standard errors
                        ([0.1, 0.9, 0.5], "within chance"), ([0.1, 0.9, 0.5] * 3, "more than chance")):
        found = evaluation([1] * len(moves), moves).beside(evaluation([1] * len(moves), [0.0] * len(moves)))
        assert abs(found.logprob.value) > 2 * found.logprob.error and says in found.answer.partition("log-likelihood")[2]
    half = evaluation([1] * 9, [1.0, 1.6] + [None] * 7).beside(evaluation([1] * 9, [0.0] * 9))      # of two, not of nine
    assert "within chance" in half.answer.partition("log-likelihood")[2]


def test_a_difference_that_is_more_than_chance_is_said_to_be():
    found = evaluation([0] * 9 + [1] * 21).beside(evaluation([1] * 30, name="b.gguf"))
    assert found.shown and "chance alone does that 0.39 % of the time" in found.answer and "no more than" not in found.answer
    same = evaluation([1, 0] * 2).beside(evaluation([1, 0] * 2))
    assert same.p == 1 and same.logprob is None and "scores as" in same.answer


@pytest.mark.parametrize("count", [1, 2, 5])
def test_so_few_items_can_show_no_difference(count):
    found = evaluation([0] * count).beside(evaluation([1] * count))
    assert not found.shown and "So few items can show no difference: 6 would have to change, all one way." in found.answer
    assert "points can be shown" not in found.answer
    assert evaluation([0] * 6).beside(evaluation([1] * 6)).shown


@pytest.mark.parametrize(("lost", "gained", "p"), [(4, 0, "0.12"), (5, 0, "0.062"), (7, 1, "0.07"), (9, 2, "0.065")])
def test_where_the_interval_and_the_exact_test_differ_it_is_said_which_counts(lost, gained, p):
    one = evaluation([0] * lost + [1] * (36 - lost))
    other = evaluation([1] * lost + [0] * gained + [1] * (36 - lost - gained))
    for found in (one.beside(other), other.beside(one)):
        assert not found.shown and (found.interval[1] < 0 or found.interval[0] > 0)
        assert (f"; that is no more than chance (McNemar's exact test: p = {p}; the interval leaves out 0, but the test is the "
                "stricter and counts). Where ") in found.answer
    even = evaluation([0, 0] + [1] * 34).beside(evaluation([1] * 36))
    assert "(McNemar's exact test: p = 0.5)" in even.answer


def test_only_what_both_were_asked_is_compared():
    one, other = evaluation([1, 1, 0]), evaluation([0, 1])
    found = one.beside(other)
    assert found.n == 2 and found.left_out == 1 and "1 item that only one of them was asked" in found.answer
    with pytest.raises(LabError, match="no item alike"):
        one.beside(evaluation([1], task="another"))


def test_without_lm_eval_its_tasks_are_refused_with_what_to_do(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llmlab.evaluation.adapter", raising=False)
    for call in (lambda: llmlab.evaluation.lm_eval_model(*llmlab.decoder(tiny)),
                 lambda: llmlab.evaluate(*llmlab.decoder(tiny), "lm_eval:hellaswag", progress=False)):
        with pytest.raises(LabError, match="pip install lm-eval"):
            call()
