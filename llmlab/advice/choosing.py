"""llmlab.best: every model in every quant, cache and placement that keeps to the limits, ranked by the score to expect."""

import gc
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from .. import catalog
from ..catalog import Entry
from ..errors import LabError
from ..memory import check_settings, weights
from ..shapes import model_spec
from . import limits
from .answer import Advice, Asked, Choice, Near, Unknown, ranked
from .configurations import Model, decode, models_on, usual_place
from .losses import expected
from .published import Setting, setting_of, settings_of

REFUSED = ("license", "languages", "context", "memory", "speed", "quality")
"""Limits in the order they are asked: a model counts once, under the last one that some of its configurations came to."""


def best(gpu_or_machine, task: str = "coding", context: int = 8192, min_speed: float = 5, quality_floor: float | None = None,
         languages=None, license=None, *, host=None, setting: str | None = None, models: Iterable | None = None) -> Advice:
    """The best model for a machine and a task: `llmlab.best`.

    >>> llmlab.best("rtx-3060-12gb", task="coding", min_speed=15).answer

    gpu_or_machine, context: as `llmlab.fit` takes them. host: RAM, as there; None: this computer's, or 32 GiB beside a card
    that is only named (one that shares its RAM has as much as it is sold with). task: what published scores are looked at:
    coding, tools, reasoning, maths, knowledge, instructions, chat. min_speed: tokens per second while it answers, the usual
    guess with the context full. quality_floor: the least score to expect, in the setting's own points. languages: "ru" or
    ["English", "Russian"]: that its maker names, or counts among twenty or more, which is then said. license: how it begins,
    or "open". setting: words of the scores to rank by, where not those of most models ("evalplus"). models: only these.

    Scores are compared within one setting; a model it does not score is listed under `unknown`, never ranked. Raises LabError
    in one line for what cannot be; a question that nothing answers is no error: `.answer` says the least that would do.
    """
    entries = _entries(models)
    check_settings(context)
    asked = Asked(task, setting_of(task, setting), context, _number("min_speed", min_speed, "tokens per second, like 5") or 0.0,
                  _number("quality_floor", quality_floor, "the least score, like 70"), limits.languages(languages),
                  limits.licences(license))
    choices: list[Choice] = []
    unknown: list[Unknown] = []
    refused = Counter(dict.fromkeys(REFUSED, 0))
    near: list[Near] = []
    where = usual_place(gpu_or_machine, host)
    model_of, too_large = models_on(where, context), []
    with _no_garbage():
        for entry in entries:
            limit = _plain_limit(entry, asked)
            if not limit:
                model = model_of(entry)
                found, limit, nearest = _one(entry, model, asked)
                near += nearest
                too_large += [model] * (limit == "memory")
                if found:
                    (unknown if isinstance(found[0], Unknown) else choices).extend(found)
                    continue
            refused[limit] += 1
    if not choices:
        scored = asked.setting.scores.keys()
        for which in (lambda name: name in scored, lambda name: name not in scored):
            if not any(which(one.entry.id) for one in near):
                near += _smallest(model for model in too_large if which(model.entry.id))
    return Advice(asked, where.cards, where.host, ranked(choices), tuple(sorted(unknown, key=lambda one: one.order)),
                  dict(refused), tuple(near), len(entries))


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Hundreds of graphs, none of them garbage: looking for some would take a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _entries(models: Iterable | None) -> list[Entry]:
    if models is None:
        return list(catalog.entries().values())
    if isinstance(models, str):
        models = [models]
    chosen = [one if isinstance(one, Entry) else catalog.entry(one) for one in models] if isinstance(models, Iterable) else []
    if not chosen:
        raise LabError(f"models is {models!r:.60}; give names of the catalogue, which llmlab.models() lists")
    return list({entry.id: entry for entry in chosen}.values())


def _number(name: str, given, like: str) -> float | None:
    if given is None:
        return None
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(given, bool) or not 0 <= number < math.inf:
        raise LabError(f"{name} is {str(given)[:40]!r}; give {like}, not less than 0")
    return number


def _plain_limit(entry: Entry, asked: Asked) -> str | None:
    """The limit that the model itself does not keep to, whatever the quant."""
    if asked.license and entry.license not in asked.license:
        return "license"
    if asked.languages and limits.speaks(entry, asked.languages) is False:
        return "languages"
    return "context" if asked.context > (model_spec(entry.id).context_train or asked.context) else None


def _one(entry: Entry, model: Model, asked: Asked) -> tuple[list, str, list[Near]]:
    """What of a model keeps to the limits, or by which it fails, and what came nearest to keeping to that."""
    if entry.id not in asked.setting.scores:
        return _unscored(entry, model, asked)
    band = asked.setting.scores[entry.id]
    found, slow, weak = [], [], []
    whole = ((recipe, report) for recipe in model.recipes if (report := model.whole(recipe)))
    for recipe, report in chain(whole, model.partly(asked.min_speed)):
        quality, lost = expected(entry, asked.setting.benchmark, band, recipe.nats)
        if decode(report) < asked.min_speed:
            slow.append(Near("speed", entry, report, quality))
        elif asked.quality_floor is not None and quality[1] < asked.quality_floor:
            weak.append(Near("quality", entry, report, quality))
        else:
            found.append(Choice(entry, report, asked.setting, band, quality, lost, limits.unnamed(entry, asked.languages)))
    if weak and not found:
        return [], "quality", [max(weak, key=lambda one: one.quality[1])]
    return (found, "", []) if found else _failed(model, slow, asked)


def _unscored(entry: Entry, model: Model, asked: Asked) -> tuple[list, str, list[Near]]:
    """The same of a model that the setting does not score: in one recipe that keeps to the limits, all on the cards where one
    does so, then the most faithful."""
    slow = []
    whole = (report for recipe in model.recipes if (report := model.whole(recipe)))
    for report in chain(whole, (report for _, report in model.partly(asked.min_speed))):
        if decode(report) >= asked.min_speed:
            said = limits.unnamed(entry, asked.languages)
            return [Unknown(entry, report, asked.setting, _elsewhere(entry, asked), said)], "", []
        slow.append(Near("speed", entry, report, None))
    return _failed(model, slow, asked)


def _failed(model: Model, slow: list[Near], asked: Asked) -> tuple[list, str, list[Near]]:
    """Too slow, where it fits anywhere or only RAM could not be read quickly enough; else too large."""
    if slow:
        return [], "speed", [max(slow, key=lambda one: decode(one.report))]
    unread = (r for r in model.in_part if model.hopeless(r, asked.min_speed) and not model.hopeless(r, 0.0))
    return [], "speed" if next(unread, None) else "memory", []


def _smallest(models: Iterable[Model]) -> list[Near]:
    """Of models that fit nowhere the one that takes least, in what it takes least in."""
    sizes = [(weights(m.spec, r.quant, r.importance).padded, m, r) for m in models for r in m.recipes[-1:]]
    if not sizes:
        return []
    _, model, recipe = min(sizes, key=lambda one: one[0])
    return [Near("memory", model.entry, model.report(recipe), None)]


def _elsewhere(entry: Entry, asked: Asked) -> tuple[Setting, ...]:
    """The settings for this task that do score a model."""
    return tuple(setting for setting in settings_of(asked.task) if entry.id in setting.scores)


__all__ = ["Advice", "Choice", "Unknown", "best"]
