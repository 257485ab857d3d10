"""`llmlab.evaluate`: the items of some tasks through one model."""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial

import numpy as np
import torch

from ..errors import LabError
from ..quality.needles import KINDS, haystack
from ..quality.passes import name_of
from ..runtime.generating import has_template, prompt_tokens
from .asking import Asked
from .calling import RIGHT, TOLD, Calls, call_prompt, checked_tools, verdict, way_of
from .items import LM_EVAL, NEEDLES, Call, Choice, Exact, Item, called, check_limit, names_of, task_items
from .matching import matches, whole
from .outcomes import Evaluation, Outcome

HAY, TRIALS = 1024, 3   # tokens of a haystack; haystacks of each kind
CALL_TOKENS = 128       # most tokens of an answer to a call item


def evaluate(model, tokenizer, tasks: str | os.PathLike | Sequence[str | os.PathLike] | None = None, *,
             limit: int | None = None, progress: bool = True, stopped: Callable[[], bool] = lambda: False) -> Evaluation:
    """What a model gets right, measured on this computer.

    >>> llmlab.evaluate(*llmlab.decoder("smollm2-135m"), "coding").answer

    `model`, `tokenizer`: of `llmlab.load` or `llmlab.decoder`; what the model had read is forgotten. Figures to hold beside
    others want dtype="float32". `tasks`: names of those that come with llmlab ("coding", "tools", "reasoning", "english",
    "russian"), "needles" (facts in a text of 1,024 tokens), paths of .jsonl files of the same form, or "lm_eval:NAME" for a
    task of lm-eval-harness, where that is installed; None: all that come with llmlab, and needles. `limit`: only the first so
    many items of each. `stopped`: asked before each item; the outcomes are then those so far.

    What counts as right. A choice: the text with the highest log-likelihood a character (lm-eval's acc_norm; by the sum alone,
    its acc, which is beside it, long texts lose to short ones), after the prompt as it stands, without a chat template. An
    exact answer: written greedily, through the chat template where there is one. A call: it parses, names a function that was
    offered, fits its JSON schema, is the right function with the right arguments; where none fits, words. A needle: greedy
    generation goes on with it.

    Each item's prompt is read once and stays while its choices come and go; tokens read times weights is the floor of the
    time. Raises LabError: a task that is not there, a damaged one, an item that the context does not hold.
    """
    from tqdm.auto import tqdm

    check_limit(limit)
    asked, names = Asked(model, tokenizer), names_of(tasks)
    ready = [(name, _ask_of(name, asked, limit)) for name in names if not str(name).startswith(LM_EVAL)]
    outcomes, seconds, tokens, notes, ended = [], {}, {}, [], False
    total = sum(len(asks) for _, asks in ready)
    with asked.held(), tqdm(total=total, desc="evaluate", unit="item", disable=not progress) as bar:
        for name, asks in ready:
            task, began, read = called(name), time.perf_counter(), asked.read
            bar.set_postfix_str(task, refresh=False)
            for ask in asks:
                if ended := ended or stopped():
                    break
                outcomes.append(ask(task))
                bar.update()
            seconds[task], tokens[task] = time.perf_counter() - began, asked.read - read
            notes += _notes(task, asks, tokenizer)
    if (theirs := [str(name).removeprefix(LM_EVAL) for name in names if str(name).startswith(LM_EVAL)]) and not ended:
        from .adapter import outcomes_of

        more, took, went = outcomes_of(asked, theirs, limit, progress)
        outcomes, seconds, tokens = outcomes + more, seconds | took, tokens | went
    return Evaluation(_name(model), _how(asked), tuple(outcomes), seconds, tokens, date.today().isoformat(),
                      {"torch": torch.__version__, "python": platform.python_version()}, tuple(notes),
                      not ended)


def _ask_of(name: str | os.PathLike, asked: Asked, limit: int | None) -> list[Callable[[str], Outcome]]:
    """What asks each item of a task, told the task's name."""
    if name == NEEDLES:
        return list(_needles(asked))[:limit]
    return [partial(_ASK[item.kind], asked, item) for item in task_items(name)[:limit]]


def _choice(asked: Asked, item: Choice, task: str) -> Outcome:
    try:
        pairs = [asked.pair(item.prompt, text) for text in item.choices]
        # lm-eval reads each choice after the prompt's own tokens, which are the same for all
        found = [one.value for one in asked.likelihoods(pairs[0][0], [rest for _, rest in pairs])]
    except LabError as error:
        raise LabError(f"item {item.id}: {error}") from None
    best = int(np.argmax([value / len(text) for value, text in zip(found, item.choices, strict=True)]))
    return _outcome(item, task, best == item.answer, said=item.choices[best], logprob=found[item.answer],
                    plain=int(np.argmax(found)) == item.answer, logprobs=tuple(found))


def _exact(asked: Asked, item: Exact, task: str) -> Outcome:
    said = ""

    def done(piece: str, token: int | None) -> bool:
        nonlocal said
        said += piece
        return whole(said, item.match)

    prompt = [{"role": "user", "content": item.prompt}] if has_template(asked.words) else item.prompt
    text = _written(asked, item, prompt_tokens(asked.words, prompt), item.tokens, done)
    return _outcome(item, task, matches(text, item.answers, item.match), said=text)


def _call(asked: Asked, item: Call, task: str) -> Outcome:
    tools = checked_tools(list(item.tools))
    calls = Calls(asked.words, tools)
    text = _written(asked, item, call_prompt(asked.words, item.messages, tools), CALL_TOKENS, calls.add)
    found = verdict(calls.call, calls.content, tools, item.name, item.arguments, item.accept)
    said = text if calls.call is None else "{}({})".format(*calls.call)
    return _outcome(item, task, found in RIGHT, said=said, verdict=found)


_ASK = {"choice": _choice, "exact": _exact, "call": _call}


def _written(asked: Asked, item: Item, prompt: list[int], most: int, done) -> str:
    try:
        return asked.writes(prompt, most, done)
    except LabError as error:
        raise LabError(f"item {item.id}: {error}") from None


def _outcome(item: Item, task: str, right: bool, **more) -> Outcome:
    return Outcome(task, item.id, item.kind, item.digest, right, item.chance, **more)


def _needles(asked: Asked) -> Iterator[Callable[[str], Outcome]]:
    """One question a needle; haystacks of numbers and of names in turn, so that a limit leaves some of both."""
    room = HAY if asked.memory.context is None else min(HAY, asked.memory.context - 160)
    for trial in range(TRIALS):
        for kind in KINDS:
            hay = haystack(asked.words, room, kind=kind, seed=trial)
            for needle in hay.needles:
                yield partial(_needle, asked, hay, needle, f"{kind}-{trial}-{needle.depth:g}")


def _needle(asked: Asked, hay, needle, name: str, task: str) -> Outcome:
    found, = asked.likelihoods(hay.prompt(asked.words, needle), [hay.answer(asked.words, needle)])
    digest = hashlib.sha256(f"{hay.text}\n{needle.question}".encode()).hexdigest()[:12]
    return Outcome(task, name, "needle", digest, found.greedy, logprob=found.value)


def _notes(task: str, asks: list, words) -> list[str]:
    """What is to be known of how a task was asked."""
    kinds = {ask.args[1].kind for ask in asks if isinstance(ask.args[1], Item)}
    notes = []
    if "call" in kinds:
        notes.append(f"{task}: {TOLD[way_of(words)]}")
    if "exact" in kinds and not has_template(words):
        notes.append(f"{task}: prompts continued as they stand, because the model has no chat template")
    return notes


def _name(model) -> str:
    return os.path.basename(model.path) if getattr(model, "path", None) else name_of(model)


def _how(asked: Asked) -> str:
    """What ran it, in words."""
    lean = hasattr(asked.memory, "weights")
    one = asked.memory if lean else asked.model
    said = [f"llmlab's lean decoder ({one.strategy})" if lean else "transformers' modules",
            str(getattr(one, "dtype", "")).removeprefix("torch."), str(getattr(one, "device", "cpu"))]
    kv = getattr(one, "kv", None)
    return ", ".join([*said, f"a cache of {'/'.join(kv)}"] if kv else said)
