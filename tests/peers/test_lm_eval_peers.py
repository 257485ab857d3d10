"""lm-eval-harness through our adapter says what our own harness says, and what its own HFLM says of the same weights."""

import json

import pytest
import torch

import llmlab
from llmlab.evaluation import lm_eval_model
from llmlab.loading import load

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.peers

CITIES = ("Paris", "Rome", "Berlin", "Madrid", "Moscow", "Tokyo")
LANDS = ("France", "Italy", "Germany", "Spain", "Russia", "Japan")
CAPITALS = [(f"Question: What is the capital of {land}?\nAnswer:",
             [f" {CITIES[(at + step) % 6]}" + " city" * (step == 1) for step in range(4)], 0) for at, land in enumerate(LANDS)]
SUMS = [(f"{a} + {b} =", [f" {a + b + wrong}" for wrong in (1, 0, 10, -1)], 1) for a, b in ((1, 2), (3, 4), (20, 7), (5, 5))]
PROGRAMS = [("print(len('abc')) prints ", ["3", "2", "an error", "abc"], 0),       # a space before the choice
            ("Столица России —", [" Москва", " Париж", " Санкт-Петербург", " Минск"], 0)]
ITEMS = [{"id": f"p-{at}", "kind": "choice", "prompt": prompt, "choices": choices, "answer": answer}
         for at, (prompt, choices, answer) in enumerate(CAPITALS + SUMS + PROGRAMS)]
YAML = """task: own
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITTEN = YAML.partition("output_type")[0].replace("own", "written") + """output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
    ignore_case: true
    regexes_to_ignore: ["^ "]
"""
ROLLING = WRITTEN.partition("output_type")[0].replace("written", "rolling") + """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Our items as one file of ours and as three tasks of lm-eval's."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "own.jsonl"
    rows.write_text("\n".join(map(json.dumps, ITEMS)))
    for name, text in (("own", YAML), ("written", WRITTEN), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(rows=rows))
    return folder


@pytest.fixture(scope="module")
def ours(smollm2):
    return llmlab.decoder(smollm2, dtype="float32")


@pytest.fixture(scope="module")
def theirs(smollm2):
    """lm-eval's own way: a whole pass for each text, over the transformers model with its weights unpacked at every use."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(smollm2, device="cpu", dtype="float32", strategy="reference")
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")


def asked(lm, folder, task):
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0,
                                   task_manager=TaskManager(include_path=str(folder), include_defaults=False))


def test_choices_are_scored_as_lm_eval_scores_them(folder, ours, theirs):
    own = llmlab.evaluate(*ours, folder / "own.jsonl", progress=False)
    score = own.scores["own"]
    through, beside = asked(lm_eval_model(*ours), folder, "own"), asked(theirs, folder, "own")
    for found in (through, beside):
        assert found["results"]["own"]["acc,none"] == pytest.approx(score.plain)
        assert found["results"]["own"]["acc_norm,none"] == pytest.approx(score.share)
    assert 0.4 < score.share and score.plain != score.share         # something to be right about, and to tell apart
    for one, mine, other in zip(own.outcomes, through["samples"]["own"], beside["samples"]["own"], strict=True):
        assert (mine["acc_norm"], mine["acc"]) == (other["acc_norm"], other["acc"]) == (one.right, one.plain)
        by_us, by_them = ([value for value, _ in sample["filtered_resps"]] for sample in (mine, other))
        assert by_us == list(one.logprobs) and by_us == pytest.approx(by_them, abs=1e-4)
        assert [greedy for _, greedy in mine["filtered_resps"]] == [greedy for _, greedy in other["filtered_resps"]]


def test_answers_are_written_as_lm_eval_writes_them(folder, ours, theirs):
    mine, other = (asked(lm, folder, "written")["samples"]["written"] for lm in (lm_eval_model(*ours), theirs))
    assert [one["filtered_resps"] for one in mine] == [one["filtered_resps"] for one in other]
    assert sum(one["exact_match"] for one in mine) == sum(one["exact_match"] for one in other) > 0


def test_texts_are_read_in_windows_as_lm_eval_reads_them(folder, ours, theirs, smollm2, monkeypatch):
    mine, other = (asked(lm, folder, "rolling")["results"]["rolling"] for lm in (lm_eval_model(*ours), theirs))
    assert mine["byte_perplexity,none"] == pytest.approx(other["byte_perplexity,none"], rel=1e-5)
    monkeypatch.setattr(theirs, "_max_length", 8)                   # several windows
    short = lm_eval_model(*llmlab.decoder(smollm2, dtype="float32", context=8))
    mine, other = (asked(lm, folder, "rolling")["results"]["rolling"] for lm in (short, theirs))
    assert mine["byte_perplexity,none"] == pytest.approx(other["byte_perplexity,none"], rel=1e-5)


def test_a_task_of_lm_eval_in_an_evaluation(folder, ours):
    theirs = [f"lm_eval:{folder / name}" for name in ("own.yaml", "written.yaml")]
    both = llmlab.evaluate(*ours, [folder / "own.jsonl", *theirs], limit=6, progress=False)
    own, named, written = both.tasks
    assert (named, written) == ("lm_eval:own", "lm_eval:written") and both.scores[named].n == 6
    assert [(one.right, one.plain, one.logprobs) for one in both.of(own)] == [
        (one.right, one.plain, one.logprobs) for one in both.of(named)]
    assert both.scores[named].chance == 0.25 and both.tokens[named] == both.tokens[own]
    assert {one.said for one in both.of(written)} and both.beside(both).n == 18
    for name, says in (("lm_eval:no_such_task", "fails"), (f"lm_eval:{folder / 'rolling.yaml'}", "no right and wrong"),
                       (f"lm_eval:{folder / 'gone.yaml'}", "cannot be read")):
        with pytest.raises(llmlab.LabError, match=says) as error:
            llmlab.evaluate(*ours, name, limit=2, progress=False)
        assert "\n" not in str(error.value)


def test_an_empty_context_and_a_chat(ours, theirs):
    from lm_eval.api.instance import Instance

    def request(*texts):
        return Instance("loglikelihood", {}, texts, 0)

    mine, other = (lm.loglikelihood([request("", "Paris is in France")], disable_tqdm=True)
                   for lm in (lm_eval_model(*ours), theirs))
    assert mine[0][0] == pytest.approx(other[0][0], abs=1e-4)
    lm, talk = lm_eval_model(*ours), [{"role": "user", "content": "Hello"}]
    assert lm.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    assert lm.tok_encode(lm.apply_chat_template(talk)) == theirs.tok_encode(theirs.apply_chat_template(talk))
    with pytest.raises(llmlab.LabError, match="samples"):
        lm.generate_until([Instance("generate_until", {}, ("Hello", {"do_sample": True, "temperature": 0.7}), 0)])
    assert torch.is_grad_enabled()


def test_answers_that_would_leave_the_prompt_no_room_are_refused(smollm2):
    from lm_eval.api.instance import Instance

    lm = lm_eval_model(*llmlab.decoder(smollm2, dtype="float32", context=64))
    for most in (64, 65, None):                     # None: lm-eval's 256
        options = {"until": ["."]} | ({} if most is None else {"max_gen_toks": most})
        with pytest.raises(llmlab.LabError, match=f"up to {most or 256} tokens and the context holds 64, .*larger") as error:
            lm.generate_until([Instance("generate_until", {}, ("Paris is the capital of", options), 0)], disable_tqdm=True)
        assert "\n" not in str(error.value)
    said, = lm.generate_until([Instance("generate_until", {}, ("Paris is the capital of", {"max_gen_toks": 6}), 0)],
                              disable_tqdm=True)
    assert said
