"""Our models behind lm-eval-harness (https://github.com/EleutherAI/lm-evaluation-harness), where it is installed: packed
weights answer whatever task it has."""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from ..errors import LabError
from ..runtime.generating import has_template
from .asking import Asked
from .items import LM_EVAL
from .outcomes import Outcome

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise LabError("lm-eval-harness is not installed; pip install lm-eval, or take the tasks that come with llmlab") from None

CONTEXT = 2048          # of a model that names none, as lm-eval takes it
NEW = 256               # most tokens of an answer where a task does not say, as lm-eval takes it
_RIGHT = ("acc_norm", "acc", "exact_match")     # what of a sample is its headline, the first that is there


class LabLM(TemplateLM):
    """A model of ours as lm-eval's LM. A context is read once for all texts that follow it, and what is written is greedy.

    Beginnings of texts (BOS) are the vocabulary's own, as in lm-eval's HFLM. Raises LabError for a task that samples, and for
    one whose answers would leave its prompt no room.
    """

    def __init__(self, model, tokenizer, progress: bool = True):
        super().__init__()
        self.asked = model if isinstance(model, Asked) else Asked(model, tokenizer)
        self.tokenizer, self._progress = self.asked.words, progress

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return self.asked.memory.context or CONTEXT

    @property
    def tokenizer_name(self) -> str:
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:12]

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        if not has_template(self.tokenizer):
            raise LabError("this model's file has no chat template; evaluate it with apply_chat_template=False")
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more) -> list[int]:
        if add_special_tokens is None:          # a chat template writes the beginning itself
            begun = self.tokenizer.bos_token
            add_special_tokens = not (begun and string.startswith(begun))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or not self._progress)

    def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **more) -> list[tuple[float, bool]]:
        found = []
        with self.asked.held(), self._bar("likelihoods", len(requests), disable_tqdm) as bar:
            for context, group in groupby(requests, key=lambda one: one[1]):
                group = list(group)
                longest = max(len(rest) for _, _, rest in group)
                if longest > self.max_length:
                    raise LabError(f"a text of {longest:,} tokens is to be scored and the context holds {self.max_length:,}; "
                                   "take another task, or a larger context")
                context = context[-(self.max_length + 1 - longest):]
                for (texts, _, _), one in zip(group, self.asked.likelihoods(context, [rest for _, _, rest in group]),
                                              strict=True):
                    found.append((one.value, one.greedy))
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[-1])
                bar.update(len(group))
        return found

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            text, = request.args
            windows = map(make_disjoint_window, get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1))
            parts = self._loglikelihood_tokens([(None, *window) for window in windows], True)
            found.append(sum(value for value, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        found = []
        with self.asked.held(), self._bar("answers", len(requests), disable_tqdm) as bar:
            for request in requests:
                context, options = request.args
                found.append(self._written(context, options))
                self.cache_hook.add_partial("generate_until", request.args, found[-1])
                bar.update()
        return found

    def _written(self, context: str, options: Mapping) -> str:
        if options.get("do_sample") or options.get("temperature", 0) not in (0, None):
            raise LabError("this task samples (do_sample), and answers are written greedily here: give "
                           "gen_kwargs={'do_sample': False, 'temperature': 0}")
        until = options.get("until") or []
        until = [one for one in ([until] if isinstance(until, str) else until) if one]
        most, text = int(options.get("max_gen_toks", options.get("max_new_tokens", NEW))), ""
        if most >= self.max_length:
            raise LabError(f"this task writes up to {most:,} tokens and the context holds {self.max_length:,}, so none is left "
                           "for its prompt; give a larger context, or gen_kwargs={'max_gen_toks': ...}")

        def done(piece: str, token: int | None) -> bool:
            nonlocal text
            text += piece
            return any(one in text for one in until)

        prompt = self.tok_encode(context)[-(self.max_length - most):]
        written = self.asked.writes(prompt, most, done)
        return written[:min([written.find(one) for one in until if one in written], default=len(written))]

    def _bar(self, what: str, total: int, disabled: bool):
        from tqdm.auto import tqdm

        return tqdm(total=total, desc=what, disable=disabled or not self._progress)


def outcomes_of(asked: Asked, names: Sequence[str], limit: int | None,
                progress: bool) -> tuple[list[Outcome], dict[str, float], dict[str, int]]:
    """Items of lm-eval's tasks as outcomes, the seconds and the tokens of each task. `names`: its own, or paths of .yaml files.
    Raises LabError for one that is not there, that cannot be had without a network, and one without right and wrong."""
    outcomes, seconds, tokens = [], {}, {}
    for name in names:
        manager, task = _manager(name)
        began, read = time.perf_counter(), asked.read
        try:
            found = lm_eval.simple_evaluate(LabLM(asked, asked.words, progress), tasks=[task], limit=limit, bootstrap_iters=0,
                                            log_samples=True, task_manager=manager)
        except LabError:
            raise
        except Exception as error:          # a task is a program by others, with a data set that may be out of reach
            raise LabError(f"lm-eval's task {task[:60]!r} fails ({type(error).__name__}: "
                           f"{' '.join(str(error).split())[:160]}); lm_eval.tasks.TaskManager().all_tasks lists what there is, "
                           "and most data sets want a network the first time") from None
        for part, samples in found["samples"].items():
            outcomes += _samples(f"{LM_EVAL}{part}", samples)
        seconds[f"{LM_EVAL}{task}"], tokens[f"{LM_EVAL}{task}"] = time.perf_counter() - began, asked.read - read
    return outcomes, seconds, tokens


def _manager(name: str):
    """lm-eval's index of tasks, and the name of the one that is meant."""
    if not name.endswith((".yaml", ".yml")):
        return TaskManager(), name
    try:
        named = re.search(r"^task:\s*[\"']?([\w.-]+)", Path(name).read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{name} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}") from None
    if not named:
        raise LabError(f"{name} names no task of lm-eval's; give a file with a line such as 'task: mine'")
    return TaskManager(include_path=str(Path(name).parent), include_defaults=False), named[1]


def _samples(task: str, samples: Sequence[Mapping]) -> list[Outcome]:
    """Of a task's first filter: the headline metric, which must be 0 or 1 for each item."""
    first = samples[0].get("filter")
    metric = next((one for one in _RIGHT if one in samples[0]), None)
    found = []
    for one in samples:
        if one.get("filter") != first:
            continue
        if metric is None or one[metric] not in (0, 1):
            raise LabError(f"{task} has no right and wrong for each item; lm_eval.simple_evaluate takes "
                           "llmlab.evaluation.lm_eval_model(model, tokenizer), and gives its own figures")
        answers, chance, more = one["filtered_resps"], 0.0, {}
        if isinstance(answers[0], (tuple, list)) and len(answers) > 1:          # log-likelihoods of choices
            likely, chance = tuple(float(value) for value, _ in answers), 1 / len(answers)
            right = one["target"] if isinstance(one["target"], int) and 0 <= one["target"] < len(likely) else None
            more = {"logprobs": likely, "logprob": None if right is None else likely[right],
                    "plain": bool(one["acc"]) if "acc" in one else None}
        elif isinstance(answers[0], str):
            more = {"said": answers[0]}
        digest = hashlib.sha256(f"{one.get('doc_hash')} {one.get('prompt_hash')}".encode()).hexdigest()[:12]
        found.append(Outcome(task, str(one["doc_id"]), "lm_eval", digest, bool(one[metric]), chance, **more))
    return found
