"""What was measured once with the tasks that come along, of models that need not be here: data/evaluations.csv."""

import csv

from ..catalog import Table
from ..errors import UnknownName
from ..places import folder
from .outcomes import Score

RECORDED = "evaluations.csv"
_EVERY = "-every"       # of `items`: only a part of a task's was asked


def recorded(model: str | None = None) -> dict[str, dict[str, Score]]:
    """{"model quant": {task: Score}} of a model or of all; where a task was asked whole and in part, the whole.
    Raises UnknownName: nothing was recorded of that model."""
    rows = _rows(model)
    found: dict[str, dict[str, Score]] = {}
    for row in sorted(rows, key=lambda row: _EVERY not in row["items"]):         # whole tasks last: they stay
        name = f"{row['model']} {row['quant']}"
        found.setdefault(name, {})[row["task"]] = Score(
            int(row["right"]), int(row["n"]), *(float(row[key]) for key in ("share", "low", "high", "chance")),
            *(float(row[key]) if row[key] else None for key in ("acc", "logprob")))
    order = list(dict.fromkeys(f"{row['model']} {row['quant']}" for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return {name: {task: found[name][task] for task in tasks if task in found[name]} for name in order}


def recorded_table(model: str | None = None) -> Table:
    """A row a model and quant, a column a task: right of asked, and the range that chance leaves (95 %)."""
    scores = recorded(model)
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    return Table([{"model": name} | {task: _said(found.get(task)) for task in tasks} for name, found in scores.items()])


def _said(score: Score | None) -> str | None:
    return score and f"{score.right}/{score.n} ({100 * score.low:.0f} to {100 * score.high:.0f} %)"


def _rows(model: str | None) -> list[dict[str, str]]:
    with open(folder("data") / RECORDED, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = list(dict.fromkeys(row["model"] for row in rows))
    if model is not None and model not in known:
        raise UnknownName(f"nothing was recorded of {str(model)[:60]!r}; recorded: {', '.join(known)}")
    return [row for row in rows if model is None or row["model"] == model]
