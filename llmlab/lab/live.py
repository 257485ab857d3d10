"""LiveFigure: a plotly figure that is changed in place, and still tells the truth after the page is reloaded."""

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
        super().__init__(figure, **more)
        self._built = True
        self._config = {**self._config, "displayModeBar": False, "responsive": True}

    def present(self, figure: dict) -> None:
        """Change what differs from `figure` ({"data", "layout"}, the same traces in the same order), in one message."""
        with self.batch_update():
            for trace, new in zip(self.data, figure["data"], strict=True):
                trace.update(new)
            self.update_layout(figure["layout"])

    def get_state(self, key=None, drop_defaults=False):
        state = super().get_state(key, drop_defaults)
        if key is None and self.__dict__.get("_built"):      # before that there is no figure to hand out
            now = self.to_dict()
            state["_widget_data"], state["_widget_layout"] = now["data"], now["layout"]
        return state

    def __repr__(self) -> str:
        return f"<{self._words}>"
