"""LiveFigure: a plotly figure that is changed in place, and still tells the truth after the page is reloaded."""

from collections.abc import Iterator

import plotly.graph_objects as go


class LiveFigure(go.FigureWidget):
    """A FigureWidget shown from a figure (or its dict) and brought up to date with `present`.

    plotly hands its figure to the page once, as it was constructed, and from then on sends edits only. A page that is
    reloaded asks for the state and would be handed that first picture, so `get_state` hands out the present one. It
    leans on plotly's names for that state (`_widget_data`, `_widget_layout`, `_config`); the browser test watches them.
    """

    def __init__(self, figure=None, words: str = "chart", **more):
        """`words` stands for the chart where it cannot be drawn: in text, and in the `repr`."""
        self._words = words
        self._last = None
        super().__init__(figure, **more)
        self._built = True
        self._config = {**self._config, "displayModeBar": False, "responsive": True}

    def present(self, figure: dict) -> None:
        """Bring the chart to `figure`, {"data", "layout"} with the same traces in the same order, in one message.

        Only what differs from the figure presented before is touched: plotly takes 40 ms to compare it all.
        """
        before = self._last or {"data": [{}] * len(self.data), "layout": {}}
        with self.batch_update():
            for trace, old, new in zip(self.data, before["data"], figure["data"], strict=True):
                for path, value in _changes(old, new):
                    trace[path] = value
            for path, value in _changes(before["layout"], figure["layout"]):
                self.layout[path] = value
        self._last = figure

    def get_state(self, key=None, drop_defaults=False):
        state = super().get_state(key, drop_defaults)
        if key is None and self.__dict__.get("_built"):      # before that there is no figure to hand out
            now = self.to_dict()
            state["_widget_data"], state["_widget_layout"] = now["data"], now["layout"]
        return state

    def __repr__(self) -> str:
        return f"<{self._words}>"


def _changes(old: dict, new: dict, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of every leaf of `new` that is not so in `old`."""
    for key, value in new.items():
        if isinstance(value, dict):
            yield from _changes(old.get(key) or {}, value, f"{path}{key}.")
        elif key not in old or old[key] != value:
            yield f"{path}{key}", value
