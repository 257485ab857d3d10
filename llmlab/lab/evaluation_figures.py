"""A figure of evaluations: the share of items that each model has right, by task, its interval, and what guessing gives."""

from collections.abc import Mapping

import plotly.graph_objects as go

from ..evaluation.outcomes import Evaluation, Score
from .style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, layout

LOOKS = ((BLUE, "circle"), (ORANGE, "diamond"), (GREEN, "square"), (PINK, "triangle-up"), (SKY, "star"), (RED, "cross"))
APART = 0.16          # rows between two models of one task


def evaluation_figure(*evaluations: Evaluation, scores: Mapping[str, Mapping[str, Score]] | None = None) -> go.Figure:
    """Evaluations side by side; `scores`: more of them, {model: {task: Score}}. Bars are Wilson's 95 % interval of each alone:
    two of the same items say more together, `one.beside(other)`."""
    return go.Figure(evaluation_picture({**{one.model: one.scores for one in evaluations}, **(scores or {})}))


def evaluation_picture(scores: Mapping[str, Mapping[str, Score]]) -> dict:
    """{"data", "layout"} of evaluation_figure. Traces: one a model, then what guessing gives."""
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    chances = {task: next(found[task].chance for found in scores.values() if task in found) for task in tasks}
    guessed = [(chance, at) for at, chance in enumerate(chances.values()) if chance]
    x = [100 * chance if end is not None else None for chance, _ in guessed for end in (-1, 1, None)]
    y = [at + 0.4 * end if end is not None else None for _, at in guessed for end in (-1, 1, None)]
    return {
        "data": [*(_model(name, found, tasks, at - (len(scores) - 1) / 2, *LOOKS[at % len(LOOKS)])
                   for at, (name, found) in enumerate(scores.items())),
                 {"type": "scatter", "mode": "lines", "name": "guessing", "x": x, "y": y, "hoverinfo": "skip",
                  "showlegend": bool(x), "line": {"color": GREY, "width": 1.5, "dash": "dot"}}],
        "layout": layout(height=130 + (30 + 14 * len(scores)) * max(len(tasks), 1), margin={"l": 12, "r": 16, "t": 56, "b": 44},
                         xaxis={"range": [-2, 102], "nticks": 6, "zeroline": False,
                                "title": {"text": "% of the items right, measured", "font": {"size": 13}, "standoff": 4}},
                         yaxis={"automargin": True, "tickvals": list(range(len(tasks))), "ticktext": tasks, "showgrid": False,
                                "zeroline": False, "range": [len(tasks) - 0.4, -0.6]}),
    }


def _model(name: str, found: Mapping[str, Score], tasks: list[str], place: float, colour: str, symbol: str) -> dict:
    rows = [(tasks.index(task) + APART * place, task, score) for task, score in found.items()]
    return {"type": "scatter", "mode": "markers", "name": name, "y": [at for at, *_ in rows],
            "x": [100 * score.share for *_, score in rows],
            "error_x": {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 4,
                        "array": [100 * (score.high - score.share) for *_, score in rows],
                        "arrayminus": [100 * (score.share - score.low) for *_, score in rows]},
            "marker": {"color": colour, "symbol": symbol, "size": 9},
            "customdata": [f"{name}<br>{task}: {score}" for _, task, score in rows],
            "hovertemplate": "%{customdata}<extra></extra>"}
