"""Many texts at once say what each says alone, whatever runs beside them; nothing leaks, nothing hangs, and faults stay where
they are."""

import gc
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import pytest
import tiny_chat

import llmlab
from llmlab.errors import LabError
from llmlab.runtime import engine as engines
from llmlab.runtime.engine import Engine
from llmlab.runtime.generating import stream
from llmlab.runtime.jobs import Answer, Event
from llmlab.runtime.sampling import Chooser, Options

TOP = Path(__file__).resolve().parent.parent
GREEDY = Options(temperature=0, max_tokens=24)
PROMPTS = ["Once upon a time", "How are you?", "a", "The engine answers many requests at once, and each as if alone. " * 2,
           "Once upon a river", "1 2 3 4 5 6 7", "Zürich", "x" * 90]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(decoder, words, path) of a tiny model."""
    path = tiny_chat.write(tmp_path_factory.mktemp("engine") / "tiny.gguf")
    return *llmlab.decoder(path, device="cpu", dtype="float32", strategy="compact"), path


@pytest.fixture(scope="module")
def alone(made):
    """What the lean decoder's own stream says."""
    decoder, words, _ = made

    def said(prompt: str, options: Options = GREEDY) -> str:
        decoder.forget()
        return "".join(stream(decoder, words, prompt, options))

    return said


@pytest.fixture
def engine(made):
    with Engine(made[0], made[1], memory="2 MiB") as found:
        yield found


def tokens(made, prompt: str) -> list[int]:
    return list(made[1](prompt)["input_ids"])


def settled(engine: Engine) -> None:
    """Every block is free or cached, and nobody is left."""
    usage = engine.usage()
    assert engine.idle() and usage.used == 0 and usage.tokens == 0 and usage.free + usage.cached == usage.total
    assert set(engine.owners()) <= {0, -1}


# ---- what comes ----------------------------------------------------------------------------------------------

def test_many_at_once_say_what_each_says_alone(made, alone, engine):
    jobs = [engine.submit(tokens(made, prompt), GREEDY) for prompt in PROMPTS * 3]
    answers = [job.result(60) for job in jobs]
    assert [answer.text for answer in answers] == [alone(prompt) for prompt in PROMPTS * 3]
    assert all(answer.ended in ("limit", "end of turn") and len(answer.tokens) <= 24 for answer in answers)
    settled(engine)
    counters = engine.counters
    assert counters.requests == counters.ended == 24 and counters.failed == 0
    assert max(record.running for record in engine.history) > 8       # they did run together
    assert sum(record.rows for record in engine.history) == counters.rows and counters.steps == len(engine.history)
    assert sum(record.logits for record in engine.history) == counters.made


@pytest.mark.parametrize("policy", ["static", "alone"])
def test_other_policies_say_the_same(made, alone, policy):
    with Engine(made[0], made[1], memory="1 MiB", policy=policy, context=256) as engine:
        answers = [job.result(60) for job in [engine.submit(tokens(made, prompt), GREEDY) for prompt in PROMPTS]]
        assert [answer.text for answer in answers] == [alone(prompt) for prompt in PROMPTS]
        settled(engine)
        assert (engine.counters.padded > 0) == (policy == "static")
        if policy == "alone":
            assert all(record.running <= 1 for record in engine.history)


def test_events_are_the_answer_piece_by_piece(made, engine):
    job = engine.submit(tokens(made, "Once upon"), GREEDY, logprobs=3)
    events = list(job)
    answer = job.result()
    assert all(isinstance(event, Event) for event in events) and isinstance(answer, Answer)
    assert "".join(event.text for event in events) == answer.text
    assert tuple(event.token for event in events if event.token is not None) == answer.tokens
    assert tuple(event.logprobs for event in events if event.token is not None) == answer.logprobs
    for found in answer.logprobs:
        assert len(found.top) == 3 and found.token == found.top[0][0] and found.logprob == found.top[0][1] <= 0
    assert list(job) == [] and job.ended and 0 < answer.first_seconds <= answer.seconds
    assert answer.prompt_tokens == len("Once upon")


def test_a_seed_gives_the_same_text_in_any_company(made, alone, engine):
    options = Options(temperature=1.2, top_k=0, seed=5, max_tokens=30)
    one = engine.submit(tokens(made, "Once"), options).result(60)
    others = [engine.submit(tokens(made, prompt), Options(temperature=1.5, max_tokens=20)) for prompt in PROMPTS]
    again = engine.submit(tokens(made, "Once"), options).result(60)
    assert one.tokens == again.tokens and one.text == alone("Once", options) and one.seed == 5
    assert len({other.result(60).seed for other in others}) == len(others)


def test_several_answers_of_one_prompt(made, engine):
    prompt = tokens(made, PROMPTS[3])
    options = Options(temperature=1.0, top_k=0, seed=11, max_tokens=20)
    jobs = engine.submit_several(prompt, 4, options)
    answers = [job.result(60) for job in jobs]
    for at, answer in enumerate(answers):
        apart = engine.submit(prompt, Options(temperature=1.0, top_k=0, seed=11 + at, max_tokens=20)).result(60)
        assert answer.tokens == apart.tokens and answer.seed == 11 + at
    assert len({answer.tokens for answer in answers}) > 1
    assert engine.counters.read < 2 * len(prompt)           # read once; what came later found nearly all of it
    settled(engine)


def test_a_stop_string_ends_it_as_alone(made, alone, engine):
    whole = alone("Once upon a time")
    stop = whole[5:8]
    options = Options(temperature=0, max_tokens=24, stop=(stop,))
    answer = engine.submit(tokens(made, "Once upon a time"), options).result(60)
    assert answer.ended == "stop string" and answer.text == whole[:whole.index(stop)] == alone("Once upon a time", options)


def test_a_context_that_is_full_ends_it(made, alone):
    with Engine(made[0], made[1], context=40, memory="1 MiB") as engine:
        answer = engine.submit(tokens(made, "Once upon a time"), Options(temperature=0)).result(60)
        assert answer.ended in ("context full", "end of turn")
        if answer.ended == "context full":
            assert answer.prompt_tokens + len(answer.tokens) == 40
        assert alone("Once upon a time", Options(temperature=0, max_tokens=24)).startswith(answer.text[:10])


def test_what_was_read_before_is_not_read_again(made, engine):
    prompt = tokens(made, PROMPTS[3])
    first, again = (engine.submit(prompt, GREEDY).result(60) for _ in range(2))
    assert first.reused_tokens == 0 and again.reused_tokens == (len(prompt) - 1) // 16 * 16 and first.tokens == again.tokens
    with Engine(made[0], made[1], memory="2 MiB", share=False) as other:
        assert [other.submit(prompt, GREEDY).result(60).reused_tokens for _ in range(2)] == [0, 0]


def test_an_answer_that_is_not_shared_leaves_no_trace(made):
    """What goes on from an answer shares it, or has the numbers of an engine that never wrote it."""
    def goes_on(answers: bool) -> tuple[int, tuple]:
        with Engine(made[0], made[1], memory="2 MiB", answers=answers) as engine:
            on_and_on = Chooser(Options(temperature=0.9, top_k=0, seed=5), bias=dict.fromkeys(made[1].stop_ids, -1e9))
            first = engine.submit(prompt, Options(max_tokens=40), chooser=on_and_on).result(60)
            assert len(first.tokens) == 40
            found = engine.submit([*prompt, *first.tokens], GREEDY, logprobs=2).result(60)
        with Engine(made[0], made[1], memory="2 MiB", answers=answers) as engine:
            anew = engine.submit([*prompt, *first.tokens], GREEDY, logprobs=2).result(60)
        assert found.tokens == anew.tokens and anew.reused_tokens == 0
        return found.reused_tokens, found.logprobs == anew.logprobs

    prompt = tokens(made, PROMPTS[3])[:50]
    assert goes_on(answers=True)[0] == (50 + 39) // 16 * 16
    assert goes_on(answers=False) == (50 // 16 * 16, True)


def test_the_real_model_says_the_same_in_any_company():
    """SmolLM2: the same tokens and logits to the bit alone, among others, and with prompts cut into pieces; and the text that
    the lean decoder streams."""
    decoder, words = llmlab.decoder(llmlab.fetch("smollm2-135m", progress=False), device="cpu", dtype="float32",
                                    strategy="compact")
    asked = [list(words(text)["input_ids"]) for text in (
        "The capital of France is", "Write a short poem about the sea, its colours and its sounds at night: ", "1, 2, 3, 4,")]
    options = Options(temperature=0, max_tokens=5)
    with Engine(decoder, words, memory="32 MiB", share=False, rows=9, sequences=8) as engine:
        alone = [engine.submit(one, options, logprobs=1).result(300) for one in asked]
        together = [job.result(300) for job in [engine.submit(one, options, logprobs=1) for one in asked]]
    assert [(one.tokens, one.logprobs) for one in alone] == [(one.tokens, one.logprobs) for one in together]
    decoder.forget()
    assert "".join(stream(decoder, words, "The capital of France is", options)) == alone[0].text


# ---- too little memory -----------------------------------------------------------------------------------------

def test_few_blocks_give_the_same_answers(made, alone):
    """So few that texts give theirs away and are read anew: the same tokens, and the same logits to the bit."""
    options = Options(temperature=0, max_tokens=60)
    with Engine(made[0], made[1], memory="160 KiB") as engine:
        jobs = [engine.submit(tokens(made, prompt), options, logprobs=2) for prompt in PROMPTS * 2]
        answers = [job.result(120) for job in jobs]
        assert [answer.text for answer in answers] == [alone(prompt, options) for prompt in PROMPTS * 2]
        assert engine.counters.preemptions == sum(answer.preempted for answer in answers) > 0
        settled(engine)
    with Engine(made[0], made[1], memory="2 MiB", share=False) as engine:
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            assert engine.submit(tokens(made, prompt), options, logprobs=2).result(60).logprobs == answer.logprobs


def test_too_little_memory_says_the_least_that_does(made):
    with pytest.raises(LabError, match=r"a block of 16 tokens takes .* give [\d,]+ bytes at least") as error:
        Engine(made[0], made[1], memory="6 KiB")
    least = int(str(error.value).split("give ")[1].split(" bytes")[0].replace(",", ""))
    with Engine(made[0], made[1], memory=least) as engine:
        assert engine.submit(tokens(made, "a"), GREEDY).result(60).prompt_tokens == 1
    with pytest.raises(LabError):
        Engine(made[0], made[1], memory=least - 1)


@pytest.mark.parametrize(("prompt", "options", "says"), [
    ([], GREEDY, "nothing to read"), ([1] * 600, GREEDY, "600 tokens"), ([1, 259], GREEDY, "from 0 to 258"),
    ([-1], GREEDY, "whole numbers"), (["a"], GREEDY, "whole numbers"), ([1], Options(shift=1), "one text at a time")])
def test_what_can_never_be_read_is_refused_at_once(engine, prompt, options, says):
    with pytest.raises(LabError, match=says):
        engine.submit(prompt, options)
    settled(engine)


# ---- faults and cancels ----------------------------------------------------------------------------------------

def test_cancels_leave_no_block_and_change_no_answer(made, alone, engine):
    chance, jobs = random.Random(3), []
    for at in range(20):
        options = Options(temperature=0, max_tokens=chance.randint(5, 60))
        jobs.append((prompt := PROMPTS[at % 8], options, engine.submit(tokens(made, prompt), options)))
    cancelled = set(chance.sample(range(20), 8))
    for at in cancelled:
        if chance.random() < 0.7:
            next(iter(jobs[at][2]), None)       # after a token or before any
        threading.Thread(target=jobs[at][2].cancel).start()
    for at, (prompt, options, job) in enumerate(jobs):
        answer, whole = job.result(60), alone(prompt, options)
        cut = answer.text.rstrip("\ufffd")      # of a character whose last bytes did not come any more
        assert whole.startswith(cut) if at in cancelled else answer.text == whole
        assert at in cancelled or answer.ended != "stopped"
    settled(engine)


def test_cancels_among_several_answers_of_a_prompt(made, engine):
    prompt = tokens(made, PROMPTS[3])
    for which in (0, 1, 3):
        jobs = engine.submit_several(prompt, 4, Options(temperature=1.0, seed=1, max_tokens=10))
        jobs[which].cancel()
        answers = [job.result(60) for job in jobs]
        assert all(answer.ended in ("limit", "end of turn") for at, answer in enumerate(answers) if at != which)
    settled(engine)


def test_what_was_reused_is_counted_once_where_the_first_of_several_is_cancelled(made, monkeypatch):
    """The next one takes its place while the prompt is being read, and with it what was found in the cache."""
    prompt, begun, go = tokens(made, PROMPTS[3]), threading.Event(), threading.Event()
    with Engine(made[0], made[1], memory="2 MiB", rows=4, sequences=4) as engine:       # the rest takes several steps
        engine.submit(prompt, GREEDY).result(60)
        read = engine.batcher.read

        def waits(*given):
            begun.set()
            return go.wait(30) and read(*given)

        monkeypatch.setattr(engine.batcher, "read", waits)
        jobs = engine.submit_several(prompt, 3, Options(temperature=1.0, seed=1, max_tokens=4))
        assert begun.wait(30)
        jobs[0].cancel()
        go.set()
        answers = [job.result(60) for job in jobs]
        found = (len(prompt) - 1) // 16 * 16
        assert [answer.reused_tokens for answer in answers] == [0, found, len(prompt)] and answers[0].ended == "stopped"
        settled(engine)
        assert engine.counters.reused == found + len(prompt)


@pytest.mark.parametrize(("count", "choosers"), [(3, [Chooser()] * 2), (1, []), (0, None)])
def test_several_answers_have_a_chooser_each_or_none(engine, count, choosers):
    with pytest.raises(LabError, match="a chooser for each"):
        engine.submit_several([1, 2], count, choosers=choosers)


def test_a_cancelled_job_stops_soon(made, engine):
    job = engine.submit(tokens(made, "Once"), Options(temperature=1.5, max_tokens=450, top_k=0))
    next(job)
    job.cancel()
    assert job.result(60).ended == "stopped" and len(job.result().tokens) < 450
    job.cancel()
    settled(engine)


def test_a_step_that_fails_ends_its_own_and_no_other(made, alone, engine, monkeypatch):
    read, failed = engine.batcher.read, []

    def fails_once(given, *rest):
        if any(66 in one for one in given) and not failed:
            failed.append(given)
            raise RuntimeError("a fault\nof two lines")
        return read(given, *rest)

    monkeypatch.setattr(engine.batcher, "read", fails_once)
    with pytest.raises(LabError, match=r"a step of the engine failed \(RuntimeError: a fault of two lines\)") as error:
        engine.submit([66, 67], GREEDY).result(60)
    assert isinstance(error.value.__cause__, RuntimeError)
    settled(engine)
    assert engine.submit(tokens(made, "Once upon"), GREEDY).result(60).text == alone("Once upon")
    assert engine.counters.failed == 1


def test_too_little_memory_in_a_step_is_said(engine, monkeypatch):
    def fails(*given):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(engine.batcher, "read", fails)
    job = engine.submit([1, 2], GREEDY)
    with pytest.raises(LabError, match="memory does not suffice"):
        list(job)
    settled(engine)


def test_a_chooser_that_fails_ends_its_text_alone(made, alone, engine):
    class Bad(Chooser):
        @property
        def changes(self):
            return True

        def change(self, scores, prompt, new):
            if len(new) == 2:
                raise LabError("nothing may come")

    bad = engine.submit(tokens(made, "How"), chooser=Bad(GREEDY), options=GREEDY)
    good = engine.submit(tokens(made, "Once upon"), GREEDY)
    with pytest.raises(LabError, match="nothing may come"):
        bad.result(60)
    assert good.result(60).text == alone("Once upon")
    settled(engine)


def test_a_step_that_fails_once_texts_have_forked_ends_them_all(made, alone, engine, monkeypatch):
    choose = engines.choose_each

    def fails(choosers, *rest):
        if len(choosers) == 3:
            raise RuntimeError("no room for their logits")
        return choose(choosers, *rest)

    monkeypatch.setattr(engines, "choose_each", fails)
    for job in engine.submit_several(tokens(made, "How are"), 3, Options(temperature=1.0, seed=1, max_tokens=5)):
        with pytest.raises(LabError, match="no room for their logits"):
            job.result(30)
    settled(engine)
    assert engine.idle() and engine.submit(tokens(made, "Once upon"), GREEDY).result(60).text == alone("Once upon")


def test_a_last_text_that_is_none_ends_its_job_alone(made, alone, engine, monkeypatch):
    answer = engines._Text.answer
    monkeypatch.setattr(engines._Text, "answer", lambda text, how: 1 / 0 if text.prompt == [66, 67] else answer(text, how))
    bad, good = engine.submit([66, 67], GREEDY), engine.submit(tokens(made, "Once upon"), GREEDY)
    with pytest.raises(LabError, match="ZeroDivisionError"):
        bad.result(30)
    assert good.result(30).text == alone("Once upon")
    settled(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_is_gone(made, monkeypatch):
    class Panic(BaseException):
        """As libraries written in Rust raise it."""

    def panics(*given):
        raise Panic

    with Engine(made[0], made[1], memory="2 MiB") as engine:
        monkeypatch.setattr(engine.batcher, "read", panics)
        job = engine.submit([1, 2], GREEDY)
        assert job.result(30).ended == "stopped"
        with pytest.raises(LabError, match="closed"):
            engine.submit([1, 2], GREEDY).result(30)


# ---- waiting and ending ----------------------------------------------------------------------------------------

def test_a_result_that_takes_too_long_goes_on(made, engine, monkeypatch):
    go, read = threading.Event(), engine.batcher.read
    monkeypatch.setattr(engine.batcher, "read", lambda *given: go.wait(30) and read(*given))
    job = engine.submit(tokens(made, "Once"), GREEDY)
    with pytest.raises(TimeoutError):
        job.result(0.05)
    assert not job._bells
    go.set()
    assert job.result(60).tokens


def test_several_threads_wait_for_one(made, engine):
    job, found = engine.submit(tokens(made, "Once upon a time"), GREEDY), []
    threads = [threading.Thread(target=lambda: found.append(job.result(60))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 5 and len({answer.text for answer in found}) == 1


def test_closing_stops_what_runs_and_refuses_what_comes(made, monkeypatch):
    engine = Engine(made[0], made[1], memory="2 MiB")
    read = engine.batcher.read
    monkeypatch.setattr(engine.batcher, "read", lambda *given: time.sleep(0.01) or read(*given))     # nobody is through by then
    jobs = [engine.submit(tokens(made, "Once"), Options(temperature=1.5, top_k=0, max_tokens=400)) for _ in range(5)]
    for job in jobs:        # one that is not taken up yet is refused
        next(job)
    engine.close()
    engine.close()
    assert all(job.result(10).ended in ("stopped", "end of turn") for job in jobs)
    with pytest.raises(LabError, match="closed"):
        engine.submit([1], GREEDY)
    assert not engine._thread.is_alive()
    settled(engine)


def test_an_engine_nobody_has_ends(made):
    engine = Engine(made[0], made[1], memory="2 MiB")
    assert engine.submit(tokens(made, "Once"), GREEDY).result(60).text
    thread, ref = engine._thread, weakref.ref(engine)
    del engine
    gc.collect()
    thread.join(10)
    assert ref() is None and not thread.is_alive()


def test_the_interpreter_ends_with_an_engine_at_work(made):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(f"""
        import llmlab
        from llmlab.runtime.engine import Engine
        from llmlab.runtime.sampling import Options
        decoder, words = llmlab.decoder({str(made[2])!r}, device="cpu", strategy="compact")
        engine = Engine(decoder, words, memory="2 MiB")
        job = engine.submit([1, 2, 3], Options(temperature=1.5, top_k=0))
        print(next(job).token >= 0)
        """)], cwd=TOP, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no GPU: interrupts are sent otherwise there")
def test_an_interrupt_while_waiting_leaves_it_well(made, alone, engine):
    import os
    import signal

    for _ in range(3):
        job = engine.submit(tokens(made, "Once"), Options(temperature=1.5, top_k=0, max_tokens=300))
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3000):
                job.result(60)
                time.sleep(0.01)
        timer.join()
        job.cancel()
        job.result(60)
    assert engine.submit(tokens(made, "Once upon"), GREEDY).result(60).text == alone("Once upon")
    settled(engine)


def test_a_step_is_remembered(made, engine):
    engine.submit(tokens(made, PROMPTS[3]), GREEDY).result(60)
    first, *later = engine.history
    assert first.rows == len(PROMPTS[3]) and first.logits == 1 and first.computing <= first.seconds
    assert all(record.rows == record.logits == 1 for record in later)
    assert [record.cells for record in engine.history][:3] == [first.rows, first.rows + 1, first.rows + 2]
    assert all(record.used + record.cached + record.free == engine.blocks.count for record in engine.history)
    assert engine.why.startswith(f"{engine.blocks.count:,} blocks of 16 tokens") and engines._HISTORY >= 1000
